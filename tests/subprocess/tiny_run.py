"""A tiny training with every kind of state: dropout, experts, batch norm, a schedule, averages of weights.

    python tiny_run.py FOLDER [STEP]

Saves every 3 steps to FOLDER and resumes from the last save. If STEP is given, SIGKILL ends the process after that
step. A complete training writes FOLDER/end.npz: all variables, and the logs of the last epoch.
"""

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

import keras_jamba
from keras_jamba import training

EPOCHS, EXAMPLES, BATCH = 3, 44, 4  # 11 steps per epoch


class Dies(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def model():
    keras.utils.set_random_seed(0)
    made = keras_jamba.DHCJamba(
        num_classes=3,
        image_shape=(8, 8, 1),
        d_model=8,
        num_layers=2,
        mamba_ratio=1,
        num_heads=2,
        num_experts=2,
        pixel_range=None,  # the noise exceeds any range
        num_experts_per_token=1,
        dropout=0.2,
    )
    optimizer = training.optimizer(made, EPOCHS * EXAMPLES // BATCH, learning_rate=1e-2, use_ema=True)
    made.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return made


def batches(**changes):
    rng = np.random.default_rng(1)
    noise = lambda batch, rng: (batch[0] + rng.normal(0, 0.1, batch[0].shape).astype("float32"), batch[1])  # noqa: E731
    data = rng.random((EXAMPLES, 8, 8, 1), "float32"), rng.integers(0, 3, EXAMPLES)
    return training.Batches(data, BATCH, **dict(seed=5, transform=noise) | changes)


def main(folder, step=None):
    trained, data = model(), batches()
    callbacks = [training.Checkpoint(folder, data, every=3)]
    callbacks += [] if step is None else [Dies(int(step))]
    history = trained.fit(data, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    variables = [keras.ops.convert_to_numpy(v) for v in (*trained.variables, *trained.optimizer.variables)]
    logs = [history.history[name][-1] for name in sorted(history.history)] if history.history else []
    np.savez(Path(folder) / "end.npz", *variables, np.array(logs))


if __name__ == "__main__":
    main(*sys.argv[1:])
