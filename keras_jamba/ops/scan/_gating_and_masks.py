"""Softplus, mask, documents, skip and gate around the recurrence of every implementation, in float32."""

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._tokens import begins_document, zero_padding


def why_not_traced(call):
    """Returns None, or the reason why a trace of this call is wrong for other lengths."""
    if _backend.tensors.is_traced_by_torchscript() and int(call.length) == 1:
        return (
            "TorchScript, which torch.onnx also uses, keeps the length of its example, and length 1 means an unknown "
            "length: fix the length with keras.Input((t, d)), or export on TensorFlow"
        )
    return None


def with_gating_and_masks(recurrence):
    """Returns the complete op of a recurrence.

    Args:
        recurrence: `(u, delta, A, B, C, initial_state, reset) -> (y, last_state)`, all float32, with
            `h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t` and `y_t = C_t h_t`. `reset` `(b, t)` bool is True at the
            first token of a document, or None if it is False everywhere. There zeros replace `h_{t-1}` by selection,
            and in the gradient too: a product with 0 would keep NaN and infinity of the document before.

    Returns:
        `run`, with the signature of every implementation.
    """

    def run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, segment_ids):
        dtype = u.dtype
        single = lambda x: x if x is None else ops.cast(x, "float32")  # noqa: E731
        u, delta, A, B, C, D, z, delta_bias = map(single, (u, delta, A, B, C, D, z, delta_bias))
        u, delta, B, C, z = (zero_padding(x, mask) for x in (u, delta, B, C, z))
        if delta_bias is not None:
            delta = delta + delta_bias
        if delta_softplus:
            delta = ops.softplus(delta)
        if mask is not None:
            # With delta = 0 the decay is 1 and the input is 0: the state stays exactly the same.
            delta = ops.where(ops.expand_dims(mask, 2), delta, 0.0)
        if initial_state is None:
            initial_state = ops.zeros((ops.shape(u)[0], *A.shape), "float32")
        reset = None if segment_ids is None else begins_document(segment_ids, mask)
        y, last_state = recurrence(u, delta, A, B, C, single(initial_state), reset)
        if D is not None:
            y = y + u * D
        if z is not None:
            y = y * ops.silu(z)
        if mask is not None:
            y = ops.where(ops.expand_dims(mask, 2), y, 0.0)
        return ops.cast(y, dtype), last_state

    return run
