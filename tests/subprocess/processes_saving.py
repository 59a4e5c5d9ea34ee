"""A training of a model that is split among two processes is saved by both, and goes on in both or in one.

python processes_saving.py FOLDER I PORT    process I of two, with four devices each: saves steps 6 and 7, going on in
                                            between; the second dies as by kill -9 when it has written step 8
python processes_saving.py FOLDER           one process with eight devices goes on from step 7
"""

import os
import signal
import sys
from pathlib import Path

import jax
import keras
import numpy as np

if len(sys.argv) > 2:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=2, process_id=int(sys.argv[2]))

from sharded_saving import BREAKS, TOKENS, Begins, assert_equal, distribution, fit, logits, state  # noqa: E402

from keras_jamba import training  # noqa: E402


def across_processes():
    """Two devices of each have the parts of a row of the mesh."""
    names = keras.distribution.list_devices("cpu")
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), [names[i] for i in order])
    # Each process makes all rows of a batch, for its devices have some of each.
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh), auto_shard_dataset=False)


def dies_at(step):
    """When all is on the disk, and nothing renamed."""
    replace = os.replace

    def replaced(source, target):
        if Path(target).name == f"step_{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replaced


def greedy(model):
    """In two processes each has some of the tokens."""
    return model.generate(TOKENS[:4, :5], max_length=9)


class BeginsToWrite(Begins):
    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.tokens = greedy(self.model)


def two(folder, index):
    with across_processes().scope():
        broken, _ = fit(folder / "saves", breaks=BREAKS)
        assert any(not v.value.is_fully_addressable for v in broken.variables)
        found, begins = fit(folder / "saves", seed=1, breaks=BREAKS + 1)
        assert_equal(begins.state, state(broken))
        end = [*state(found), logits(found), greedy(found)]
        if index == 0:
            np.savez(folder / "end.npz", *end)
        print("all are equal", flush=True)
        if index == 1:
            dies_at(BREAKS + 2)
        fit(folder / "saves", seed=2)


def one(folder):
    with np.load(folder / "end.npz") as file:
        *expected, expected_logits, tokens = [file[f"arr_{i}"] for i in range(len(file.files))]
    with distribution((4, 2)).scope():
        _, begins = fit(folder / "saves", seed=3, begins=BeginsToWrite())
    assert_equal(begins.state, expected)
    np.testing.assert_allclose(begins.logits, expected_logits, atol=1e-6)
    np.testing.assert_array_equal(begins.tokens, tokens)
    print("all are equal")


def main(folder, index=None, port=None):
    if index is None:
        one(Path(folder))
    else:
        two(Path(folder), int(index))


if __name__ == "__main__":
    main(*sys.argv[1:])
