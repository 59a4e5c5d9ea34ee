"""Temporary memory of a running layer: in inference, and in the backward pass besides kept activations."""

import math

from keras_jamba.estimation._plan import encoder_convolutions, ends_residual_block
from keras_jamba.estimation.activations import chunk_of, encoder_parts
from keras_jamba.estimation.operations import attends_in_blocks


def block(run, plan, mixer, feed_forward):
    """Returns the bytes of the residual stream, its norm, and the larger of mixer and feed-forward part."""
    stream = 2 * run.s * plan.d * run.computed
    return stream + max(_MIXERS[mixer](run, plan), _FEED_FORWARDS[feed_forward](run, plan))


def _mamba(run, plan):
    s, a, e, n, r = run.s, run.computed, plan.e, plan.n, plan.r
    return _gated_conv(run, plan) + s * (r + 2 * n) * a + SCANS[run.scan](run, e, n)


def _gated_conv(run, plan):
    """Returns the bytes of both projection halves, convolution output, gate's SiLU or delta, and y.

    Two directions need all but y twice, x and z in reversed order.
    """
    return (1 + 4 * plan.directions) * run.s * plan.e * run.computed


def _float32(run, e, n):
    """Returns the float32 bytes of u, z, B and C, delta, its softplus and the outputs."""
    return 4 * run.s * (3 * e + (2 * e + 2 * n if run.cast else 0))


def _chunk(run, e, n):
    """Returns the bytes of one tensor of the states of a chunk of "portable"."""
    return 4 * run.b * e * n * min(run.t, chunk_of(run, e, n))


# Bytes per scan besides inputs and outputs, as functions of `(run, e, n)` by implementation.
SCANS = {
    "native": lambda run, e, n: 0,
    # Decay and states of the current and the previous chunk.
    "portable": lambda run, e, n: _float32(run, e, n) + 4 * _chunk(run, e, n),
    # Decay, inputs twice, and the top level's results in halves and combined.
    "associative": lambda run, e, n: _float32(run, e, n) + 5 * 4 * run.s * e * n,
    "reference": lambda run, e, n: _float32(run, e, n) + 2 * 4 * run.s * e * n,
}
# The same for the backward pass, besides kept activations. Factors that match no tensor count are measured.
SCANS_BACKWARD = {
    "native": lambda run, e, n: 0,
    "portable": lambda run, e, n: 3 * _chunk(run, e, n),
    "associative": lambda run, e, n: 20 * run.s * e * n,
    "reference": lambda run, e, n: 2 * 4 * run.s * e * n,
}


def backward(run, plan, freed, after_encoder):
    """Returns a training step's temporary bytes: gradients of features, of one scan and of the encoder.

    `freed` is the activation memory of the layers after the last scan, which the backward pass frees before that scan.
    `after_encoder` is that of the layers after the encoder. It is small if a frame is one token.
    """
    scans = any(mixer == "mamba" for mixer, _ in plan.pattern)
    scan = SCANS_BACKWARD[run.scan](run, plan.e, plan.n) if scans else 0
    return 4 * run.s * plan.d * run.computed + max(0, scan - freed, _encoder_backward(run, plan) - after_encoder)


def _encoder_backward(run, plan):
    """Returns a norm's gradients, four times its float32 input, less the freed memory of later convolutions."""
    if not plan.image:
        return 0
    most = freed = 0
    layers = zip(encoder_convolutions(plan), run.grid[1:], encoder_parts(run, plan), strict=True)
    for (_, width, _, _), size, kept in reversed(list(layers)):
        most = max(most, 4 * 4 * run.images * math.prod(size) * width - freed)
        freed += kept
    return most


def _attention(run, plan):
    s, a, d = run.s, run.computed, plan.d
    # Projected and multiplied queries, keys and values, the outputs twice, and the mask of a window.
    windowed = plan.config["attention_window"] and not attends_in_blocks(run, plan)
    mask = run.b * run.t * run.t * a if windowed else 0
    return s * (d + 2 * plan.g * plan.c) * a + s * 4 * d * a + s * d * a + mask


def _hidden(run, plan, rows):
    """Returns the bytes of a hidden layer: gate, SiLU, other half and product, or two tensors for GELU."""
    return (4 if plan.config["use_swiglu"] else 2) * rows * plan.f * run.computed


def _dense(run, plan):
    return _hidden(run, plan, run.s)


def _moe(run, plan):
    """Returns the bytes of sorted tokens, of three versions of the outputs, and of one expert's hidden layer.

    The outputs exist sorted by expert, combined, and in the original order. If variable and compute dtype differ, all
    weights are cast first.
    """
    rows = one = run.s * plan.chosen
    if plan.config["capacity_factor"] is None:
        one = math.ceil(rows / plan.x)
    router = 4 * run.s * (plan.d if run.cast else 0) + 4 * run.s * 3 * plan.x
    banks = plan.x * (3 if plan.config["use_swiglu"] else 2) * plan.d * plan.f
    copies = banks * run.computed if run.computed != run.stored else 0
    return router + copies + 4 * rows * plan.d * run.computed + _hidden(run, plan, one)


_MIXERS = {"mamba": _mamba, "gated_conv": _gated_conv, "attention": _attention}
_FEED_FORWARDS = {"dense": _dense, "moe": _moe, None: lambda run, plan: 0}


def encoder(run, plan):
    """Returns the bytes of the largest convolution: input, output, the float32 tensors of its norm, and
    the input of a residual block."""
    most = 0
    for i, (channels, width, _, _) in enumerate(encoder_convolutions(plan)):
        before, after = (run.images * math.prod(size) for size in run.grid[i : i + 2])
        normed = run.computed + 8 + (run.computed if run.cast else 0)
        block = after * width * run.computed if ends_residual_block(plan, i) else 0
        most = max(most, before * channels * run.computed + after * width * normed + block)
    return most


def tokens(run, plan):
    """Returns the bytes for frames of the grid, with positions, projected and its SiLU; for a grid, of reordering."""
    if plan.image.tokens == "frames":
        return run.cells * (4 * plan.d + 2) * run.computed
    return (3 if plan.image.scan_order == "snake" else 1) * run.cells * plan.d * run.computed


def readout(run, plan):
    """Returns the bytes of tokens: the readouts "mean" and "seqpool" add float32 copies, "seqpool" weighted tokens."""
    wide = {"last": 0, "mean": 4 if run.cast else 0, "seqpool": 8 if run.cast else 4}[plan.image.readout]
    return run.s * plan.d * (run.computed + wide)


def embedding(run, plan):
    return run.s * plan.d * run.computed


def final_norm(run, plan):
    return 2 * run.s * plan.d * run.computed + (8 * run.s * plan.d if run.cast else 0)


def head(run, plan):
    if plan.image:
        return 4 * run.b * (plan.d + plan.image.num_classes)
    return run.s * (plan.d + plan.vocabulary[0]) * run.computed
