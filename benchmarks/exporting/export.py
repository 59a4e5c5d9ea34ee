"""Exported files: difference from the model, size and latency in their own runtimes, beside the model itself.

    KERAS_BACKEND=torch python -m benchmarks.exporting.export [--models digits ...] [--rounds 15] [--smoke]

Writes each model in each format of the backend. The difference is the largest over batch sizes 1 and 3 and, for an open
length, lengths 1, 7, 64 and 257, relative to the largest number of the output. Latencies are medians of interleaved
calls at batch sizes 1 and 32; the peer is the model itself, compiled on JAX and TensorFlow. Texts have 64 tokens, clips
16 frames, and a stream takes one frame or token. Prints the rows and writes results/export_BACKEND.json.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import keras

import keras_jamba
from benchmarks import measure
from keras_jamba import _backend
from keras_jamba.exporting import comparison, programs, runtimes
from keras_jamba.exporting.formats import FORMATS

BACKEND = os.environ["KERAS_BACKEND"]
LENGTHS, BATCHES, ROUNDS, CAPACITY = (1, 7, 64, 257), (1, 32), 15, 300
TEXT = dict(d_model=64, num_layers=4, mamba_ratio=1, num_heads=4, num_kv_heads=2, moe_frequency=2, num_experts=4)


def text_classifier():
    return keras_jamba.JambaClassifier(256, 3, **TEXT)


def language_model():
    return keras_jamba.JambaCausalLM(256, **TEXT)


def preset(name):
    return lambda: keras_jamba.DHCJamba.from_preset(name)


# `{name: (function that returns the model, whether to export a stream, timed length)}`.
MODELS = {
    "digits": (preset("digits"), False, None),
    "small": (preset("small"), False, None),
    "video_order": (preset("video_order"), False, 16),
    "text classifier": (text_classifier, False, 64),
    "language model": (language_model, False, 64),
    "video_direction, stream": (preset("video_direction"), True, None),
    "language model, stream": (language_model, True, 1),
}


def difference(program, run, found):
    """Returns the largest difference at all sizes; `found` is that of the export."""
    if program.state or programs.LENGTH not in program.sizes():
        return found
    sizes = [{programs.BATCH: 3 - 2 * (i % 2), programs.LENGTH: length} for i, length in enumerate(LENGTHS)]
    tolerance = comparison.TOLERANCES["float32"]
    return max(found, *(comparison.call_difference(program, run, each, 0, tolerance) for each in sizes))


def latencies(program, run, length, rounds):
    """Returns `{"batch b": {"file": milliseconds, "model": milliseconds}}`."""
    found = {}
    compiled = _backend.compilation.jit_inference(program.function, program.model.variables)
    for batch in BATCHES:
        arrays = program.example({programs.BATCH: batch, programs.LENGTH: length})
        tensors = {name: keras.ops.convert_to_tensor(x) for name, x in arrays.items()}
        model = partial(_on_host, compiled, tensors)
        times = measure.interleaved({"file": partial(run, arrays), "model": model}, rounds)
        found[f"batch {batch}"] = {name: 1e3 * seconds for name, seconds in times.items()}
    return found


def _on_host(function, tensors):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, function(tensors))


def size(path):
    """Returns the bytes of a file with its weights beside it, or of a folder."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.stem}.*")
    return sum(file.stat().st_size for file in files if file.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the latencies; 0 for none")
    parser.add_argument("--smoke", action="store_true", help="few rounds; records nothing")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        make, streaming, length = MODELS[name]
        model = make()
        given = dict(streaming=True, capacity=CAPACITY) if streaming else {}
        program = (
            programs.stream_program(model, None, None, CAPACITY)
            if streaming
            else programs.call_program(model, None, None, None)
        )
        for format in _backend.exporting.formats():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"model{FORMATS[format].suffix or ''}"
                found = keras_jamba.export(model, path, format, **given)
                run = runtimes.load(format, path)
                row = {"model": name, "format": format, "difference": difference(program, run, found)}
                rounds = min(args.rounds, 2) if args.smoke else args.rounds
                row |= {"bytes": size(path)} | (latencies(program, run, length, rounds) if rounds else {})
            print(row, flush=True)
            rows.append(row)
    if not args.smoke:
        measure.record(f"export_{BACKEND}", {"rows": rows})


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    main()
