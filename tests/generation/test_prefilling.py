"""Chunks of the prefill: their number, their sizes, and equal results."""

import numpy as np
import pytest
from checks import numpy
from keras import ops

import keras_jamba
from keras_jamba import _backend
from keras_jamba.generation import prefilling


def recorded(length, longest, rows=2):
    """Returns the shapes of all chunks, and the tokens that the step saw."""
    shapes, seen = [], []

    def step(inputs, cache):
        ids = numpy(inputs["token_ids"])
        mask = numpy(inputs["padding_mask"]) if "padding_mask" in inputs else np.ones(ids.shape, bool)
        shapes.append(ids.shape)
        seen.append(np.where(mask, ids, -1))
        return ops.zeros((rows, 1, 3)), cache

    ids = np.arange(1, rows * length + 1).reshape(rows, length).astype("int32")
    prefilling.prefilled(step, ids, np.ones(ids.shape, bool), {}, longest)
    seen = np.concatenate(seen, axis=1)
    np.testing.assert_array_equal(seen[:, -length:], ids)
    assert (seen[:, :-length] == -1).all()
    return shapes


@pytest.mark.parametrize("longest", [16, 100, 2048])
def test_chunks_are_equal_and_hold_every_token_once(longest):
    for length in (1, 15, 16, 17, 100, 300, 1025, 2049):
        shapes = recorded(length, longest)
        assert len(shapes) == -(-length // longest)
        assert all(size <= longest for _, size in shapes)
        if _backend.compilation.has_jit():
            # Compiled programs have few shapes. Rounding adds at most a quarter to long chunks.
            assert len(set(shapes)) == 1
            size = shapes[0][1]
            assert size < 2 * max(16, -(-length // len(shapes)))
        else:
            assert sum(size for _, size in shapes) == length
            assert max(size for _, size in shapes) - min(size for _, size in shapes) < len(shapes)


def test_a_budget_of_tokens_bounds_the_chunks_of_all_rows():
    has_kernels = keras_jamba.ops.implementations().get("triton", "unknown") is None
    budget = prefilling.TOKENS_WITH_TRITON if has_kernels else prefilling.TOKENS
    assert prefilling.longest_chunk(1) == budget and prefilling.longest_chunk(4) == budget // 4
    assert prefilling.longest_chunk(10**6) == prefilling.MIN_CHUNK


def test_the_large_budget_needs_the_kernels_of_the_scan(monkeypatch):
    monkeypatch.setattr(prefilling, "implementations", lambda: {"triton": None})
    assert prefilling.longest_chunk(2) == 8192
    monkeypatch.setattr(prefilling, "implementations", lambda: {"triton": "not tried", "associative": None})
    assert prefilling.longest_chunk(2) == 1024


def test_few_sizes_of_chunks_need_programs():
    sizes = {prefilling._rounded(size) for size in range(1, 16385)}
    assert len(sizes) <= 30
    assert all(size <= prefilling._rounded(size) <= max(16, 2 * size) for size in range(1, 16385))
    assert all(prefilling._rounded(size) <= 1.25 * size for size in range(257, 16385))


def test_the_default_gives_the_tokens_of_every_chunk_size(monkeypatch):
    monkeypatch.setattr(prefilling, "TOKENS", 40)
    monkeypatch.setattr(prefilling, "TOKENS_WITH_TRITON", 40)
    model = keras_jamba.JambaCausalLM(23, d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=2)
    prompts = [np.arange(37) % 23, np.arange(5) + 3]
    given = dict(max_new_tokens=5, stop_token_ids=None)
    expected = model.generate(prompts, prefill_chunk_size=64, **given)
    for found in (model.generate(prompts, **given), model.generate(prompts, prefill_chunk_size=3, **given)):
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)
    assert list(model.stream(prompts[0], **given)) == expected[0][37:].tolist()
    with pytest.raises(ValueError, match="prefill_chunk_size must be an integer of at least 1"):
        model.generate(prompts, prefill_chunk_size=0)
