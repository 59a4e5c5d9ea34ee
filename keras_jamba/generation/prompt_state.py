"""The state of a language model after a prompt."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from keras import ops

from keras_jamba import _files


@dataclass(frozen=True)
class PromptState:
    """State of a model after one prompt. It can be saved, and continued any number of times.

    Attributes:
        token_ids: `(t,)`, the ids of the prompt.
        cache: the cache after the prompt, with one row.
        logits: `(1, v)`, the logits of the token after the prompt.
        model: the fingerprint of the model and its weights.
    """

    token_ids: np.ndarray
    cache: dict
    logits: object
    model: str

    def save(self, file):
        """Writes the state to a file in the format of `numpy.load`. The file appears complete or not at all."""
        leaves = {f"cache/{block}/{leaf}": x for block, state in self.cache.items() for leaf, x in state.items()}
        arrays = {name: _storable(x) for name, x in (leaves | {"logits": self.logits}).items()}
        with _files.atomic_file(file) as staged, open(staged, "wb") as stream:
            np.savez(stream, token_ids=self.token_ids, model=np.array(self.model), **arrays)

    @classmethod
    def load(cls, file):
        """Returns the state in a file that `save` wrote on any backend.

        Raises:
            ValueError: if the file is damaged, or if `save` did not write it.
        """
        try:
            # NumPy does not close a damaged file that it opened itself.
            with open(Path(file), "rb") as stream, np.load(stream, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            cache = {}
            for name in arrays:
                if name.startswith("cache/"):
                    _, block, leaf = name.split("/")
                    cache.setdefault(block, {})[leaf] = ops.convert_to_tensor(arrays[name])
            return cls(arrays["token_ids"], cache, ops.convert_to_tensor(arrays["logits"]), str(arrays["model"]))
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"A prompt's state must be a file that its save wrote. Received: {str(file)!r}, {error}. Prefill again."
            ) from error


def _storable(x):
    x = ops.convert_to_numpy(ops.stop_gradient(x))
    # NumPy files do not support bfloat16. The conversion to float32 is exact.
    return x.astype("float32") if x.dtype.name == "bfloat16" else x
