"""Speed of a mixture of experts on a GPU, as a share of plain matrix products with the same number of operations.

    KERAS_BACKEND=torch python -m benchmarks.moe.gpu

The workload is SwiGLU in bfloat16: 8,192 tokens, 8 experts, two experts per token, d 4096, hidden 14336. The script
first compares outputs and gradients of every form with float64. The sizes include multiples of the tiles, other sizes,
and an expert without tokens. Interleaved runs then time:

- plain products: the three of the forward pass and the nine of both passes;
- every form of `expert_mlp`, with Hugging Face as the peer on PyTorch;
- each product alone, from the library and from Triton;
- the operations between the products.

`--tune` also times other tiles of the kernels. `--smoke` is a quick run for a CPU and writes nothing. Prints tables and
writes results/gpu_moe_BACKEND.json.
"""

import argparse
import statistics
import sys
import time

import keras
import numpy as np
from keras import ops

from benchmarks import measure
from benchmarks.moe.gpu_products import (
    EXPERTS,
    KERNELS,
    PER_TOKEN,
    dense_products,
    hugging_face,
    library_products,
    mosaic_products,
    operations_between_products,
    triton_products,
)
from keras_jamba import _backend
from keras_jamba._triton.grouped import Tiles
from keras_jamba.ops import expert_mlp
from keras_jamba.ops.experts import _TABLE, _Call, triton
from keras_jamba.ops.experts._sorting import sorted_by_expert

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    raise SystemExit("The kernels run on JAX and PyTorch. Received: KERAS_BACKEND=tensorflow. Set it to jax or torch.")
PLATFORM = _backend.tensors.platform()
NAMES = ["tokens", "weights", "up_bank", "down_bank", "gate_bank"]
# Allowed errors relative to the norm. On a GPU, JAX multiplies float32 in TF32.
ALLOWED = {"float32": 2e-3, "bfloat16": 2e-2, "float16": 4e-3}
ODD, SMALL, LARGE = (33, 18, 25), (300, 80, 96), (1500, 512, 1024)  # tokens, d, hidden
SMOKE = [((40, 16, 24), dtype) for dtype in ALLOWED] + [(ODD, "float32"), (ODD, "bfloat16")]
CASES = [(ODD, "float32"), (SMALL, "float32"), (SMALL, "float16"), (SMALL, "bfloat16"), (LARGE, "bfloat16")]
TUNED = [(128, 256, 64, 16, 8, 3), (128, 256, 64, 16, 8, 4), (128, 256, 64, 8, 8, 4), (128, 256, 64, 32, 8, 4)]
TUNED += [(128, 256, 32, 16, 8, 5), (256, 128, 64, 8, 8, 4), (128, 128, 64, 16, 8, 4), (128, 128, 64, 16, 4, 3)]
TUNED += [(128, 128, 64, 16, 4, 4), (128, 128, 128, 16, 8, 3), (64, 256, 64, 16, 4, 3), (64, 256, 64, 16, 4, 4)]


def forms(dtype, d, hidden, tokens):
    """Returns the supported forms, `{name: function of (tokens, weights, up_bank, down_bank, gate_bank, indices)}`."""
    call = _Call(EXPERTS, PER_TOKEN, platform=PLATFORM, tokens=tokens, dtype=dtype, sizes=(d, hidden))
    found = {name: form_of(name) for name, form in _TABLE.items() if name != "triton" and form.why_not(call) is None}
    if KERNELS:
        found["triton"] = with_products("triton")
        if _backend.numerics.why_no_grouped_matmul(PLATFORM, dtype, (d, hidden)) is None:
            found["triton, library's products"] = with_products("library")
    return found


def form_of(implementation=None, **options):
    def mixture(*tensors):
        *tensors, indices = tensors
        given = dict(zip(NAMES, tensors, strict=True)) | options
        y = expert_mlp(indices=indices, implementation=implementation, **given)
        return y[0] if options else y

    return mixture


def with_products(products):
    return lambda x, weights, up, down, gate, indices: triton.run(x, weights, indices, up, down, gate, products)


def both_passes(function):
    """Returns a function `(*tensors, indices, weight) -> (outputs, *gradients)` with gradients of all tensors."""
    if BACKEND == "jax":
        import jax

        def run(*given):
            *tensors, indices, weight = given
            y, pull_back = jax.vjp(lambda *xs: function(*xs, indices), *tensors)
            return y, *pull_back(weight)

        return run
    import torch

    def run(*given):
        *tensors, indices, weight = given
        leaves = [x.detach().requires_grad_(True) for x in tensors]
        with torch.enable_grad():
            y = function(*leaves, indices)
        return y.detach(), *torch.autograd.grad(y, leaves, weight)

    return run


