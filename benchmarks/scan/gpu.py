"""Speed and memory of the selective scan on a GPU, with mamba-ssm's CUDA kernel as the peer.

    KERAS_BACKEND=torch python -m benchmarks.scan.gpu [--parts check scan long]

KERAS_BACKEND names the backend: torch or jax. The parts are:

- check: compares outputs and all gradients of both with float64.
- scan: measures milliseconds of forward and of forward+backward, and the memory beyond the inputs. Each scan reads its
  own layout. Two floors are computed: the time to read each input and write each output once, and the time of the
  exponentials.
- long: runs 256 K tokens at batch 1 and compares a sample of channels with float64.

On PyTorch the script times replays of a graph of ten calls, on JAX repeated calls in one program. Writes
results/gpu_scan_BACKEND.json.
"""

import argparse
import statistics

import keras
import numpy as np
import torch
from keras import ops

from benchmarks import measure
from benchmarks.scan.gpu_peers import selective_scan_fn
from keras_jamba.ops import selective_scan

BACKEND = keras.backend.backend()
STATE = 16
# Shapes (b, e, t), as in the peer's layout, and dtypes.
SHAPES = [
    ((8, 2048, 2048), "bfloat16"),
    ((8, 2048, 2048), "float32"),
    ((64, 512, 64), "bfloat16"),
    ((32, 512, 256), "bfloat16"),
    ((1, 8192, 16384), "bfloat16"),
    ((4, 8192, 4096), "bfloat16"),
]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# Inputs that the peer reads with tokens as the last axis.
TRANSPOSED = (0, 1, 3, 4, 6)


def random_tensors(shape, dtype, seed=0):
    """Returns the inputs of `selective_scan` and a gradient of its output, PyTorch tensors on the GPU in our layout."""
    batch, channels, length = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    torch_dtype = getattr(torch, dtype)
    tokens = lambda width: normal(batch, length, width).to(torch_dtype)  # noqa: E731
    A = -torch.exp(normal(channels, STATE))
    delta = (normal(batch, length, channels) * 0.5 - 4).to(torch_dtype)
    tensors = [tokens(channels), delta, A, tokens(STATE), tokens(STATE), normal(channels), tokens(channels)]
    return [*tensors, 0.1 * normal(channels)], tokens(channels)


def exact_scan(tensors, grad_y):
    """Returns y and the gradients in float64, computed token by token."""
    u, delta, A, B, C, D, z, bias = leaves = [x.double().requires_grad_() for x in tensors]
    steps = torch.nn.functional.softplus(delta + bias)
    state, ys = torch.zeros(u.shape[0], *A.shape, dtype=torch.float64, device="cuda"), []
    for t in range(u.shape[1]):
        drive = (steps[:, t] * u[:, t])[..., None] * B[:, t, None]
        state = torch.exp(steps[:, t, :, None] * A) * state + drive
        ys.append((state * C[:, t, None]).sum(-1))
    y = (torch.stack(ys, 1) + D * u) * torch.nn.functional.silu(z)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.double())]


def peer(tensors, grad_y=None):
    """Returns a function that runs mamba-ssm's scan: forward alone, or y and all gradients if `grad_y` is given."""
    transposed = [x.mT.contiguous() if i in TRANSPOSED else x.detach() for i, x in enumerate(tensors)]
    if grad_y is None:
        return lambda: selective_scan_fn(*transposed, delta_softplus=True)
    leaves, weight = [x.requires_grad_() for x in transposed], grad_y.mT.contiguous()

    def both():
        y = selective_scan_fn(*leaves, delta_softplus=True)
        return [y, *torch.autograd.grad(y, leaves, weight)]

    return both


def ours(tensors, grad_y=None):
    """Returns a function that runs our scan: forward alone, or y and all gradients if `grad_y` is given."""
    if BACKEND == "jax":
        return ours_on_jax(tensors, grad_y)
    scan = lambda *given: selective_scan(*given, delta_softplus=True, implementation="triton")  # noqa: E731
    if grad_y is None:
        return lambda: scan(*tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]

    def both():
        y = scan(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad_y)]

    return both


def ours_on_jax(tensors, grad_y=None):
    import jax

    given = [ops.convert_to_tensor(jax.dlpack.from_dlpack(x.detach().contiguous())) for x in tensors]
    scan = lambda *given: selective_scan(*given, delta_softplus=True, implementation="triton")  # noqa: E731
    if grad_y is None:
        run = jax.jit(scan)
        return lambda: run(*given)
    weight = jax.dlpack.from_dlpack(grad_y.contiguous())

    @jax.jit
    def run(given, weight):
        y, pull_back = jax.vjp(scan, *given)
        return [y, *pull_back(weight)]

    return lambda: run(given, weight)


