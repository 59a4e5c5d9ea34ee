"""The recurrence for compiled backends (JAX and TensorFlow): a loop over tokens inside a loop over chunks.

The gradient is written by hand. The forward pass keeps one state per chunk. The backward pass recomputes the states of
a chunk and then its gradient in reverse, so no tensor of size tokens x channels x state exists. The layout is (state,
rows, channels): with channels innermost the compiler vectorises the exponentials, and the sum over the state is n
additions of complete slices.
"""

from keras import ops

from keras_jamba import _backend

_LONGEST_CHUNK = 64


def recurrence(u, delta, A, B, C, initial_state, reset):
    """Computes the recurrence that `with_gating_and_masks` requires."""
    # A custom gradient takes tensors of one floating dtype alone.
    resets = () if reset is None else (ops.cast(reset, "float32")[:, :, None],)
    return _differentiable(u, delta, A, B, C, initial_state, *resets)


def _forward(u, delta, A, B, C, initial_state, *resets):
    layout = _Layout(u, A)
    tokens = (*map(layout.channel_chunks, (u, delta)), *map(layout.chunks, (B, C, *resets)))
    rates = layout.state(A[None])

    def chunk(state, tokens):
        after, y = _backend.compilation.scan(token, state, tokens)
        return after, (y, state)

    def token(state, token):
        u, delta, B, C, *resets = token
        decay = ops.exp(delta[None] * rates)
        state = decay * layout.continued(state, resets) + (delta * u)[None] * layout.over_channels(B)
        return state, _sum_state(state * layout.over_channels(C))

    last, (y, first_states) = _backend.compilation.scan(chunk, layout.state(initial_state), tokens)
    outputs = layout.unchunk(y, layout.channels), layout.unstate(last)
    return outputs, (u, delta, A, B, C, resets, first_states)


def _backward(residuals, gradients):
    u, delta, A, B, C, resets, first_states = residuals
    grad_y, grad_last = gradients
    layout = _Layout(u, A)
    tokens = (*map(layout.channel_chunks, (u, delta, grad_y)), *map(layout.chunks, (B, C, *resets)))
    rates = layout.state(A[None])

    def chunk(carry, inputs):
        tokens, first_state = inputs
        _, states_before = _backend.compilation.scan(replay, first_state, tokens)
        return _backend.compilation.scan(token, carry, (tokens, states_before), reverse=True)

    def replay(state, token):
        u, delta, _, B, _, *resets = token
        decay = ops.exp(delta[None] * rates)
        return decay * layout.continued(state, resets) + (delta * u)[None] * layout.over_channels(B), state

    def token(carry, inputs):
        grad_state, grad_rates = carry
        (u, delta, grad_y, B, C, *resets), before = inputs
        B, C, drive = layout.over_channels(B), layout.over_channels(C), delta * u
        decay, before = ops.exp(delta[None] * rates), layout.continued(before, resets)
        state = decay * before + drive[None] * B
        grad_state = grad_state + grad_y[None] * C
        grad_C = layout.sum_channels(state * grad_y[None])
        grad_B = layout.sum_channels(grad_state * drive[None])
        grad_drive = _sum_state(grad_state * B)
        grad_state = grad_state * decay
        grad_exponent = grad_state * before
        grad_delta = _sum_state(grad_exponent * rates) + grad_drive * u
        grad_rates = grad_rates + grad_exponent * delta[None]
        return (layout.continued(grad_state, resets), grad_rates), (grad_drive * delta, grad_delta, grad_B, grad_C)

    grad_last = layout.state(grad_last)
    carry = (grad_last, ops.zeros_like(grad_last))
    inputs = (tokens, first_states)
    (grad_first, grad_rates), gradients = _backend.compilation.scan(chunk, carry, inputs, reverse=True)
    widths = (layout.channels, layout.channels, layout.state_size, layout.state_size)
    grad_u, grad_delta, grad_B, grad_C = map(layout.unchunk, gradients, widths)
    grad_A = ops.sum(layout.unstate(grad_rates), axis=0)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, layout.unstate(grad_first), *(None for _ in resets)


_differentiable = _backend.autodiff.custom_gradient(_forward, _backward)


def _sum_state(x):
    """Computes the sum over the leading axis pair by pair: up to ten times faster here than a reduction on a CPU."""
    parts = [x[i] for i in range(x.shape[0])]
    while len(parts) > 1:
        rest = parts[-1:] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + rest
    return parts[0]


class _Layout:
    """Conversions between the layouts of the op and of the loops.

    The loops use tokens `(chunk, token, row, channel)` and states `(n, row, channel)`. Rows are the batch. A batch of
    one becomes two rows of half the channels: XLA drops an axis of length one and then takes twice the time on a CPU.
    """

    def __init__(self, u, A):
        self.batch, self.length, self.channels = ops.shape(u)
        self.state_size = A.shape[1]
        self.split = u.shape[0] == 1 and self.channels % 2 == 0
        self.rows = (2, self.channels // 2) if self.split else (self.batch, self.channels)
        self.count = (self.length + _LONGEST_CHUNK - 1) // _LONGEST_CHUNK
        self.size = (self.length + self.count - 1) // self.count

    def chunks(self, x):
        """Returns `x (b, t, any)` as `(chunk, token, b, any)`. Padding has delta = 0, which keeps the state."""
        x = ops.pad(x, ((0, 0), (0, self.count * self.size - self.length), (0, 0)))
        x = ops.transpose(x, (1, 0, 2))
        return ops.reshape(x, (self.count, self.size, self.batch, x.shape[-1]))

    def channel_chunks(self, x):
        """Returns `x (b, t, e)` as `(chunk, token, row, channel)`."""
        return ops.reshape(self.chunks(x), (self.count, self.size, *self.rows))

    def unchunk(self, x, width):
        """Inverts `chunks` and `channel_chunks`: returns `(b, t, width)`."""
        x = ops.reshape(x, (self.count * self.size, self.batch, width))
        return ops.transpose(x[: self.length], (1, 0, 2))

    def state(self, x):
        """Returns `x (b or 1, e, n)` as `(n, row or 1, channel)`."""
        x = ops.transpose(x, (2, 0, 1))
        return ops.reshape(x, (self.state_size, *self.rows)) if self.split else x

    def unstate(self, x):
        """Inverts `state`: returns `(b, e, n)`."""
        x = ops.reshape(x, (self.state_size, self.batch, self.channels))
        return ops.transpose(x, (1, 2, 0))

    def continued(self, state, resets):
        """Returns the state before one token, or its gradient: zeros where a document begins."""
        return ops.where(self.over_channels(resets[0]) > 0, 0.0, state) if resets else state

    def over_channels(self, x):
        """Returns B or C `(b, n)`, or the reset `(b, 1)`, of one token in a shape that broadcasts against a state."""
        return ops.transpose(x)[:, :, None]

    def sum_channels(self, x):
        """Computes the sum over channels of `x (n, row, channel)`, as `(b, n)`: the shape of one token's B and C."""
        if _backend.tensors.platform() == "cpu":
            # On a CPU, XLA sums the innermost axis one element at a time; its matrix product is vectorised.
            x = ops.matmul(x, ops.ones((x.shape[2],), x.dtype))
        else:
            x = ops.sum(x, axis=2)
        return ops.transpose(ops.sum(x, axis=1, keepdims=True) if self.split else x)
