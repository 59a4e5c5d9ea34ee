"""Time for which a GPU is busy, and its longest operations."""

import collections
import tempfile
from pathlib import Path

import keras

BACKEND = keras.backend.backend()


def busy_milliseconds(function, steps, longest=20):
    """Returns the milliseconds per step that the GPU is busy, and `[(kernel, milliseconds, calls)]` of the longest."""
    total, calls = collections.Counter(), collections.Counter()
    for name, nanoseconds in _kernels(function):
        total[name] += nanoseconds
        calls[name] += 1
    found = [(name, ns / steps / 1e6, calls[name] / steps) for name, ns in total.most_common(longest)]
    return sum(total.values()) / steps / 1e6, found


def _kernels(function):
    """Yields `(name, nanoseconds)` of each operation of the device while `function` runs."""
    if BACKEND == "jax":
        import jax

        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                function()
            (file,) = Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines if "GPU" in plane.name else ():
                    if "Stream" in line.name:
                        yield from ((event.name, event.duration_ns) for event in line.events)
    else:
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                yield event.name, 1e3 * event.device_time
