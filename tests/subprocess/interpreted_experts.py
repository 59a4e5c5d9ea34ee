"""The kernels of the experts in Triton's interpreter on a CPU, against float64.

Runs in its own process: KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_experts.py
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import oracles  # noqa: E402
import triton_on_cpu  # noqa: E402

from keras_jamba import _backend  # noqa: E402
from keras_jamba._triton import grouped as kernels  # noqa: E402
from keras_jamba.ops.experts import triton  # noqa: E402
from keras_jamba.ops.experts._sorting import sorted_by_expert  # noqa: E402

TILES = kernels.Tiles(16, 16, 16, 2, 4, 1)
launcher = _backend.kernels.triton_launcher
EXPERTS, TOKENS, PER_TOKEN = 5, 21, 2


def close(actual, expected, name):
    expected = np.asarray(expected)
    actual = actual.detach().numpy()
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def draw(d, f):
    """Returns tensors, indices and a gradient. Expert 3 gets no token, and expert 0 more tokens than a tile holds."""
    rng = np.random.default_rng(d)
    normal = lambda *shape: torch.tensor(rng.standard_normal(shape).astype("float32"))  # noqa: E731
    indices = np.stack([[0, rng.choice([1, 2, 4])][:: rng.choice([-1, 1])] for _ in range(TOKENS)])
    banks = [normal(EXPERTS, d, f), normal(EXPERTS, f, d), normal(EXPERTS, d, f)]
    return [normal(TOKENS, d), torch.rand(TOKENS, PER_TOKEN), *banks], torch.tensor(indices), normal(TOKENS, d)


def check_mixture(d, f, swiglu, products):
    tensors, indices, gradient = draw(d, f)
    tensors = tensors if swiglu else tensors[:-1]
    given = [x.numpy() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    tokens, weights, up, down, gate = leaves if swiglu else [*leaves, None]
    name = f"d {d}, f {f}, swiglu {swiglu}, {products}: "
    y = triton.run(tokens, weights, indices, up, down, gate, products=products)
    close(y, oracles.expert_mlp(*given[:2], indices.numpy(), *given[2:]), name + "y")
    with torch.no_grad():
        again = triton.run(tokens, weights, indices, up, down, gate, products=products)
    close(again, y.detach().numpy(), name + "y without a gradient")
    actual = torch.autograd.grad((y * gradient).sum(), leaves)
    expected = oracles.expert_mlp_gradients(gradient.numpy(), *given[:2], indices.numpy(), *given[2:])
    for i, pair in enumerate(zip(actual, expected, strict=True)):
        close(*pair, f"{name}gradient {i}")
    (alone,) = torch.autograd.grad(
        triton.run(tokens, weights, indices, up, down, gate, products=products).sum(), tokens
    )
    assert alone.shape == tokens.shape


def check_indices_of_no_expert(d, f):
    """Checks sharded experts: rows of other devices add nothing to outputs and gradients."""
    tensors, indices, gradient = draw(d, f)
    indices = torch.where((indices == 0) | (indices == 4), EXPERTS, indices)
    tokens, weights, *banks = (x.requires_grad_() for x in tensors)
    none = indices == EXPERTS
    assert none.all(dim=1).any() and not none.all()
    y = triton.run(tokens, weights, indices, *banks, products="triton")
    given = tokens, torch.where(none, 0, weights), torch.where(none, 0, indices), *banks
    arrays = [x.detach().numpy() for x in given]
    close(y, oracles.expert_mlp(*arrays), "y with rows of no expert")
    actual = torch.autograd.grad((y * gradient).sum(), [tokens, weights, *banks])
    expected = oracles.expert_mlp_gradients(gradient.numpy(), *arrays)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if i == 1:
            a, e = a[~none], e[~none.numpy()]
        close(a, e, f"gradient {i} with rows of no expert")


def check_that_a_second_gradient_is_refused():
    (tokens, weights, up, down, gate), indices, _ = draw(16, 24)
    tokens.requires_grad_()
    y = triton.run(tokens, weights, indices, up, down, gate, products="triton")
    with pytest.raises(ValueError, match="no gradient of its own.*Received: tensors that require a gradient"):
        torch.autograd.grad(y.square().sum(), tokens, create_graph=True)


def check_tiles(d, f):
    """Checks many tiles per expert and strips of tiles, along all axes."""
    (tokens, weights, up, down, gate), indices, gradient = draw(d, f)
    rows = sorted_by_expert(indices, EXPERTS)
    order, source = rows.order.numpy(), rows.source.numpy()
    expert = indices.numpy().reshape(-1)[order]
    exact = lambda x: x.numpy().astype("float64")  # noqa: E731
    x = exact(tokens)[source]
    product = lambda a, bank, inner: np.einsum(inner, a, exact(bank)[expert])  # noqa: E731
    into, back = "rd,rdf->rf", "rf,rdf->rd"
    projected, logits = product(x, up, into), product(x, gate, into)
    found = kernels.first_product(launcher(), tokens, rows.source, rows.counts, up, gate, keep=True, tiles=TILES)
    for actual, expected in zip(found, (projected * logits / (1 + np.exp(-logits)), projected, logits), strict=True):
        close(actual, expected, "first_product")
    _, up_rows, gate_rows = found
    y = kernels.rows_product(launcher(), up_rows, down, rows.counts, target=rows.order, scale=weights, tiles=TILES)
    expected = np.empty((len(order), d))
    expected[order] = product(projected, down, "rf,rfd->rd") * exact(weights).reshape(-1)[order][:, None]
    close(y, expected, "rows_product")
    both = kernels.rows_product(
        launcher(), up_rows, up, rows.counts, (gate_rows, gate), transpose_rhs=True, tiles=TILES
    )
    close(both, product(projected, up, back) + product(logits, gate, back), "rows_product, two banks, transposed")
    bank = kernels.bank_gradient(launcher(), tokens, gradient, rows.counts, rows.source, rows.source, tiles=TILES)
    expected = np.zeros((EXPERTS, d, d))
    np.add.at(expected, expert, x[:, :, None] * exact(gradient)[source][:, None])
    close(bank, expected, "bank_gradient")


def check_sums_shared_by_programs(gathered, dtype):
    """Checks that programs share the rows of one tile, also for experts with few rows or none."""
    rng, counts = np.random.default_rng(0), torch.tensor([700, 0, 1, 40, 59], dtype=torch.int32)
    a, b = (torch.tensor(rng.standard_normal((800, 18)), dtype=dtype) for _ in range(2))
    source = torch.tensor(rng.permutation(800).astype("int32")) if gathered else None
    assert kernels._splits(launcher(), EXPERTS * 4, 800 // (EXPERTS * 16)) == 2
    found = kernels.bank_gradient(launcher(), a, b, counts, source, source, tiles=TILES)
    assert found.dtype == dtype
    exact = [(x if source is None else x[source]).double().numpy() for x in (a, b)]
    ends = np.cumsum([0, *counts])
    expected = [np.einsum("rm,rn->mn", *(x[i:j] for x in exact)) for i, j in zip(ends, ends[1:], strict=False)]
    if dtype == torch.float32:
        close(found, np.stack(expected), "bank_gradient with shared sums")
    else:
        np.testing.assert_allclose(found.float().numpy(), np.stack(expected), rtol=1e-2, atol=1e-2)


for gathered in (True, False):
    check_sums_shared_by_programs(gathered, torch.float32)
check_sums_shared_by_programs(False, torch.float16)
for d, f in ((48, 40), (18, 25)):
    check_tiles(d, f)
    for swiglu in (True, False):
        check_mixture(d, f, swiglu, "triton")
check_indices_of_no_expert(16, 24)
check_mixture(16, 24, True, "library")
check_mixture(16, 24, False, "library")
check_that_a_second_gradient_is_refused()
with triton_on_cpu.on_an_unknown_device():
    check_mixture(16, 24, True, "triton")
print("all are equal")
