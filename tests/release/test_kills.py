"""A writer that is killed at a random moment leaves the old or the new save, and no leftovers after the next one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import records
from checks import once
from writers import WRITERS

# Files are written alike on every backend.
pytestmark = once
KILLS = 24
FOUND = {}


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new_save(tmp_path, name):
    script = Path(__file__).parent.parent / "subprocess" / "killed_writer.py"
    command = [sys.executable, str(script), name, str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": "torch"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    FOUND[name] = found
    records.write("kills", {"seed": 0, "kills per writer": KILLS, "writers": FOUND})
    assert found["failures"] == [] and found["kills"] == KILLS == found["old"] + found["new"]
