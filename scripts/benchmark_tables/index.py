"""The tables of docs/benchmarks/index.md."""

from scripts.benchmark_tables.tables import BACKENDS, TITLES, markdown, number, read, runs, table


@table
def import_time():
    """Seconds of the two imports."""
    rows = []
    for backend in BACKENDS:
        found = read(f"import_time_{backend}")
        rows.append([TITLES[backend], number(found["import_keras_s"]), number(found["import_keras_jamba_s"], 2)])
    return markdown(["backend", "`import keras`, s", "`import keras_jamba` after it, s"], rows)


@table
def import_time_runs():
    return runs(*(f"import_time_{backend}" for backend in BACKENDS))
