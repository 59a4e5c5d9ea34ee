"""The tables of docs/benchmarks/scan.md."""

from scripts.benchmark_tables.tables import BACKENDS, TITLES, error, markdown, number, read, runs, table

# Results files of the scan on CPUs, the implementation of each row, and its peer.
CPU_ROWS = (
    ("torch", "native", "mambapy"),
    ("torch", "portable", "mambapy"),
    ("torch_avx512", "native", "mambapy"),
    ("torch_avx512", "portable", "mambapy"),
    ("jax", "native", "lax.associative_scan"),
    ("jax", "portable", "lax.associative_scan"),
    ("jax", "native", "lax.scan"),
    ("jax", "portable", "lax.scan"),
    ("tensorflow", "native", "keras.ops.associative_scan"),
    ("tensorflow", "portable", "keras.ops.associative_scan"),
)
FILES = ("torch", "torch_avx512", "jax", "tensorflow")
# Its measured peak misses the memory that TensorFlow reuses from the call before.
WITHOUT_MEMORY = ("tensorflow", "portable")


def title(file):
    """Returns the backend and the machine of a results file of the scan on CPUs."""
    return f"{TITLES[file.split('_')[0]]}, {read(f'scan_{file}')['machine']['processor'].split(',')[0]}".replace(
        "Intel(R) Xeon(R) Processor", "Intel Xeon"
    )


def both_passes(file):
    """Returns the rows of forward and backward of one results file."""
    return [row for row in read(f"scan_{file}")["timings"] if row["what"] == "forward+backward"]


@table
def scan_gpu():
    """The Triton scan beside mamba-ssm: milliseconds, speedups and memory."""
    rows = []
    for torch, jax in zip(read("gpu_scan_torch")["timings"], read("gpu_scan_jax")["timings"], strict=True):
        row = [f"({', '.join(f'{n:,}' for n in torch['(b, e, t)'])}) {torch['dtype']}"]
        for what in ("forward", "forward+backward"):
            row += [number(torch[what]["ours"]), number(torch[what]["ratio"]), number(jax[what]["ratio"])]
        rows.append([*row, *(f"{torch['MB'][name]:,}" for name in ("ours", "mamba-ssm"))])
    titles = ["(rows, channels, tokens)", "forward, ms", "speedup, PyTorch", "speedup, JAX"]
    titles += ["both passes, ms", "speedup, PyTorch", "speedup, JAX", "memory, MB", "mamba-ssm's, MB"]
    return markdown(titles, rows)


@table
def scan_gpu_errors():
    """Relative errors of the Triton scan and of mamba-ssm against float64."""
    rows = []
    for row in read("gpu_scan_torch")["errors"]:
        cells = [row["dtype"]]
        for name in ("ours", "mamba-ssm"):
            y, *gradients = row[name]
            cells += [error(y), error(max(gradients))]
        rows.append(cells)
    titles = ["dtype", "output", "worst gradient", "mamba-ssm, output", "mamba-ssm, worst gradient"]
    return markdown(titles, rows)


@table
def scan_gpu_long():
    """One pass over 256 K tokens."""
    found = read("gpu_scan_long_torch")["long"]
    row = [number(found["ms"]), f"{found['MB']:,}", f"{found['MB of inputs and gradient']:,}"]
    row.append(error(max(found["error"].values())))
    return markdown(["both passes, ms", "memory, MB", "inputs, MB", "largest error against float64"], [row])


@table
def kernels_gpu():
    """State update and convolution beside mamba-ssm and causal-conv1d."""
    rows = []
    for row in read("gpu_step_torch")["rows"]:
        peer = "mamba-ssm" if "mamba-ssm" in row else "causal-conv1d"
        shape = f"({', '.join(f'{n:,}' for n in row['(b, e, t)'])})" if "(b, e, t)" in row else f"batch {row['batch']}"
        times = [number(1e3 * row[name]) for name in ("ours", peer)]
        rows.append([row["what"].replace("forward+backward", "both passes"), shape, times[0], peer, times[1]])
        rows[-1].append(number(row[peer] / row["ours"]))
    titles = ["operation", "size", "time, microseconds", "peer", "peer's time, microseconds", "speedup"]
    return markdown(titles, rows)


@table
def scan_cpu():
    """Speedups of the scan on CPUs over a peer, by shape, and memory for 16,384 tokens."""
    shapes = [row["shape"] for row in both_passes("jax")]
    rows = []
    for file, form, peer in CPU_ROWS:
        times = [row["ms"] for row in both_passes(file)]
        ratios = [number(ms[peer] / ms[form], 2) if peer in ms else None for ms in times]
        memory = None if (file, form) == WITHOUT_MEMORY else read(f"scan_{file}")["memory"][-1]["MiB"][form]
        rows.append([title(file), f"`{form}`", f"`{peer}`", *ratios, memory])
    shapes = [f"{batch} x {tokens:,} x {channels}" for batch, tokens, channels in shapes]
    return markdown(["backend, processor", "implementation", "peer", *shapes, "memory, MiB"], rows)


@table
def scan_cpu_floor():
    """Milliseconds of the C library, called from a backend and from C, and the lower bound of the machine."""
    rows = []
    for file in FILES:
        for row in both_passes(file):
            ms, (batch, tokens, channels) = row["ms"], row["shape"]
            shape = f"{batch} x {tokens:,} x {channels}"
            times = [number(ms[name]) if name in ms else None for name in ("native", "native, from C", "floor")]
            rows.append([title(file), shape, *times])
    titles = ["backend, processor", "rows x tokens x channels", "`native`, ms", "called from C, ms", "lower bound, ms"]
    return markdown(titles, rows)


@table
def scan_precision():
    """Relative errors of the scan against float64 by length."""
    found = {backend: read(f"precision_{backend}")["relative_rms_error"] for backend in BACKENDS}
    rows = []
    for group in zip(*found.values(), strict=True):
        errors = [row[key] for key in ("output", "last state") for row in group]
        rows.append([group[0]["dtype"], f"{group[0]['tokens']:,}", *errors])
    names = [f"{what}, {TITLES[backend]}" for what in ("output", "last state") for backend in BACKENDS]
    return markdown(["dtype", "tokens", *names], rows)


@table
def cost():
    """Milliseconds and MiB of layers and backbones by number of tokens."""
    documents = {backend: read(f"cost_{backend}") for backend in BACKENDS}
    lengths = sorted({length for document in documents.values() for length in document["lengths"]})
    rows = []
    for backend, document in documents.items():
        for name, row in document["rows"].items():
            cells = zip(document["lengths"], row["ms"], row["MiB"], strict=True)
            found = {length: f"{ms:,.0f} ms, {mib:,} MiB" for length, ms, mib in cells}
            rows.append([TITLES[backend], name, *(found.get(length) for length in lengths)])
    return markdown(["backend", "layer or model", *(f"{length:,} tokens" for length in lengths)], rows)


@table
def cost_crossover():
    """Number of tokens from which the hybrid is faster than attention alone."""
    found = {backend: read(f"cost_{backend}")["crossover"] for backend in BACKENDS}
    rows = [[TITLES[backend], f"{n:,}" if isinstance(n, int) else n] for backend, n in found.items()]
    return markdown(["backend", "hybrid is faster from, tokens"], rows)


@table
def scan_runs():
    files = ["gpu_scan_torch", "gpu_scan_jax", "gpu_scan_long_torch", "gpu_step_torch"]
    files += [f"scan_{name}" for name in FILES]
    files += [f"{kind}_{backend}" for kind in ("precision", "cost") for backend in BACKENDS]
    return runs(*files)
