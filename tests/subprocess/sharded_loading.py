"""A checkpoint loads onto 8 devices without a complete matrix on any of them, and generates the tokens of one device.

Runs in its own process. The first argument is a new folder for the checkpoint. With a second argument, all matrices
count as large.
"""

import math
import sys

import jax
import keras
import numpy as np

import keras_jamba
from keras_jamba import _backend, training

WIDE = dict(d_model=32, num_layers=4, mamba_ratio=1, num_heads=8, num_kv_heads=2, num_experts=8, d_ff=64)
PROMPTS = [[3, 4, 5, 6, 7], [8, 9]]


def complete_on_a_device():
    """Returns `{id: size}` of all arrays of which one device has every number."""
    return {id(x): x.size for x in jax.live_arrays() if x.sharding.is_fully_replicated}


folder = sys.argv[1]
keras.utils.set_random_seed(0)
keras_jamba.JambaCausalLM(vocab_size=64, **WIDE).export_to_transformers(folder)
plain = keras_jamba.JambaCausalLM.from_preset(folder)
expected = [np.asarray(v.value) for v in plain.weights]
tokens = plain.generate(PROMPTS, max_new_tokens=12, stop_token_ids=None)
del plain
jax.clear_caches()
before = list(jax.live_arrays())

mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), keras.distribution.list_devices("cpu"))
layout = keras.distribution.ModelParallel(layout_map=training.layout_map(mesh))
fill, largest = _backend.tensors.fill, []


def watched(variable, array):
    fill(variable, array)
    if not variable.value.sharding.is_fully_replicated:
        found = complete_on_a_device()
        largest.append((array.size, max((found[i] for i in found.keys() - set(map(id, before))), default=0)))


_backend.tensors.fill = watched
if len(sys.argv) > 2:
    # Keras compiles the initializers of large variables.
    keras.src.backend.jax.core.should_shard_at_init = lambda layout, shape: math.prod(shape) > 1000
with layout.scope():
    model = keras_jamba.JambaCausalLM.from_preset(folder)
    for variable, x in zip(model.weights, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(variable.value), x)
    replicated = max(v.value.size for v in model.weights if v.value.sharding.is_fully_replicated)
    assert len(largest) > 20 and max(size for size, _ in largest) > 4 * replicated
    assert all(found <= replicated for _, found in largest), (largest, replicated)
    found = model.generate(PROMPTS, max_new_tokens=12, stop_token_ids=None)
for a, b in zip(tokens, found, strict=True):
    np.testing.assert_array_equal(a, b)
print("all are equal")
