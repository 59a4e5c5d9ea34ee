"""Atomic writing of files and folders: they are staged beside their destination and moved there at the end.

Everything is flushed to disk before it is moved, so that a crash of the machine leaves the old or the new content. A
killed process leaves a folder whose name begins with `.unfinished-`, and an unchanged destination. The next write of
the same destination on this host removes that folder, where the file system has locks.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where leftovers of killed processes stay
    fcntl = None  # type: ignore[assignment]

_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"
# Some shared file systems lock within one host only.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextlib.contextmanager
def atomic_file(path):
    """Yields the path of a staged file, which replaces `path` on success.

    An error or an interrupt leaves the previous file unchanged and removes the staged one. The file gets the
    permissions of the file that it replaces, or those of a new file.

    Args:
        path: destination. A missing parent folder is created, and a link is followed. For a device or pipe, the
            content is copied into it.

    Raises:
        IsADirectoryError: if `path` is a folder.
        PermissionError: if the file or its parent folder is not writable.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if place.is_file() and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if place.exists() and not place.is_file():
        with _written_into(place, Path(path).name) as staged:
            yield staged
        return
    # Some writers choose a format by the suffix of the given name, which is that of the link.
    with _staging(place, Path(path).name) as staged:
        mode = place.stat().st_mode if place.exists() else _mode_of_new_files(staged.parent)
        yield staged
        _flush(staged)
        staged.chmod(stat.S_IMODE(mode))
        os.replace(staged, place)
        _flush(place.parent)


@contextlib.contextmanager
def atomic_folder(path, replaces=False):
    """Yields an empty staged folder, which replaces `path` on success.

    An error or an interrupt leaves the previous folder unchanged and removes the staged one.

    Args:
        path: destination. A missing parent folder is created, and a link is followed.
        replaces: whether to replace a folder that is not empty. If the process is killed during the replacement,
            `restore` recovers the previous folder.

    Raises:
        OSError: if `path` is a folder that is not empty, unless `replaces`.
        ValueError: if `path` is the working directory, which would be removed.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir() and os.path.samefile(place, os.curdir):
        raise ValueError(
            f"The folder must not be the working directory, which would be replaced. Received: {str(path)!r}. Pass a "
            "folder inside it."
        )
    with _staging(place) as staged:
        staged.mkdir()
        yield staged
        mode = stat.S_IMODE(_mode_of_new_files(staged.parent))
        for written in (*staged.rglob("*"), staged):
            _flush(written)
            if written.is_file():
                written.chmod(mode)
        with _set_aside(place) if replaces else contextlib.nullcontext():
            os.replace(staged, place)
            _flush(place.parent)


@contextlib.contextmanager
def atomic_files(folder):
    """Yields an empty staged folder, whose files are moved into `folder` on success.

    Each file is replaced atomically. An error or an interrupt before all are written changes no file. Other files in
    `folder` are kept.

    Args:
        folder: destination. It is created if missing.

    Raises:
        IsADirectoryError: if the destination of a file is a folder. No file is changed then.
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


def exists(path):
    """Returns whether a path is a regular file that this process may read. Reading a device or pipe may never end.

    Raises:
        PermissionError: if it may not read the file or look into its folder.
    """
    path = Path(path)
    try:
        if not path.is_file():
            return False
        with open(path, "rb"):
            return True
    except PermissionError as error:
        message = "Files must be readable. Received: a file or folder without permission. Make it readable"
        raise PermissionError(error.errno, message, str(path)) from error
    except OSError:
        return False


def read_json(path):
    """Returns the value in a JSON file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not JSON in UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def write_json(path, value, indent=2, **options):
    """Writes a value as JSON with a final newline. `options` are passed to `json.dumps`. The write is not atomic."""
    Path(path).write_text(json.dumps(value, indent=indent, **options) + "\n", "utf-8")


def restore(parent):
    """Restores the folders in `parent` whose replacement was killed."""
    for aside in Path(parent).glob(f"{_REPLACED}*"):
        _restore_folder(aside, aside.with_name(aside.name.removeprefix(_REPLACED)))


def remove_folder(folder):
    """Removes a folder. A killed removal never leaves an incomplete folder at its path."""
    with _staging(Path(folder)) as away:
        os.replace(folder, away)


def remove_leftovers(parent, names):
    """Removes files of killed processes in `parent`, for folders whose names match the pattern `names`."""
    for left in Path(parent).glob(f"{_UNFINISHED}{names}"):
        _remove_if_abandoned(left)
    for left in Path(parent).glob(f"{_REPLACED}{names}"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _staging(place, name=None):
    """Yields a path named `name`, or like `place`, in a new folder beside `place`, which is removed afterwards."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # The name of `place` may already have the maximum length.
    prefix = f"{_UNFINISHED}{place.name[:40]}-{_HOST}-"
    _remove_abandoned(place.parent, prefix)
    folder, lock = _locked_folder(place, prefix)
    try:
        yield folder / (name or place.name)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(folder)):
            raise _of_place(error, place) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _of_place(error, place):
    """Returns an OSError that names the destination, where `error` names no file or a staged one."""
    if error.errno is None:
        return OSError(f"{error}: {str(place)!r}")
    return OSError(error.errno, error.strerror, str(place))


def _locked_folder(place, prefix):
    """Returns a new folder beside `place` and the file descriptor of its lock, or None without locks.

    A process holds the lock as long as it lives, which tells its folder from that of a killed process.
    """
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
        except OSError as error:
            message = f"{error.strerror}: files are staged beside their destination, in a folder that must be writable"
            raise OSError(error.errno, message, str(place)) from error
        if fcntl is None:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            if folder.exists():  # a file system whose folders cannot be opened
                return folder, None
            continue  # another process removed it before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process is removing it
            os.close(lock)
            continue
        except OSError:  # a file system without locks
            os.close(lock)
            return folder, None
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(parent, prefix):
    """Removes the staging folders of killed processes of this host."""
    for folder in parent.glob(f"{glob.escape(prefix)}*") if fcntl is not None else ():
        _remove_if_abandoned(folder)


def _remove_if_abandoned(folder):
    """Removes a staging folder unless a process holds its lock. Without locks, it removes the folder."""
    if fcntl is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its process lives, or the file system has no locks
        pass
    finally:
        os.close(lock)


@contextlib.contextmanager
def _written_into(node, name):
    """Yields the path of a temporary file, whose content is then copied into a device or pipe."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / name
        with open(Path(folder) / name, "rb") as written, open(node, "wb") as stream:
            shutil.copyfileobj(written, stream)


@contextlib.contextmanager
def _set_aside(place):
    """Renames the folder at `place` during the context. Removes it if another took its place, else restores it."""
    aside = place.with_name(f"{_REPLACED}{place.name}")
    try:
        if place.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(place, aside)
        yield
    finally:
        _restore_folder(aside, place)
    shutil.rmtree(aside, ignore_errors=True)


def _restore_folder(aside, place):
    if aside.is_dir() and not place.exists():
        os.replace(aside, place)


def _mode_of_new_files(folder):
    """Returns the mode of new files. Some libraries create files that only their owner may read."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        file = Path(inner) / "file"
        file.touch()
        return file.stat().st_mode


def _flush(path):
    """Flushes a file, or the entries of a folder, to disk."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        if path.is_dir():  # some systems cannot open folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)
