"""Shared code of the benchmarks: interleaved timing, peak memory, and records of command and machine."""

import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def interleaved(functions, rounds):
    """Returns the median seconds of each function of `{name: function}`.

    Every round calls each function once, after one warm-up call per function. Noise that lasts longer than a round
    affects all functions alike, so ratios hold where times drift.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def forward_and_gradient(function, tensors):
    """Returns two functions without arguments: the first computes the output, the second all gradients.

    Both wait for their results. The last tensor is not an input. It weights the output, and the gradients are those of
    the weighted sum.
    """
    import keras

    *inputs, weight = tensors
    if keras.backend.backend() == "jax":
        import jax

        forward = jax.jit(function)
        gradient = jax.jit(jax.grad(lambda xs, w: (function(*xs) * w).sum()))
        return (
            lambda: jax.block_until_ready(forward(*inputs)),
            lambda: jax.block_until_ready(gradient(inputs, weight)),
        )
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function(autograph=False)
        def gradient(inputs, weight):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                loss = tf.reduce_sum(function(*inputs) * weight)
            return [tf.convert_to_tensor(g) for g in tape.gradient(loss, inputs)]

        forward = tf.function(function, autograph=False)
        return lambda: forward(*inputs), lambda: gradient(inputs, weight)
    import torch

    leaves = [x.clone().requires_grad_(True) for x in inputs]

    def waited(result):
        if weight.is_cuda:
            torch.cuda.synchronize()
        return result

    def forward():
        with torch.no_grad():
            return waited(function(*inputs))

    return forward, lambda: waited(torch.autograd.grad((function(*leaves) * weight).sum(), leaves))


def layer_pair(layer, x, **given):
    """Returns `forward_and_gradient` of a built layer, with gradients for its input and all its weights."""
    from keras import ops

    state = [ops.convert_to_tensor(v) for v in layer.non_trainable_variables]
    weights = [ops.convert_to_tensor(v) for v in layer.trainable_variables]

    def function(x, *weights):
        return layer.stateless_call(list(weights), state, x, **given)[0]

    x = ops.convert_to_tensor(x)
    return forward_and_gradient(function, [x, *weights, x])


def memory_in_a_process(module, *arguments):
    """Returns the MiB that `python -m MODULE --memory JSON` prints in a separate process."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--memory", json.dumps(arguments)],
        env=memory_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module} --memory {arguments} failed:\n{done.stderr[-3000:]}")
    return round(float(done.stdout.split()[-1]))


def extra_memory(function):
    """Returns the MiB that `function()` allocates at its peak, beyond the memory of the process before, on Linux.

    Call it in a separate process, started with `memory_environment()`. It calls the function once before, to compile.
    """
    function()
    time.sleep(0.5)  # runtimes of compilers free memory with a delay
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current use
    function()
    return (_status("VmHWM") - before) / 1024


def peak_anonymous(function):
    """Returns the MB of anonymous memory that `function()` takes at its peak, without mapped files, on Linux."""
    before, peak, done = _status("RssAnon"), [0], threading.Event()

    def record_peak():
        while not done.wait(0.001):
            peak[0] = max(peak[0], _status("RssAnon"))

    thread = threading.Thread(target=record_peak)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return (peak[0] - before) * 1024 / 1e6


def extra_device_memory(function, backend=None):
    """Returns the GiB that `function()` allocates on the GPU at its peak, beyond the memory before; 0 without a GPU.

    On JAX the peak is that of the process, so the function must be the largest so far.
    """
    import keras

    if (backend or keras.backend.backend()) == "jax":
        import jax

        stats = lambda: jax.devices()[0].memory_stats() or {}  # noqa: E731
        before = stats().get("bytes_in_use", 0)
        function()
        return (stats().get("peak_bytes_in_use", before) - before) / 2**30
    import torch

    if not torch.cuda.is_available():
        function()
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def memory_environment():
    """Returns an environment in which glibc releases freed memory at once, so that peaks are peaks of use."""
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}.")


def machine_rates():
    """Returns the exponentials and bytes per second of all cores together, `{name: number}`.

    Returns None without a C compiler.
    """
    import hatch_build

    compiler = hatch_build.compiler()
    if compiler is None:
        return None
    source = Path(__file__).parent / "scan" / "floor.c"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floor"
        flags = [flag for flag in hatch_build.FLAGS if flag not in ("-shared", "-fPIC")]
        subprocess.run([*compiler.split(), *flags, source, "-o", program, "-lm", "-pthread"], check=True)
        return json.loads(subprocess.run([program, str(cores())], check=True, capture_output=True).stdout)


def cores():
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine():
    """Returns the processor, the cores, the GPUs if any, and the versions of the installed packages."""
    names = ("keras", "jax", "tensorflow", "torch", "numpy", "mambapy", "keras-hub", "transformers", "scikit-learn")
    names += ("triton", "jax-triton", "mamba-ssm", "causal-conv1d")
    names += ("onnx", "onnxscript", "onnxruntime", "openvino", "ai-edge-litert")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = _gpus()
    return {
        "processor": _processor(),
        "cores": cores(),
        **({"gpus": gpus} if gpus else {}),
        "python": platform.python_version(),
        "versions": versions,
    }


def _gpus():
    """Returns the names of NVIDIA GPUs and their driver versions."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
    except OSError:
        return []
    return [] if done.returncode else done.stdout.splitlines()


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "")
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    widest = next((name for name in ("avx512f", "avx2") if f" {name} " in flags + " "), "no avx2")
    return f"{model}, {widest}"


def _program():
    """Returns the arguments that started Python: `-m MODULE`, or the path of a script."""
    spec = sys.modules["__main__"].__spec__
    return f"-m {spec.name}" if spec else f"benchmarks/{Path(sys.argv[0]).name}"


def record(name, results):
    """Writes `results/NAME.json` with the command, the machine and `results`, and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    arguments = " ".join([_program(), *sys.argv[1:]])
    backend = f"KERAS_BACKEND={os.environ['KERAS_BACKEND']} " if "KERAS_BACKEND" in os.environ else ""
    document = {"command": f"{backend}python {arguments}", "machine": machine(), **results}
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return file


def table(rows, columns):
    """Returns rows of `{column: text}` as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
