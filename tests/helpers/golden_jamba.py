"""The recorded models of `tests/golden` (transformers 5.23.0), loaded through the public API."""

import functools
from pathlib import Path

import numpy as np
from checks import jitted, numpy

import keras_jamba
from keras_jamba.converters import checkpoints

FOLDER = Path(__file__).parent.parent / "golden"


@functools.cache
def model(case):
    kind = keras_jamba.JambaClassifier if case == "seqcls" else keras_jamba.JambaCausalLM
    return kind.from_preset(FOLDER / case)


@functools.cache
def call(case):
    return jitted(model(case))


@functools.cache
def step(case):
    return jitted(model(case).step)


@functools.cache
def features(case):
    return numpy(jitted(model(case).extract_features)(recorded(case)["input_ids"]))


@functools.cache
def recorded(case):
    """Returns the recorded arrays of transformers. Names of float64 arrays begin with `truth_`."""
    arrays = dict(np.load(FOLDER / case / "golden.npz"))
    if (FOLDER / case / "truth.npz").exists():
        arrays |= {f"truth_{name}": x for name, x in np.load(FOLDER / case / "truth.npz").items()}
    return arrays


def gradients(case):
    """Returns the recorded gradients by variable path, in the layout of keras_jamba."""
    theirs = dict(np.load(FOLDER / case / "grads.npz"))
    kind, arguments = checkpoints.read(FOLDER / case, "JambaCausalLM")
    arrays = {}
    for name, x in theirs.items():
        for each, index in (kind.unstacked(name, x.shape) or {name: ()}).items():
            arrays[each] = x[index] if index else x
    weights = kind.weights(arguments, model(case).block_pattern)
    return {weight.path: weight.ours(arrays.__getitem__) for weight in weights}
