"""What devices can do: peak rates from their makers' data sheets, or measured; and the memory of this process."""

import os
import statistics
import time

import keras

from keras_jamba import _backend

# 1e12 FLOPs a second of matrix products without sparsity: (bfloat16 or, where there is none, float16; float32 without
# TF32). A part of the device's name, the more special one first. NVIDIA's and Google's data sheets.
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
    """FLOPs a second of one device: a number as it is, a dtype's entry in the table, or "measured"."""
    if isinstance(peak, (int, float)) and not isinstance(peak, bool) and peak > 0:
        return peak
    if peak == "measured":
        return _measured()
    column = {"bfloat16": 1, "float16": 1, "float32": 2}.get(peak)
    if column is None:
        raise ValueError(
            "peak must be a positive number of FLOPs a second, 'bfloat16', 'float16', 'float32' or 'measured'. "
            f"Received: peak={peak!r}. Pass one of these."
        )
    name = _backend.device.device_name()
    found = next((row[column] for row in _PEAKS if row[0].lower() in name.lower()), None)
    if found is None:
        raise ValueError(
            f"The table of devices must know this one in {peak}. Received: {name!r}. "
            "Pass peak as a number of FLOPs a second, or peak='measured'."
        )
    return found * 1e12


def _measured(times=7):
    """FLOPs a second of a product of square float32 matrices, so large that a product takes some milliseconds."""
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
    """`{"process_memory": bytes}` that are resident, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return {"process_memory": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    except OSError:
        return {}


class PeakMemory:
    """`with PeakMemory() as peak`: afterwards `peak.bytes`, the most that this process had resident meanwhile.

    Only Linux can forget an earlier peak. Elsewhere it is an error where it is `needed`, and else 0.
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
                    "A bound for the process needs a system that tells its peak of memory, Linux. "
                    f"Received: {error}. Leave memory out."
                ) from error
        return self

    def __exit__(self, *exception):
        if self.needed:
            with open("/proc/self/status") as file:
                line = next(line for line in file if line.startswith("VmHWM"))
            self.bytes = 1024 * int(line.split()[1])