def repeated_on_jax(tensors, grad_y, times):
    """Returns a program that runs the scan `times` times; each run reads the output of the run before."""
    import jax

    given = [jax.dlpack.from_dlpack(x.detach().contiguous()) for x in tensors]
    weight = None if grad_y is None else jax.dlpack.from_dlpack(grad_y.contiguous())
    scan = lambda u, *rest: selective_scan(u, *rest, delta_softplus=True, implementation="triton")  # noqa: E731

    @jax.jit
    def run(u, rest, weight):
        found = []
        for _ in range(times):
            if weight is None:
                u = scan(u, *rest)
            else:
                _, pull_back = jax.vjp(scan, u, *rest)
                u, *others = pull_back(weight)
                # Only small gradients are returned. XLA reuses the buffers of the others, as a PyTorch graph does.
                found.append([x for x in others if x.size < u.size])
        return u, found

    return lambda: jax.block_until_ready(run(given[0], given[1:], weight))


def milliseconds(function, times=10):
    """Returns the median milliseconds per call, from GPU events around replays of a graph of `times` calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for _ in range(times):
            function()
    function = recorded.replay
    found = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found) / times


def milliseconds_on_jax(function):
    """Returns the median milliseconds of a function that waits for its result."""
    import time

    times = []
    for _ in range(13):
        started = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def time_ours(tensors, grad_y):
    """Returns the milliseconds per call of our scan."""
    if BACKEND == "torch":
        return milliseconds(ours(tensors, grad_y))
    # Enough calls to make the start and end of a program negligible.
    times = 10 if tensors[0].numel() > 2**25 else 40
    return milliseconds_on_jax(repeated_on_jax(tensors, grad_y, times)) / times


def extra_memory(function):
    """Returns the MB that `function()` allocates at its peak, beyond the memory before, on PyTorch."""
    outputs = function()
    del outputs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6)


def extra_memory_on_jax(tensors, grad_y):
    import jax

    given = [jax.dlpack.from_dlpack(x.detach().contiguous()) for x in tensors]
    weight = jax.dlpack.from_dlpack(grad_y.contiguous())
    scan = lambda *given: selective_scan(*given, delta_softplus=True, implementation="triton")  # noqa: E731
    run = jax.jit(lambda given, weight: (lambda y, pull_back: [y, *pull_back(weight)])(*jax.vjp(scan, *given)))
    analysis = run.lower(given, weight).compile().memory_analysis()
    return round((analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 1e6)


def errors(found, exact):
    """Returns the relative errors of y and of each gradient, in the Euclidean norm."""
    as_torch = lambda x: x if isinstance(x, torch.Tensor) else torch.from_dlpack(x)  # noqa: E731
    pairs = [(as_torch(a).detach().double(), e) for a, e in zip(found, exact, strict=True)]
    return [float((a - e).norm() / e.norm()) for a, e in pairs]


def check():
    """Returns the errors against float64 per dtype. Raises AssertionError if ours are too large."""
    results = []
    names = ["y", *NAMES]
    for dtype in ("float32", "bfloat16", "float16"):
        tensors, grad_y = random_tensors((2, 256, 500), dtype)
        exact = exact_scan(tensors, grad_y)
        row = {"dtype": dtype, "ours": errors(ours(tensors, grad_y)(), exact)}
        if selective_scan_fn is not None:
            y, *gradients = peer(tensors, grad_y)()
            transposed = [g.mT if i in TRANSPOSED else g for i, g in enumerate(gradients)]
            row["mamba-ssm"] = errors([y.mT, *transposed], exact)
        results.append(row)
        for name in ("ours", "mamba-ssm"):
            if name in row:
                print(dtype, name, " ".join(f"{n} {e:.1e}" for n, e in zip(names, row[name], strict=True)), flush=True)
        assert max(row["ours"]) < {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype], row
    return results


def rates():
    """Returns the bytes per second of a copy, and the exponentials per second: 16 per multiprocessor and cycle."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_rate = 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source)))
    properties = torch.cuda.get_device_properties()
    return {"bytes": copy_rate, "exponentials": 16 * properties.multi_processor_count * properties.clock_rate * 1e3}


def scan(rates):
    results = []
    for shape, dtype in SHAPES:
        tensors, grad_y = random_tensors(shape, dtype)
        batch, channels, length = shape
        size = grad_y.element_size()
        row = {"(b, e, t)": shape, "dtype": dtype}
        sequence_bytes = batch * channels * length * size
        row["floor, bytes"] = 1e3 * 4 * sequence_bytes / rates["bytes"]
        row["floor, exponentials"] = 1e3 * batch * channels * length * STATE / rates["exponentials"]
        for what, weight in (("forward", None), ("forward+backward", grad_y)):
            row[what] = {"ours": time_ours(tensors, weight)}
            if selective_scan_fn is not None:
                row[what]["mamba-ssm"] = milliseconds(peer(tensors, weight))
                row[what]["ratio"] = row[what]["mamba-ssm"] / row[what]["ours"]
        row["MB"] = {"mamba-ssm": extra_memory(peer(tensors, grad_y))} if selective_scan_fn is not None else {}
        if BACKEND == "torch":
            row["MB"]["ours"] = extra_memory(ours(tensors, grad_y))
        else:
            row["MB"]["ours"] = extra_memory_on_jax(tensors, grad_y)
        results.append(row)
        print(row, flush=True)
        torch.cuda.empty_cache()
    return results


