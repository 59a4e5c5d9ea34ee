"""Speed and memory of the selective scan on a CPU, with other implementations as peers.

    KERAS_BACKEND=jax python -m benchmarks.scan.cpu

KERAS_BACKEND names the backend. The script first compares outputs and gradients of every implementation with the
reference. It then times all in one interleaved run, and measures the peak memory of forward and backward, each in a
separate process. The floor of the machine is the time of the exponentials or of the bytes alone, see `floor_ms`. Prints
a table and writes results/scan_BACKEND.json.
"""

import argparse
import json
import sys

import keras
import numpy as np
from keras import ops

from benchmarks import measure
from benchmarks.scan.cpu_peers import peers
from keras_jamba.ops import implementations, selective_scan

BACKEND = keras.backend.backend()
SHAPES = [(8, 64, 256), (8, 256, 256), (2, 1024, 512), (1, 4096, 512)]
MEMORY_SHAPES = [(1, 4096, 512), (1, 16384, 512)]
STATE = 16
# Longest sequence in tokens that each slow implementation is timed at, compilation included.
LONGEST = {"reference": 64, "keras.ops.associative_scan": 1024}
LONGEST_IN_MEMORY = {"portable": 16384, "native": 16384, "reference": 0, "keras.ops.associative_scan": 0}


def contestants():
    def ours(name):
        return lambda *tensors: selective_scan(*tensors, delta_softplus=True, implementation=name)

    available = [name for name, reason in implementations().items() if reason is None]
    return {name: ours(name) for name in available} | peers()


def called_from_c(tensors):
    """Returns `measure.forward_and_gradient` of the native kernel on prepared arrays, without the cost of a backend."""
    from keras_jamba import _native

    names = ("u", "delta", "A", "B", "C", "D", "z", "bias", "grad_y")
    arrays = {name: np.array(ops.convert_to_numpy(x)) for name, x in zip(names, tensors, strict=True)}
    specs = _native.SCAN.output_specs({name: x.shape for name, x in arrays.items()}, "float32", train=True)
    arrays |= {name: np.empty(*spec) for name, spec in zip(_native.SCAN.outputs, specs, strict=True)}
    arrays |= {f"grad_{name}": np.empty_like(arrays[name]) for name in names[:-1]}
    pointers = {k: _native.Array(x.ctypes.data, x.shape, "float32", x.shape[-1]) for k, x in arrays.items()}

    def run(*passes, owner=arrays):  # keeps the arrays alive as long as this function
        for backward in passes:
            _native.SCAN.run(backward, pointers, {"softplus": 1}, _native.cores())

    return lambda: run(False), lambda: run(False, True)


def floor_ms(shape, what, rates):
    """Returns a lower bound in milliseconds of any float32 scan on this machine.

    It is the time of the exponentials, or of reading each input and writing each output once, if that is longer. The
    backward pass computes the decays again. Both passes read u, delta, z, B and C.
    """
    batch, length, channels = shape
    passes = 2 if what == "forward+backward" else 1
    sequence_tensors, state_tensors = (4, 2) if passes == 1 else (4 + 7, 2 + 4)  # tensors of (b, t, e) and of (b, t, n)
    tokens = batch * length
    exponentials = passes * tokens * channels * STATE / rates["exponentials"]
    memory = 4 * tokens * (sequence_tensors * channels + state_tensors * STATE) / rates["bytes"]
    return round(1e3 * max(exponentials, memory), 2)


def random_tensors(batch, length, channels):
    """Returns u, delta, A, B, C, D, z, delta_bias, and a weight for the output, as tensors of the backend."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    sequence, state = (batch, length, channels), (batch, length, STATE)
    A = np.tile(-np.arange(1, STATE + 1, dtype="float32"), (channels, 1))
    arrays = (normal(*sequence), normal(*sequence) - 4, A, normal(*state), normal(*state))
    arrays += (normal(channels), normal(*sequence), 0.1 * normal(channels), normal(*sequence))
    return [ops.convert_to_tensor(x) for x in arrays]


def check(scans):
    """Checks outputs and all gradients of every implementation against the reference."""
    tensors = random_tensors(2, 65, 32)
    expected_y, expected = (f() for f in measure.forward_and_gradient(scans["reference"], tensors))
    for name, scan in scans.items():
        y, gradients = (f() for f in measure.forward_and_gradient(scan, tensors))
        pairs = [(y, expected_y), *zip(gradients, expected, strict=True)]
        for actual, target in pairs:
            target = ops.convert_to_numpy(target)
            tolerance = 2e-5 * max(1.0, np.abs(target).max())
            np.testing.assert_allclose(ops.convert_to_numpy(actual), target, atol=tolerance, rtol=1e-4, err_msg=name)


def timings(scans, rounds, rates):
    results = []
    for shape in SHAPES:
        tensors = random_tensors(*shape)
        names = [name for name in scans if shape[1] <= LONGEST.get(name, shape[1])]
        pairs = {name: measure.forward_and_gradient(scans[name], tensors) for name in names}
        if "native" in pairs:
            pairs["native, from C"] = called_from_c(tensors)
        for what in ("forward", "forward+backward"):
            chosen = {name: pair[what != "forward"] for name, pair in pairs.items()}
            seconds = measure.interleaved(chosen, rounds)
            ms = {k: round(1e3 * v, 2) for k, v in seconds.items()}
            if rates is not None:
                ms["floor"] = floor_ms(shape, what, rates)
            results.append({"shape": shape, "what": what, "ms": ms})
            print(shape, what, results[-1]["ms"], file=sys.stderr, flush=True)
    return results


def memory_of(scans):
    """Returns the peak MiB of forward and backward of each scan, from separate processes."""
    results = []
    for shape in MEMORY_SHAPES:
        peak = {}
        for name in scans:
            if shape[1] > LONGEST_IN_MEMORY.get(name, 4096):
                continue
            peak[name] = measure.memory_in_a_process(__spec__.name, name, *shape)
        results.append({"shape": shape, "what": "peak MiB, forward+backward", "MiB": peak})
        print(results[-1], file=sys.stderr, flush=True)
    return results


def show(timing_rows, memory, scans):
    """Prints one row per shape: milliseconds of our fastest implementation, and the ratios of the others to it."""
    best = next(iter(scans))
    rows = []
    for row in timing_rows + memory:
        unit = "ms" if "ms" in row else "MiB"
        values = row[unit]
        ratios = {name: f"{value / values[best]:.2f}x" for name, value in values.items() if name != best}
        rows.append({"(b, t, e)": row["shape"], "": row["what"], best: f"{values[best]} {unit}", **ratios})
    print(measure.table(rows, ["(b, t, e)", "", *dict.fromkeys(name for row in timing_rows for name in row["ms"])]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", help="JSON [name, batch, length, channels]: print only the peak memory of it")
    args = parser.parse_args()
    scans = contestants()
    if args.memory:
        name, *shape = json.loads(args.memory)
        print(measure.extra_memory(measure.forward_and_gradient(scans[name], random_tensors(*shape))[1]))
        return
    check(scans)
    rates = measure.machine_rates()
    timing_rows = timings(scans, args.rounds, rates)
    memory = memory_of(scans)
    show(timing_rows, memory, scans)
    results = {"backend": BACKEND, "d_state": STATE, "a second": rates, "timings": timing_rows, "memory": memory}
    measure.record(f"scan_{BACKEND}", results)


if __name__ == "__main__":
    main()
