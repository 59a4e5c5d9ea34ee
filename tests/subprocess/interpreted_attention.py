"""The kernels of attention in Triton's interpreter, against float64.

Runs on a CPU, in its own process:
KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_attention.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import oracles  # noqa: E402
from triton_on_cpu import launch  # noqa: E402

from keras_jamba._triton import Gpu, attention  # noqa: E402
from keras_jamba._triton import split_keys as split_keys_launches  # noqa: E402
from keras_jamba.ops._isolation import isolated  # noqa: E402
from keras_jamba.ops.attention import _visibility, dense, split_keys, triton  # noqa: E402
from keras_jamba.ops.attention._visibility import Rule, keys, queries  # noqa: E402

attention.tile = lambda width, dtype: attention.Tile(16, 32, 1)


def launched(kernel, grid, inputs, *others, **options):
    # As a backend does.
    return launch(kernel, grid, [x.contiguous() for x in inputs], *others, **options)


# Many multiprocessors split the query heads of a key-value head.
multiprocessors = [1]
triton._launcher = lambda: Gpu(launched, None, None, multiprocessors[0])


def close(actual, expected, name, tolerance):
    actual = actual.detach().to(torch.float64).numpy()
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()), err_msg=name
    )


def check(seed, tokens, heads, groups, width, causal, window, sinks, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    documents = np.cumsum(rng.random((2, tokens)) < 0.1, axis=1).astype("int32")
    mask = rng.random((2, tokens)) < 0.9
    mask[1, tokens // 2 :] = False
    shapes = (heads, groups, groups, heads)
    *qkv, grad = (torch.tensor(rng.standard_normal((2, tokens, n, width))).to(dtype) for n in shapes)
    positions = torch.tensor(np.cumsum(mask, axis=1) - mask, dtype=torch.int32)
    ids, real = torch.tensor(documents), torch.tensor(mask)
    seen = oracles.seen_pairs(documents, mask, causal, window, sinks)
    exempt = _first(documents, mask, sinks) if sinks else None
    of_query, of_key = queries(positions, ids, real), keys(positions, ids, real, exempt)
    np.testing.assert_array_equal(_visibility.visible(Rule(causal, window), of_query, of_key).numpy(), seen)
    qkv = [x.requires_grad_() for x in qkv]
    outputs = triton.run(*qkv, Rule(causal, window), of_query, of_key)
    arrays = [x.detach().to(torch.float64).numpy() for x in qkv]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    close(outputs, oracles.attention(*arrays, seen), "outputs", tolerance)
    expected = oracles.attention_gradients(grad.to(torch.float64).numpy(), *arrays, seen)
    found = torch.autograd.grad(outputs, qkv, grad)
    for name, a, e in zip(("query", "key", "value"), found, expected, strict=True):
        assert a.dtype == dtype
        close(a, e, name, tolerance)


def check_few(seed, tokens, heads, groups, width, window, sinks, capacity, queries_of=3, dtype=torch.float32):
    """Compares the last queries of each row, after a cache with empty slots, with float64."""
    rng = np.random.default_rng(seed)
    query, key, value = (
        torch.tensor(rng.standard_normal((2, n, each, width))).to(dtype)
        for n, each in ((queries_of, heads), (capacity, groups), (capacity, groups))
    )
    lengths = np.array([tokens, tokens // 2])
    slots = np.broadcast_to(np.arange(capacity), (2, capacity))
    # Every slot that no query sees holds NaN.
    real = slots < lengths[:, None]
    places = lengths[:, None] - queries_of + np.arange(queries_of)
    seen = real[:, None] & (slots[:, None] <= places[..., None])
    if window is not None:
        seen &= (places[..., None] - slots[:, None] < window) | (slots[:, None] < sinks)
    hidden = torch.tensor(~seen.any(1))[:, :, None, None]
    key, value = (torch.where(hidden, torch.nan, x) for x in (key, value))
    as_tensor = lambda x: torch.tensor(np.ascontiguousarray(x), dtype=torch.int32)  # noqa: E731
    zeros = lambda x: torch.zeros(x.shape, dtype=torch.int32)  # noqa: E731
    of_query = queries(as_tensor(places), zeros(places), torch.tensor(np.arange(queries_of) >= 0).expand(2, -1))
    exempt = as_tensor(slots) < sinks if sinks else None
    of_key = keys(as_tensor(slots), zeros(slots), torch.tensor(real), exempt)
    with torch.no_grad():
        outputs = split_keys.run(query, key, value, Rule(True, window), of_query, of_key)
    arrays = [x.nan_to_num().to(torch.float64).numpy() for x in (query, key, value)]
    assert outputs.dtype == dtype
    close(outputs, oracles.attention(*arrays, seen), "few queries", 1e-5 if dtype == torch.float32 else 3e-3)


def check_damage(seed, damaged, window, sinks, value):
    """Compares with dense attention, in which the same tokens are damaged, by a value of one head."""
    rng = np.random.default_rng(seed)
    documents, mask = np.cumsum(rng.random((2, 40)) < 0.1, axis=1).astype("int32"), rng.random((2, 40)) < 0.9
    positions = torch.tensor(np.cumsum(mask, axis=1) - mask, dtype=torch.int32)
    ids, real = torch.tensor(documents), torch.tensor(mask)
    exempt = _first(documents, mask, sinks) if sinks else None
    tokens = queries(positions, ids, real), keys(positions, ids, real, exempt)
    names = dict(query=4, key=2, value=2, gradient=4)
    tensors = {name: torch.tensor(rng.standard_normal((2, 40, n, 8))).float() for name, n in names.items()}
    for name in damaged:
        tensors[name][rng.random((2, 40)) < 0.05, 1, 3] = value
    grad, rule = tensors.pop("gradient"), Rule(True, window)
    qkv = [x.requires_grad_() for x in tensors.values()]
    outputs = triton.run(*qkv, rule, *tokens, isolate=True)
    attend = lambda *qkv: dense.run(*qkv, rule, *tokens)  # noqa: E731
    expected = isolated(attend, *qkv, *dense.reach(rule, *tokens))
    found = [outputs, *torch.autograd.grad(outputs, qkv, grad)]
    expected = [expected, *torch.autograd.grad(expected, qkv, grad)]
    assert np.isnan(expected[1].numpy()).any() and not np.isnan(expected[1].numpy()).all()
    for name, a, e in zip(("outputs", *tensors), found, expected, strict=True):
        np.testing.assert_allclose(a.detach(), e.detach(), rtol=1e-5, atol=1e-5, err_msg=f"{name}, {damaged}")


def _first(documents, mask, count):
    """Returns whether each token is among the first `count` real ones of its document."""
    found = np.zeros_like(mask)
    for row, (ids, real) in enumerate(zip(documents, mask, strict=True)):
        for document in np.unique(ids):
            found[row, np.flatnonzero((ids == document) & real)[:count]] = True
    return torch.tensor(found)


for seed, (heads, groups) in enumerate([(4, 2), (2, 2), (3, 1)]):
    windows = (None, 0), (7, 0), (7, 3)
    for window, sinks in windows:
        check(seed, 50, heads, groups, 8, True, window, sinks)
    check(seed, 50, heads, groups, 8, False, *windows[seed])
check(3, 33, 2, 1, 24, True, None, 0)
# The interpreter multiplies no bfloat16 matrices.
check(4, 17, 2, 1, 16, True, 5, 2, torch.float16)
check(5, 1, 2, 1, 16, True, None, 0)
for seed, damaged in enumerate((("query",), ("key",), ("value",), ("gradient",), ("query", "key", "gradient"))):
    window, sinks = ((None, 0), (5, 2))[seed % 2]
    check_damage(seed, damaged, window, sinks, (np.nan, np.inf, 3e19)[seed % 3])
multiprocessors[0] = 64
for heads, groups in ((4, 2), (6, 1), (2, 2)):
    check(6, 50, heads, groups, 8, True, 7, 3)
    check(7, 20, heads, groups, 16, True, None, 0, torch.float16)
check_damage(8, ("query", "value"), None, 0, np.nan)
for seed, (heads, groups, width) in enumerate(((4, 2, 8), (3, 1, 24), (2, 2, 40))):
    for window, sinks in ((None, 0), (60, 0), (60, 3)):
        check_few(seed, 300, heads, groups, width, window, sinks, 420)
    check_few(seed, 100, heads, groups, width, 60, 3, 100, queries_of=1, dtype=torch.float16)
# More pairs of a query and a head than a program has rows, and a range per program.
check_few(9, 200, 20, 1, 16, None, 0, 200, queries_of=16)
split_keys_launches._PROGRAMS = 0
check_few(10, 200, 4, 2, 16, 90, 2, 200)
print("all are equal")
