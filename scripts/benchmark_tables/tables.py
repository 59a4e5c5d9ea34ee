"""Shared code of the tables: the registry, results files, Markdown and numbers."""

import json
import math
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BACKENDS = ("jax", "tensorflow", "torch")
TITLES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
# `{name: function without arguments that returns a Markdown table}`.
TABLES = {}


def table(function):
    """Registers a function under its name."""
    TABLES[function.__name__] = function
    return function


def read(name):
    """Returns the content of `results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(titles, rows):
    """Returns a Markdown table. None becomes a dash."""
    lines = [titles, ["---"] * len(titles), *rows]
    for row in rows:
        if len(row) != len(titles):
            raise ValueError(f"A row must have {len(titles)} cells. Received: {row}")
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def number(value, digits=3):
    """Returns a number with `digits` significant digits. Digits before the point are all kept."""
    if not value:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share, decimals=0):
    """Returns a share from 0 to 1 in percent."""
    return f"{100 * share:.{decimals}f} %"


def error(value):
    """Returns a small number with two significant digits."""
    return f"{value:.1e}" if value else "0"


def gigabytes(count, digits=3):
    """Returns a number of bytes in units of 1e9 bytes."""
    return number(count / 1e9, digits)


def runs(*names):
    """Returns the table of the machines and versions of results files. Files of equal runs share a row."""
    return runs_of({name: read(name) for name in names})


def runs_of(documents):
    """Returns the table of `runs` for `{name of the file: its content}`."""
    grouped = {}
    for name, document in documents.items():
        grouped.setdefault((_machine(document), _versions(document)), []).append(f"`{name}.json`")
    rows = [[", ".join(files), *facts] for facts, files in grouped.items()]
    return markdown(["results file", "machine", "versions"], rows)


def _machine(document):
    machine = document.get("measured on", document.get("machine"))
    if machine is None:
        return "not recorded"
    gpus = machine.get("gpus") or [name for name in [document.get("device", "")] if name.startswith("NVIDIA")]
    processor = machine["processor"].replace("(R)", "").replace(" Processor", "")
    processor = processor.replace("avx512f", "AVX-512").replace("avx2", "AVX2")
    parts = [f"{len(gpus)} x {gpus[0].replace(', ', ', driver ')}"] if gpus else []
    parts += [f"{machine['cores']} cores of {processor}" if "cores" in machine else processor]
    parts += [f"trained on {' and '.join(document['trained on'])}"] if "trained on" in document else []
    return "; ".join(parts)


def _versions(document):
    machine = document.get("measured on", document.get("machine"))
    if machine is None:
        return "not recorded"
    versions = {"python": machine["python"]} if "python" in machine else {}
    return ", ".join(f"{name} {version}" for name, version in (versions | machine["versions"]).items())
