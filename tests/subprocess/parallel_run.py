"""Four training steps on complete batches, in one process or by replicas.

    python parallel_run.py OUTPUT MODEL REPLICAS

MODEL is `backbone` (a sequence model without batch norm) or `images` (DHCJamba with experts). Each process writes its
losses and all weights to its own file in OUTPUT. The checkpoint saves the training in OUTPUT/saves.
"""

import contextlib
import os
import sys
from pathlib import Path

if os.environ["KERAS_BACKEND"] == "jax":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import keras
import numpy as np

import keras_jamba
from keras_jamba import training

STEPS, BATCH = 4, 8


def backbone():
    inputs = keras.Input((6, 8))
    jamba = keras_jamba.JambaBackbone(d_model=8, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(jamba(inputs))))


def images():
    return keras_jamba.DHCJamba(3, (8, 8, 1), d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=2)


def devices(replicas):
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return [f"CPU:{i}" for i in range(replicas)]


def main(output, kind, replicas):
    keras.utils.set_random_seed(0)
    context = contextlib.nullcontext()
    if int(replicas) > 1:
        context = training.DataParallel(devices(int(replicas)))
    with context as parallel:
        model = {"backbone": backbone, "images": images}[kind]()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(training.optimizer(model, STEPS, learning_rate=1e-3, global_clipnorm=0.1), loss)
        if parallel:
            parallel.prepare(model)
        rng = np.random.default_rng(0)
        data = rng.random((STEPS * BATCH, *model.input_shape[1:]), "float32"), rng.integers(0, 3, STEPS * BATCH)
        shard = parallel.shard if parallel else (0, 1)
        batches = training.Batches(data, BATCH, shard=shard)
        saves = training.Checkpoint(Path(output) / "saves", batches)
        losses = model.fit(batches, epochs=1, verbose=0, callbacks=[saves]).history["loss"]
    norm = keras.ops.convert_to_numpy(model.optimizer.gradient_norm)
    count = parallel.replicas if parallel else 1
    weights = map(keras.ops.convert_to_numpy, model.weights)
    np.savez(Path(output) / f"{shard[0]}.npz", np.array(losses), norm, np.array(count), *weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
