"""Records of the tests before a release: `results/NAME.json` with versions, machine, date and figures."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import keras

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
_PACKAGES = ("keras", "numpy", "h5py", "safetensors", "tokenizers", "jinja2", "jax", "tensorflow", "torch")


def write(name, figures, backend=None):
    """Writes the figures of a test, with what they depend on, to `results/NAME.json`.

    `backend` is that of the processes that the test started; None for the backend of this process.
    """
    record = {"commit": COMMIT, "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    record |= {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_memory()}"}
    record |= {"python": platform.python_version(), "backend": backend or keras.backend.backend()}
    record |= {"versions": _versions()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record | figures, indent=1) + "\n")


def _versions():
    installed = {each.name for each in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in _PACKAGES if name in installed}


def _memory():
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):
        return "unknown memory"


def _commit():
    """Returns the commit, with a plus if the package has changed since."""
    changed = "+" if _git("status", "--short", "keras_jamba") else ""
    return _git("rev-parse", "--short", "HEAD") + changed


def _git(*command):
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()


# At the beginning of a run.
COMMIT = _commit()
