"""The benchmark of photographs: its models have their sizes, and a training is recorded."""

import hashlib
import json

import numpy as np
import pytest
from checks import full, once
from test_data_sets import write_cifar10

import keras_jamba
from benchmarks.images import photo_models, photo_report, photo_tables, photos

# Independent of the backend.
pytestmark = once
IMAGE = (32, 32, 3)


@full()
def test_models_and_peers_have_about_as_many_parameters():
    names = ("small", *photo_models.CANDIDATES)
    counts = {name: photo_models.candidate(name, IMAGE, 10).count_params() for name in names}
    counts |= {name: make(IMAGE, 10).count_params() for name, make in photo_models.PEERS.items()}
    assert {name: count for name, count in counts.items() if not 0.76e6 < count < 0.865e6} == {}


@full()
def test_presets_have_their_sizes():
    sizes = {"small": (0.76e6, 0.84e6), "medium": (1.9e6, 2.1e6), "large": (8.07e6, 8.93e6), "fashion": (0, 0.3e6)}
    for name, (low, high) in sizes.items():
        shape = (28, 28, 1) if name == "fashion" else IMAGE
        assert low < photo_models.candidate(name, shape, 10).count_params() <= high, name


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(4) / 2, 500), rng.integers(0, 4, 500)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    expected = 0.0
    for i in range(15):
        inside = [j for j in range(500) if i / 15 <= confidence[j] < (i + 1) / 15 or i == 14 and confidence[j] == 1]
        if inside:
            expected += len(inside) / 500 * abs(np.mean(right[inside]) - np.mean(confidence[inside]))
    assert photos.calibration_error(probabilities, labels) == pytest.approx(100 * expected)


def test_predictions_that_are_not_finite_are_refused():
    class Diverged:
        def predict(self, images, **_):
            return np.full((len(images), 2), np.nan)

    with pytest.raises(AssertionError, match="must be finite"):
        photos.measured(Diverged(), np.zeros((3, 2)), np.zeros(3, int))


@full()
def test_a_training_is_recorded_and_reported(tmp_path, monkeypatch, capsys):
    write_cifar10(tmp_path)
    options = json.dumps(dict(d_model=8, num_layers=1, mamba_ratio=None, stem="patchify", stem_blocks=1))
    given = ["causal", "--data", tmp_path, "--options", options, "--epochs", 2, "--batch-size", 2, "--workers", 1]
    given += ["--policy", "float32", "--output", tmp_path / "runs" / "first", "--preset", tmp_path / "preset"]
    monkeypatch.setattr("sys.argv", ["photos.py", *map(str, given)])
    photos.main()
    record = json.loads((tmp_path / "runs" / "first" / "result.json").read_text())
    assert record["images"] == 3 and len(record["history"]["loss"]) == 2
    assert set(record["test"]) == {"accuracy", "calibration error"}
    assert len(record["corrupted"]) == 11 and all(0 <= value <= 100 for value in record["corrupted"].values())
    preset = keras_jamba.DHCJamba.from_preset(tmp_path / "preset")
    assert list(preset.class_names) == ["cat", "dog"] and preset.pixel_range == (0, 1)
    readme = (tmp_path / "preset" / "README.md").read_text()
    assert "JPEG 75" in readme and f"{record['test']['accuracy']} %" in readme and "Seed 0" in readme
    checksum = hashlib.sha256((tmp_path / "preset" / "model.weights.h5").read_bytes()).hexdigest()
    assert checksum in readme

    (report,) = photo_tables.read(tmp_path / "runs")
    assert str(tmp_path) not in json.dumps(report)
    groups = photo_tables.grouped([report, report], "test", "cifar10")
    assert next(iter(groups)).startswith("causal, batch size 2, policy float32, d_model 8, ")
    (row,) = photo_tables.accuracies(groups, "test")
    assert row["seeds"] == 2 and float(row["accuracy, %"]) == record["test"]["accuracy"]
    assert [row["images"] for row in photo_tables.corruptions(groups)] == ["clean", *record["corrupted"]]
    photo_report.draw_curves({"small": [report]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_preset_folder_that_exists_is_refused_before_the_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        photos.arguments(["small", "--preset", str(tmp_path)])
    assert "must be a new folder. Received" in capsys.readouterr().err


def test_a_report_of_a_folder_without_trainings_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold NAME/result.json"):
        photo_tables.read(tmp_path)
