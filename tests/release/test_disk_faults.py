"""A faulty disk gives an error that names the path, and leaves the old save. The next save leaves no leftovers."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import records
from checks import once
from writers import SILENT, WRITERS

# Files are written alike on every backend.
pytestmark = once
FAULTS = 40
FOUND = {}


def own_mounts():
    """Returns the command that runs a program in a mount namespace, or [] if the system refuses one."""
    command = ["unshare", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


@pytest.mark.parametrize("name", WRITERS)
def test_a_faulty_disk_gives_an_error_and_keeps_the_old_save(name):
    script = Path(__file__).parent.parent / "subprocess" / "faulty_disk.py"
    # pytest's own folders deny access to the user without rights, for whom some folders are forbidden.
    with tempfile.TemporaryDirectory() as folder:
        command = [*own_mounts(), sys.executable, str(script), name, folder, str(FAULTS), "0"]
        done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": "torch"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    FOUND[name] = found
    records.write("disk_faults", {"seed": 0, "faults per writer": FAULTS, "writers": FOUND})
    failures, errors, counts = found["failures"], found["errors"], found["faults"]
    assert failures == [] and sum(counts.values()) == FAULTS
    assert errors == 0 if name in SILENT else errors >= 10
