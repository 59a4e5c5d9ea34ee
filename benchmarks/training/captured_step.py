"""Kernels of a Mamba layer on a GPU, with mamba-ssm and causal-conv1d as peers: state update and convolution.

    KERAS_BACKEND=torch python -m benchmarks.training.captured_step

Compares the state update of `selective_scan` for one token with mamba-ssm's `selective_state_update`. Compares the
convolution with SiLU of a complete sequence, forward and with all gradients, with `causal_conv1d_fn`. The script first
checks that the outputs agree. Times are medians of replays of a graph. Writes results/gpu_step_torch.json.
"""

import torch

from benchmarks import measure
from benchmarks.scan.gpu import STATE, milliseconds
from benchmarks.scan.gpu_peers import causal_conv1d_fn, selective_state_update
from keras_jamba.ops import causal_depthwise_conv, selective_scan

BATCHES, CHANNELS = (1, 64, 512), 4096
CONVOLUTIONS = ((8, 2048, 2048), (4, 1536, 4096))


def close(ours, theirs):
    """Returns the relative error. Raises AssertionError if it is 1 % or more."""
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    assert error < 1e-2, error
    return error


def update(batch):
    """Returns the row of the state update of one token."""
    normal = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    bfloat16 = lambda *shape: normal(*shape).bfloat16()  # noqa: E731
    u, delta, z, B, C = (
        bfloat16(batch, CHANNELS),
        bfloat16(batch, CHANNELS) - 4,
        bfloat16(batch, CHANNELS),
        *bfloat16(2, batch, STATE),
    )
    A, D, bias, state = (
        -torch.exp(normal(CHANNELS, STATE)),
        normal(CHANNELS),
        normal(CHANNELS),
        normal(batch, CHANNELS, STATE),
    )

    def ours():
        tokens = [x[:, None] for x in (u, delta, B, C, z)]
        given = dict(D=D, z=tokens[4], delta_bias=bias, delta_softplus=True, initial_state=state)
        return selective_scan(*tokens[:2], A, *tokens[2:4], **given, return_last_state=True, implementation="triton")

    row = {"what": "state update", "batch": batch}
    theirs_state = state.clone()

    def theirs():
        return selective_state_update(theirs_state, u, delta, A, B, C, D, z, bias, dt_softplus=True)

    with torch.no_grad():
        if selective_state_update is not None:
            y, last = ours()
            row["error"] = close(y[:, 0], theirs())
            close(last, theirs_state)
            row["mamba-ssm"] = milliseconds(theirs)
        row["ours"] = milliseconds(ours)
    return row


def convolution(shape):
    """Returns the rows of the convolution, forward and forward+backward."""
    batch, channels, length = shape
    x, grad_y = torch.randn(2, batch, length, channels, device="cuda").bfloat16()
    kernel, bias = torch.randn(4, channels, device="cuda"), torch.randn(channels, device="cuda")
    leaves = [t.requires_grad_() for t in (x, kernel, bias)]
    # Transposed views keep channels last, a fast layout of the peer for consecutive tokens.
    transposed = [
        x.detach().mT.requires_grad_(),
        kernel.detach().mT.contiguous().requires_grad_(),
        bias.detach().requires_grad_(),
    ]

    def ours():
        return causal_depthwise_conv(*leaves, activation="silu", implementation="triton")

    def theirs():
        return causal_conv1d_fn(*transposed, activation="silu")

    rows = []
    for what in ("forward", "forward+backward"):
        row = {"what": f"convolution, {what}", "(b, e, t)": shape}
        runs = {"ours": (ours, leaves, grad_y)}
        if causal_conv1d_fn is not None:
            row["error"] = close(ours(), theirs().mT)
            runs["causal-conv1d"] = (theirs, transposed, grad_y.mT)
        for name, (run, given, weight) in runs.items():
            gradient = lambda run=run, given=given, weight=weight: torch.autograd.grad(run(), given, weight)  # noqa: E731
            with torch.set_grad_enabled(what != "forward"):
                row[name] = milliseconds(run if what == "forward" else gradient)
        rows.append(row)
    return rows


def main():
    print(torch.cuda.get_device_name())
    rows = [update(batch) for batch in BATCHES]
    for shape in CONVOLUTIONS:
        rows += convolution(shape)
    for row in rows:
        print(row, flush=True)
    measure.record("gpu_step_torch", {"rows": rows})


if __name__ == "__main__":
    main()
