"""The wheel holds the package, all presets and nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checks import full, once

# Independent of the backend.
pytestmark = once
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns a wheel that hatchling builds directly, without network access or an isolated environment."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def files_under(folder):
    """Returns the files of a folder as in a clone: without `__pycache__` and `.DS_Store`."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }


def test_the_wheel_has_every_preset_and_no_other(contents):
    prefix = "keras_jamba/_presets/"
    packed = {name.removeprefix(prefix) for name in contents if name.startswith(prefix)}
    assert packed == files_under(ROOT / "presets")
    assert packed


def test_the_wheel_has_every_module_and_nothing_beside_the_package(contents):
    modules = {f"keras_jamba/{path}" for path in files_under(ROOT / "keras_jamba")}
    assert {name for name in modules if name.endswith(".py")} <= contents
    folders = {name.split("/")[0] for name in contents}
    assert {f for f in folders if not f.endswith(".dist-info")} == {"keras_jamba"}


@full()
def test_an_unpacked_wheel_finds_its_presets(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    code = (
        "import keras_jamba, keras_jamba.presets as presets;print(keras_jamba.__file__); print(presets.list_presets())"
    )
    # PYTHONPATH precedes an editable install, which would import the clone.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "unpacked")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    file, names = done.stdout.splitlines()[-2:]
    assert Path(file).is_relative_to(tmp_path)
    assert names == str(tuple(sorted(path.parent.name for path in (ROOT / "presets").glob("*/config.json"))))
