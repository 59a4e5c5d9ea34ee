"""Builds the C library of keras_jamba/_native into the wheel, or into an editable install's sources.

Without a C compiler, or where compiling fails, the package still installs, and uses the portable implementations.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("keras_jamba") / "_native"
LIBRARY = FOLDER / "libkeras_jamba.so"
# Not -ffast-math: it takes NaN and the rounding trick of exp2 away.
FLAGS = "-std=c11 -O3 -fPIC -shared -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi".split()


def command(compiler, root, output):
    """The one command that builds the library."""
    return [*compiler.split(), *FLAGS, str(root / FOLDER / "keras_jamba.c"), "-o", str(output), "-lm", "-pthread"]


def compiler():
    """The C compiler: the environment variable CC, or the first of the usual names that is there, or None."""
    named = os.environ.get("CC")
    return named or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        root = Path(self.root)
        output = root / LIBRARY
        reason = self._compile(root, output)
        if reason:
            output.unlink(missing_ok=True)  # one of an older source
            self.app.display_warning(f"keras-jamba is installed without its C library: {reason}")
            return
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def _compile(self, root, output):
        """None, or why there is no library."""
        found = compiler()
        if found is None:
            return "there is no C compiler (cc, gcc or clang)."
        # Into a file of its own first: a process that has the old library loaded keeps it.
        made = output.with_suffix(f".building-{os.getpid()}")
        try:
            done = subprocess.run(command(found, root, made), capture_output=True, text=True, errors="replace")
        except OSError as error:
            return f"{found!r} cannot be run ({error})."
        if done.returncode or not made.exists():
            made.unlink(missing_ok=True)
            return f"{found!r} failed:\n{done.stderr[-2000:]}"
        made.replace(output)
        return None
