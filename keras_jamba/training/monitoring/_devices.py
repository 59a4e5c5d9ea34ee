"""Peak rates of devices, from data sheets or measured, and the memory of this process."""

import os
import statistics
import time

import keras

from keras_jamba import _backend

# Part of the device's name, then 1e12 FLOPs per second of dense products, from NVIDIA's and Google's data sheets:
# bfloat16 (float16 if unsupported), and float32 without TF32. More specific names come first.
_PEAKS = (
    ("B200", 2250, 75),
    ("H200", 989, 67),
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835, 60),
    ("H100", 989, 67),
    ("A100", 312, 19.5),
    ("L40S", 362, 91.6),
    ("L4", 121, 30.3),
    ("A10", 125, 31.2),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("RTX 4090", 165, 82.6),
    ("TPU v6 lite", 918, None),
    ("TPU v5 lite", 197, None),
    ("TPU v5", 459, None),
    ("TPU v4", 275, None),
)


def peak_flops(peak):
    """Returns the FLOPs per second of one device: `peak` if a number, the table's entry for a dtype, or measured."""
    if isinstance(peak, (int, float)) and not isinstance(peak, bool) and peak > 0:
        return peak
    if peak == "measured":
        return _measured()
    column = {"bfloat16": 1, "float16": 1, "float32": 2}.get(peak)
    if column is None:
        raise ValueError(
            "peak must be a positive number of FLOPs per second, 'bfloat16', 'float16', 'float32' or 'measured'. "
            f"Received: peak={peak!r}. Pass one of these."
        )
    name = _backend.device.device_name()
    found = next((row[column] for row in _PEAKS if row[0].lower() in name.lower()), None)
    if found is None:
        raise ValueError(
            f"The table of peak rates must have a {peak} entry for the device. Received: {name!r}. "
            "Pass peak as a number of FLOPs per second, or peak='measured'."
        )
    return found * 1e12


def _measured(times=7):
    """Measures the FLOPs per second of a product of square float32 matrices that takes at least 5 ms if possible."""
    size, seconds = 512, 0.0
    while seconds < 5e-3 and size < 16384:
        size *= 2
        x = keras.random.normal((size, size))
        _timed_product(x)
        seconds = _timed_product(x)
    return 2 * size**3 / statistics.median(_timed_product(x) for _ in range(times))


def _timed_product(x):
    started = time.perf_counter()
    keras.ops.convert_to_numpy(keras.ops.matmul(x, x)[0, 0])
    return time.perf_counter() - started


def process_memory():
    """Returns `{"process_memory": bytes}`, the resident memory; an empty dict without /proc/self/statm."""
    try:
        with open("/proc/self/statm") as file:
            return {"process_memory": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    except OSError:
        return {}


class PeakMemory:
    """A context that measures the peak resident memory of this process, as `bytes` after it ends.

    Only Linux can reset an earlier peak. Elsewhere `__enter__` raises a ValueError if `needed`. Without `needed`,
    `bytes` is 0.
    """

    def __init__(self, needed):
        self.needed, self.bytes = needed, 0

    def __enter__(self):
        if self.needed:
            try:
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")
            except OSError as error:
                raise ValueError(
                    "memory needs Linux, which reports the peak memory of a process. "
                    f"Received: {error}. Leave memory out."
                ) from error
        return self

    def __exit__(self, *exception):
        if self.needed:
            with open("/proc/self/status") as file:
                line = next(line for line in file if line.startswith("VmHWM"))
            self.bytes = 1024 * int(line.split()[1])
