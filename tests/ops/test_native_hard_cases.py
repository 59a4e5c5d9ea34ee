"""The C library with unusual memory layouts, NaN in another document, and higher derivatives."""

import keras
import numpy as np
import pytest
from checks import close, gradients, numpy
from keras import ops
from test_scan import NAMES, draw, outputs_and_gradients

from keras_jamba import _native
from keras_jamba.ops import causal_depthwise_conv, selective_scan

BACKEND = keras.backend.backend()


def scan(inputs, implementation, **more):
    return selective_scan(**inputs, delta_softplus=True, implementation=implementation, **more)


def test_one_token_of_a_time_major_tensor_is_read_in_place():
    inputs = draw(3, 1, 6, 4)
    transposed = {k: x.swapaxes(0, 1).copy() if x.ndim == 3 and x.shape[1] == 1 else x for k, x in inputs.items()}

    def loss(implementation):
        def function(*tensors):
            given = {}
            for (name, x), tensor in zip(inputs.items(), tensors, strict=True):
                given[name] = ops.transpose(tensor, (1, 0, 2)) if x.ndim == 3 and x.shape[1] == 1 else tensor
            y, last = scan(given, implementation, return_last_state=True)
            return ops.sum(ops.transpose(y, (1, 0, 2)) ** 2) + ops.sum(last**2)

        return function

    actual, expected = (gradients(loss(name), list(transposed.values())) for name in ("native", "reference"))
    for name, a, e in zip(inputs, actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_state_and_its_gradient_may_be_slices_of_wider_tensors():
    inputs = draw(2, 5, 6, 4)
    wide = np.concatenate([inputs.pop("initial_state")] * 2, axis=-1) * np.linspace(1, 2, 8, dtype="float32")

    def loss(implementation):
        def function(wide):
            y, last = scan(inputs | {"initial_state": wide[..., 3:7]}, implementation, return_last_state=True)
            return ops.sum(y**2) + ops.sum(ops.concatenate([last, last * 2], axis=-1) ** 2)

        return function

    (actual,), (expected,) = (gradients(loss(name), [wide]) for name in ("native", "reference"))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_document():
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype("float32") for shape in ((2, 9, 6), (4, 6)))
    ids = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2, "int32")
    holed = x.copy()
    holed[:, 3] = np.nan
    run = lambda x: numpy(causal_depthwise_conv(x, kernel, segment_ids=ids, implementation="native"))[:, 4:]  # noqa: E731
    np.testing.assert_array_equal(run(holed), run(x))
    weight = lambda x: ops.sum(causal_depthwise_conv(x, kernel, segment_ids=ids, implementation="native")[:, 4:])  # noqa: E731
    for a, e in zip(gradients(weight, [holed]), gradients(weight, [x]), strict=True):
        np.testing.assert_array_equal(a[:, 4:], e[:, 4:])


@pytest.mark.skipif(BACKEND != "torch", reason="JAX and TensorFlow fix the set when they trace; runs on torch")
def test_another_instruction_set_may_run_the_backward_pass(monkeypatch):
    import torch

    inputs = draw(2, 40, 21, 5)
    _, expected, weights = outputs_and_gradients(inputs, "native")
    sets = _native.instruction_sets()
    leaves = {name: torch.tensor(inputs[name], requires_grad=True) for name in NAMES}
    monkeypatch.setenv("KERAS_JAMBA_ISA", sets[-1])
    outputs = scan(leaves, "native", return_last_state=True)
    monkeypatch.setenv("KERAS_JAMBA_ISA", sets[0])
    sum((y * torch.tensor(w)).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    for name, e in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(leaves[name].grad, e, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("implementation", ["native", "portable"])
@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives_are_correct_or_refused(implementation, gated):
    """Also where another path leads to the same input: the gate is u itself."""
    inputs = draw(2, 7, 6, 4)

    def squared_gradient(implementation):
        def loss(u):
            gate = {"z": u} if gated else {}
            return ops.sum(scan(inputs | {"u": u} | gate, implementation) ** 2)

        if BACKEND == "jax":
            import jax

            return lambda u: ops.sum(jax.grad(loss)(u) ** 2)
        if BACKEND == "torch":
            import torch

            return lambda u: ops.sum(torch.autograd.grad(loss(u), u, create_graph=True)[0] ** 2)
        import tensorflow as tf

        def squared(u):
            with tf.GradientTape() as tape:
                tape.watch(u)
                y = loss(u)
            return tf.reduce_sum(tape.gradient(y, u) ** 2)

        return squared

    (expected,) = gradients(squared_gradient("reference"), [inputs["u"]])
    if BACKEND == "jax":
        close(gradients(squared_gradient(implementation), [inputs["u"]])[0], expected, absolute=1e-3)
    else:
        # TensorFlow itself refuses the gradient of a compiled loop's gradient.
        own = BACKEND == "torch" or implementation == "native"
        message = "no second derivatives.*Compute it with implementation='reference'" if own else "TensorList"
        with pytest.raises(Exception, match=message):
            gradients(squared_gradient(implementation), [inputs["u"]])


@pytest.mark.skipif(BACKEND != "torch", reason="JAX itself refuses forward mode; about torch")
def test_forward_mode_is_refused_and_the_reference_supports_it():
    import torch

    inputs = draw(1, 5, 3, 2)
    u = torch.tensor(inputs["u"])
    jvp = lambda name: torch.func.jvp(lambda u: scan(inputs | {"u": u}, name), (u,), (torch.ones_like(u),))[1]  # noqa: E731
    assert jvp("reference").abs().sum() > 0
    with pytest.raises(ValueError, match="it has no forward-mode derivatives"):
        jvp("native")


def test_a_library_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(_native, "CHUNK", 8)
    assert _native._load() == "its C library is of another version: install the package again"


def test_empty_kernels_and_states_are_refused():
    x, A = np.ones((1, 3, 2), "float32"), -np.ones((2, 0), "float32")
    with pytest.raises(ValueError, match=r"kernel must cover at least one token. Received: kernel.shape=\(0, 2\)"):
        causal_depthwise_conv(x, np.ones((0, 2), "float32"))
    with pytest.raises(ValueError, match=r"at least one state per channel. Received: A.shape=\(2, 0\)"):
        selective_scan(x, x, A, x[..., :0], x[..., :0])


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no 64-bit integers; runs on the other two")
def test_segment_ids_beyond_32_bits_are_refused():
    x = np.ones((1, 3, 2), "float32")
    ids = np.array([[0, 0, 2**32]], "int64")
    with pytest.raises(ValueError, match="segment_ids must fit into 32 bits. Received: values from 0 to 4294967296"):
        causal_depthwise_conv(x, x[0, :2], segment_ids=ids)
