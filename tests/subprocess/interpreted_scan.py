"""The kernels of the selective scan in Triton's interpreter on a CPU, against float64.

Runs in its own process: KERAS_BACKEND=torch TRITON_INTERPRET=1 python tests/subprocess/interpreted_scan.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "helpers")]
import oracles  # noqa: E402
import triton_on_cpu  # noqa: E402

from keras_jamba._triton import Gpu  # noqa: E402
from keras_jamba._triton import scan as kernels  # noqa: E402
from keras_jamba.ops import selective_scan  # noqa: E402
from keras_jamba.ops.scan import triton  # noqa: E402

NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]


def draw(batch, length, channels, states):
    rng = np.random.default_rng(length)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    u, delta, z = normal(batch, length, channels), normal(batch, length, channels) - 2, normal(batch, length, channels)
    B, C = normal(batch, length, states), normal(batch, length, states)
    arrays = (u, delta, -np.exp(normal(channels, states)), B, C, normal(channels), z, 0.1 * normal(channels))
    return dict(zip(NAMES, (*arrays, normal(batch, channels, states)), strict=True))


def tensors_of(arrays, dtype=torch.float32):
    """Returns leaves, and the arguments made from them. `z` is half of a wider tensor, as in a layer."""
    leaves = {name: torch.tensor(x).requires_grad_() for name, x in arrays.items() if x is not None}
    given = {name: leaves.get(name) for name in NAMES}
    wide = torch.stack([given["z"], given["z"].detach()], dim=2).flatten(2)
    given["z"] = wide[..., : given["z"].shape[-1]]
    short = {name: given[name].to(dtype) for name in ("u", "delta", "B", "C", "z")}
    return leaves, given | short


def close(actual, expected, name, tolerance=1e-5):
    expected = np.asarray(expected)
    actual = actual.detach().float().numpy()
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=tolerance * scale, err_msg=name)


def check(batch, length, channels, states, dtype=torch.float32, tolerance=1e-5):
    arrays = draw(batch, length, channels, states)
    leaves, given = tensors_of(arrays, dtype)
    if dtype != torch.float32:
        arrays |= {name: given[name].detach().float().numpy() for name in ("u", "delta", "B", "C", "z")}
    y, last = triton.run(**given, delta_softplus=True, mask=None, segment_ids=None)
    expected = oracles.selective_scan(**arrays, delta_softplus=True)
    close(y, expected[0], "y", tolerance)
    close(last, expected[1], "last state")
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(x.shape).astype("float32") for x in expected]
    # Rounded, so that kernel and reference get the same gradient.
    weights[0] = torch.tensor(weights[0]).to(dtype).float().numpy()
    found = torch.autograd.grad(
        [y, last], list(leaves.values()), [torch.tensor(weights[0]).to(dtype), torch.tensor(weights[1])]
    )
    expected = oracles.selective_scan_gradients(*weights, *arrays.values())
    for name, actual, wanted in zip(NAMES, found, expected, strict=True):
        close(actual, wanted, name, tolerance)


def check_options(left_out, softplus=True, mask=None, segment_ids=None):
    """Checks missing inputs, masked tokens and packed documents against the reference."""
    arrays = draw(2, 13, 5, 3) | dict.fromkeys(left_out)
    arrays["delta"] = arrays["delta"] if softplus else np.abs(arrays["delta"])
    found = []
    for run in (
        triton.run,
        lambda **given: selective_scan(**given, return_last_state=True, implementation="reference"),
    ):
        leaves, given = tensors_of(arrays | {"z": draw(2, 13, 5, 3)["z"]})
        if "z" in left_out:
            leaves.pop("z")
            given["z"] = None
        y, last = run(**given, delta_softplus=softplus, mask=mask, segment_ids=segment_ids)
        weights = [torch.linspace(-1, 2, x.numel()).reshape(x.shape) for x in (y, last)]
        gradients = torch.autograd.grad([y, last], list(leaves.values()), weights, allow_unused=True)
        found.append({"y": y, "last": last} | dict(zip(leaves, gradients, strict=True)))
    for name, wanted in found[1].items():
        close(found[0][name], wanted.detach(), name)


def check_one_token():
    """Checks the separate kernel for one decoding step without gradients."""
    arrays = draw(3, 1, 10, 16)
    mask = torch.tensor([[True], [False], [True]])
    with torch.no_grad():
        _, given = tensors_of(arrays)
        y, last = triton.run(**given, delta_softplus=True, mask=mask, segment_ids=None)
    expected = oracles.selective_scan(**arrays, delta_softplus=True)
    is_real = mask.numpy()[:, :, None]
    close(y, np.where(is_real, expected[0], 0), "y of one token")
    close(last, np.where(is_real, expected[1], arrays["initial_state"]), "state after one token")


def check_segment_counts():
    """Checks that the plan divides only long sequences into segments."""
    for multiprocessors, sizes, segments in (
        (132, dict(batch=1, length=4096, channels=512, states=16), 16),
        (132, dict(batch=64, length=64, channels=512, states=16), 1),
        (132, dict(batch=8, length=2048, channels=2048, states=16), 1),
    ):
        gpu = Gpu(None, None, None, multiprocessors)
        plan = kernels.backward_plan(sizes, gpu, kernels.backward_choice(sizes))
        assert plan.segments(sizes) == segments, (sizes, plan)


def check_segments(length, documents):
    """Checks division into segments on short sequences, with close checkpoints and one or two per segment."""
    complete, every = kernels._plan, kernels.every
    kernels.every = lambda length: 8
    kernels._plan = lambda *given, **more: complete(*given, **more)._replace(segment=16 if documents else 8)
    try:
        if documents:
            ids = np.cumsum(np.arange(length) % 20 == 12)
            segment_ids = torch.tensor(np.stack([ids, 0 * ids])).int()
            mask = torch.tensor(np.arange(2 * length).reshape(2, -1) % 7 != 3)
            check_packed(length, mask, segment_ids)
        else:
            check(1, length, 9, 4)
    finally:
        kernels._plan, kernels.every = complete, every


def check_packed(length, mask, segment_ids):
    """Checks masked tokens and packed documents against the associative scan."""
    arrays = draw(2, length, 3, 2)
    results = []
    for run in (
        triton.run,
        lambda **given: selective_scan(**given, return_last_state=True, implementation="associative"),
    ):
        leaves, given = tensors_of(arrays)
        y, last = run(**given, delta_softplus=True, mask=mask, segment_ids=segment_ids)
        results.append([y, last, *torch.autograd.grad(y.sum() + (last * last).sum(), list(leaves.values()))])
    for name, actual, wanted in zip(["y", "last", *NAMES], *results, strict=True):
        close(actual, wanted.detach(), name)
    check_isolation(arrays, mask, segment_ids)


def damaged_run(arrays, bad, value, mask, segment_ids):
    """Returns the outputs, and the gradients by name, with `value` in the inputs and the gradient of `bad` tokens."""
    per_token = ("u", "delta", "B", "C", "z")
    bad = torch.tensor(bad)[..., None]
    given = arrays | {name: np.where(bad, np.float32(value), arrays[name]) for name in per_token}
    leaves, tensors = tensors_of(given)
    y, last = triton.run(**tensors, delta_softplus=True, mask=mask, segment_ids=segment_ids)
    of_y = torch.where(bad, value, torch.linspace(-1, 2, y.numel()).reshape(y.shape))
    gradients = torch.autograd.grad([y, last], list(leaves.values()), [of_y, torch.ones_like(last)])
    return y, last, dict(zip(leaves, gradients, strict=True))


def check_isolation(arrays, mask, segment_ids):
    """Checks that NaN and infinity of padding change nothing, and those of a document nothing of other documents."""
    nowhere = np.zeros(tuple(segment_ids.shape), bool)
    real = ~nowhere if mask is None else mask.numpy()
    y, last, gradients = damaged_run(arrays, nowhere, 0.0, mask, segment_ids)
    for value in (np.nan, np.inf, 3e38):
        found = damaged_run(arrays, ~real, value, mask, segment_ids)
        for name, wanted in {"y": y, "last": last, **gradients}.items():
            actual = {"y": found[0], "last": found[1], **found[2]}[name]
            close(actual, wanted.detach(), f"{name} with damaged padding")
    for document in np.unique(segment_ids.numpy()[0]):
        bad = (segment_ids.numpy() == document) & real
        bad[1] = False
        found_y, found_last, found = damaged_run(arrays, bad, np.nan, mask, segment_ids)
        assert found_y[torch.tensor(bad)].isnan().all()
        close(found_y[torch.tensor(~bad)], y[torch.tensor(~bad)].detach(), "y of other documents")
        intact = slice(1 if document == segment_ids[0, -1] else 0, None)
        close(found_last[intact], last[intact].detach(), "last state of other documents")
        intact = slice(1 if document == segment_ids[0, 0] else 0, None)
        close(found["initial_state"][intact], gradients["initial_state"][intact], "initial_state of other documents")
        for name in ("u", "delta", "B", "C", "z"):
            here = torch.tensor(~bad & real)
            close(found[name][here], gradients[name][here], f"{name} of other documents")


def main():
    for length in (1, 2, 7, 33):
        check(2, length, 6, 16)
    check(1, 9, 33, 1)
    check(1, 5, 3, 33)
    check(1, 13, 12, 16, torch.bfloat16, tolerance=2e-2)
    check(1, 13, 12, 16, torch.float16, tolerance=2e-3)
    for left_out in (["D"], ["z"], ["delta_bias"], ["initial_state"], ["D", "z", "delta_bias", "initial_state"]):
        check_options(left_out)
    check_options([], softplus=False)
    mask = torch.tensor(np.arange(26).reshape(2, 13) % 4 != 2)
    ids = torch.tensor(np.array([[0] * 5 + [1] * 8, [0] * 2 + [3] * 4 + [4] * 7])).int()
    check_options([], mask=mask)
    check_options([], segment_ids=ids)
    check_options([], mask=mask, segment_ids=ids)
    check_packed(13, mask, ids)
    check_isolation(draw(2, 13, 3, 2), None, ids)
    check_one_token()
    check_segment_counts()
    check_segments(29, documents=False)
    check_segments(35, documents=True)
    with triton_on_cpu.on_an_unknown_device():
        check(1, 9, 6, 16)
        check_options([], mask=mask, segment_ids=ids)
    print("all are equal")


if __name__ == "__main__":
    main()
