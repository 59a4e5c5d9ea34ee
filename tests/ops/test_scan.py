"""The selective scan: every implementation against NumPy, and two against recorded outputs of mamba_ssm."""

from pathlib import Path

import keras
import numpy as np
import oracles
import pytest
from checks import close, gradients, jitted
from keras import ops
from keras.src.backend import compute_output_spec

from keras_jamba.ops import implementations, selective_scan

GOLDEN = Path(__file__).parent.parent / "golden" / "selective_scan"
FAST = [name for name in implementations() if name != "reference"]
NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]


def draw(batch, length, channels, state=16, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) - 2,
        "A": -np.exp(normal(channels, state)),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": 0.1 * normal(channels),
        "initial_state": normal(batch, channels, state),
    }


def outputs_and_gradients(inputs, implementation):
    """Returns the outputs, the gradients of their weighted sum for all nine inputs, and the weights of the sum."""
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(inputs[k].shape).astype("float32") for k in ("u", "initial_state")]
    scan = lambda *tensors: selective_scan(  # noqa: E731
        **dict(zip(NAMES, tensors, strict=True)),
        delta_softplus=True,
        return_last_state=True,
        implementation=implementation,
    )

    def loss(*tensors):
        return sum(ops.sum(x * ops.convert_to_tensor(w)) for x, w in zip(scan(*tensors), weights, strict=True))

    tensors = [inputs[name] for name in NAMES]
    return jitted(scan)(*tensors), gradients(loss, tensors), weights


def assert_equals_the_oracle(inputs, implementation):
    outputs, actual, weights = outputs_and_gradients(inputs, implementation)
    expected = oracles.selective_scan(**inputs, delta_softplus=True)
    for a, e in zip(outputs, expected, strict=True):
        close(a, e, absolute=2e-5)
    expected = oracles.selective_scan_gradients(*weights, *(inputs[name] for name in NAMES))
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        scale = max(1, np.abs(e).max())
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_reference_equals_the_float64_recurrence(length):
    assert_equals_the_oracle(draw(2, length, 6), "reference")


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("implementation", FAST)
def test_every_implementation_equals_the_recurrence_and_its_gradients(implementation, length):
    assert_equals_the_oracle(draw(2, length, 6), implementation)


@pytest.mark.parametrize("channels", [6, 5])
def test_a_batch_of_one_equals_the_recurrence(channels):
    assert_equals_the_oracle(draw(1, 65, channels), "portable")


def golden(length):
    """Returns the recorded inputs in the layouts (b, t, e) and (b, t, n), and the unchanged recording."""
    recorded = dict(np.load(GOLDEN / f"L{length}.npz"))
    swap = lambda x: np.swapaxes(x, 1, 2).astype("float32")  # noqa: E731
    inputs = {k: swap(recorded[k]) for k in ("u", "delta", "B", "C", "z")}
    return inputs | {k: recorded[k].astype("float32") for k in ("A", "D", "delta_bias")}, recorded


@pytest.mark.parametrize("length", ["1", "7", "64", "257_odd"])
@pytest.mark.parametrize("implementation", ["portable", "associative"])
def test_outputs_and_gradients_match_the_recorded_ones_of_mamba_ssm(implementation, length):
    inputs, recorded = golden(length)
    names = list(inputs)
    scan = lambda *tensors, **more: selective_scan(  # noqa: E731
        **dict(zip(names, tensors, strict=True)), delta_softplus=True, implementation=implementation, **more
    )
    y, last = jitted(lambda *tensors: scan(*tensors, return_last_state=True))(*inputs.values())
    close(y, np.swapaxes(recorded["out"], 1, 2), absolute=2e-5)
    close(last, recorded["last_state"], absolute=2e-5)
    dy = ops.convert_to_tensor(np.swapaxes(recorded["dy"], 1, 2).astype("float32"))
    grads = gradients(lambda *tensors: ops.sum(scan(*tensors) * dy), list(inputs.values()))
    for name, actual in zip(names, grads, strict=True):
        expected = recorded[f"grad_{name}"]
        if expected.ndim == 3:
            expected = np.swapaxes(expected, 1, 2)
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6 * scale * 10, err_msg=name)


@pytest.mark.parametrize("implementation", implementations())
def test_static_shapes_stay_static_and_the_dtype_is_that_of_u(implementation):
    inputs = {k: v for k, v in draw(2, 7, 6).items() if k != "initial_state"}
    symbols = [keras.KerasTensor(x.shape, "bfloat16" if k == "u" else "float32") for k, x in inputs.items()]
    scan = lambda *tensors: selective_scan(  # noqa: E731
        **dict(zip(inputs, tensors, strict=True)), return_last_state=True, implementation=implementation
    )
    y, last = compute_output_spec(scan, *symbols)
    assert (y.shape, y.dtype) == ((2, 7, 6), "bfloat16")
    assert (last.shape, last.dtype) == ((2, 6, 16), "float32")
