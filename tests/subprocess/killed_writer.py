"""Kills a writer while it replaces its save, and checks what is left.

    python killed_writer.py WRITER FOLDER KILLS SEED

Each kill ends a fork of this process by SIGKILL at a random moment of the write. The last line is a JSON dict:
`kills`, `old` and `new`, the counts of saves found afterwards, and `failures`, a list of sentences.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# Threads of a library do not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from writers import WRITERS, equal, leftovers, make_way  # noqa: E402


def start(write, k):
    """Returns `(process id, pipe)` of a fork that writes save k, and closes the pipe at its end."""
    ready, started = os.pipe()
    ended, end = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(ended)
        os.write(started, b"x")
        write(k)
        os.close(end)
        os._exit(0)
    os.read(ready, 1)
    for pipe in (ready, started, end):
        os.close(pipe)
    return process, ended


def seconds(write, k):
    process, ended = start(write, k)
    begin = time.perf_counter()
    os.read(ended, 1)
    taken = time.perf_counter() - begin
    os.close(ended)
    os.waitpid(process, 0)
    return taken


def killed(write, k, delay):
    process, ended = start(write, k)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    os.close(ended)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def main(name, folder, kills, seed):
    folder, draw = Path(folder), random.Random(int(seed))
    write_beside, read = WRITERS[name](folder)

    def write(k):
        make_way(name, folder)
        write_beside(k)

    # A checkpoint keeps two saves.
    write(0)
    write(1)
    names, duration = len(list(folder.rglob("*"))), sorted(seconds(write, k) for k in (2, 3, 4))[1]
    found = {"kills": 0, "old": 0, "new": 0, "milliseconds": round(1000 * duration, 1), "failures": []}
    k = 3
    while found["kills"] < int(kills):
        k += 2
        write(k)
        make_way(name, folder)
        old = read()
        delay = draw.uniform(0, duration)
        if not killed(write_beside, k + 1, delay):
            continue  # the write was faster than usual
        found["kills"] += 1
        case = f"{name}, kill {found['kills']} after {1000 * delay:.2f} ms"
        try:
            left = read()
        except Exception as error:
            left = f"{type(error).__name__}: {error}"
        write(k + 1)
        new = read()
        if isinstance(left, str):
            found["failures"].append(f"{case}: unreadable, {left}")
        elif equal(left, old):
            found["old"] += 1
        elif equal(left, new):
            found["new"] += 1
        else:
            found["failures"].append(f"{case}: other numbers")
        if equal(old, new):
            found["failures"].append(f"{case}: the saves do not differ")
        if leftovers(folder) or len(list(folder.rglob("*"))) != names:
            found["failures"].append(f"{case}: leftovers {leftovers(folder)}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
