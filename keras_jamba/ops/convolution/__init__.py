"""The causal depthwise convolution before the scan: one function, several implementations."""

from dataclasses import dataclass
from typing import Literal

from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Tensor, Tensors
from keras_jamba.ops import _checks
from keras_jamba.ops._implementations import choose
from keras_jamba.ops._sharding import shard_map
from keras_jamba.ops._tokens import compaction, document_numbers
from keras_jamba.ops.convolution import native, portable, triton

_FASTEST_FIRST = {
    "cpu": {"native": native, "portable": portable},
    "gpu": {"triton": triton, "portable": portable},
    "tpu": {"portable": portable},
}


_SHAPES = {"x": "bte", "kernel": "we", "bias": "e", "initial_state": "bse"}


@dataclass(frozen=True)
class _Call:
    """Properties of a call that `why_not` reads: the platform, the shape (b, t, e) and the kernel width."""

    platform: str
    shape: tuple
    width: int


def causal_depthwise_conv(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    *,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    implementation: str | None = None,
) -> Tensors:
    """Convolves every channel with its own kernel over the current token and the w - 1 tokens before it.

    `y_t = bias + sum over i of kernel[i] * x_{t - (w - 1) + i}`. The last row of the kernel multiplies the current
    token: a cross-correlation, as in PyTorch's `conv1d`. The initial state precedes the first token.

    Args:
        x: `(b, t, e)`.
        kernel: `(w, e)`.
        bias: `(e,)` or None.
        initial_state: `(b, w - 1, e)`, the inputs before the first token; None for zeros.
        return_last_state: whether to also return the last w - 1 inputs.
        mask: `(b, t)` bool or None, False for padding. Windows and the last state skip padding and use the real
            tokens before it. The output of padding is zero.
        segment_ids: `(b, t)` integers or None: the document of each token. A change of the id begins a document, so
            0 1 0 are three documents. Windows never reach into an earlier document. The initial state belongs to the
            first document.
        activation: None or "silu", applied to the output.
        implementation: None for the fastest that can run, "native" (the C library, on a CPU), "triton" (on a GPU) or
            "portable".

    Returns:
        `(b, t, e)` in the dtype of `x`. With `return_last_state`, that and the last state `(b, w - 1, e)` in the
        same dtype.

    Raises:
        ValueError: if shapes do not match, if a dtype is not floating-point, or if the implementation is unknown or
            cannot run.
    """
    tensors = {"x": x, "kernel": kernel, "bias": bias, "initial_state": initial_state}
    tensors = {name: x if x is None else _backend.tensors.as_tensor(x) for name, x in tensors.items()}
    _check(tensors)
    _checks.check_choice("activation", activation, (None, "silu"))
    x, width = tensors["x"], tensors["kernel"].shape[0]
    mask, segment_ids = _checks.check_tokens(mask, segment_ids, x.shape)
    if return_last_state and x.shape[1] == 1 and mask is None and segment_ids is None and implementation is None:
        weights, state = (tensors["kernel"], tensors["bias"]), tensors["initial_state"]
        if state is not None and (
            found := _backend.decoding.convolution_step(x, *weights, state=state, silu=activation == "silu")
        ):
            return found
    call = _Call(_backend.tensors.platform(x), tuple(x.shape), width)
    chosen = choose("causal_depthwise_conv", _FASTEST_FIRST[call.platform], implementation, call)
    given = tensors | dict(mask=mask, segment_ids=segment_ids)
    run = lambda **given: (chosen.run(**given, silu=activation == "silu"),)  # noqa: E731
    (y,) = shard_map(run, given, _SHAPES | {"mask": "bt", "segment_ids": "bt"}, ("bte",))
    if not return_last_state:
        return y
    return y, last_inputs(x, tensors["initial_state"], mask, segment_ids, width)


def _check(tensors):
    _checks.check_given(tensors, ("x", "kernel"))
    present = {name: x for name, x in tensors.items() if x is not None}
    _checks.check_floating(present)
    _checks.check_shapes({"kernel": present["kernel"]}, _SHAPES)
    state, width = tensors["initial_state"], present["kernel"].shape[0]
    if state is not None and (len(state.shape) != 3 or state.shape[1] != width - 1):
        raise ValueError(
            f"initial_state must have the shape (b, w - 1, e) with w={width}. Received: initial_state.shape="
            f"{tuple(state.shape)}. Pass the last state of a call with the same kernel width."
        )
    if width == 0:
        raise ValueError(
            f"kernel must cover at least one token. Received: kernel.shape={tuple(present['kernel'].shape)}. "
            "Give it the shape (w, e)."
        )
    _checks.check_shapes(present, _SHAPES)


def last_inputs(x, initial_state, mask, segment_ids, width):
    """Returns the state after a convolution: the last w - 1 real inputs, zeros in place of other documents."""
    if width == 1:
        return x[:, :0]
    if initial_state is None:
        initial_state = ops.zeros((ops.shape(x)[0], width - 1, x.shape[2]), x.dtype)
    initial_state = ops.cast(initial_state, x.dtype)
    if mask is None and segment_ids is None:
        return ops.concatenate([initial_state, x[:, 1 - width :]], axis=1)[:, 1 - width :]
    if mask is None:
        mask = ops.ones_like(segment_ids, "bool")
    order, _ = compaction(mask)
    count = ops.sum(ops.cast(mask, "int32"), axis=1, keepdims=True)
    # Indices among the real tokens; negative ones lie before the row.
    number = count + ops.arange(1 - width, 0, dtype="int32")[None]
    inside = number >= 0
    index = _backend.tensors.take_tokens(order, ops.maximum(number, 0))
    before = ops.minimum(number + width - 1, width - 2)
    state = ops.where(
        inside[..., None],
        _backend.tensors.take_tokens(x, index),
        _backend.tensors.take_tokens(initial_state, before),
    )
    if segment_ids is None:
        return state
    # The tokens before the row belong to its first document.
    numbers = _backend.tensors.take_tokens(document_numbers(segment_ids, mask), index)
    numbers = ops.where(inside, numbers, 0)
    return ops.where(ops.equal(numbers, numbers[:, -1:])[..., None], state, 0.0)
