"""README and docs: their code runs, their links lead somewhere, and README keeps its rules."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import page_code
import pytest
from checks import full, once
from sklearn.datasets import load_sample_images

import keras_jamba
from benchmarks.images.photo_trainings import training_of

ROOT = page_code.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
BACKENDS = ("jax", "torch", "torch", "tensorflow", "torch", "torch")
# ONNX is written on PyTorch.
ON_TORCH = ("exporting.md",)
# Sphinx makes these pages from docstrings.
GENERATED = set(re.findall(r"^docs/reference/(.+)$", (ROOT / ".gitignore").read_text(encoding="utf-8"), re.MULTILINE))
PAGES = [page for page in page_code.PAGES if not (page.parent.name == "reference" and page.name in GENERATED)]
WITH_CODE = [page for page in PAGES if page_code.blocks(page.read_text(encoding="utf-8"))]
# Pages for contributors and tables of figures follow other rules.
FOR_USERS = [page for page in PAGES if not {"development"} & set(page.parts)]


def name_of(page):
    return str(page.relative_to(ROOT / "docs"))


def python(program, folder):
    (folder / "readme.py").write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, "readme.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@full()
def test_the_readmes_code_runs(tmp_path):
    blocks = page_code.blocks(README)
    # Two layers, and four steps per epoch instead of 29.
    for long, short in (("[:898]", "[:128]"), ("downsample=2)", "downsample=2, num_layers=2, mamba_ratio=1)")):
        assert long in blocks[0]
        blocks = [block.replace(long, short) for block in blocks]
    shutil.copy(Path(load_sample_images().filenames[0]), tmp_path / "photo.jpg")
    python("\n".join(blocks), tmp_path)


@full()
@once
def test_the_quick_start_evaluates_its_trained_model(tmp_path):
    """Trains one epoch on 898 images: batch norm must start from the first batch, or `evaluate` stays at chance."""
    block = page_code.blocks(README)[0].replace("model.fit(", "history = model.fit(")
    check = """
accuracy = model.evaluate(x[:898], y[:898], return_dict=True)["accuracy"]
assert accuracy > history.history["accuracy"][-1] - 0.1, (accuracy, history.history)
"""
    python(block + check, tmp_path)


def tables(text):
    """Returns the number of rows below the header of each table."""
    found = re.findall(r"^\|.*\n\|[ :|-]+\|\n((?:\|.*\n)*)", text, re.MULTILINE)
    return [rows.count("\n") for rows in found]


@once
def test_the_readme_is_short_and_begins_with_code():
    assert README.count("\n") <= 150
    assert README[: README.index("```python")].count("\n") < 25
    assert "pip install" in README[: README.index("```python")]
    assert tables(README) and max(tables(README)) <= 8


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@once
def test_the_readmes_figures_are_those_of_the_results():
    scan = next(row for row in result("gpu_scan_torch")["timings"] if row["dtype"] == "bfloat16")
    assert scan["(b, e, t)"] == [8, 2048, 2048]
    forward, gradient = scan["forward"]["ratio"], scan["forward+backward"]["ratio"]
    assert f"is {forward:.2f} times as fast as mamba-ssm's CUDA kernel, {gradient:.2f} times with gradient" in README
    steps = {name: row["milliseconds a step"] for name, row in result("gpu_lm_jax")["training"].items()}
    peer, ours = steps.pop("Hugging Face"), min(steps.values())
    assert f"trains {peer / ours:.1f} times as fast as Hugging Face's" in README
    rates = result("decode_jax")["tokens a second"]
    speedup = rates["keras-jamba, batch 1"] / rates["Hugging Face, batch 1"]
    assert f"decoding on JAX is {speedup:.1f} times as fast as Hugging Face's" in README


@once
def test_a_longer_table_and_sentence_are_found():
    assert tables("| a |\n| --- |\n" + "| 1 |\n" * 9) == [9]
    sentence = " ".join(["Word"] * 26) + "."
    text = f"A short one. {sentence}\n\n```text\n{sentence}\n```\n\n| {sentence} |"
    assert page_code.long_sentences(text) == [sentence]


@once
@pytest.mark.parametrize("page", [ROOT / "README.md", *FOR_USERS], ids=lambda page: page.stem)
def test_sentences_have_at_most_25_words(page):
    assert page_code.long_sentences(page.read_text(encoding="utf-8")) == []


@once
@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", text)]
    missing = [t for t in targets if not (page.parent / t).exists() and Path(t).name not in GENERATED]
    assert missing == []


@once
def test_every_page_stands_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    assert {name_of(page) for page in PAGES if page.resolve() not in listed} == {"index.md"}


# Each page runs on one backend, most of them on PyTorch, which compiles nothing.
# `python tests/helpers/page_code.py PAGE` runs it on any other.
CHOSEN = ["torch" if p.name in ON_TORCH else BACKENDS[i % len(BACKENDS)] for i, p in enumerate(WITH_CODE)]
HERE = [p for p, backend in zip(WITH_CODE, CHOSEN, strict=True) if backend == keras.backend.backend()]


@full()
@pytest.mark.parametrize("page", HERE, ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path):
    done = page_code.run(page, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


MILLIONS = {"small": 0.8, "medium": 2.0, "large": 8.5}


@once
@pytest.mark.parametrize("preset", keras_jamba.presets.list_presets())
def test_presets_have_the_size_that_the_readme_states(preset):
    metadata, folder = keras_jamba.presets.read(preset)
    model = keras_jamba.DHCJamba.from_preset(preset, load_weights=False)
    size = sum(int(np.prod(v.shape)) for v in model.trainable_weights)
    assert re.search(rf"^\| `{preset}` \|.* {size:,} \|", README, re.MULTILINE)
    assert metadata["weights"] is not None
    if preset in MILLIONS:
        assert abs(size / (1e6 * MILLIONS[preset]) - 1) <= 0.05
    recipe = (folder / "README.md").read_text(encoding="utf-8")
    assert "python " in recipe and "--seed" in recipe


@once
@pytest.mark.parametrize("preset", ["small", "medium", "large", "fashion"])
def test_presets_of_photographs_have_the_accuracy_and_checksum_that_their_pages_state(preset):
    metadata, folder = keras_jamba.presets.read(preset)
    (record,) = (
        record
        for record in result("photos")["trainings"]
        if record["arguments"]["model"] == preset and record["arguments"]["seed"] == 0 and "test" in record
        if record["arguments"]["set"] == training_of(preset)["set"]
    )
    about = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{record['test']['accuracy']} % of the 10,000 test images" in about
    assert f"`{metadata['weights']['sha256']}`" in about
    assert ("JPEG 75" in about) == (preset != "fashion")
    assert f"{record['test']['accuracy']:.1f} %" in re.search(rf"^\| `{preset}` \|.*", README, re.MULTILINE)[0]
    settings = training_of(preset)
    assert record["recipe"] == {name: settings[name] for name in record["recipe"]}


@once
@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_are_committed_without_outputs(file):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    text = page_code.text(file)
    assert "After this notebook you can" in text and page_code.long_sentences(text) == []
