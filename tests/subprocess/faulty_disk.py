"""Writers on disks with faults, and checks what is left.

    python faulty_disk.py WRITER FOLDER FAULTS SEED

Each fault happens to a fork of this process. As root in its own mount namespace (`unshare --mount`), disks are full or
read-only file systems in memory. Without, files have a maximum size and folders forbid writing. The last line is a JSON
dict: `faults`, `{name: count}`; `errors`, the count of refused writes; `remade`, how often a writer made a folder anew
that had been moved away; and `failures`, a list of sentences.
"""

import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Threads of a library do not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from writers import SILENT, WRITERS, equal, leftovers, make_way  # noqa: E402

NOBODY = 65534


class Disk:
    """A file system of its own in memory with a folder, or only the folder."""

    def __init__(self, place):
        self.place, self.folder = place, place / "folder"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
        self.is_mounted = subprocess.run(command, capture_output=True).returncode == 0
        self.folder.mkdir()

    def mounted(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.place)], check=True)

    def fill(self, free):
        """Fills the disk up to `free` bytes."""
        with open(self.place / "filler", "wb", buffering=0) as file:
            while space := max(0, os.statvfs(self.place).f_bavail * os.statvfs(self.place).f_frsize - free):
                file.write(bytes(min(space, 4096)))


def limited(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def without_rights():
    """Gives up the rights of root, which ignores permissions."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


# Each fault is a generator `fault(disk, draw, size, duration)`. It yields a function that the fork calls before it
# writes, and continues while the fork writes. It yields again before the fork is awaited, and repairs the disk.


def full_disk(disk, draw, size, duration):
    disk.fill(draw.randrange(size))
    yield None
    yield
    (disk.place / "filler").unlink()


def short_files(disk, draw, size, duration):
    limit = draw.randrange(size)
    yield lambda: limited(limit)
    yield


def read_only_disk(disk, draw, size, duration):
    disk.mounted("ro")
    yield None
    yield
    disk.mounted("rw")


def forbidden_folder(disk, draw, size, duration):
    mode = draw.choice([0o555, 0o111, 0o000])
    for folder in [disk.folder, *(path for path in disk.folder.rglob("*") if path.is_dir())]:
        folder.chmod(mode)
    yield without_rights
    yield
    disk.folder.chmod(0o755)
    for folder in sorted(path for path in disk.folder.rglob("*") if path.is_dir()):
        folder.chmod(0o755)


def moved_folder(disk, draw, size, duration):
    yield None
    time.sleep(draw.uniform(0, duration))
    away = disk.folder.with_name("away")
    disk.folder.rename(away)
    yield
    # The writer may have made the folder anew.
    shutil.rmtree(disk.folder, ignore_errors=True)
    away.rename(disk.folder)


def removed_folder(disk, draw, size, duration):
    yield None
    time.sleep(draw.uniform(0, duration))
    shutil.rmtree(disk.folder, ignore_errors=True)
    yield
    disk.folder.mkdir(exist_ok=True)


FAULTS = {
    full_disk: 12,
    short_files: 12,
    read_only_disk: 2,
    forbidden_folder: 2,
    moved_folder: 6,
    removed_folder: 6,
}


def faults_of(count, is_mounted):
    if not is_mounted:
        return [short_files] * (count - 14) + [forbidden_folder] * 2 + [moved_folder] * 6 + [removed_folder] * 6
    found = [fault for fault, times in FAULTS.items() for _ in range(times)]
    return found if count == len(found) else [found[i * len(found) // count] for i in range(count)]


def written(write, k, before):
    """Returns `(process, pipe)` of a fork that writes save k, and then its error as JSON, or null."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        error = None
        try:
            if before is not None:
                before()
            os.write(write_end, b"\n")
            write(k)
        except BaseException as raised:
            error = [type(raised).__name__, str(raised), isinstance(raised, OSError)]
        os.write(write_end, json.dumps(error).encode())
        os._exit(0)
    os.close(write_end)
    pipe = os.fdopen(read_end, "rb")
    pipe.readline()
    return process, pipe


def readable(read, wrong):
    try:
        return read()
    except Exception as raised:
        wrong(f"unreadable, {raised!r}")


def main(name, folder, count, seed):
    Path(folder).chmod(0o755)
    draw, disk = random.Random(int(seed)), Disk(Path(folder) / "disk")
    write_beside, read = WRITERS[name](disk.folder)

    def write(k):
        make_way(name, disk.folder)
        write_beside(k)

    # A checkpoint keeps two saves.
    write(0)
    write(1)
    paths = list(disk.folder.rglob("*"))
    size = sum(path.stat().st_size for path in paths if path.is_file())
    begin = time.perf_counter()
    write(2)
    duration, k = time.perf_counter() - begin, 3
    counts, found = collections.Counter(), {"errors": 0, "remade": 0, "failures": []}
    for i, fault in enumerate(faults_of(int(count), disk.is_mounted)):
        case = f"{name}, fault {i}, {fault.__name__}"
        wrong = lambda what, case=case: found["failures"].append(f"{case}: {what}")  # noqa: E731
        write(k)
        make_way(name, disk.folder)
        old = read()
        running = fault(disk, draw, size, duration)
        process, pipe = written(write_beside, k + 1, next(running))
        next(running)
        error = pipe.read()
        status = os.waitpid(process, 0)[1]
        # A folder that the writer made anew, where the old one has been moved away, holds a whole save or none.
        is_remade = fault is moved_folder and disk.folder.exists()
        remade = readable(read, wrong) if is_remade else None
        next(running, None)
        counts[fault.__name__] += 1
        left = readable(read, wrong)
        write(k + 1)
        new = read()
        if os.WIFSIGNALED(status):
            wrong(f"signal {os.WTERMSIG(status)}")
        elif (error := json.loads(error)) is not None:
            found["errors"] += 1
            if not error[2] or str(disk.folder) not in error[1]:
                wrong(f"error {error}")
        vanished = fault in (moved_folder, removed_folder)  # also at once after the write, or with the new save
        is_old = equal(left, old) or left is None and fault is removed_folder
        refused = error is not None or name in SILENT or os.WIFSIGNALED(status)
        if not (equal(left, new) or is_old and (refused or vanished)):
            wrong("other numbers")
        found["remade"] += is_remade
        if remade is not None and not equal(remade, new):
            wrong("other numbers in a folder made anew")
        if equal(old, new):
            wrong("the saves do not differ")
        if fault is removed_folder:
            write(k + 2)  # again two saves
        if leftovers(disk.folder) or len(list(disk.folder.rglob("*"))) != len(paths):
            wrong(f"leftovers {leftovers(disk.folder)}, {len(list(disk.folder.rglob('*')))} of {len(paths)}")
        k += 3
    print(json.dumps({"faults": counts} | found))


if __name__ == "__main__":
    main(*sys.argv[1:])
