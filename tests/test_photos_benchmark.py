"""The benchmark of photographs: its models have their sizes, and a training is recorded."""

import json

import numpy as np
import pytest
from checks import full, once
from test_data_sets import write_cifar10

import keras_jamba
from benchmarks.images import photo_models, photos

# Independent of the backend.
pytestmark = once
IMAGE = (32, 32, 3)


@full()
def test_models_and_peers_have_about_as_many_parameters():
    counts = {name: photo_models.candidate(name, IMAGE, 10).count_params() for name in photo_models.CANDIDATES}
    counts |= {name: make(IMAGE, 10).count_params() for name, make in photo_models.PEERS.items()}
    assert {name: count for name, count in counts.items() if not 0.73e6 < count < 0.87e6} == {}


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
def test_a_training_is_recorded(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    options = json.dumps(dict(d_model=8, num_layers=1, mamba_ratio=None, stem="patchify"))
    given = ["causal", "--data", tmp_path, "--options", options, "--epochs", 2, "--batch-size", 2, "--workers", 1]
    monkeypatch.setattr(
        "sys.argv",
        ["photos.py", *map(str, given), "--output", str(tmp_path / "run"), "--preset", str(tmp_path / "preset")],
    )
    photos.main()
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["images"] == 3 and len(record["history"]["loss"]) == 2
    assert set(record["test"]) == {"accuracy", "calibration error"}
    preset = keras_jamba.DHCJamba.from_preset(tmp_path / "preset")
    assert list(preset.class_names) == ["cat", "dog"]
    assert str(tmp_path) not in json.dumps({**record, "arguments": {**record["arguments"], "output": "", "preset": ""}})
