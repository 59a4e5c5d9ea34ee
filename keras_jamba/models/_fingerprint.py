"""The fingerprint of a model and its weights."""

import hashlib
import json
import zlib

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.presets import STATISTICS

# Arguments that older versions did not have, with their defaults: prompt states of those versions stay valid.
_ADDED = {"attention_sinks": 0}


def fingerprint(model):
    """Returns a hash of a model's arguments and weights as text; it is the same on all backends."""
    config = {k: v for k, v in model.constructor_arguments().items() if k != "transformers_config"}
    config = {k: v for k, v in config.items() if k not in _ADDED or v != _ADDED[k]}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    variables = sorted(model.weights, key=lambda variable: variable.path)
    variables = [v for v in variables if v.path.rsplit("/", 1)[-1] not in STATISTICS]
    with _backend.trainer.readable_values(variables) as values:
        for value in values:
            x = np.ascontiguousarray(ops.convert_to_numpy(value), "float32")
            digest.update(f"{x.shape}{zlib.crc32(x)}".encode())
    return digest.hexdigest()
