"""The notebooks run, and their results are those that their text states. `make docs` renders them."""

import tempfile

import numpy as np
import page_code
import pytest
from checks import full, once

import keras_jamba

FOLDER = page_code.ROOT / "docs" / "notebooks"


class Run:
    """The results of a notebook: `name` of one of its variables, `values` of cells, `printed` and `pictures`."""

    def __init__(self, variables, values, printed, pictures):
        self.variables, self.values, self.printed, self.pictures = variables, values, printed, pictures

    def __getitem__(self, name):
        return self.variables[name]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a notebook. Figures that it shows become PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pictures = []

    def show():
        for number in plt.get_fignums():
            pictures.append(tmp_path / f"{len(pictures)}.png")
            plt.figure(number).savefig(pictures[-1], dpi=80, bbox_inches="tight")
        plt.close("all")

    def call(name):
        variables, values = page_code.execute(FOLDER / f"{name}.ipynb")
        return Run(variables, values, capsys.readouterr().out, pictures)

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield call
    plt.close("all")


@full()
@once
def test_image_folder_reads_trains_and_predicts_class_names(run):
    found = run("image_folder")
    train, test = found["train"], found["test"]
    assert train.class_names == tuple(sorted(found["names"])) and train.class_names[0] == "eight"
    assert train.num_examples + test.num_examples == 1797 and 0.79 < train.num_examples / 1797 < 0.81
    assert [path.name for path in (*train.unreadable, *test.unreadable)] == ["broken.png"]
    assert "left out: ['broken.png']" in found.printed
    assert found["history"]["val_accuracy"][-1] > 0.95
    assert f"{len(found['wrong'])} of {test.num_examples} wrong" in found.printed and len(found["wrong"]) < 18
    assert len(found.pictures) == 2
    # The model in a preset and the one in a file take bytes, and return the same names.
    pixels = np.round(found["images"] * 255).astype("uint8")
    expected = found["model"].predict(found["images"], verbose=0)
    for each in (found["server"], found["loaded"]):
        assert each.pixel_range == (0, 255) and tuple(each.class_names) == train.class_names
        np.testing.assert_allclose(each.predict(pixels, verbose=0), expected, atol=1e-4)
    assert found.printed.count("[('seven', 0.9") == 2


@full()
@once
def test_adapters_learn_load_merge_and_quantize(run):
    found = run("adapters")
    assert "8,474 of 138,135 weights are trained" in found.printed and found["trained"]["trained"] == 8474
    (upright, lying), (_, learned) = found["before"], found["after"]
    assert upright > 0.95 and lying < 0.25 and learned > 0.85
    for name, atol in (("loaded", 1e-5), ("merged", 1e-3)):
        np.testing.assert_allclose(found[name], found["expected"], atol=atol)
    assert (found["folder"] / "lying.safetensors").stat().st_size < 4 * 8474 + 4096
    sizes = found["sizes"]
    assert sizes["int4"] < sizes["int8"] < 0.6 * sizes["float32"]
    assert all(value > 0.95 for value in found["right_answers"].values())
    assert found["reloaded"].get_config()["quantization"] == "int8"
    of_quantized, of_reloaded = (m.predict(found["x"], verbose=0) for m in (found["copies"]["int8"], found["reloaded"]))
    np.testing.assert_array_equal(of_reloaded, of_quantized)
    assert len(found.pictures) == 3


@full()
@once
def test_video_stream_steps_through_a_clip(run):
    found = run("video_stream")
    assert found["probabilities"].shape == (12, 6)
    np.testing.assert_allclose(found["probabilities"].sum(-1), 1, atol=1e-5)
    assert "true: 1, 2, 0 predicted: 1, 2, 0" in found.printed
    np.testing.assert_allclose(found["streamed"], found["complete"], atol=1e-4)
    assert len(found.pictures) == 2


@full()
@once
def test_language_model_learns_samples_and_streams(run):
    found = run("language_model")
    bits = found["losses"].bits
    assert len(bits) == found["epochs"] * len(found["rows"])
    assert 7 < bits[0] < 9 and np.mean(bits[-20:]) < 2.5
    # The losses of the steps have the mean that Keras reports for the epoch.
    nats = found["model"].history.history["loss"][-1]
    np.testing.assert_allclose(np.mean(bits[-len(found["rows"]) :]), nats / np.log(2), rtol=1e-4)
    assert found.printed.count("temperature ") == 3
    samplers = [keras_jamba.Sampler(temperature=0.7, top_p=0.95, seed=0) for _ in range(2)]
    first, second = (found["model"].generate("Return the ", max_new_tokens=8, sampler=each) for each in samplers)
    assert first == second
    assert len(found.pictures) == 1


@full()
@once
def test_visualize_ends_its_cells_with_figures(run):
    from matplotlib.figure import Figure

    found = run("visualize")
    assert [type(value) for value in found.values] == [type(None), *[Figure] * 5]
    # Jupyter formats such figures as pictures only after this line.
    cell, *_ = page_code.cells(FOLDER / "visualize.ipynb", "code")
    assert cell.startswith("%matplotlib inline\n")


@once
def test_every_notebook_runs_in_a_test_of_its_name():
    notebooks = {file.stem for file in FOLDER.glob("*.ipynb")}
    tests = [name.removeprefix("test_") for name in globals() if name.startswith("test_")]
    assert notebooks and [name for name in notebooks if not any(test.startswith(f"{name}_") for test in tests)] == []
    assert notebooks <= set((FOLDER / "index.md").read_text(encoding="utf-8").split())