def compiled(function):
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import torch

    return torch.no_grad()(function)


def check(cases):
    """Returns rows with the errors of every form, and messages about forms whose errors are too large."""
    rows, failures = [], []
    for (tokens, d, hidden), dtype in cases:
        arrays, indices, weight = random_check_inputs(tokens, d, hidden)
        exact = exact_mixture(*arrays, indices, weight)
        given = [ops.cast(ops.convert_to_tensor(x), dtype) for x in (*arrays, weight)]
        given[1] = ops.convert_to_tensor(arrays[1])
        for name, function in forms(dtype, d, hidden, tokens).items():
            if PLATFORM == "gpu" and not name.startswith(("triton", "grouped")):
                continue  # the tests check forms for CPUs on a CPU
            row = {"form": name, "dtype": dtype, "tokens": tokens, "d": d, "hidden": hidden}
            try:
                found = compiled(both_passes(function))(*given[:-1], ops.convert_to_tensor(indices), given[-1])
                found = [ops.convert_to_numpy(ops.cast(x, "float32")).astype("float64") for x in found]
            except Exception as error:
                print(f"{row} cannot run: {error!r}"[:600], file=sys.stderr, flush=True)
                continue
            errors = [float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in zip(found, exact, strict=True)]
            rows.append(row | {"output": errors[0], "gradients": max(errors[1:])})
            if not all(error < ALLOWED[dtype] for error in errors):
                failures.append(f"{row}: {errors}")
                print(f"WRONG: {failures[-1]}", file=sys.stderr, flush=True)
    return rows, failures


def random_check_inputs(tokens, d, hidden):
    """Returns NumPy arrays with uneven routing, where one expert has no token."""
    rng = np.random.default_rng(tokens)
    normal = lambda *shape: (rng.standard_normal(shape) / shape[-2] ** (len(shape) > 2 and 0.5)).astype("float32")  # noqa: E731
    logits = rng.standard_normal((tokens, EXPERTS)) - 0.3 * np.arange(EXPERTS)
    logits[:, 3] = -np.inf
    indices = np.argsort(-logits, axis=1)[:, :PER_TOKEN].astype("int32")
    banks = [normal(EXPERTS, d, hidden), normal(EXPERTS, hidden, d), normal(EXPERTS, d, hidden)]
    # Inputs are representable in bfloat16, so that errors are those of the computation alone.
    rounded = [_rounded_to_bfloat16(x) for x in (normal(tokens, d), *banks, normal(tokens, d))]
    return [rounded[0], rng.random((tokens, PER_TOKEN), "float32"), *rounded[1:4]], indices, rounded[4]


def _rounded_to_bfloat16(x):
    return ops.convert_to_numpy(ops.cast(ops.cast(ops.convert_to_tensor(x), "bfloat16"), "float32"))


def exact_mixture(tokens, weights, up, down, gate, indices, gradient):
    """Returns outputs and gradients in float64, computed expert by expert."""
    tokens, weights, up, down, gate, gradient = (
        x.astype("float64") for x in (tokens, weights, up, down, gate, gradient)
    )
    y, *grads = (np.zeros_like(x) for x in (tokens, tokens, weights, up, down, gate))
    for e in range(EXPERTS):
        row, choice = np.nonzero(indices == e)
        x, weight = tokens[row], weights[row, choice][:, None]
        wide, opening = x @ up[e], x @ gate[e]
        sigmoid = 1 / (1 + np.exp(-opening))
        hidden, grad = wide * opening * sigmoid, gradient[row]
        result, grad_hidden = hidden @ down[e], weight * (grad @ down[e].T)
        grad_wide = grad_hidden * opening * sigmoid
        grad_opening = grad_hidden * wide * sigmoid * (1 + opening * (1 - sigmoid))
        y[row] += weight * result
        grads[0][row] += grad_wide @ up[e].T + grad_opening @ gate[e].T
        grads[1][row, choice] = (grad * result).sum(1)
        grads[2][e], grads[3][e], grads[4][e] = x.T @ grad_wide, hidden.T @ (weight * grad), x.T @ grad_opening
    return [y, *grads]


