"""Compares an exported file, in its own runtime, with the model."""

import keras
import numpy as np

from keras_jamba import _backend
from keras_jamba.exporting.programs import BATCH, LENGTH

TOLERANCES = {"float32": 1e-4, "float16": 5e-2}
# Below this, a difference is compared with it, and not with the largest number of an output.
_SMALLEST_SCALE = 0.01
_BATCHES, _LENGTHS, _OTHERS = (3, 1), (7, 130), (32, 48)
_STEPS = 3
_REMEDY = "Export the model again, or in another format."


def largest_difference(program, run, tolerance):
    """Returns the largest relative difference between a file and the model over two batch sizes and two lengths.

    Args:
        program: a `Program`.
        run: the file, `run({name: array})`.
        tolerance: the largest difference that is accepted.

    Raises:
        ValueError: if an output differs; it names the output.
    """
    stream = _stream_difference if program.state else call_difference
    found = [stream(program, run, sizes, seed, tolerance) for seed, sizes in enumerate(_sizes(program))]
    return max(found)


def _sizes(program):
    """Returns the two sets of sizes at which outputs are compared."""
    names = program.sizes()
    for batch, length, other in zip(_BATCHES, _LENGTHS, _OTHERS, strict=True):
        if program.capacity is not None:
            length = max(1, min(length, program.capacity - _STEPS + 1))
        yield {name: {BATCH: batch, LENGTH: length}.get(name, other) for name in names}


def call_difference(program, run, sizes, seed, tolerance):
    """Returns the largest relative difference of a call at given sizes."""
    arrays = program.example(sizes, seed)
    return _compared(_backend.exporting.run(program, arrays), run(arrays), sizes, tolerance)


def _stream_difference(program, run, sizes, seed, tolerance):
    """Compares some steps of a stream. The first row begins again at the last step.

    The file begins with zeros and `reset`, the model with its own empty state and no reset.
    """
    found, of_file, of_model, used = [], {}, {}, 0
    for step in range(_STEPS):
        arrays = program.example(sizes | ({LENGTH: 1} if step and LENGTH in sizes else {}), seed + step)
        tokens = arrays["token_ids"].shape[1] if "token_ids" in arrays else 1
        if program.capacity is not None and used + tokens > program.capacity and step:
            break
        rows = len(arrays["reset"])
        if not step:
            of_model = {name: keras.ops.convert_to_numpy(x) for name, x in program.empty_state(rows).items()}
            of_file = {name: arrays[name] for name in program.state}
        again = (np.arange(rows) == 0) & (step == _STEPS - 1)
        expected = _backend.exporting.run(program, arrays | of_model | {"reset": again})
        outputs = run(arrays | of_file | {"reset": again | (step == 0)})
        logits = [{name: x for name, x in each.items() if not name.startswith("next_")} for each in (expected, outputs)]
        found.append(_compared(*logits, sizes, tolerance))
        of_model, of_file = ({name: each[f"next_{name}"] for name in program.state} for each in (expected, outputs))
        used += tokens
    return max(found)


def _compared(expected, found, sizes, tolerance):
    """Returns the largest relative difference of outputs `{name: array}`."""
    if sorted(expected) != sorted(found):
        raise ValueError(f"The outputs of the file must be {sorted(expected)}. Received: {sorted(found)}. {_REMEDY}")
    return max(_difference(name, x, found[name], sizes, tolerance) for name, x in expected.items())


def _difference(name, expected, found, sizes, tolerance):
    where = f"the output {name!r} at the sizes {sizes}" if sizes else f"the output {name!r}"
    if expected.shape != found.shape:
        raise ValueError(f"The shape of {where} must be {expected.shape}. Received: {found.shape}. {_REMEDY}")
    if expected.dtype != found.dtype:
        raise ValueError(f"The dtype of {where} must be {expected.dtype}. Received: {found.dtype}. {_REMEDY}")
    if not np.issubdtype(expected.dtype, np.floating):
        if not np.array_equal(expected, found):
            raise ValueError(f"The integers of {where} must be those of the model. Received: other numbers. {_REMEDY}")
        return 0.0
    special = [np.where(np.isfinite(x), 0, x) for x in (expected, found)]
    if not np.array_equal(*special, equal_nan=True):
        raise ValueError(f"NaN and infinity in {where} must be those of the model. Received: them elsewhere. {_REMEDY}")
    finite = np.isfinite(expected)
    expected, found = (x[finite].astype("float64") for x in (expected, found))
    scale = max(np.abs(expected).max(initial=0.0), _SMALLEST_SCALE)
    difference = float(np.abs(expected - found).max(initial=0.0) / scale)
    if difference > tolerance:
        raise ValueError(
            f"The relative difference of {where} from the model must be at most {tolerance:g}. "
            f"Received: {difference:.2g}. {_REMEDY}"
        )
    return difference
