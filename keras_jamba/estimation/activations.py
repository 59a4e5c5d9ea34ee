"""Activation memory: bytes that the forward pass keeps for the backward pass, layer by layer.

The estimates count the tensors that PyTorch's autograd keeps for this package's layers in eager mode. A compiler may
keep less. A tensor that several operations keep counts once, at the operation that creates it. The exception is the
input of a block, which counts at the block's norm: the norm keeps it in float32.
"""

import math

from keras_jamba.estimation._plan import encoder_convolutions
from keras_jamba.estimation.operations import attends_in_blocks
from keras_jamba.estimation.parameters import perceptron
from keras_jamba.ops.cross_entropy import CHUNK_BYTES, tokens_per_chunk

_CHUNK = 16  # tokens between two states that the native scan keeps
_CACHED_NUMBERS, _LONGEST_CHUNK = 1 << 19, 64  # the chunks of ops/scan/torch_chunks.py


def block(run, plan, mixer, feed_forward):
    """Returns the bytes that one block keeps, including copies of weights."""
    dropped = run.s * plan.d * (run.computed if run.platform == "cpu" else 1) if plan.config["dropout"] else 0
    parts = (1 if feed_forward is None else 2) * (_norm(run, run.s, plan.d) + dropped)
    return parts + _MIXERS[mixer](run, plan) + _FEED_FORWARDS[feed_forward](run, plan)


def input_bytes(plan, run):
    """Returns the bytes that the first block saves if its input comes from the caller and needs no gradient."""
    return 4 * run.s * plan.d if run.platform == "cpu" or not run.cast else 0


def _norm(run, rows, width):
    """Returns the bytes of an RMSNorm: its float32 input and, in the CPU's composed version, the normalised values."""
    return 4 * rows * width * (2 if run.platform == "cpu" else 1) + 4 * rows


def _copies(run, numbers):
    """Returns the bytes of weights cast to the compute dtype, if that differs from the variable dtype."""
    return numbers * run.computed if run.computed != run.stored else 0


def _mamba(run, plan):
    keeps_gate = run.scan == "native" or not run.cast
    return _gated(run, plan, keeps_gate, _ssm(run, plan) + SCANS[run.scan](run, plan.e, plan.n))


def _gated_conv(run, plan):
    """Returns the bytes of a gated convolution, including the gate's SiLU."""
    return _gated(run, plan, True, run.s * plan.e * run.computed)


def _gated(run, plan, keeps_gate, inner):
    """Returns the bytes of projections, convolutions and `inner`, the operations after each direction's convolution.

    `keeps_gate` is True if `inner` keeps z itself, and False if it keeps its own copy.
    """
    s, a, d, e = run.s, run.computed, plan.d, plan.e
    reversed_directions = plan.directions - 1
    kept = s * d * a + s * e * a + _copies(run, 3 * d * e)
    if keeps_gate or run.convolution == "native":
        kept += 2 * s * e * a  # x and z are views of the projection
    kept += reversed_directions * s * e * a * (keeps_gate + (run.convolution == "native"))
    return kept + plan.directions * (_convolution(run, plan) + inner)


def _convolution(run, plan):
    """Returns the bytes of the output and, for "portable", of the padded input and the SiLU's input."""
    s, a, e = run.s, run.computed, plan.e
    return s * e * a + (run.b * (run.t + plan.w - 1) * e * a + s * e * a if run.convolution == "portable" else 0)


def _ssm(run, plan):
    """Returns the bytes of the SSM's projections in one direction."""
    s, a, e, n, r = run.s, run.computed, plan.e, plan.n, plan.r
    kept = _copies(run, 2 * e * (r + n)) + 2 * 4 * e * n + s * (r + 2 * n) * a
    return kept + (_norm(run, s, r + 2 * n) + 8 * s if plan.config["mixer_rms_norm"] else 0)


def _native(run, e, n):
    """Returns the bytes of delta and of one state per 16 tokens."""
    channels = math.ceil(e / _CHUNK) * _CHUNK
    return run.s * e * run.computed + 4 * run.b * math.ceil(run.t / _CHUNK) * channels * n


def _gating_and_masks(run, e, n):
    """Returns the bytes of delta before and after softplus, of the gate and its input, and of float32 inputs."""
    return 4 * (4 * run.s * e + (2 * run.s * (e + n) if run.cast else 0))


