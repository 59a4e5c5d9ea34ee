"""The tables of docs/benchmarks/experts.md."""

from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, number, percent, read, runs, table

# Names of the forms in the results files that differ from those in the table.
FORMS = {
    "triton": "`triton`, Triton products",
    "triton, library's products": "`triton`, library's products",
    "capacity 1.0": "`capacity`, factor 1",
}
# Keys of a results file that are not implementations of this package.
PEERS = ("capacity 1.25", "keras-hub", "Hugging Face")


@table
def experts_cpu():
    """Milliseconds of router and experts on a CPU, and multiples of them for other forms."""
    rows = []
    for backend in BACKENDS:
        for row in read(f"moe_{backend}")["timings"]:
            ms = row["ms"]
            (ours,) = set(ms) - set(PEERS)
            ratios = [number(ms[name] / ms[ours], 2) if name in ms else None for name in PEERS]
            rows.append([TITLES[backend], row["experts"], f"{row['tokens']:,}", f"`{ours}`", number(ms[ours]), *ratios])
    titles = ["backend", "experts", "tokens", "implementation", "time, ms", "`capacity_factor=1.25`, times"]
    return markdown([*titles, "keras-hub, times", "Hugging Face, times"], rows)


@table
def experts_gpu():
    """Experts on a GPU, as shares of the rate of plain matrix products."""
    rows = []
    for backend in ("torch", "jax"):
        for row in read(f"gpu_moe_{backend}")["mixtures"]:
            name = row["form"]
            label = FORMS.get(name, name if name.startswith("Hugging") else f"`{name}`")
            shares = [row[key].replace("%", " %") for key in ("of the dense rate", "of its rate")]
            times = [number(row[key]) for key in ("forward, ms", "both passes, ms")]
            rows.append([TITLES[backend], label, times[0], shares[0], times[1], shares[1]])
    titles = ["backend", "implementation", "forward, ms", "rate, forward", "both passes, ms", "rate, both passes"]
    return markdown(titles, rows)


@table
def experts_products():
    """Grouped matrix products, as shares of the rate of plain products of equal operations."""
    rows = []
    for backend in ("torch", "jax"):
        for row in read(f"gpu_moe_{backend}")["products"]:
            shares = [row[name].replace("%", " %") if name in row else None for name in ("library", "Triton", "Mosaic")]
            if any(shares):
                rows.append([TITLES[backend], row["product"], row["dense, TFLOP/s"], *shares])
    return markdown(["backend", "product", "plain, TFLOP/s", "library", "Triton", "Mosaic"], rows)


@table
def load_balance():
    """Load of the experts with and without auxiliary losses, means over the seeds."""
    rows = []
    for name, row in read("load_balance_jax")["means"].items():
        figures = [f"{row[key]:.3f}" for key in ("entropy", "max_load")] + [row["dead_experts"]]
        losses = [f"{row[key]:.3f}" for key in ("train_loss", "test_loss")]
        rows.append([name, *figures, *losses, percent(row["test_accuracy"] / 100, 1)])
    titles = ["auxiliary losses", "entropy", "largest load", "dead experts", "training loss", "test loss"]
    return markdown([*titles, "test accuracy"], rows)


@table
def experts_runs():
    return runs("gpu_moe_torch", "gpu_moe_jax", *(f"moe_{backend}" for backend in BACKENDS), "load_balance_jax")
