"""Quantized matrices (int8, int4) against rounding in NumPy."""

import numpy as np
import pytest
from checks import close, gradients, numpy
from keras import ops

from keras_jamba.ops.experts import _TABLE, _Call, expert_mlp
from keras_jamba.ops.quantization import QuantizedTensor, dequantized, product, quantized, storage_specs

SHAPES = [(100, 33), (3, 70, 8)]


def drawn(shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype("float32")


def stored(x, mode):
    return QuantizedTensor(*map(ops.convert_to_tensor, quantized(x, mode).values()))


def steps(x, mode):
    """Returns the distance between quantization levels, one value per element."""
    if mode == "int8":
        return np.broadcast_to(np.abs(x).max(axis=-2, keepdims=True) / 127, x.shape)
    groups = [x[..., i : i + 64, :] for i in range(0, x.shape[-2], 64)]
    # Zero is a level even if all values of a group have the same sign.
    spread = [np.maximum(x.max(-2, keepdims=True), 0) - np.minimum(x.min(-2, keepdims=True), 0) for x in groups]
    return np.concatenate([np.broadcast_to(s / 15, x.shape) for s, x in zip(spread, groups, strict=True)], -2)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_rounded_to_a_near_level(shape, mode):
    x = drawn(shape)
    arrays = quantized(x, mode)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == storage_specs(shape, mode)
    error = np.abs(numpy(dequantized(stored(x, mode), "float32")) - x)
    # int4 first rounds the zero point, which can shift the other levels by half a step.
    assert (error <= steps(x, mode) * (0.5001 if mode == "int8" else 1.0001)).all()
    assert error.max() > 0


def test_int4_packs_two_columns_per_byte_the_even_one_in_the_low_bits():
    arrays = quantized(drawn((70, 5)), "int4")
    columns = np.stack([arrays[""].astype("int8") << 4 >> 4, arrays[""] >> 4], -1).reshape(70, 6)[:, :5]
    groups = np.repeat(np.arange(2), 64)[:70]
    expected = (columns - arrays["_zero"][groups]) * arrays["_scale"][groups]
    close(dequantized(stored(drawn((70, 5)), "int4"), "float32"), expected)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("rows", [(2, 3), (20, 2)])
def test_products_and_gradients_are_those_of_the_dequantized_matrix(rows, mode):
    matrix, x, weight = stored(drawn((70, 33)), mode), drawn((*rows, 70)), drawn((*rows, 33))
    rounded = numpy(dequantized(matrix, "float32"))
    close(product(ops.convert_to_tensor(x), matrix), x @ rounded, absolute=1e-4)
    (gradient,) = gradients(lambda x: ops.sum(product(x, matrix) * ops.convert_to_tensor(weight)), [x])
    np.testing.assert_allclose(gradient, weight @ rounded.T, rtol=1e-4, atol=1e-4)


def test_products_have_the_dtype_of_the_inputs():
    x, matrix = drawn((4, 70)), stored(drawn((70, 33)), "int8")
    actual = product(ops.cast(x, "bfloat16"), matrix)
    assert "bfloat16" in str(actual.dtype)
    expected = x @ numpy(dequantized(matrix, "float32"))
    assert np.abs(numpy(ops.cast(actual, "float32")) - expected).max() < 0.02 * np.abs(expected).max()


IMPLEMENTATIONS = [
    (name, tokens, bits)
    for tokens in (3, 40)
    for bits in (8, 4)
    for name in _TABLE
    if _TABLE[name].why_not(_Call(8, 2, tokens=tokens, is_quantized=True, sizes=(6, 10))) is None
]


@pytest.mark.parametrize(("name", "tokens", "bits"), IMPLEMENTATIONS)
def test_every_implementation_of_experts_uses_the_dequantized_banks(name, tokens, bits):
    rng = np.random.default_rng(tokens)
    banks = {"up_bank": (8, 6, 10), "down_bank": (8, 10, 6), "gate_bank": (8, 6, 10)}
    banks = {bank: stored(drawn(shape), f"int{bits}") for bank, shape in banks.items()}
    dequantized_banks = {bank: dequantized(x, "float32") for bank, x in banks.items()}
    indices = ops.convert_to_tensor(np.argsort(rng.random((tokens, 8)), axis=1)[:, :2].astype("int32"))
    x, weights, weight = rng.standard_normal((tokens, 6)), rng.random((tokens, 2)), rng.standard_normal((tokens, 6))
    x, weights, weight = (array.astype("float32") for array in (x, weights, weight))

    def run(x, weights, banks, implementation):
        return expert_mlp(x, weights, indices, **banks, implementation=implementation)

    close(run(x, weights, banks, name), numpy(run(x, weights, dequantized_banks, "dense")), absolute=1e-4)

    def loss(banks, implementation):
        return lambda x, weights: ops.sum(run(x, weights, banks, implementation) * ops.convert_to_tensor(weight))

    actual = gradients(loss(banks, name), [x, weights])
    expected = gradients(loss(dequantized_banks, "dense"), [x, weights])
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_rounding_some_columns_at_a_time_gives_the_numbers_of_all_at_once(mode, monkeypatch):
    x = np.random.default_rng(0).standard_normal((2, 70, 13)).astype("float32")
    complete = quantized(x, mode)
    monkeypatch.setattr("keras_jamba.ops.quantization._BLOCK", 70 * 5)
    blocks = quantized(x.swapaxes(1, 2).copy().swapaxes(1, 2), mode)
    assert complete.keys() == blocks.keys()
    for name, expected in complete.items():
        np.testing.assert_array_equal(blocks[name], expected)
