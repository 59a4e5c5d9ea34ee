"""The recurrence for compilers (jax and tensorflow): a loop over tokens inside a loop over chunks.

The gradient is written by hand: the forward pass keeps one state a chunk, the backward pass runs a
chunk's states again and then its gradient back through them, so nothing of tokens x channels x state
is ever held.  The layout puts channels innermost (state, rows, channels): there the compiler
vectorises the exponentials, and the sum over the state is n plain additions of whole slices.
"""

from keras import ops

from keras_jamba import _backend

_LONGEST_CHUNK = 64


def recurrence(u, delta, A, B, C, initial_state, reset):
    """What `around` asks for."""
    resets = () if reset is None else (reset[:, :, None],)
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
        decay = layout.decay(delta, rates, resets)
        state = decay * state + (delta * u)[None] * layout.over_channels(B)
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
        return layout.decay(delta, rates, resets) * state + (delta * u)[None] * layout.over_channels(B), state

    def token(carry, inputs):
        grad_state, grad_rates = carry
        (u, delta, grad_y, B, C, *resets), before = inputs
        B, C, drive = layout.over_channels(B), layout.over_channels(C), delta * u
        decay = layout.decay(delta, rates, resets)
        state = decay * before + drive[None] * B
        grad_state = grad_state + grad_y[None] * C
        grad_C = layout.sum_channels(state * grad_y[None])
        grad_B = layout.sum_channels(grad_state * drive[None])
        grad_drive = _sum_state(grad_state * B)
        grad_state = grad_state * decay
        grad_exponent = grad_state * before
        grad_delta = _sum_state(grad_exponent * rates) + grad_drive * u
        grad_rates = grad_rates + grad_exponent * delta[None]
        return (grad_state, grad_rates), (grad_drive * delta, grad_delta, grad_B, grad_C)

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
    """Sum over the leading axis, pair by pair: up to ten times faster here than a reduction on a CPU."""
    parts = [x[i] for i in range(x.shape[0])]
    while len(parts) > 1:
        rest = parts[-1:] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + rest
    return parts[0]


class _Layout:
    """Moves between the op's layout and the loops': tokens (chunk, token, row, channel), states (n, row, channel).

    Rows are the batch. A batch of one is laid out as two rows of half the channels each: XLA drops an
    axis of length one and then, on a CPU, takes twice the time.
    """

    def __init__(self, u, A):
        self.batch, self.length, self.channels = ops.shape(u)
        self.state_size = A.shape[1]
        self.split = u.shape[0] == 1 and self.channels % 2 == 0
        self.rows = (2, self.channels // 2) if self.split else (self.batch, self.channels)
        self.count = (self.length + _LONGEST_CHUNK - 1) // _LONGEST_CHUNK
        self.size = (self.length + self.count - 1) // self.count

    def chunks(self, x):
        """(b, t, any) to (chunk, token, b, any). Tokens added at the end have delta = 0: they hold the state."""
        x = ops.pad(x, ((0, 0), (0, self.count * self.size - self.length), (0, 0)))
        x = ops.transpose(x, (1, 0, 2))
        return ops.reshape(x, (self.count, self.size, self.batch, x.shape[-1]))

    def channel_chunks(self, x):
        """(b, t, e) to (chunk, token, row, channel)."""
        return ops.reshape(self.chunks(x), (self.count, self.size, *self.rows))

    def unchunk(self, x, width):
        """The way back of `chunks` and of `channel_chunks`: (b, t, width)."""
        x = ops.reshape(x, (self.count * self.size, self.batch, width))
        return ops.transpose(x[: self.length], (1, 0, 2))

    def state(self, x):
        """(b or 1, e, n) to (n, row or 1, channel)."""
        x = ops.transpose(x, (2, 0, 1))
        return ops.reshape(x, (self.state_size, *self.rows)) if self.split else x

    def unstate(self, x):
        """The way back of `state`."""
        x = ops.reshape(x, (self.state_size, self.batch, self.channels))
        return ops.transpose(x, (1, 2, 0))

    def decay(self, delta, rates, resets):
        """What one token leaves of the state: `exp(delta A)`, or nothing where a document begins."""
        factors = ops.exp(delta[None] * rates)
        return factors * (1.0 - self.over_channels(resets[0])) if resets else factors

    def over_channels(self, x):
        """B or C of one token, (b, n), or its reset, (b, 1), to a shape that broadcasts against a state."""
        return ops.transpose(x)[:, :, None]

    def sum_channels(self, x):
        """Sum of a state-like (n, row, channel) over what B and C of one token, (b, n), are shared by."""
        if _backend.tensors.platform() == "cpu":
            # XLA adds along the innermost axis one by one on a CPU, and its matrix product does not.
            x = ops.matmul(x, ops.ones((x.shape[2],), x.dtype))
        else:
            x = ops.sum(x, axis=2)
        return ops.transpose(ops.sum(x, axis=1, keepdims=True) if self.split else x)
