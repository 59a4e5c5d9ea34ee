"""Tokens sorted by expert, with Triton kernels for the matrix products or only for the steps between them, on a GPU.

Triton products gather and scatter rows themselves, and fuse the activation and the experts' weights. The only residuals
are the products of the first layer. With Triton products the index x means no expert; the gradient of its weight is
undefined.
"""

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._triton import grouped as kernels
from keras_jamba.ops.experts._sorting import Sorted, in_one_dtype, sorted_by_expert

_launcher = _backend.kernels.triton_launcher
# The default for matrix products: "triton", or the backend's own "library" if the backend prefers it.
PRODUCTS = "library" if _backend.numerics.prefers_grouped_matmul() else "triton"


def why_not(call):
    if call.limited:
        return "it does not support capacity_factor"
    if call.platform != "gpu":
        return "it requires a GPU"
    if reason := _backend.kernels.why_no_triton():
        return reason
    if not isinstance(call.tokens, int) or call.tokens == 0:
        return "it requires a static number of tokens above zero"
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"it supports bfloat16, float16 and float32, not {call.dtype}"
    return None


def run(tokens, weights, indices, up_bank, down_bank, gate_bank, products=None):
    given = tokens.dtype
    tokens, up_bank, down_bank, gate_bank = in_one_dtype(tokens, up_bank, down_bank, gate_bank)
    products, dtype = products or PRODUCTS, keras.backend.standardize_dtype(tokens.dtype)
    if products == "library" and _backend.numerics.why_no_grouped_matmul(
        _backend.tensors.platform(tokens), dtype, up_bank.shape[1:]
    ):
        products = "triton"
    rows = sorted_by_expert(indices, up_bank.shape[0])
    banks = (down_bank, up_bank) if gate_bank is None else (down_bank, up_bank, gate_bank)
    return ops.cast(_MIXTURES[products](tokens, weights, *rows, *banks), given)


class _Kernels:
    """Matrix products in Triton, which gather and scatter rows themselves."""

    def __init__(self, rows):
        self.rows = rows

    def hidden(self, tokens, up_bank, gate_bank, keep):
        rows = self.rows
        return kernels.first_product(_launcher(), tokens, rows.source, rows.counts, up_bank, gate_bank, keep)

    def outputs(self, hidden, down_bank, weights):
        return self._summed(
            kernels.rows_product(
                _launcher(), hidden, down_bank, self.rows.counts, target=self.rows.order, scale=weights
            )
        )

    def hidden_gradient(self, gradient, down_bank):
        source, counts = self.rows.source, self.rows.counts
        return kernels.rows_product(_launcher(), gradient, down_bank, counts, transpose_rhs=True, source=source)

    def tokens_gradient(self, grad_up, up_bank, grad_gate, gate_bank):
        other = None if gate_bank is None else (grad_gate, gate_bank)
        counts, target = self.rows.counts, self.rows.order
        return self._summed(
            kernels.rows_product(_launcher(), grad_up, up_bank, counts, other, transpose_rhs=True, target=target)
        )

    def bank_gradients(self, tokens, grads, hidden, gradient):
        """Returns functions without arguments: for the gradient of down_bank, then one per element of `grads`."""
        # Gathering first is faster: a gather inside the sum over rows would wait for the row indices.
        given = lambda x: ops.take(x, self.rows.source, axis=0)  # noqa: E731
        bank = lambda a, b: kernels.bank_gradient(_launcher(), a, b, self.rows.counts)  # noqa: E731
        first = lambda grad: lambda: bank(given(tokens), grad)  # noqa: E731
        return [lambda: bank(hidden, given(gradient)), *map(first, grads)]

    def _summed(self, y):
        y = ops.reshape(y, (*self.rows.place.shape, y.shape[-1]))
        # Rows without an expert come last, and the kernel has not written their outputs.
        written = self.rows.place < ops.sum(self.rows.counts)
        return ops.sum(ops.where(written[..., None], y, ops.zeros((), y.dtype)), axis=1)


class _Library:
    """Matrix products of the backend, with the steps between them in Triton."""

    def __init__(self, rows):
        self.rows = rows

    def hidden(self, tokens, up_bank, gate_bank, keep):
        x = self._take_rows(tokens)
        up = self._product(x, up_bank)
        gate = None if gate_bank is None else self._product(x, gate_bank)
        hidden = kernels.activation(_launcher(), up, gate)
        return (hidden, up, gate) if keep else hidden

    def outputs(self, hidden, down_bank, weights):
        return kernels.combination(_launcher(), self._product(hidden, down_bank), self.rows.place, weights)

    def hidden_gradient(self, gradient, down_bank):
        return self._product(self._take_rows(gradient), down_bank, transpose_rhs=True)

    def tokens_gradient(self, grad_up, up_bank, grad_gate, gate_bank):
        x = self._product(grad_up, up_bank, transpose_rhs=True)
        other = None if gate_bank is None else self._product(grad_gate, gate_bank, transpose_rhs=True)
        return kernels.combination(_launcher(), x, self.rows.place, other=other)

    def bank_gradients(self, tokens, grads, hidden, gradient):
        counts = self.rows.counts
        first = lambda grad: lambda: _backend.numerics.grouped_matmul_weight_grad(self._take_rows(tokens), grad, counts)  # noqa: E731
        return [
            lambda: _backend.numerics.grouped_matmul_weight_grad(hidden, self._take_rows(gradient), counts),
            *map(first, grads),
        ]

    def _take_rows(self, tokens):
        return ops.take(tokens, self.rows.source, axis=0)

    def _product(self, x, bank, transpose_rhs=False):
        return _backend.numerics.grouped_matmul(x, bank, self.rows.counts, transpose_rhs)


def _mixture(products):
    """Returns the function of `(tokens, weights, *rows, down_bank, up_bank[, gate_bank])`, with its gradient."""

    def unpacked(tensors):
        tokens, weights, *rest = tensors
        count = len(Sorted._fields)
        down_bank, up_bank, *gate_bank = rest[count:]
        return tokens, weights, products(Sorted(*rest[:count])), down_bank, up_bank, *(gate_bank or [None])

    def plain(*tensors):
        tokens, weights, steps, down_bank, up_bank, gate_bank = unpacked(tensors)
        return steps.outputs(steps.hidden(tokens, up_bank, gate_bank, keep=False), down_bank, weights)

    def forward(*tensors):
        tokens, weights, steps, down_bank, up_bank, gate_bank = unpacked(tensors)
        hidden, up, gate = steps.hidden(tokens, up_bank, gate_bank, keep=True)
        return steps.outputs(hidden, down_bank, weights), (tensors, up, gate)

    def backward(residuals, gradient):
        tensors, up, gate = residuals
        tokens, weights, steps, down_bank, up_bank, gate_bank = unpacked(tensors)
        grad_hidden = steps.hidden_gradient(gradient, down_bank)
        # The weight is applied before the last product, so its output is not a residual.
        grad_up, grad_gate, grad_weights, hidden = kernels.activation_gradient(
            _launcher(), grad_hidden, up, gate, weights, steps.rows.order
        )
        grad_tokens = lambda: steps.tokens_gradient(grad_up, up_bank, grad_gate, gate_bank)  # noqa: E731
        grads = [grad_up] if gate is None else [grad_up, grad_gate]
        banks = steps.bank_gradients(tokens, grads, hidden, gradient)
        return grad_tokens, ops.reshape(grad_weights, weights.shape), *[None] * len(Sorted._fields), *banks

    return _backend.autodiff.custom_gradient(forward, backward, plain)


_MIXTURES = {"triton": _mixture(_Kernels), "library": _mixture(_Library)}
