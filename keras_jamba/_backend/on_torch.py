"""The functions of `_backend` on PyTorch, where eager code needs neither compiled loops nor a gradient protocol."""

from pathlib import Path

import torch
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from keras_jamba._backend.grouped_on_torch import grouped_product, grouped_sum, why_not_grouped  # noqa: F401
from keras_jamba._backend.native_on_torch import native  # noqa: F401
from keras_jamba._backend.recording_on_torch import recorded, recording
from keras_jamba._backend.triton_on_torch import gpu, launched, why_not_here, why_not_triton  # noqa: F401


def rms_norm(x, scale, epsilon):
    # Keras' own makes a copy of x in float32 first, in which PyTorch's computes anyway, and casts the result back.
    return torch.nn.functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype), epsilon)


def goes_straight(layer, x):
    # Subclasses of tensors are none of Keras' own; hooks are called by Module.__call__ alone, and see only that.
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and layer.built
        and x.dtype is getattr(torch, layer.compute_dtype)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        and getattr(x, "_keras_mask", None) is None
        and layer.activity_regularizer is None
    )


def scan(body, carry, inputs, reverse=False):
    leaves, structure = _pytree.tree_flatten(inputs)
    places = range(leaves[0].shape[0])
    found = []
    for i in reversed(places) if reverse else places:
        carry, outputs = body(carry, _pytree.tree_unflatten([x[i] for x in leaves], structure))
        found.append(outputs)
    found = found[::-1] if reverse else found
    return carry, _pytree.tree_map(lambda *each: torch.stack(each), *found)


def custom_gradient(forward, backward, plain=None):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            outputs, residuals = forward(*tensors)
            kept, ctx.structure = _pytree.tree_flatten(residuals)
            ctx.save_for_backward(*kept)
            return outputs

        @staticmethod
        def backward(ctx, *gradients):
            residuals = _pytree.tree_unflatten(list(ctx.saved_tensors), ctx.structure)
            found = backward(residuals, gradients if len(gradients) > 1 else gradients[0])
            wanted = zip(found, ctx.needs_input_grad, strict=True)
            return tuple((g() if callable(g) else g) if needed else None for g, needed in wanted)

    def function(*tensors):
        if plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return plain(*tensors)
        return Function.apply(*tensors)

    return function


def matmul_in_float32(x, y):
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.mm(x, y).float()


def platform(x=None):
    if x is not None and x.device.type != "meta":
        return "cpu" if x.device.type == "cpu" else "gpu"
    return "gpu" if torch.cuda.is_available() else "cpu"


def host_values(x):
    traced = compiling() or torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if x.device.type != "cpu" or traced:
        return None
    x = x.detach()
    # NumPy has no bfloat16.
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


def compiling():
    return torch.compiler.is_compiling() or recording()


def split(x, counts):
    return x.split(counts.tolist())


def compiles():
    return False


def compiled(function):
    # torch.compile takes many seconds, and does not know Keras' scopes.
    return function


def inference(function, variables):
    return torch.inference_mode()(function)


def repeated(body, variables):
    body = recorded(body, variables)

    def run(going, state):
        while going:
            going, state = body(state)
        return state

    return run


def recomputed(function):
    def run(*tensors):
        # Stopped early, the second run ends with an exception, whose frames keep all that it has computed until Python
        # collects its garbage.
        with set_checkpoint_early_stop(False):
            return checkpoint(function, *tensors, use_reentrant=False)

    return run


def input_gradient(function, x):
    # Whatever context the caller is in; the weights' own gradients stay as they are.
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(function(x), x, materialize_grads=True)[0]


def why_not_native(shape):
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported graph must run where the library is not"
    if recording() and len(shape) == 3 and shape[1] == 1:
        return "one token takes PyTorch's own operations, written down, no longer"
    # Where an operator has no rule for it, PyTorch takes the derivative for zero.
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivatives"
    return None


def traced_by_example():
    return torch.jit.is_tracing()


def may_log():
    # A line of the log would break the graph in two.
    return not torch.compiler.is_compiling()


def sum_over_replicas(tensors):
    return tensors


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def device_memory():
    if not torch.cuda.is_available():
        return {}
    return {"device_memory": torch.cuda.memory_allocated(), "device_memory_peak": torch.cuda.max_memory_allocated()}


def start_trace(folder):
    profiler = torch.profiler.profile()
    profiler.start()

    def stop():
        profiler.stop()
        Path(folder).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))

    return stop


def out_of_memory(error):
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def random_states():
    # Keras' dropout draws from these, whatever seed it is given.
    return [torch.get_rng_state().numpy(), *(state.numpy() for state in torch.cuda.get_rng_state_all())]


def set_random_states(states):
    first, *others = (torch.from_numpy(state) for state in states)
    torch.set_rng_state(first)
    for device, state in enumerate(others[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def process_index():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def process_count():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def of_all_processes(number):
    found = [number] * process_count()
    if len(found) > 1:
        torch.distributed.all_gather_object(found, number)
    return found


def first_batch(given, look, steps):
    (data,) = given
    look(data[0])
    return given
