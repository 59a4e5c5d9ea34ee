"""`.keras` and `.weights.h5` files: atomic writing with HDF5 in memory, and errors of damaged files."""

from pathlib import Path
from typing import Any

import h5py
import keras

from keras_jamba import _files, _keras_internals, presets
from keras_jamba._typing import PathLike
from keras_jamba.models._documented import documented_by

# Deflate compresses by this factor at most.
_MOST_COMPRESSED = 1032


class KerasFiles(_keras_internals.Mixin):
    """Mixed into a `keras.Model`, before it in the bases.

    Keras itself handles remote paths and sharded files, prompts before it overwrites, and refuses invalid arguments.
    """

    @_keras_internals.restored_scopes()
    def save(self, filepath: PathLike, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any) -> None:
        is_plain = overwrite and zipped is not False and set(kwargs) <= {"include_optimizer"}
        if not (is_plain and _write(_keras_internals.save_archive, self, filepath, ".keras")):
            super().save(filepath, overwrite, zipped, **kwargs)

    @_keras_internals.restored_scopes()
    @documented_by(keras.Model.save_weights)
    def save_weights(self, filepath: PathLike, overwrite: bool = True, max_shard_size: float | None = None) -> None:
        is_plain = overwrite and max_shard_size is None and self.built
        if not (is_plain and _write(_keras_internals.save_weights, self, filepath, ".weights.h5")):
            super().save_weights(filepath, overwrite, max_shard_size)

    @_keras_internals.restored_scopes()
    def load_weights(self, filepath: PathLike, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """Loads a file of `save_weights` like `keras.Model.load_weights`.

        Raises:
            ValueError: if the file is damaged or of another model, or a weight is not finite. Some weights may have
                been loaded then.
        """
        try:
            _check_sizes(filepath)
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        except MemoryError:
            raise
        except Exception as error:  # h5py raises errors of many classes
            reason = str(error).strip().removesuffix(".")
            raise ValueError(
                "Weights must be a complete file that save_weights wrote for a model of the same sizes. Received: "
                f"{str(filepath)!r}, {type(error).__name__}: {reason}. Build the model anew, and load another file."
            ) from error
        presets.check_finite(self, str(filepath))


def _check_sizes(filepath):
    """Raises ValueError for a local HDF5 file with an array that is larger than its stored bytes can express."""
    if not str(filepath).endswith(".h5") or not Path(filepath).is_file():
        return

    def check(name, item):
        if isinstance(item, h5py.Dataset) and item.nbytes > _MOST_COMPRESSED * item.id.get_storage_size():
            raise ValueError(f"{name!r} declares {item.nbytes} bytes, and {item.id.get_storage_size()} are stored")

    with h5py.File(filepath) as file:
        file.visititems(check)


def _write(writer, model, filepath, ending):
    """Writes a local file. Returns whether it did."""
    if not str(filepath).endswith(ending) or "://" in str(filepath):
        return False
    with _files.atomic_file(filepath) as staged:
        writer(model, staged)
    return True
