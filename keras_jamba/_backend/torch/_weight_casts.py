"""Casts of weights to the compute dtype in a captured step, in few launches.

Mixed precision casts each weight where a layer reads it, and casts its gradient back: two launches per weight, which
take longer than the copies. A captured step casts all weights at its beginning, and all gradients at its end.
"""

import torch

from keras_jamba._backend.torch._step_mode import StepMode


class WeightCasts(StepMode):
    """A mode in which `weight.to(dtype)` returns the tensor that `cast_all` has made, for weights cast once per step.

    A warm-up step under `recording()` finds them. The captured step runs under `replaying()`. Weights that a step
    assigns, and those of checkpointed layers, whose casts should not outlive the layer, are cast one by one.
    """

    def __init__(self):
        super().__init__()
        self.counts, self.made = {}, None

    def recording(self):
        self.counts, self.made = {}, None
        return self

    def replaying(self):
        return self

    def __exit__(self, *error):
        # The captured graph owns these tensors.
        self.made = None
        return super().__exit__(*error)

    def cast_all(self, weights):
        """Casts those of `weights` that the warm-up step has cast exactly once; the casts have gradients."""
        by_dtype, self.made = {}, {}
        for weight in weights:
            dtypes = self.counts.get(id(weight), [])
            if len(dtypes) == 1:
                by_dtype.setdefault(dtypes[0], []).append(weight)
        for dtype, group in by_dtype.items():
            found = _Casts.apply(dtype, *group)
            self.made |= {(id(w), dtype, w._version): x for w, x in zip(group, found, strict=True)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to and not kwargs and len(args) == 2 and _is_cast_of_weight(*args):
            weight, dtype = args
            if self.made is None:
                self.counts.setdefault(id(weight), []).append(dtype)
            elif (id(weight), dtype, weight._version) in self.made:
                return self.made[id(weight), dtype, weight._version]
        return function(*args, **kwargs)


def leave_out(tensors):
    """Tells the recording mode of this thread, if any, to cast these weights where they are read."""
    mode = WeightCasts.current()
    if mode is not None and mode.made is None:
        for x in tensors:
            mode.counts.setdefault(id(x), []).extend([None, None])


def _is_cast_of_weight(x, dtype):
    of_weight = isinstance(x, torch.Tensor) and x.is_leaf and x.requires_grad
    return of_weight and isinstance(dtype, torch.dtype) and dtype != x.dtype


class _Casts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        return tuple(_cast(weights, [dtype] * len(weights)))

    @staticmethod
    def backward(ctx, *gradients):
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        found = _cast([gradients[i] for i in places], [ctx.dtypes[i] for i in places])
        found = dict(zip(places, found, strict=True))
        return None, *(found.get(i) for i in range(len(gradients)))


def _cast(tensors, dtypes):
    """Returns the tensors in the given dtypes."""
    made = [torch.empty_like(x, dtype=dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return made
