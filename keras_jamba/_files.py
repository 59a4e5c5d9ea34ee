"""Files and folders that appear whole or not at all: they are written beside their place, and moved there at the end.

A process that is killed meanwhile leaves a folder that begins with `.unfinished-`, and nothing in the place.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"


@contextlib.contextmanager
def atomic_file(path):
    """Gives the path of a file to write, which takes the place of `path` when all went well.

    After an error or an interrupt what stood there before stays, and nothing is left beside it. The file has the
    permissions of the one that it replaces, or those of any new file.

    Args:
        path: its parent folder is made where it is not there. A link is followed. What was written is copied into a
            device or pipe.

    Raises:
        IsADirectoryError: if a folder stands there.
        PermissionError: if the folder around the file cannot be written to.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if place.exists() and not place.is_file():
        with _written_into(place, Path(path).name) as staged:
            yield staged
        return
    # Some writers go by the ending of the name that the user gave: that of the link.
    with _staging(place, Path(path).name) as staged:
        mode = place.stat().st_mode if place.exists() else _mode_of_new_files(staged.parent)
        yield staged
        staged.chmod(stat.S_IMODE(mode))
        os.replace(staged, place)


@contextlib.contextmanager
def atomic_folder(path, replaces=False, flushes=False):
    """Gives an empty folder to fill, which takes the place of `path` when all went well.

    After an error or an interrupt what stood there before stays, and nothing is left beside it.

    Args:
        path: its parent folder is made where it is not there. A link is followed.
        replaces: whether to replace a folder that holds anything. Where the process is killed just then, `restore`
            finds the folder of before.
        flushes: whether to wait until all is on the disk, before the folder takes its place and after.

    Raises:
        OSError: if a folder there holds anything, unless `replaces`.
        ValueError: for the working directory, which would be gone.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir() and os.path.samefile(place, os.curdir):
        raise ValueError(
            f"The folder must not be the working directory, which would be replaced. Received: {str(path)!r}. Name a "
            "folder inside it."
        )
    with _staging(place) as staged:
        staged.mkdir()
        yield staged
        mode = stat.S_IMODE(_mode_of_new_files(staged.parent))
        for written in (*staged.rglob("*"), staged):
            if written.is_file():
                written.chmod(mode)
            if flushes:
                _flush(written)
        with _set_aside(place) if replaces else contextlib.nullcontext():
            os.replace(staged, place)
            if flushes:
                _flush(place.parent)


@contextlib.contextmanager
def atomic_files(folder):
    """Gives an empty folder to fill, whose files take their places in `folder` when all went well.

    Each appears whole, and none where an error or an interrupt comes before all are written. Other files stay.

    Args:
        folder: is made where it is not there.

    Raises:
        IsADirectoryError: if a folder stands where a file is to be. No file is changed then.
    """
    folder = Path(folder)
    with _staging(folder / "files") as staged:
        staged.mkdir()
        yield staged
        places = {file: folder / file.relative_to(staged) for file in sorted(staged.rglob("*")) if file.is_file()}
        for place in places.values():
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        for file, place in places.items():
            with atomic_file(place) as written:
                shutil.move(file, written)


def write_json(path, value, indent=2, **options):
    """Writes a value as JSON, and a newline; `options` are those of `json.dumps`. The file itself is not atomic."""
    Path(path).write_text(json.dumps(value, indent=indent, **options) + "\n", "utf-8")


def restore(parent):
    """Puts back the folders in `parent` whose replacement was killed halfway."""
    for aside in Path(parent).glob(f"{_REPLACED}*"):
        _put_back(aside, aside.with_name(aside.name.removeprefix(_REPLACED)))


def remove_folder(folder):
    """Removes a folder; what is killed meanwhile leaves nothing in its place that looks whole."""
    with _staging(Path(folder)) as away:
        os.replace(folder, away)


def remove_leftovers(parent, names):
    """Removes what killed processes left in `parent` of folders whose names match a pattern."""
    for prefix in (_UNFINISHED, _REPLACED):
        for left in Path(parent).glob(f"{prefix}{names}"):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _staging(place, name=None):
    """A path of the name of `place`, or of another, in a new folder beside it, which is removed afterwards."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A name may be as long as the system takes.
        folder = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{place.name[:40]}-", dir=place.parent))
    except PermissionError as error:
        message = "What is saved is first written beside its place, in a folder that must be writable"
        raise PermissionError(errno.EACCES, message, str(place.parent)) from error
    try:
        yield folder / (name or place.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _written_into(node, name):
    """The path of a file to write, whose content is then written into a device or pipe."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / name
        with open(Path(folder) / name, "rb") as written, open(node, "wb") as stream:
            shutil.copyfileobj(written, stream)


@contextlib.contextmanager
def _set_aside(place):
    """The folder at `place` is renamed, and removed when another is there; it comes back when none is."""
    aside = place.with_name(f"{_REPLACED}{place.name}")
    try:
        if place.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(place, aside)
        yield
    finally:
        _put_back(aside, place)
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside, place):
    if aside.is_dir() and not place.exists():
        os.replace(aside, place)


def _mode_of_new_files(folder):
    """Some libraries make files that only their owner reads."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        file = Path(inner) / "file"
        file.touch()
        return file.stat().st_mode


def _flush(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        if path.is_dir():  # not every system opens folders
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
