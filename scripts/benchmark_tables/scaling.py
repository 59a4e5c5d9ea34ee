"""The tables of docs/benchmarks/scaling.md."""

from scripts.benchmark_tables.tables import error, gigabytes, markdown, number, read, runs, table

# Options of `training.layout_map` by the name of the strategy; others take none.
OPTIONS = {
    "rows, matrices shared": "`fully_sharded`",
    "model, tokens split": "`sequence_parallel`",
    "rows and model, matrices shared": "`fully_sharded`",
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def mesh_of(case):
    """Returns the mesh of a simulated case and its layout."""
    return ", ".join(["x".join(map(str, case["mesh"])), *(f"`{name}`" for name in case["layout"])])


@table
def sharding():
    """Training speed on several GPUs, beside one GPU."""
    found = read("gpu_sharding")
    rows = []
    for name, row in found["training"].items():
        mesh = "x".join(map(str, found["meshes"].get(name, (1, 1))))
        speeds = [number(row["milliseconds a step"]), f"{row['tokens a second']:,}", f"{row['times one device']:.2f}"]
        rows.append([", ".join(filter(None, [mesh, OPTIONS.get(name)])), *speeds, number(row["GB held by a device"])])
    titles = ["mesh (rows x model)", "ms per step", "tokens per second", "times one GPU", "GB held per GPU"]
    return markdown(titles, rows)


@table
def sharding_differences():
    """Largest differences of losses and weights to one GPU."""
    found = read("gpu_sharding")
    rows = []
    for name, row in found["differences"].items():
        mesh = "x".join(map(str, found["meshes"][name]))
        label = ", ".join(filter(None, [mesh, OPTIONS.get(name)]))
        rows.append([label, error(row["losses"]), error(row["weights"])])
    return markdown(["mesh (rows x model)", "losses, relative", "weights, absolute"], rows)


@table
def scale_memory():
    """GB per device of large models, by simulation."""
    rows = []
    for case in read("scale")["cases"]:
        size = case["bytes"]
        kept = [
            gigabytes(size[key]) if key in size else None for key in ("weights", "gradients", "optimizer", "caches")
        ]
        other = gigabytes(size["activations"] + size.get("working", 0))
        rows.append([case["model"], case["step"], f"{case['device']} GB", mesh_of(case), *kept, other])
        rows[-1].append(gigabytes(size["total"]))
    titles = ["model", "step", "device", "mesh", "weights", "gradients", "optimizer", "caches", "activations", "total"]
    return markdown(titles, rows)


@table
def scale_collectives():
    """GB that a device receives per step, and the number of operations, by simulation."""
    rows = []
    for case in read("scale")["cases"]:
        found = case["compiled"]["collectives"]
        cells = [f"{gigabytes(size, 2)} ({count:,})" for count, size in (found[name] for name in COLLECTIVES)]
        rows.append([case["model"], case["step"], mesh_of(case), *cells])
    return markdown(["model", "step", "mesh", *COLLECTIVES], rows)


@table
def scaling_runs():
    return runs("gpu_sharding", "scale")
