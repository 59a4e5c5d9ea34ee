"""Triton kernels on PyTorch: registered operators, which `torch.compile` does not trace into."""

import contextlib
import functools
import importlib.util
import logging
import math

import torch

from keras_jamba._backend.torch._c_kernels import Operator, row_step
from keras_jamba._backend.torch._fx_tracing import is_tracing
from keras_jamba._backend.torch._partial_evaluation import are_constant
from keras_jamba._triton import Gpu, norm

_logger = logging.getLogger("keras_jamba")


class LaunchedOperator(Operator):
    def computed(self, tensors, options, train, arguments):
        tensors = {name: self._readable(name, x) for name, x in tensors.items()}
        if self.backward:
            found = self.kernel.backward(_gpu(), tensors, options)
        else:
            found = self.kernel.forward(_gpu(), tensors, options, train)
        dtype = arguments[0].dtype if self.backward else torch.float32
        found = tuple(arguments[0].new_empty(0, dtype=dtype) if x is None else x for x in found)
        return found if len(found) > 1 else found[0]

    def _readable(self, name, x):
        if x is None or (name in self.kernel.strided and row_step(x) is not None):
            return x
        return x.contiguous()


@functools.cache
def why_not_here():
    """Returns None, or the reason why no Triton kernel runs on this machine."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() or torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return "Triton kernels need an NVIDIA GPU of capability 8.0 or more"
    return None


def _gpu(launch=None):
    cast = lambda x, dtype: x.to(_DTYPES.get(dtype, dtype))  # noqa: E731
    return Gpu(launch or _launched, row_step, cast, *_device())


@functools.cache
def _device():
    # Triton's interpreter runs without a GPU.
    if not torch.cuda.is_available():
        return 132, "", True, None
    properties = torch.cuda.get_device_properties()
    capability = torch.cuda.get_device_capability()
    given = properties.multi_processor_count, properties.name, capability == (9, 0), _clock
    return (*given, are_constant) if capability >= (9, 0) else given


def _clock(specs, run):
    if torch.cuda.is_current_stream_capturing():
        return None
    try:
        with torch.no_grad():
            arrays = {name: _filled(*spec) for name, spec in specs.items()}
            run(arrays), run(arrays)
            times = []
            for _ in range(5):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run(arrays)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
    except torch.OutOfMemoryError:
        return None
    except Exception:  # the plan exceeds the resources of a multiprocessor
        return math.inf
    return sorted(times)[2]


def _filled(shape, dtype, value):
    dtype = _DTYPES.get(dtype, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(value, range):
        return torch.arange(math.prod(shape), device=device).remainder(len(value)).to(dtype).reshape(shape)
    return torch.full(shape, value, dtype=dtype, device=device)


def _launched(
    kernel,
    grid,
    inputs,
    outputs,
    constants,
    num_warps=4,
    num_stages=3,
    registers=None,
    zeroed=(),
    overlaps=False,
    into=None,
):
    device = inputs[0].device
    new = lambda shape, dtype: torch.empty(shape, dtype=_DTYPES.get(dtype, dtype), device=device)  # noqa: E731
    made = [into[i] if into and i in into else new(*output) for i, output in enumerate(outputs)]
    for i in zeroed:
        # Not `torch.zeros`, which a captured step would take for a constant.
        made[i].zero_()
    if device.type == "meta":  # Keras computes shapes on it
        return made
    limit = {} if registers is None else {"maxnreg": registers}
    limit |= {"launch_pdl": True} if overlaps else {}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*inputs, *made, **constants, num_warps=num_warps, num_stages=num_stages, **limit)
    return made


_DTYPES = {"float32": torch.float32, "int32": torch.int32}


def why_not_triton():
    if why_not_here():
        return why_not_here()
    if is_tracing() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a traced or compiled function cannot contain such a kernel"
    # Without a rule, PyTorch would return a zero forward-mode derivative.
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivatives"
    return None


def can_differentiate():
    """Returns whether an `autograd.Function` of kernels has its gradient here: no transform and no tracer is active."""
    # Function transforms need rules that such classes have not.
    return why_not_triton() is None and torch._C._functorch.peek_interpreter_stack() is None


def is_batched(x):
    """Returns whether `torch.vmap`, or a gradient with `is_grads_batched=True`, runs over x."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


@functools.cache
def kernels_run(device):
    """Returns whether Triton compiles and runs kernels on a device. It needs a C compiler."""
    try:
        x = torch.ones(1, 32, device=device)
        y, inverse = norm.forward(_gpu(), x, 32, x[0], 1e-6)
        norm.gradients(_gpu(), y, x, 32, x[0], inverse)
    except Exception as error:  # compilers fail in many ways
        _logger.info("PyTorch's functions replace the kernels of Triton, which failed: %s", error)
        return False
    return True


def launcher():
    return _gpu(_launched_without_gradient)


def _launched_without_gradient(kernel, grid, inputs, outputs, constants, num_warps=4, num_stages=3):
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(
            "A Triton kernel without an op has no gradient of its own. Received: tensors that require a gradient, as "
            "in a gradient of a gradient. Compute it with another implementation of the op."
        )
    inputs = [x.contiguous() for x in inputs]
    return _launched(kernel, grid, inputs, outputs, constants, num_warps, num_stages)
