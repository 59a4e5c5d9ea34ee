"""Reference formulas of the operations in float64 NumPy, written for readability."""

from math import erf

import numpy as np


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    u, delta, A, B, C = (np.asarray(x, "float64") for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = np.logaddexp(0, delta)
    state = np.zeros((u.shape[0], *A.shape)) if initial_state is None else np.asarray(initial_state)
    # Vectorized over tokens except for the recurrence: 65536 tokens would otherwise take ten seconds.
    decay, drive = np.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    states = np.empty_like(drive)
    for t in range(u.shape[1]):
        states[:, t] = state = decay[:, t] * state + drive[:, t]
    y = (states * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + D * u
    return (y if z is None else y * z / (1 + np.exp(-z))), state


def selective_scan_gradients(grad_y, grad_last, u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Backpropagates through time by hand, with softplus. Returns gradients in argument order, from `u` on."""
    u, A, B, C, D, z = (np.asarray(x, "float64") for x in (u, A, B, C, D, z))
    biased = np.asarray(delta, "float64") + delta_bias
    delta = np.logaddexp(0, biased)
    sigmoid = 1 / (1 + np.exp(-z))
    decay, drive = np.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    states = np.empty((u.shape[0], u.shape[1] + 1, *A.shape))
    states[:, 0] = initial_state
    for t in range(u.shape[1]):
        states[:, t + 1] = decay[:, t] * states[:, t] + drive[:, t]
    ungated = (states[:, 1:] * C[:, :, None]).sum(-1) + D * u
    grad_z = grad_y * ungated * sigmoid * (1 + z * (1 - sigmoid))
    grad = grad_y * z * sigmoid
    grad_states, grad_state = np.empty_like(drive), np.asarray(grad_last, "float64")
    for t in reversed(range(u.shape[1])):
        grad_states[:, t] = grad_state = grad_state + grad[:, t, :, None] * C[:, t, None]
        grad_state = grad_state * decay[:, t]
    grad_C = (states[:, 1:] * grad[..., None]).sum(2)
    grad_B = (grad_states * (delta * u)[..., None]).sum(2)
    grad_drive = (grad_states * B[:, :, None]).sum(-1)
    grad_exponent = grad_states * states[:, :-1] * decay
    grad_A = (grad_exponent * delta[..., None]).sum((0, 1))
    grad_u = grad * D + grad_drive * delta
    grad_delta = grad_drive * u + (grad_exponent * A).sum(-1)
    grad_delta = grad_delta / (1 + np.exp(-biased))
    grad_D, grad_bias = (grad * u).sum((0, 1)), grad_delta.sum((0, 1))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_state


def documents_alone(run, state, length, mask=None, segment_ids=None):
    """Computes each document of a row separately, from its real tokens only: the definition of masks and documents.

    Args:
        run: function `(tokens, state) -> (outputs, state)` of one row, where `tokens` are indices.
        state: initial state of the first document. Later documents begin with zeros.
        length: number of tokens in the row.
        mask, segment_ids: `(t,)` of this row, or None.

    Returns:
        `(outputs, last state)`. Outputs are zero at masked tokens.
    """
    real = np.arange(length) if mask is None else np.flatnonzero(mask)
    ids = np.zeros(length, int) if segment_ids is None else np.asarray(segment_ids)
    outputs, begin = {}, 0
    for end in range(1, len(real) + 1):
        if end == len(real) or ids[real[end]] != ids[real[begin]]:
            y, state = run(real[begin:end], state if begin == 0 else np.zeros_like(state))
            outputs |= dict(zip(real[begin:end], y, strict=True))
            begin = end
    width = len(next(iter(outputs.values()))) if outputs else 0
    return np.stack([outputs.get(t, np.zeros(width)) for t in range(length)]), state


def causal_depthwise_conv(x, kernel, bias, state):
    """Computes one row: `(t, e)`, `(k, e)`, `(e,)`, `(k - 1, e)` to `(outputs, last state)`."""
    window = np.concatenate([state, x]).astype("float64")
    k = len(kernel)
    y = np.stack([(kernel * window[t : t + k]).sum(0) + bias for t in range(len(x))])
    return y, window[len(window) - (k - 1) :]


def expert_mlp(tokens, weights, indices, up_bank, down_bank, gate_bank=None):
    """Computes one token and one expert at a time. GELU is exact: x times the normal distribution function of x."""
    tokens, weights, up, down = (np.asarray(x, "float64") for x in (tokens, weights, up_bank, down_bank))
    y = np.zeros_like(tokens)
    for row, (token, chosen) in enumerate(zip(tokens, indices, strict=True)):
        for weight, e in zip(weights[row], chosen, strict=True):
            hidden = token @ up[e]
            if gate_bank is None:
                hidden = hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2
            else:
                gate = token @ np.asarray(gate_bank[e], "float64")
                hidden = hidden * gate / (1 + np.exp(-gate))
            y[row] += weight * hidden @ down[e]
    return y


def expert_mlp_gradients(gradient, tokens, weights, indices, up_bank, down_bank, gate_bank=None):
    """Computes gradients by hand, in the order of the arguments from `tokens` on, without `indices`."""
    given = [tokens, weights, up_bank, down_bank] + ([] if gate_bank is None else [gate_bank])
    tokens, weights, up, down, *gate = (np.asarray(x, "float64") for x in given)
    found = [np.zeros_like(x) for x in (tokens, weights, up, down, *gate)]
    for row, choice in np.ndindex(*indices.shape):
        e, token, weight, grad = indices[row, choice], tokens[row], weights[row, choice], gradient[row]
        projected = token @ up[e]
        if gate:
            logit = token @ gate[0][e]
            sigmoid = 1 / (1 + np.exp(-logit))
            slope, gate_slope = logit * sigmoid, projected * sigmoid * (1 + logit * (1 - sigmoid))
            hidden = projected * slope
        else:
            cdf = (1 + np.vectorize(erf)(projected / np.sqrt(2))) / 2
            hidden = projected * cdf
            slope = cdf + projected * np.exp(-(projected**2) / 2) / np.sqrt(2 * np.pi)
        grad_hidden = down[e] @ grad
        found[1][row, choice] = hidden @ down[e] @ grad
        found[3][e] += weight * np.outer(hidden, grad)
        input_banks = [(2, up, slope)] + ([(4, gate[0], gate_slope)] if gate else [])
        for i, bank, local in input_banks:
            found[0][row] += weight * bank[e] @ (grad_hidden * local)
            found[i][e] += weight * np.outer(token, grad_hidden * local)
    return found


def attention(query, key, value, seen):
    """Computes attention among the `seen` `(b, t, s)` bool pairs; zeros for a query that sees no key."""
    return _attention(query, key, value, seen)[0]


def attention_gradients(grad, query, key, value, seen):
    """Returns the gradients of query, key and value for the gradient of the outputs."""
    _, weights, query, key, value = _attention(query, key, value, seen)
    grad, repeats = np.asarray(grad, "float64"), query.shape[2] // key.shape[2]
    wide_key, wide_value = (np.repeat(x, repeats, axis=2) for x in (key, value))
    of_weights = np.einsum("bthc,bshc->bhts", grad, wide_value)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) / query.shape[3] ** 0.5
    by_group = lambda x: x.reshape(*key.shape[:3], repeats, -1).sum(3)  # noqa: E731
    grad_key = by_group(np.einsum("bhts,bthc->bshc", of_scores, query))
    grad_value = by_group(np.einsum("bhts,bthc->bshc", weights, grad))
    return np.einsum("bhts,bshc->bthc", of_scores, wide_key), grad_key, grad_value


def _attention(query, key, value, seen):
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    wide_key, wide_value = (np.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    scores = np.einsum("bthc,bshc->bhts", query, wide_key) / query.shape[3] ** 0.5
    scores = np.where(seen[:, None], scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    return np.einsum("bhts,bshc->bthc", weights, wide_value), weights, query, key, value


def seen_pairs(documents, mask, causal, window=None, sinks=0):
    """Returns `(b, t, t)` bool, which tokens of packed rows see which, from the definition, token by token.

    `documents` `(b, t)` are equal for the tokens of a document. `mask` `(b, t)` is False for padding.
    """
    seen = np.zeros((*documents.shape, documents.shape[1]), bool)
    for row, (ids, real) in enumerate(zip(documents, mask, strict=True)):
        places = np.flatnonzero(real)
        first = {ids[t]: n for n, t in reversed(list(enumerate(places)))}
        for n, query in enumerate(places):
            for m, key in enumerate(places):
                near = window is None or abs(n - m) < window or m - first[ids[key]] < sinks
                seen[row, query, key] = ids[query] == ids[key] and near and (m <= n or not causal)
    return seen
