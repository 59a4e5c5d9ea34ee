"""Runs trials in a process of its own: `python -m tamper.child JOBS FILE` in `tests`.

JOBS is JSON, a list of `[kind, first seed, seed after the last]`. FILE gets a line of JSON when a trial begins, and one
with its end, CPU seconds and memory when it is over. A signal thus leaves the trial that caused it.
"""

import faulthandler
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import PIL.Image
from tamper.formats import FORMATS
from tamper.trials import Trials

# Events of Python's audit hooks that mean that something runs.
RUNS = ("exec", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen")
RUNS += ("pickle.find_class", "marshal.loads", "marshal.load", "ctypes.dlopen", "code.__new__", "socket.connect")
RUNS += ("socket.getaddrinfo", "webbrowser.open", "os.chmod", "os.chown", "os.symlink", "os.link")
# Modules that run code which they wrote themselves: translations of templates, traced graphs, classes, imports.
WRITERS = ("jinja2", "torch", "collections", "dataclasses", "importlib", "_frozen_importlib")
# A trial that takes longer ends the process.
HANGS_AFTER = 120


class Watch:
    """Notes the events of `RUNS`, imports of new packages, and files written outside of temporary folders."""

    def __init__(self):
        self.seen = None
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.seen is None:
            return
        if event in RUNS:
            if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] not in WRITERS:
                what = getattr(arguments[0], "co_filename", arguments[0]) if arguments else ""
                self.seen.append(f"{event} {what!s:.80}")
        elif event == "import" and arguments[0].partition(".")[0] not in sys.modules:
            self.seen.append(f"import {arguments[0]}")
        elif event == "open" and _is_written(arguments):
            self.seen.append(f"write of {arguments[0]!s:.80}")


def _is_written(arguments):
    path, mode, flags = arguments
    written = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "r" != mode
    if not written or isinstance(path, int):
        return False
    return not os.path.realpath(os.fsdecode(path)).startswith((os.path.realpath(tempfile.gettempdir()), "/dev/null"))


class Memory:
    """The growth of the resident memory, at its peak, since `restart`, in MiB; 0 where the kernel does not tell."""

    def restart(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        self.before = _status("VmRSS")

    def growth(self):
        return max(0, _status("VmHWM") - self.before) / 1024


def _status(name):
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(jobs, file):
    PIL.Image.init()  # Pillow imports its formats when it first meets a file that is none of the usual ones.
    watch, memory = Watch(), Memory()
    with open(file, "a", buffering=1) as report:
        for kind, first, last in json.loads(jobs):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["KERAS_HOME"] = folder
                trials = Trials(FORMATS[kind], Path(folder))
                for seed in range(first, last):
                    _try(trials, kind, seed, watch, memory, report)


def _try(trials, kind, seed, watch, memory, report):
    # The good file takes turns with the damaged ones, because memory and lazy imports settle slowly.
    for place, what in ((trials.good, "good"), trials.damaged(seed)):
        trial = {"kind": kind, "seed": seed, "what": what}
        print(json.dumps(trial), file=report)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        memory.restart()
        started, watch.seen = time.process_time(), []
        end = trials.end(place)
        seconds, ran, watch.seen = time.process_time() - started, watch.seen, None
        measured = {"seconds": round(seconds, 3), "mib": round(memory.growth(), 1), "ran": ran}
        print(json.dumps(trial | {"end": end} | measured), file=report)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])
