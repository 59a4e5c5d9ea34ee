"""Trainings of models sharded over 8 devices save local shards and continue on other meshes. Presets are checked too.

python sharded_saving.py FOLDER            runs all checks and prints "all are equal"
python sharded_saving.py FOLDER forever    saves a sharded model, filled with the step number, until it is killed
"""

import contextlib
import shutil
import sys
from pathlib import Path

import jax
import keras
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from sharded_models import WIDE, distribution

import keras_jamba
from keras_jamba import training
from keras_jamba.training.checkpointing import _snapshots

EPOCHS, STEPS, BREAKS = 2, 4, 6  # the training stops after step 6, in the middle of its last epoch
TOKENS = np.random.default_rng(0).integers(0, 64, (8 * STEPS, 9)).astype("int32")


class Broken(Exception):
    pass


class Breaks(keras.callbacks.Callback):
    """Stops the training after a step. The checkpoint is earlier in the list, so it has saved."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(np.asarray(self.model.optimizer.iterations.value)) == self.step:
            raise Broken


class Begins(keras.callbacks.Callback):
    """Records the state at the beginning. The checkpoint is earlier in the list, so it has loaded."""

    def on_train_begin(self, logs=None):
        self.state, self.logits = state(self.model), logits(self.model)


def model(seed=0):
    keras.utils.set_random_seed(seed)
    made = keras_jamba.JambaCausalLM(vocab_size=64, dropout=0.1, **WIDE | dict(num_layers=2, d_ff=32))
    made.compile(training.optimizer(made, EPOCHS * STEPS, learning_rate=1e-3))
    return made


def complete(x):
    return np.asarray(x) if x.is_fully_addressable else process_allgather(x, tiled=True)


def variables(model):
    return [*model.variables, *model.optimizer.variables]


def state(model):
    return [complete(v.value) for v in variables(model)]


def logits(model):
    call = jax.jit(lambda *values: model.stateless_call(*values, TOKENS[:8, :-1], training=False)[0])
    return complete(
        call(*([v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables)))
    )


def fit(folder, seed=0, breaks=None, every=1, begins=None):
    """Trains a new model from the last save, if any. Returns `(model, begins)`, where `begins` has its first state."""
    made, begins = model(seed), begins or Begins()
    batches = training.Batches((TOKENS[:, :-1], TOKENS[:, 1:]), 8)
    callbacks = [training.Checkpoint(folder, batches, every=every), begins]
    with contextlib.suppress(Broken):
        made.fit(batches, epochs=EPOCHS, verbose=0, callbacks=callbacks + ([Breaks(breaks)] if breaks else []))
    return made, begins


def assert_equal(found, expected):
    for a, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def check_each_shard_is_saved_once(folder, model):
    arrays, _ = _snapshots.read(folder, BREAKS)
    sharded = 0
    for array, variable in zip(arrays, variables(model), strict=False):
        shards = {str(shard.index) for shard in variable.value.addressable_shards}
        assert len(array.chunks) == len(shards), variable.path
        assert sum(chunk.size for _, chunk in array.chunks) == variable.value.size
        sharded += len(shards) > 1
    assert sharded > 30


@contextlib.contextmanager
def reads():
    """Yields a list that records the number of values per read from a saved array."""
    read, sizes = _snapshots.Saved.read, []

    def watched(saved, index=None):
        values = read(saved, index)
        sizes.append(values.size)
        return values

    _snapshots.Saved.read = watched
    try:
        yield sizes
    finally:
        _snapshots.Saved.read = read


def check_training_continues(folder):
    with distribution((2, 4)).scope():
        unbroken = state(fit(folder / "unbroken", every=100)[0])
        broken, _ = fit(folder / "broken", breaks=BREAKS)
        expected, expected_logits = state(broken), logits(broken)
        check_each_shard_is_saved_once(folder / "broken", broken)
    scopes = {"(2, 4)": distribution((2, 4)).scope(), "(4, 2)": distribution((4, 2)).scope()}
    for name, scope in (scopes | {"one device": contextlib.nullcontext()}).items():
        shutil.copytree(folder / "broken", folder / name)
        with scope, reads() as sizes:
            found, begins = fit(folder / name, seed=1)
        end = state(found)
        worst = max(np.abs(np.float64(a) - e).max() for a, e in zip(end, unbroken, strict=True))
        print(name, np.abs(begins.logits - expected_logits).max(), worst, flush=True)
        largest = max(v.value.addressable_shards[0].data.size for v in variables(found))
        assert max(sizes) == largest
        assert_equal(begins.state, expected)
        np.testing.assert_allclose(begins.logits, expected_logits, atol=1e-6)
        assert worst == 0 if name == "(2, 4)" else worst < 1e-4


def weights(model):
    return [complete(v.value) for v in model.weights]


def check_presets(folder):
    """Checks that sharded and unsharded models write equal presets and load each other's."""
    make, plain = keras_jamba.JambaCausalLM.from_preset, model()
    plain.save_to_preset(folder / "plain")
    plain.export_to_transformers(folder / "plain_exported")
    with distribution((2, 4)).scope():
        sharded = make(folder / "plain")
        assert any(not v.value.is_fully_replicated for v in sharded.variables)
        assert_equal(weights(sharded), weights(plain))
        np.testing.assert_allclose(logits(sharded), logits(plain), atol=1e-6)
        assert_equal(weights(make(folder / "plain_exported")), weights(plain))
        sharded.save_to_preset(folder / "sharded")
        sharded.export_to_transformers(folder / "sharded_exported")
    assert_equal(weights(make(folder / "sharded")), weights(plain))
    one, other = ((folder / name / "model.safetensors").read_bytes() for name in ("plain_exported", "sharded_exported"))
    assert one == other


def save_forever(folder):
    with distribution((2, 4)).scope():
        saved = model()
        saved.optimizer.build(saved.trainable_variables)
        checkpoint = training.Checkpoint(folder, training.Batches((TOKENS[:, :-1], TOKENS[:, 1:]), 8))
        checkpoint.set_model(saved)
        checkpoint.set_params({"epochs": EPOCHS})
        checkpoint.on_train_begin()
        for step in range(checkpoint._last + 1, 10**6):
            for variable in (*variables(saved), *saved.metrics_variables):
                if variable.dtype == "float32":
                    variable.assign(np.full(variable.shape, step, "float32"))
            checkpoint._epoch, checkpoint._done = divmod(step, STEPS)
            checkpoint._save()


def main(folder, forever=None):
    if forever:
        save_forever(folder)
    check_training_continues(Path(folder))
    check_presets(Path(folder))
    print("all are equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