def random_device_arrays(tokens, d, hidden, skew, dtype="bfloat16"):
    """Returns the arrays of all timed functions, created on the device.

    A skew of 1 gives the first expert nearly half of all tokens.
    """
    seeds = iter(range(100))
    normal = lambda *shape: keras.random.normal(shape, dtype=dtype, seed=next(seeds))  # noqa: E731
    bank = lambda *shape: normal(*shape) * shape[-2] ** -0.5  # noqa: E731
    logits = keras.random.normal((tokens, EXPERTS), seed=next(seeds)) - skew * ops.arange(EXPERTS, dtype="float32")
    indices = ops.cast(ops.top_k(logits, PER_TOKEN)[1], "int32")
    rows = sorted_by_expert(indices, EXPERTS)
    found = {"x": normal(tokens, d), "weights": keras.random.uniform((tokens, PER_TOKEN), seed=next(seeds))}
    found |= {"up": bank(EXPERTS, d, hidden), "down": bank(EXPERTS, hidden, d), "gate": bank(EXPERTS, d, hidden)}
    found |= {"indices": indices, "dy": normal(tokens, d), "rows": tuple(rows)}
    wide = {name: normal(tokens * PER_TOKEN, hidden) for name in ("hidden", "wide", "opening")}
    sorted_ = {f"sorted {name}": ops.take(found[name], rows.source, axis=0) for name in ("x", "dy")}
    return found | wide | sorted_


def mixtures(arrays, tokens, d, hidden):
    """Returns `{name: (forward, both passes)}` of the complete mixtures, as functions of the arrays."""
    inputs = lambda a: [a[name] for name in ("x", "weights", "up", "down", "gate", "indices")]  # noqa: E731
    complete_forms = forms("bfloat16", d, hidden, tokens)
    if PLATFORM == "gpu":
        # This form copies the weights of every block, which exceeds the memory.
        complete_forms.pop("blocks", None)
    complete_forms["capacity 1.0"] = form_of(capacity_factor=1.0)
    found = {
        name: (lambda a, f=f: f(*inputs(a)), lambda a, f=f: both_passes(f)(*inputs(a), a["dy"]))
        for name, f in complete_forms.items()
    }
    if BACKEND == "torch":
        for kind in ("eager", "grouped_mm"):
            try:
                found[f"Hugging Face, {kind}"] = hugging_face(arrays, kind)
            except Exception as error:
                print(f"Hugging Face's {kind} cannot run: {error!r}"[:300], file=sys.stderr)
    return found


def milliseconds(functions, arrays, rounds, times=3):
    """Returns the median milliseconds per call of each `{key: function of the arrays}`.

    Every round measures each function once. A function that fails gets None. A measurement queues several calls, so
    that the host never waits between them.
    """
    functions, found = {key: compiled(function) for key, function in functions.items()}, {}
    for key, function in functions.items():
        try:
            synchronize(function(arrays))
            synchronize(function(arrays))
            found[key] = []
        except Exception as error:
            print(f"{key} cannot run: {error!r}"[:300], file=sys.stderr, flush=True)
    for _ in range(rounds):
        for key in found:
            found[key].append(duration(functions[key], arrays, times))
    return {key: statistics.median(found[key]) if key in found else None for key in functions}


def duration(function, arrays, times):
    if BACKEND == "torch" and PLATFORM == "gpu":
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            function(arrays)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times
    started = time.perf_counter()
    for _ in range(times):
        result = function(arrays)
    synchronize(result)
    return 1e3 * (time.perf_counter() - started) / times


def synchronize(result):
    if BACKEND == "jax":
        import jax

        jax.block_until_ready(result)
    elif PLATFORM == "gpu":
        import torch

        torch.cuda.synchronize()


def share(ms, dense):
    return "" if ms is None else f"{dense / ms:.0%}"


def rounded(ms):
    return None if ms is None else float(f"{ms:.4g}")


