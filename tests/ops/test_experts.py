"""Implementations of the experts against NumPy and against every expert on every token (`dense`)."""

import keras
import numpy as np
import oracles
import pytest
from checks import close, gradients, numpy
from keras import ops

from keras_jamba import _backend
from keras_jamba.ops.experts import _TABLE, _Call, _fastest_first, expert_mlp

SIZES = [(1, 8, 2, 0), (40, 8, 2, 0), (40, 8, 1, 9), (33, 5, 2, 2), (16, 8, 3, 1)]
NAMES = ["tokens", "weights", "up_bank", "down_bank", "gate_bank"]


def runnable(experts, per_token, tokens=40, **call):
    call = _Call(experts, per_token, tokens=tokens, platform=_backend.tensors.platform(), **call)
    return [name for name, implementation in _TABLE.items() if implementation.why_not(call) is None]


CASES = [(name, size) for size in SIZES for name in runnable(*size[1:3], size[0])]


def draw(tokens, experts, k, skew=0.0, d=8, f=12):
    rng = np.random.default_rng(tokens + experts)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    logits = rng.standard_normal((tokens, experts)) - skew * np.arange(experts)
    indices = np.argsort(-logits, axis=1)[:, :k].astype("int32")
    banks = [normal(experts, d, f), normal(experts, f, d), normal(experts, d, f)]
    return [normal(tokens, d), rng.random((tokens, k), "float32"), *banks], indices, normal(tokens, d)


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("name", runnable(8, 2))
def test_every_implementation_is_the_weighted_sum_of_the_chosen_experts(name, swiglu):
    tensors, indices, _ = draw(40, 8, 2)
    given = dict(zip(NAMES, tensors, strict=True)) | ({} if swiglu else {"gate_bank": None})
    y = expert_mlp(indices=ops.convert_to_tensor(indices), implementation=name, **given)
    close(y, oracles.expert_mlp(indices=indices, **given), absolute=1e-4)


@pytest.mark.parametrize(("name", "size"), [case for case in CASES if case[0] != "dense"])
def test_gradients_equal_those_of_the_dense_implementation(name, size):
    tensors, indices, weight = draw(*size)
    indices, weight = ops.convert_to_tensor(indices), ops.convert_to_tensor(weight)

    def loss(implementation):
        return lambda *xs: ops.sum(
            weight * expert_mlp(indices=indices, implementation=implementation, **dict(zip(NAMES, xs, strict=True)))
        )

    for actual, expected in zip(gradients(loss(name), tensors), gradients(loss("dense"), tensors), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["grouped", "dense", "triton"])
def test_half_precision_agrees_with_float32(name, dtype):
    if name not in runnable(8, 2, dtype=dtype):
        pytest.skip("not available here; another test checks the reason")
    tensors, indices, _ = draw(40, 8, 2, d=16, f=24)
    exact = oracles.expert_mlp(indices=indices, **dict(zip(NAMES, tensors, strict=True)))
    tensors = [x if name == "weights" else ops.cast(x, dtype) for name, x in zip(NAMES, tensors, strict=True)]
    y = expert_mlp(indices=indices, implementation=name, **dict(zip(NAMES, tensors, strict=True)))
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert np.abs(numpy(ops.cast(y, "float32")) - exact).max() < 0.03 * np.abs(exact).max()


def test_unaligned_sizes_are_computed_or_refused_with_the_reason():
    tensors, indices, _ = draw(40, 8, 2, d=6, f=10)
    given = dict(zip(NAMES, tensors, strict=True))
    exact = oracles.expert_mlp(indices=indices, **given)
    call = _Call(8, 2, tokens=40, platform=_backend.tensors.platform(), sizes=(6, 10))
    for name in runnable(8, 2):
        if (reason := _TABLE[name].why_not(call)) is None:
            y = expert_mlp(indices=ops.convert_to_tensor(indices), implementation=name, **given)
            close(y, exact, absolute=1e-4)
        else:
            assert name == "grouped" and "these have 6 and 10 float32" in reason
            with pytest.raises(ValueError, match="a multiple of 16 bytes"):
                expert_mlp(indices=indices, implementation=name, **given)


