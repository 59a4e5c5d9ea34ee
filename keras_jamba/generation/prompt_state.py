"""The state of a model after a prompt."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from keras import ops

from keras_jamba import _files


@dataclass(frozen=True)
class PromptState:
    """What a model has made of a prompt: to be gone on from many times, and saved.

    Attributes:
        token_ids: the prompt's `(t,)`.
        cache: the state after it, of one row.
        logits: of the token after it, `(1, v)`.
        model: what tells the model with its weights from others.
    """

    token_ids: np.ndarray
    cache: dict
    logits: object
    model: str

    def save(self, file):
        """Writes it to a file, which `numpy.load` reads, and which appears whole or not at all."""
        leaves = {f"cache/{block}/{leaf}": x for block, state in self.cache.items() for leaf, x in state.items()}
        arrays = {name: _storable(x) for name, x in (leaves | {"logits": self.logits}).items()}
        with _files.atomic_file(file) as staged, open(staged, "wb") as stream:
            np.savez(stream, token_ids=self.token_ids, model=np.array(self.model), **arrays)

    @classmethod
    def load(cls, file):
        """Reads what `save` wrote, on whichever backend.

        Raises:
            ValueError: if the file is damaged or another's.
        """
        try:
            # Opened here: of a damaged file NumPy would leave it open.
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
    # NumPy's files do not know bfloat16; float32 holds it exactly.
    return x.astype("float32") if x.dtype.name == "bfloat16" else x
