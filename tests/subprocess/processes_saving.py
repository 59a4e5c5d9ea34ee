"""Two processes save the training of a sharded model, and two or one continue it.

python processes_saving.py FOLDER I PORT    process I of two, with four devices each: saves step 6, resumes and saves
                                            step 7; SIGKILL ends the second process after it has written step 8
python processes_saving.py FOLDER           one process with eight devices continues from step 7
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
    """Returns a distribution whose mesh rows have two devices of each process."""
    names = keras.distribution.list_devices("cpu")
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), [names[i] for i in order])
    # Each process makes all rows of a batch, because its devices hold a shard of every row.
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh), auto_shard_dataset=False)


def die_at(step):
    """Kills the process before it renames the folder of `step`, when all files are on disk."""
    replace = os.replace

    def replaced(source, target):
        if Path(target).name == f"step_{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replaced


def greedy(model):
    """Returns greedy tokens. With two processes, each holds a shard of the tokens."""
    return model.generate(TOKENS[:4, :5], max_length=9)


class BeginsWithTokens(Begins):
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
            die_at(BREAKS + 2)
        fit(folder / "saves", seed=2)


def one(folder):
    with np.load(folder / "end.npz") as file:
        *expected, expected_logits, tokens = [file[f"arr_{i}"] for i in range(len(file.files))]
    with distribution((4, 2)).scope():
        _, begins = fit(folder / "saves", seed=3, begins=BeginsWithTokens())
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
