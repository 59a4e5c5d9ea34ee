"""Trainings that are saved within an epoch, and the state from which the resumed training begins.

python fixture_trainings.py FOLDER INDEX PORT    process INDEX of two on JAX, which connect at PORT and shard a model
torchrun ... fixture_trainings.py FOLDER         one of two processes on PyTorch, which share each batch

Two processes save a language model in FOLDER, and each writes its own state.
"""

import contextlib
import random
import sys
from pathlib import Path

import keras
import numpy as np

BACKEND = keras.backend.backend()
if __name__ == "__main__" and BACKEND == "jax":
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=2, process_id=int(sys.argv[2]))

from checks import numpy  # noqa: E402
from fixture_models import EXPERTS, SIZES, digests, write_numbers  # noqa: E402

import keras_jamba  # noqa: E402
from keras_jamba import training  # noqa: E402

EPOCHS, EXAMPLES, BATCH = 3, 12, 4
BREAKS = 4  # the training stops after the first step of the second epoch


# Models and data


def image_model():
    """Returns a model with every kind of state: experts, dropout, a schedule, averages of weights."""
    given = SIZES | EXPERTS | dict(stem="patchify", dropout=0.1, drop_path=0.1)
    model = keras_jamba.DHCJamba(3, (8, 8, 1), **given)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(_optimizer(model, use_ema=True), loss, metrics=["accuracy"])
    return model


def image_data(**given):
    rng = np.random.default_rng(1)
    return _batches((rng.random((EXAMPLES, 8, 8, 1), "float32"), rng.integers(0, 3, EXAMPLES)), given)


def text_model():
    """Returns a model that two devices can share."""
    model = keras_jamba.JambaCausalLM(32, dropout=0.1, **SIZES | EXPERTS | dict(d_ff=8))
    model.compile(_optimizer(model))
    return model


def text_data(**given):
    tokens = np.random.default_rng(1).integers(0, 32, (EXAMPLES, 7)).astype("int32")
    return _batches((tokens[:, :-1], tokens[:, 1:]), given)


def _optimizer(model, **given):
    return training.optimizer(model, EPOCHS * EXAMPLES // BATCH, learning_rate=1e-2, **given)


def _batches(data, given):
    return training.Batches(data, BATCH, seed=5, **given)


# Saving and resuming


class Broken(Exception):
    pass


class Breaks(keras.callbacks.Callback):
    """Records the state after step `BREAKS` and stops. The checkpoint is earlier in the list, so it has saved."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_train_batch_end(self, batch, logs=None):
        if int(numpy(self.model.optimizer.iterations)) == BREAKS:
            self.found = state(self.model) | {"epoch": BREAKS * BATCH // EXAMPLES, "metrics": metrics(self.model)}
            self.found |= {"batch": digests(self.data.batch(BREAKS)), "draws": draws()}
            raise Broken


class Begins(keras.callbacks.Callback):
    """Records the state before the first step and stops. The checkpoint is earlier in the list, so it has loaded."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_train_begin(self, logs=None):
        self.found = state(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        self.found |= {"epoch": epoch, "metrics": metrics(self.model), "batch": digests(self.data[0])}

    def on_train_batch_begin(self, batch, logs=None):
        self.found["draws"] = draws()
        raise Broken


def state(model):
    found = {"variables": model.variables, "optimizer": model.optimizer.variables}
    found = {name: digests(_gathered(v.value) for v in variables) for name, variables in found.items()}
    return found | {"step": int(numpy(model.optimizer.iterations))}


def _gathered(x):
    """Returns the complete array of a tensor that may have shards in another process."""
    if BACKEND == "jax" and not x.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(x, tiled=True)
    return numpy(x)


def metrics(model):
    return [_gathered(v.value).tolist() for v in model.metrics_variables]


def draws():
    """Returns the next draws of the global generators."""
    found = {"python": random.random(), "numpy": np.random.random()}
    if BACKEND == "torch":
        import torch

        found["torch"] = torch.rand(()).item()
    return found


def saved(folder, model, data):
    """Returns the state of a training that was saved and then stopped."""
    return _fit(folder, model, data, Breaks(data))


def resumed(folder, model, data):
    """Returns the state from which a resumed training begins."""
    return _fit(folder, model, data, Begins(data))


def _fit(folder, model, data, callback):
    with contextlib.suppress(Broken):
        checkpoint = training.Checkpoint(folder, data, every=BREAKS)
        model.fit(data, epochs=EPOCHS, verbose=0, callbacks=[checkpoint, callback])
    return callback.found


# One of two processes


def _distribution():
    """Returns a model-parallel distribution over a mesh whose rows have devices of both processes."""
    names = keras.distribution.list_devices("cpu")
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), [names[i] for i in (0, 2, 1, 3)])
    # Each process makes all rows of a batch, because its devices hold a shard of every row.
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh), auto_shard_dataset=False)


def main(folder, index=None, port=None):
    keras.utils.set_random_seed(7)
    with contextlib.ExitStack() as stack:
        if BACKEND == "jax":
            stack.enter_context(_distribution().scope())
            model, data = text_model(), text_data()
        else:
            parallel = stack.enter_context(training.DataParallel())
            index = parallel.shard[0]
            model, data = parallel.prepare(text_model()), text_data(shard=parallel.shard)
        # Each process has random states of its own.
        keras.utils.set_random_seed(int(index))
        found = saved(Path(folder) / "saves", model, data)
        write_numbers(Path(folder) / f"numbers_{index}.json", found)


if __name__ == "__main__":
    main(*sys.argv[1:])