def long():
    """Runs 256 K tokens of 8,192 channels, and compares eight channels with float64."""
    channels, length, sample = 8192, 2**18, 8
    tensors, grad_y = random_tensors((1, channels, length), "bfloat16")
    sample_inputs = [x[..., :sample] if i in (0, 1, 6) else x for i, x in enumerate(tensors)]
    sample_inputs = [x[:sample] if i in (2, 5, 7) else x for i, x in enumerate(sample_inputs)]
    found = ours(tensors, grad_y)()
    as_torch = lambda x: x if isinstance(x, torch.Tensor) else torch.from_dlpack(x)  # noqa: E731
    found = [as_torch(x) for x in found]
    # Gradients of B and C are sums over all channels.
    sampled = {0: found[0][..., :sample]} | {1 + i: found[1 + i] for i in (0, 1, 2, 5, 6, 7)}
    sampled = {i: x[..., :sample] if x.dim() == 3 else x[:sample] for i, x in sampled.items()}
    sampled = {i: x.detach().cpu() for i, x in sampled.items()}
    exact = exact_long_scan([x.cpu() for x in sample_inputs], grad_y[..., :sample].cpu())
    relative_error = lambda x, expected: float((x.double() - expected).norm() / expected.norm())  # noqa: E731
    errors_of_sample = {["y", *NAMES][i]: relative_error(x, exact[i]) for i, x in sampled.items()}
    del found
    result = {"error": errors_of_sample}
    if BACKEND == "torch":
        result["ms"] = milliseconds(ours(tensors, grad_y), times=1)
        result["MB"] = extra_memory(ours(tensors, grad_y))
        result["MB of inputs and gradient"] = round(sum(x.numel() * x.element_size() for x in [*tensors, grad_y]) / 1e6)
    print(result, flush=True)
    assert max(errors_of_sample.values()) < 1e-2, errors_of_sample
    return result


def exact_long_scan(tensors, grad_y):
    """Returns `exact_scan` from NumPy with a manual backward pass: autograd would store every state many times."""
    u, delta, A, B, C, D, z, bias = (x.double().numpy() for x in tensors)
    grad_y, biased = grad_y.double().numpy()[0], delta[0] + bias
    u, B, C, z = u[0], B[0], C[0], z[0]
    steps, sigmoid = np.logaddexp(0, biased), 1 / (1 + np.exp(-z))
    states = np.zeros((len(u) + 1, *A.shape))
    for t in range(len(u)):
        states[t + 1] = np.exp(steps[t, :, None] * A) * states[t] + (steps[t] * u[t])[:, None] * B[t]
    read = (states[1:] * C[:, None]).sum(-1) + D * u
    g = grad_y * z * sigmoid
    grad_u, slope, grad_A = g * D, np.zeros_like(u), np.zeros_like(A)
    carry = np.zeros(A.shape)
    for t in reversed(range(len(u))):
        grad_h = g[t, :, None] * C[t] + carry
        decay = np.exp(steps[t, :, None] * A)
        carry = decay * grad_h
        exponent = carry * states[t]
        grad_A += exponent * steps[t, :, None]
        driven = (grad_h * B[t]).sum(-1)
        grad_u[t] += steps[t] * driven
        slope[t] = (exponent * A).sum(-1) + u[t] * driven
    slope = slope / (1 + np.exp(-biased))
    grad_z = grad_y * read * sigmoid * (1 + z * (1 - sigmoid))
    found = {0: (read * z * sigmoid)[None], 1: grad_u[None], 2: slope[None], 3: grad_A, 6: (g * u).sum(0)}
    found |= {7: grad_z[None], 8: slope.sum(0)}
    return {i: torch.from_numpy(x) for i, x in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["check", "scan", "long"], choices=["check", "scan", "long"])
    args = parser.parse_args()
    results = {"backend": BACKEND, "d_state": STATE, "a second": rates()}
    print(torch.cuda.get_device_name(), results["a second"], flush=True)
    if selective_scan_fn is None:
        print("mamba-ssm: missing")
    if "check" in args.parts:
        results["errors"] = check()
    if "scan" in args.parts:
        results["timings"] = scan(results["a second"])
    if "long" in args.parts:
        results["long"] = long()
    measure.record(f"gpu_scan_{BACKEND}", results)


if __name__ == "__main__":
    main()