def test_a_gpu_prefers_other_implementations_than_a_cpu():
    first = lambda **call: list(_fastest_first(_Call(8, 2, **call)))[:2]  # noqa: E731
    assert first() == first(platform="gpu", is_quantized=True) == ["native", "split"]
    assert first(platform="gpu") == ["triton", "grouped"]


def test_an_unavailable_implementation_is_refused_with_the_reason():
    tensors, indices, _ = draw(4, 4, 2)
    given = dict(zip(NAMES, tensors, strict=True)) | {"indices": indices}
    if _backend.tensors.platform() == "cpu":
        with pytest.raises(ValueError, match="'triton': it requires a GPU"):
            expert_mlp(implementation="triton", **given)
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match="'grouped': TensorFlow has no grouped matrix product"):
            expert_mlp(implementation="grouped", **given)


def kept_by_hand(indices, mask, experts, capacity):
    """Returns which assignments fit the capacity: first choices come first, then earlier tokens."""
    kept, used = np.zeros(indices.shape, bool), np.zeros(experts, int)
    for choice in range(indices.shape[1]):
        for row in np.flatnonzero(mask):
            expert = indices[row, choice]
            kept[row, choice] = used[expert] < capacity
            used[expert] += 1
    return kept


@pytest.mark.parametrize(("factor", "capacity"), [(0.4, 4), (1.25, 13), (9.0, 40)])
def test_a_capacity_drops_only_the_assignments_beyond_it(factor, capacity):
    tensors, indices, weight = draw(40, 8, 2, skew=0.3)
    mask = np.arange(40) % 5 != 3
    kept = kept_by_hand(indices, mask, 8, capacity)
    assert kept[mask].all() == (factor == 9.0)
    given = dict(mask=ops.convert_to_tensor(mask), capacity_factor=factor, indices=ops.convert_to_tensor(indices))
    y, actual_kept = expert_mlp(**dict(zip(NAMES, tensors, strict=True)), **given)
    np.testing.assert_array_equal(numpy(actual_kept), kept)
    close(y, oracles.expert_mlp(tensors[0], tensors[1] * kept, indices, *tensors[2:]), absolute=1e-4)

    def loss(weights_kept, **given):
        def function(*xs):
            xs = dict(zip(NAMES, xs, strict=True))
            y = expert_mlp(**xs | {"weights": xs["weights"] * weights_kept}, **given)
            return ops.sum(ops.convert_to_tensor(weight) * (y if "implementation" in given else y[0]))

        return function

    actual = gradients(loss(1.0, **given), tensors)
    dense = dict(indices=given["indices"], implementation="dense")
    expected = gradients(loss(ops.convert_to_tensor(kept.astype("float32")), **dense), tensors)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * max(1, np.abs(e).max()))


def test_an_implementation_without_dropping_refuses_a_capacity():
    tensors, indices, _ = draw(4, 4, 2)
    with pytest.raises(ValueError, match="it does not support capacity_factor"):
        given = dict(indices=indices, capacity_factor=1.0, implementation="dense")
        expert_mlp(**dict(zip(NAMES, tensors, strict=True)), **given)


def test_mismatched_banks_and_a_mask_without_capacity_are_refused():
    tensors, indices, _ = draw(4, 4, 2)
    tensors[3] = tensors[3][:, :5]
    with pytest.raises(ValueError, match=r"down_bank must have the shape \(x, f, d\).*Received: down_bank.shape"):
        expert_mlp(indices=indices, **dict(zip(NAMES, tensors, strict=True)))
    tensors, indices, _ = draw(4, 4, 2)
    with pytest.raises(ValueError, match="mask requires a capacity_factor.*Received: a mask and capacity_factor=None"):
        expert_mlp(indices=indices, **dict(zip(NAMES, tensors, strict=True)), mask=np.ones(len(indices), bool))
