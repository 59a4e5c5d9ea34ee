"""The recurrence for PyTorch's eager mode, in chunks of tokens, with one fused multiply-add per token.

The gradient is written by hand. The forward pass keeps one state per chunk, and the backward pass recomputes the
states of a chunk, so no tensor of size tokens x channels x state exists. A chunk fits into a core's cache. The layout
is (token, row, state, channel): with channels innermost, every operation is contiguous or broadcasts over complete
rows. The sums over state and channels are batched matrix products.
"""

import torch

_CACHED_FLOATS = 1 << 19


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, initial_state, reset):
        rates = A.T.contiguous()
        state = initial_state.transpose(1, 2).contiguous()
        y = torch.empty_like(u)
        first_states = []
        for span in _spans(u, A):
            first_states.append(state)
            _, states = _states(_chunk(span, u, delta, B), rates, state, _begins(span, reset))
            y[:, span] = _over_state(_chunk(span, C)[0], states).transpose(0, 1)
            state = states[-1].clone()
        ctx.save_for_backward(u, delta, A, B, C, reset, *first_states)
        return y, state.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, grad_y, grad_last):
        return *_RecurrenceGradient.apply(grad_y, grad_last, *ctx.saved_tensors), None


class _RecurrenceGradient(torch.autograd.Function):
    """The gradient as a function of all its inputs: every path of a second derivative meets the error.

    With `once_differentiable`, `torch.autograd.grad` leaves such a path out if there are others.
    """

    @staticmethod
    def forward(ctx, grad_y, grad_last, u, delta, A, B, C, reset, *first_states):
        first_states = list(first_states)
        rates = A.T.contiguous()
        grads = tuple(torch.empty_like(x) for x in (u, delta, B, C))
        grad_rates = torch.zeros_like(rates)
        grad_state = grad_last.transpose(1, 2).contiguous()
        for span in reversed(_spans(u, A)):
            tokens = _chunk(span, u, delta, B, C, grad_y)
            first, begins = first_states.pop(), _begins(span, reset)
            chunk_grads, grad_state, more = _chunk_gradient(tokens, rates, first, grad_state, begins)
            grad_rates += more
            for grad, chunk_grad in zip(grads, chunk_grads, strict=True):
                grad[:, span] = chunk_grad.transpose(0, 1)
        grad_u, grad_delta, grad_B, grad_C = grads
        return grad_u, grad_delta, grad_rates.T, grad_B, grad_C, grad_state.transpose(1, 2)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "The portable scan has no second derivatives on PyTorch. Received: a gradient of its gradient. "
            "Compute it with implementation='reference'."
        )


# The recurrence that `with_gating_and_masks` requires.
recurrence = _Recurrence.apply


def _spans(u, A):
    batch, length, _ = u.shape
    size = max(1, min(64, _CACHED_FLOATS // max(1, batch * A.numel())))
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _chunk(span, *tensors):
    """Returns one chunk of `(b, t, any)` tensors as contiguous `(token, b, any)`."""
    return tuple(x[:, span].transpose(0, 1).contiguous() for x in tensors)


def _begins(span, reset):
    """Returns `(token, b, 1, 1)` bool: whether a document begins; None without `reset`."""
    return None if reset is None else _chunk(span, reset)[0][:, :, None, None]


def _continued(x, begins, tokens):
    """Returns the states before `tokens`, or their gradients: zeros where a document begins."""
    return x if begins is None else x.masked_fill(begins[tokens], 0.0)


def _states(tokens, rates, state, begins):
    u, delta, B = tokens
    decay = (delta.unsqueeze(2) * rates).exp_()
    states = (delta * u).unsqueeze(2) * B.unsqueeze(3)
    for i, (now, factor) in enumerate(zip(states.unbind(0), decay.unbind(0), strict=True)):
        state = now.addcmul_(factor, _continued(state, begins, i))
    return decay, states


def _chunk_gradient(tokens, rates, first, grad_state, begins):
    u, delta, B, C, grad_y = tokens
    decay, states = _states((u, delta, B), rates, first, begins)
    grad_C = _over_channels(states, grad_y)
    grads = grad_y.unsqueeze(2) * C.unsqueeze(3)
    factors, slots = decay.unbind(0), grads.unbind(0)
    slots[-1].add_(grad_state)
    for i in range(len(slots) - 1, 0, -1):
        if begins is None:
            slots[i - 1].addcmul_(factors[i], slots[i])
        else:
            slots[i - 1].add_(_continued(factors[i] * slots[i], begins, i))
    drive = delta * u
    grad_B = _over_channels(grads, drive)
    grad_drive = _over_state(B, grads)
    grads *= decay
    grad_state = _continued(grads[0], begins, 0).clone()
    grads[0] *= _continued(first, begins, 0)
    grads[1:] *= _continued(states[:-1], begins, slice(1, None))
    grad_delta = (grads * rates).sum(2) + grad_drive * u
    grad_rates = grads.mul_(delta.unsqueeze(2)).sum((0, 1))
    return (grad_drive * delta, grad_delta, grad_B, grad_C), grad_state, grad_rates


def _over_state(weights, x):
    """Computes the sum over n of weights `(token, b, n)` times x `(token, b, n, e)`."""
    return torch.matmul(weights.unsqueeze(2), x).squeeze(2)


def _over_channels(x, weights):
    """Computes the sum over e of x `(token, b, n, e)` times weights `(token, b, e)`."""
    return torch.matmul(x, weights.unsqueeze(3)).squeeze(3)
