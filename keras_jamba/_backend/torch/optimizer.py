"""Optimizer functions on PyTorch in few launches. One launch per weight would take milliseconds for hundreds."""

import torch
from torch.optim.adamw import adamw


def global_norm(tensors):
    tensors = [x if x.dtype == torch.float32 else x.float() for x in tensors]
    return torch.nn.utils.get_total_norm(tensors)


def scale_gradients(tensors, factor):
    found = iter(torch._foreach_mul([x for x in tensors if x is not None], factor))
    return [x if x is None else next(found) for x in tensors]


def has_fused_adamw():
    return True


class HostStepCounter:
    def __init__(self):
        self._cached = None, None, None

    def read(self, variable):
        tensor, version, value = self._cached
        same = tensor is variable.value and version == tensor._version
        return value if same else int(variable.value)

    def keep(self, variable, value):
        self._cached = variable.value, variable.value._version, value


@torch.no_grad()
def fused_adamw(weights, gradients, momentums, velocities, maxima, *, step, rate, betas, epsilon, decay):
    rate = getattr(rate, "value", rate)
    rate = float(rate) if not torch.is_tensor(rate) or rate.device.type == "cpu" else rate
    weights, momentums, velocities = ([v.value for v in each] for each in (weights, momentums, velocities))
    # PyTorch increments the step. It adds epsilon after the bias correction of the velocity, Keras before.
    steps = torch.full((len(weights),), step - 1.0, device=weights[0].device).unbind()
    adamw(
        weights,
        [_with_layout_of(w, g) for w, g in zip(weights, gradients, strict=True)],
        momentums,
        velocities,
        [v.value for v in maxima],
        list(steps),
        fused=True,
        amsgrad=bool(maxima),
        beta1=betas[0],
        beta2=betas[1],
        lr=rate,
        weight_decay=decay,
        eps=epsilon / (1 - betas[1] ** step) ** 0.5,
        maximize=False,
    )


@torch.no_grad()
def move_averages(pairs, share):
    averages, variables = zip(*((a.value, v.value) for a, v in pairs), strict=True)
    torch._foreach_lerp_(averages, variables, share)


def _with_layout_of(weight, gradient):
    if gradient.dtype == weight.dtype and gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)