def time_products(arrays, rounds, operations):
    """Returns one row per product, and the milliseconds of the dense products by name."""
    dense = dense_products()
    functions = {("dense", name): function for name, (_, function) in dense.items()}
    functions |= {("library", name): function for name, function in library_products().items()}
    if KERNELS:
        functions |= {("Triton", name): function for name, function in triton_products().items()}
    if BACKEND == "jax" and PLATFORM == "gpu":
        try:
            functions |= {("Mosaic", name): function for name, function in mosaic_products().items()}
        except ImportError as error:
            print(f"Mosaic's products are not available: {error}", file=sys.stderr)
    ms = milliseconds(functions, arrays, rounds)
    rows = []
    for name in dict.fromkeys(name for _, name in functions):
        count = dense[name.split(",")[0]][0]
        plain = ms["dense", name.split(",")[0]]
        row = {"product": name, "dense, TFLOP/s": f"{count * operations / plain / 1e9:.0f}"}
        for kind in ("dense", "library", "Triton", "Mosaic"):
            if (kind, name) in ms:
                row |= {f"{kind}, ms": rounded(ms[kind, name])}
                row |= {} if kind == "dense" else {kind: share(ms[kind, name], plain)}
        rows.append(row)
    return rows, {name: ms["dense", name] for name in dense}


def time_mixtures(arrays, rounds, sizes, dense):
    pairs = mixtures(arrays, *sizes)
    functions = {(name, i): pair[i] for name, pair in pairs.items() for i in (0, 1)}
    ms = milliseconds(functions, arrays, rounds)
    return [
        {
            "form": name,
            "forward, ms": rounded(ms[name, 0]),
            "of the dense rate": share(ms[name, 0], dense["forward"]),
            "both passes, ms": rounded(ms[name, 1]),
            "of its rate": share(ms[name, 1], dense["both passes"]),
        }
        for name in pairs
    ]


def tune(arrays, rounds, dense):
    """Returns one row per choice of tiles. Kernels with two sums use half of the columns for each."""
    rows = []
    for numbers in TUNED:
        tiles = Tiles(*numbers)
        halved = tiles._replace(columns=tiles.columns // 2)
        functions = {
            name: function
            for name, function in (triton_products(tiles) | _first(triton_products(halved))).items()
            if name != "up bank, gathered"
        }
        ms = milliseconds(functions, arrays, rounds)
        rows.append({"tiles": str(numbers)} | {name: share(ms[name], dense[name.split(",")[0]]) for name in functions})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _first(products):
    return {name: function for name, function in products.items() if name.startswith("first")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=14336)
    parser.add_argument("--skew", type=float, default=0.0, help="0 gives all experts about the same number of tokens")
    parser.add_argument("--tune", action="store_true", help="time other tiles of the kernels too")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    tokens, d, hidden = (40, 16, 24) if args.smoke else (args.tokens, args.d, args.hidden)
    rounds = 1 if args.smoke else args.rounds
    started = time.perf_counter()
    errors, failures = check(SMOKE if args.smoke else CASES)
    printed_rows = [{k: f"{v:.1e}" if isinstance(v, float) else v for k, v in row.items()} for row in errors]
    print("Errors, as shares of the norm:\n" + measure.table(printed_rows, list(printed_rows[0])))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    arrays = random_device_arrays(tokens, d, hidden, args.skew)
    operations = 2 * tokens * PER_TOKEN * d * hidden
    products, dense = time_products(arrays, rounds, operations)
    columns = ["product", "dense, TFLOP/s", "dense, ms", "library, ms", "library"]
    columns += ["Triton, ms", "Triton", "Mosaic, ms", "Mosaic"]
    print("Products, and their share of the dense rate:\n" + measure.table(products, columns), flush=True)
    mixture_rows = time_mixtures(arrays, rounds, (tokens, d, hidden), dense)
    print("Mixtures:\n" + measure.table(mixture_rows, list(mixture_rows[0])), flush=True)
    between = {name: rounded(ms) for name, ms in milliseconds(operations_between_products(), arrays, rounds).items()}
    rows = [{"part": name, "ms": ms} for name, ms in between.items()]
    print("Between the products, ms:\n" + measure.table(rows, ["part", "ms"]))
    results = {"device": _backend.device.device_name(), "backend": BACKEND, "tokens": tokens, "d": d, "hidden": hidden}
    results |= {"experts": EXPERTS, "per token": PER_TOKEN, "skew": args.skew, "rounds": rounds, "errors": errors}
    results |= {"products": products, "mixtures": mixture_rows, "between, ms": between}
    if args.tune and KERNELS:
        results["tiles"] = tune(arrays, min(rounds, 3), dense)
        print("Tiles (rows, columns, depth, strip, warps, stages), share of the dense rate:")
        print(measure.table(results["tiles"], list(results["tiles"][0])))
    if failures:
        raise SystemExit("Some forms computed wrong results, and nothing is recorded:\n" + "\n".join(failures))
    if not args.smoke:
        measure.record(f"gpu_moe_{BACKEND}", results)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
