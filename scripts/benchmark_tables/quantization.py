"""The tables of docs/benchmarks/quantization.md."""

from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, number, percent, read, runs, table


@table
def quantization():
    """Size, memory of loading and errors of quantized weights."""
    rows = []
    for jax, torch in zip(read("quantization_jax")["rows"], read("quantization_torch")["rows"], strict=True):
        loading = [row["loading, MB"] for row in (jax, torch)]
        errors = [percent(jax[key] / 100, 1) for key in ("error, %", "same best token, %")]
        rows.append([f"`{jax['weights']}`", number(jax["MB"]), *loading, *errors])
    titles = ["weights", "size, MB", "loading, JAX, MB", "loading, PyTorch, MB", "error of logits", "same best token"]
    return markdown(titles, rows)


@table
def quantized_speed():
    """Tokens per second of decoding and of reading a prompt with quantized weights."""
    rows = []
    for backend in BACKENDS:
        for row in read(f"quantization_{backend}")["rows"]:
            keys = ("decoding, batch 1", "decoding, batch 8", "reading 512 tokens")
            rows.append([TITLES[backend], f"`{row['weights']}`", *(f"{row[key]:,}" for key in keys)])
    return markdown(["backend", "weights", "batch 1", "batch 8", "prompt of 512 tokens"], rows)


@table
def adapters():
    """Accuracy of adapters on turned digits."""
    found = read("adapters_jax")["adapters"]
    rows = [
        [f"{name} training", *(percent(row[key] / 100, 1) for key in ("upright", "turned"))]
        for name, row in found["accuracy"].items()
    ]
    return markdown(["model", "upright digits", "turned digits"], rows)


@table
def quantized_digits():
    """Accuracy and size of the preset `digits`, quantized."""
    rows = []
    for name, row in read("adapters_jax")["quantized"].items():
        rows.append(
            [f"`{name}`", f"{row['bytes']:,}", percent(row["accuracy"] / 100, 2), f"{row['images_per_second']:,}"]
        )
    return markdown(["weights", "size, bytes", "accuracy", "images per second"], rows)


@table
def quantization_runs():
    return runs(*(f"quantization_{backend}" for backend in BACKENDS), "adapters_jax")
