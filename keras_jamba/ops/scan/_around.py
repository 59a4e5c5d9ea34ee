"""The elementwise maths around the recurrence, shared by every implementation that does not fuse it."""

from keras import ops


def around(recurrence):
    """Makes the whole op from a bare recurrence.

    Args:
        recurrence: `(u, delta, A, B, C, initial_state) -> (y, last_state)`, all float32, with
            `h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t` and `y_t = C_t h_t`.

    Returns:
        `run` with the signature that every implementation has.
    """

    def run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state):
        dtype = u.dtype
        single = lambda x: x if x is None else ops.cast(x, "float32")  # noqa: E731
        u, delta, A, B, C, D, z, delta_bias = map(single, (u, delta, A, B, C, D, z, delta_bias))
        if delta_bias is not None:
            delta = delta + delta_bias
        if delta_softplus:
            delta = ops.softplus(delta)
        if initial_state is None:
            initial_state = ops.zeros((ops.shape(u)[0], *A.shape), "float32")
        y, last_state = recurrence(u, delta, A, B, C, single(initial_state))
        if D is not None:
            y = y + u * D
        if z is not None:
            y = y * ops.silu(z)
        return ops.cast(y, dtype), last_state

    return run
