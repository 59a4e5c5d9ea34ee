"""Convolution, rotary embedding, attention and routing against NumPy."""

import keras
import numpy as np
import pytest
from checks import close, gradients, numpy
from keras import ops

from keras_jamba.ops import (
    causal_depthwise_conv,
    expert_share,
    grouped_query_attention,
    rotary_embedding,
    router_z_loss,
    switch_balance_loss,
    top_k_routing,
    variance_balance_loss,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("width", [1, 3, 4])
def test_convolution_is_causal_correlation_with_its_gradients(width):
    x, kernel, bias, weight = normal(2, 6, 3), normal(width, 3, seed=1), normal(3, seed=2), normal(2, 6, 3, seed=3)
    padded = np.concatenate([np.zeros((2, width - 1, 3)), x], axis=1)
    taps = np.stack([padded[:, i : i + 6] for i in range(width)])
    close(causal_depthwise_conv(x, kernel, bias), (kernel[:, None, None] * taps).sum(0) + bias, absolute=1e-5)
    weights = ops.convert_to_tensor(weight)
    loss = lambda *xs: ops.sum(causal_depthwise_conv(*xs) * weights)  # noqa: E731
    grad_x, grad_kernel, grad_bias = gradients(loss, [x, kernel, bias])
    padded_weight = np.concatenate([weight, np.zeros((2, width - 1, 3))], axis=1)
    expected = sum(kernel[i] * padded_weight[:, width - 1 - i : width - 1 - i + 6] for i in range(width))
    np.testing.assert_allclose(grad_x, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_kernel, (taps * weight).sum((1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_bias, weight.sum((0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding_is_a_complex_rotation(interleaved):
    x = normal(2, 5, 3, 8)
    pairs = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    angles = (3 + np.arange(5))[:, None, None] * 100.0 ** (-np.arange(4) / 4)
    rotated = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)
    components = rotated.real, rotated.imag
    expected = np.stack(components, -1).reshape(x.shape) if interleaved else np.concatenate(components, -1)
    close(rotary_embedding(x, 3, 100.0, interleaved), expected, absolute=1e-5)


def test_rotary_scores_depend_on_the_distance_only():
    query, key = normal(1, 6, 1, 8), normal(1, 6, 1, 8, seed=1)
    scores = [
        ops.einsum("bthc,bshc->bhts", rotary_embedding(query, start), rotary_embedding(key, start))
        for start in (0, 1000)
    ]
    np.testing.assert_allclose(numpy(scores[0]), numpy(scores[1]), atol=1e-3)


def test_rotary_embedding_is_accurate_at_large_positions():
    positions = np.array([[255, 256, 65_536, 1_000_003, 2**31 - 1]])
    x = normal(1, 5, 1, 8)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None, None] * 1e4 ** -(np.arange(4) / 4))
    expected = np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
    close(rotary_embedding(x, positions.astype("int32")), expected, absolute=2e-4)


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        ([(1, 5, 4, 8), (1, 5, 3, 8), (1, 5, 3, 8)], None, "query heads must be a multiple.*Received: 4 and 3"),
        ([(1, 5, 4, 8), (1, 6, 2, 8), (1, 5, 2, 8)], None, r"value must have the shape \(b, s, g, c\).*Received"),
        ([(1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)], (5, 6), r"mask must have the shape \(b, t\).*Received"),
    ],
)
def test_attention_refuses_mismatched_shapes(shapes, mask, message):
    mask = None if mask is None else np.ones(mask, bool)
    with pytest.raises(ValueError, match=message):
        grouped_query_attention(*(normal(*shape) for shape in shapes), mask=mask)


def test_rotary_embedding_refuses_bad_positions_and_odd_widths():
    with pytest.raises(ValueError, match="positions must be an integer or a tensor.*Received"):
        rotary_embedding(normal(1, 2, 3, 4), np.arange(2))
    with pytest.raises(ValueError, match="even head width.*Received.*num_heads"):
        rotary_embedding(normal(1, 2, 3, 5))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_with_grouped_heads_is_softmax_attention(groups, causal):
    query, key, value = normal(2, 5, 4, 6), normal(2, 5, groups, 6, seed=1), normal(2, 5, groups, 6, seed=2)
    wide_key, wide_value = (np.repeat(x, 4 // groups, axis=2) for x in (key, value))
    scores = np.einsum("bthc,bshc->bhts", query, wide_key) / np.sqrt(6)
    if causal:
        scores = np.where(np.tri(5, dtype=bool), scores, -np.inf)
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshc->bthc", probabilities, wide_value)
    tensors = (ops.convert_to_tensor(x) for x in (query, key, value))
    close(grouped_query_attention(*tensors, causal=causal), expected, absolute=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_selects_the_most_probable_experts(normalize):
    logits = normal(6, 5)
    weights, indices, probabilities = (numpy(x) for x in top_k_routing(logits, 2, normalize))
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-expected, axis=-1)[:, :2]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    chosen = np.take_along_axis(expected, order, axis=-1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True) if normalize else chosen, rtol=1e-5)
    assert keras.backend.standardize_dtype(indices.dtype) == "int32"


def test_routing_losses_match_their_formulas():
    logits = normal(6, 4)
    _, indices, probabilities = top_k_routing(logits, 2)
    p, i = numpy(probabilities), numpy(indices)
    share = np.bincount(i.reshape(-1), minlength=4) / i.size
    close(expert_share(indices, 4), share)
    close(variance_balance_loss(probabilities), ((p.mean(0) - 0.25) ** 2).sum(), relative=1e-4)
    close(switch_balance_loss(probabilities, indices), 4 * (2 * share * p.mean(0)).sum(), relative=1e-5)
    size = np.log(np.exp(logits).sum(-1))
    close(router_z_loss(logits), (size**2).mean(), relative=1e-5)
    close(router_z_loss(logits, squared=False), size.mean(), relative=1e-5)


def test_balance_losses_are_minimal_for_uniform_routing():
    uniform, indices = np.full((4, 4), 0.25, "float32"), np.array([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert float(numpy(variance_balance_loss(ops.convert_to_tensor(uniform)))) == 0
    close(switch_balance_loss(ops.convert_to_tensor(uniform), ops.convert_to_tensor(indices)), 2.0)


def test_routing_refuses_more_experts_than_there_are():
    with pytest.raises(ValueError, match="at most the number of experts. Received: k=5 with 4"):
        top_k_routing(normal(2, 4), 5)


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token. Received: shape="):
        causal_depthwise_conv(np.zeros((2, 0, 3), "float32"), normal(4, 3))
