"""Gradients on PyTorch."""

import contextlib

import torch
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from keras_jamba._backend.torch import _constants, _weight_casts
from keras_jamba._backend.torch.tensors import needs_static_shapes


def custom_gradient(forward, backward, plain=None, has_loops=True, once=None):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            outputs, residuals = forward(*tensors)
            kept, ctx.structure = _pytree.tree_flatten(residuals)
            ctx.save_for_backward(*kept)
            return outputs

        @staticmethod
        def backward(ctx, *gradients):
            if once is not None:
                return Gradient.apply(
                    ctx.structure, ctx.needs_input_grad, len(gradients), *gradients, *ctx.saved_tensors
                )
            return found(ctx.structure, ctx.needs_input_grad, gradients, ctx.saved_tensors)

    class Gradient(torch.autograd.Function):
        """The gradient as a function of all its inputs: every path of a second derivative meets the error."""

        @staticmethod
        def forward(ctx, structure, needed, count, *tensors):
            return found(structure, needed, tensors[:count], tensors[count:])

        @staticmethod
        def backward(ctx, *gradients):
            raise RuntimeError(once)

    def found(structure, needed, gradients, saved):
        residuals = _pytree.tree_unflatten(list(saved), structure)
        wanted = zip(backward(residuals, gradients if len(gradients) > 1 else gradients[0]), needed, strict=True)
        return tuple((g() if callable(g) else g) if each else None for g, each in wanted)

    def function(*tensors):
        if plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return plain(*tensors)
        return Function.apply(*tensors)

    return function


def is_transformed():
    # `torch.compile` cannot trace the question.
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def can_trace_custom_gradient():
    # Functions without `setup_context` support neither torch.func nor forward mode.
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return not (needs_static_shapes() or torch.jit.is_tracing() or is_transformed() or forward_mode)


def remat(function, draws):
    def run(*tensors):
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if captured and draws:
            raise RuntimeError(
                "A CUDA graph cannot restore the state of the random generator. Received: a checkpointed layer that "
                "draws random numbers. Run its steps without a graph."
            )
        # Early stopping ends the second run with an exception, whose frames keep all results until Python collects
        # garbage.
        with set_checkpoint_early_stop(False):
            _weight_casts.leave_out(tensors)
            contexts = lambda: (contextlib.nullcontext(), _constants.in_recomputation())  # noqa: E731
            given = dict(use_reentrant=False, preserve_rng_state=not captured, context_fn=contexts)
            return checkpoint(function, *tensors, **given)

    return run


def input_gradient(function, x):
    # The caller may have disabled gradients. `torch.autograd.grad` leaves `.grad` of the weights unchanged.
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(function(x), x, materialize_grads=True)[0]