def chunk_of(run, e, n):
    """Returns the tokens per chunk of "portable"."""
    return max(1, min(_LONGEST_CHUNK, _CACHED_NUMBERS // (run.b * e * n)))


def _portable(run, e, n):
    """Returns the bytes of "portable", which keeps one state per chunk."""
    return _gating_and_masks(run, e, n) + 4 * run.b * e * n * math.ceil(run.t / chunk_of(run, e, n))


def _associative(run, e, n):
    """Returns the bytes of "associative": decay, inputs and results per tree level, and the states."""
    return _gating_and_masks(run, e, n) + 4 * run.s * e + 4 * run.b * e * n * (_tree(run.t) + run.t)


def _reference(run, e, n):
    """Returns the bytes of "reference", which keeps decay and state per token."""
    return _gating_and_masks(run, e, n) + 4 * run.s * e + 4 * run.b * e * n * 2 * run.t


def _tree(length):
    """Returns the tokens whose decay, inputs and results the tree of "associative" keeps, summed over levels."""
    kept = 0
    while length > 1:
        kept += 2 * length + length // 2
        length //= 2
    return kept


# Bytes per scan besides its inputs u, z, B and C, as functions of `(run, e, n)` by implementation.
SCANS = {"native": _native, "portable": _portable, "associative": _associative, "reference": _reference}


def _attention(run, plan):
    s, a, d = run.s, run.computed, plan.d
    window, blocks = plan.config["attention_window"], attends_in_blocks(run, plan)
    kept = s * d * a + _copies(run, 2 * d * d + 2 * d * plan.g * plan.c)
    # Queries, outputs, keys and values, and the logarithm of each softmax's sum.
    kept += s * (2 * d + 2 * (plan.g * plan.c if blocks else d)) * a + 4 * run.b * plan.h * run.t
    # The input of the output projection is a copy on a CPU, whose kernel puts heads before tokens.
    kept += s * d * a if run.platform == "cpu" and not blocks else 0
    if window and not blocks:
        kept += run.b * run.t * run.t * a
    if plan.config["use_rope"]:
        kept += 4 * 4 * (run.b if window else 1) * run.t * plan.c // 2
    return kept


def _hidden(run, plan, rows):
    """Returns the bytes of a hidden layer: gate, SiLU, other half and product, or two tensors for GELU."""
    return (4 if plan.config["use_swiglu"] else 2) * rows * plan.f * run.computed


def _dense(run, plan):
    return run.s * plan.d * run.computed + _hidden(run, plan, run.s) + _copies(run, perceptron(plan))


def _moe(run, plan):
    s, a, d, x = run.s, run.computed, plan.d, plan.x
    assignments = rows = s * plan.chosen
    if plan.config["capacity_factor"] is not None:
        rows = x * min(s, max(1, math.ceil(assignments * plan.config["capacity_factor"] / x)))
    # Tokens in float32, probabilities and logits, weights and indices.
    router = 4 * s * (d + 2 * x + 2) + assignments * (4 + 8)
    # Tokens sorted by expert, expert outputs in the original order, and both permutations.
    experts = rows * d * a + _hidden(run, plan, rows) + assignments * (d * a + a + 16)
    return router + experts + _copies(run, x * perceptron(plan))


_MIXERS = {"mamba": _mamba, "gated_conv": _gated_conv, "attention": _attention}
_FEED_FORWARDS = {"dense": _dense, "moe": _moe, None: lambda run, plan: 0}


def encoder(run, plan):
    return sum(encoder_parts(run, plan))


def encoder_parts(run, plan):
    """Yields bytes per convolution: the padded input, the kernel, and the tensors that norm and SiLU keep."""
    for i, (channels, width, side, stride) in enumerate(encoder_convolutions(plan)):
        before, after = run.grid[i : i + 2]
        kept = run.images * _padded(before, side, stride) * channels * run.computed
        kept += side * side * channels * width * run.computed  # the transposed kernel
        pixels = run.images * math.prod(after)
        if plan.image.stem == "patchify":
            kept += _norm(run, pixels, width)
        else:
            kept += pixels * width * (4 + 4 + run.computed)  # float32, centred float32, and the SiLU's input
        yield kept


def _padded(size, side, stride):
    """Returns the pixels of a convolution's input. Asymmetric padding needs a padded copy in PyTorch."""
    missing = [max(0, (-(-pixels // stride) - 1) * stride + side - pixels) for pixels in size]
    if any(count % 2 for count in missing):
        size = [pixels + count for pixels, count in zip(size, missing, strict=True)]
    return math.prod(size)


def tokens(run, plan):
    """Returns the bytes for frames: features, positions and the SiLU's input. The mean keeps nothing."""
    if plan.image.tokens != "frames":
        return 0
    return run.cells * (2 * plan.d + 2) * run.computed + _copies(run, (plan.d + 2) * plan.d)


def readout(run, plan):
    """Returns the bytes of "seqpool": tokens for scores and for sums, weights and scores, and the two sums."""
    if plan.image.readout != "seqpool":
        return 0
    kept = run.s * plan.d * (run.computed + (4 if run.cast else 0)) + _copies(run, plan.d)
    return kept + 4 * 2 * run.s + 4 * run.b * (plan.d + 2)


def final_norm(run, plan):
    return _norm(run, run.s, plan.d)


def head(run, plan):
    """Returns the bytes of the head's input and, for a language model, of float32 logits and their cross-entropy.

    More logits than a chunk are those of a chunk, their gradient, and three numbers per token.
    """
    if plan.image:
        return 4 * run.b * (plan.d + 2 * plan.image.num_classes)
    words = plan.vocabulary[0]
    kept = run.s * plan.d * run.computed + _copies(run, plan.d * words)
    if 4 * run.s * words <= CHUNK_BYTES:
        return kept + 2 * 4 * run.s * words
    rows = tokens_per_chunk(run.s, words, run.platform)
    return kept + rows * words * (4 + run.computed) + 3 * 4 * run.s


def embedding(run, plan):
    """Returns the bytes of the token ids."""
    return 4 * run.s
