"""Atomic writing of `.keras` and `.weights.h5` files, in which HDF5 writes to memory."""

from pathlib import Path

from keras_jamba import _files, _keras_internals


def save(model, filepath, overwrite, zipped, given):
    """Writes a `.keras` file. Returns whether it did; all other cases are left to Keras.

    Keras handles remote paths and folders, prompts before it overwrites, and refuses invalid arguments.
    """
    if not overwrite or zipped is False or not set(given) <= {"include_optimizer"}:
        return False
    return _write(_keras_internals.save_archive, model, filepath, ".keras")


def save_weights(model, filepath, overwrite, max_shard_size):
    """Writes a `.weights.h5` file. Returns whether it did; all other cases are left to Keras."""
    if not overwrite or max_shard_size is not None or not model.built:
        return False
    return _write(_keras_internals.save_weights, model, filepath, ".weights.h5")


def _write(writer, model, filepath, ending):
    if not str(filepath).endswith(ending) or not Path(filepath).parent.is_dir():
        return False
    with _files.atomic_file(filepath) as staged:
        writer(model, staged)
    return True
