"""One token's step of a Mamba layer's inner part on a GPU, beside mamba-ssm's and causal-conv1d's kernels for it.

    KERAS_BACKEND=torch python benchmarks/gpu_step.py

The state update of `selective_scan` beside mamba-ssm's `selective_state_update`, the convolution with SiLU of a whole
sequence, forward and with all gradients, beside `causal_conv1d_fn`. Checked against each other first. Medians of
replays of a graph. Writes results/gpu_step_torch.json.
"""

import measure
import torch
from gpu_peers import causal_conv1d_fn, selective_state_update
from gpu_scan import STATE, milliseconds

from keras_jamba.ops import causal_depthwise_conv, selective_scan

BATCHES, CHANNELS = (1, 64, 512), 4096
CONVOLUTIONS = ((8, 2048, 2048), (4, 1536, 4096))


def close(ours, theirs):
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    assert error < 1e-2, error
    return error


def update(batch):
    normal = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    short = lambda *shape: normal(*shape).bfloat16()  # noqa: E731
    u, delta, z, B, C = (
        short(batch, CHANNELS),
        short(batch, CHANNELS) - 4,
        short(batch, CHANNELS),
        *short(2, batch, STATE),
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
    batch, channels, length = shape
    x, grad_y = torch.randn(2, batch, length, channels, device="cuda").bfloat16()
    kernel, bias = torch.randn(4, channels, device="cuda"), torch.randn(channels, device="cuda")
    leaves = [t.requires_grad_() for t in (x, kernel, bias)]
    # Channels last, its own fast layout for tokens that lie one after the other.
    turned = [
        x.detach().mT.requires_grad_(),
        kernel.detach().mT.contiguous().requires_grad_(),
        bias.detach().requires_grad_(),
    ]

    def ours():
        return causal_depthwise_conv(*leaves, activation="silu", implementation="triton")

    def theirs():
        return causal_conv1d_fn(*turned, activation="silu")

    rows = []
    for what in ("forward", "forward+backward"):
        row = {"what": f"convolution, {what}", "(b, e, t)": shape}
        both = {"ours": (ours, leaves, grad_y)}
        if causal_conv1d_fn is not None:
            row["error"] = close(ours(), theirs().mT)
            both["causal-conv1d"] = (theirs, turned, grad_y.mT)
        for name, (run, given, weight) in both.items():
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
