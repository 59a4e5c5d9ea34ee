"""The state of a language model after a prompt."""

import logging
from dataclasses import dataclass
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_jamba import _checksums, _files, _npz
from keras_jamba._typing import Array, PathLike, Tensor, Tensors

# Axes of a cache whose size is a capacity.
_CAPACITY = {"key": 1, "value": 1}
_logger = logging.getLogger("keras_jamba")


@dataclass(frozen=True)
class PromptState:
    """State of a model after one prompt. It can be saved, and continued any number of times.

    Attributes:
        token_ids: `(t,)`, the ids of the prompt.
        cache: the cache after the prompt, with one row.
        logits: `(1, v)`, the logits of the token after the prompt.
        model: the fingerprint of the model and its weights.
    """

    token_ids: Array
    cache: dict[str, dict[str, Tensor]]
    logits: Tensor
    model: str

    def save(self, file: PathLike) -> None:
        """Writes the state to a file in the format of `numpy.load`. The file appears complete or not at all.

        Raises:
            ValueError: if a value is not finite.
        """
        leaves = {f"cache/{block}/{leaf}": x for block, state in self.cache.items() for leaf, x in state.items()}
        arrays = {name: _storable(x) for name, x in (leaves | {"logits": self.logits}).items()}
        arrays |= {"token_ids": np.asarray(self.token_ids), "model": np.array(self.model)}
        _check_finite(arrays, "the state")
        checksum = np.array(_checksums.of_arrays(arrays))
        with _files.atomic_file(file) as staged, open(staged, "wb") as stream:
            np.savez(stream, **arrays, checksum=checksum)

    @classmethod
    def load(cls, file: PathLike) -> Self:
        """Returns the state in a file that `save` wrote on any backend.

        Raises:
            ValueError: if the file is damaged or has a value that is not finite, or if `save` did not write it.
        """
        try:
            arrays = _npz.read(file)
            _check_checksum(arrays, file)
            cache: dict[str, dict[str, Tensor]] = {}
            for name, x in arrays.items():
                if name.startswith("cache/"):
                    _, block, leaf = name.split("/")
                    cache.setdefault(block, {})[leaf] = x
            token_ids, logits, model = arrays["token_ids"], arrays["logits"], str(arrays["model"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"A prompt's state must be a file that its save wrote. Received: {str(file)!r}, {error}. Prefill again."
            ) from error
        _check_finite(arrays, file)
        return cls(
            token_ids, keras.tree.map_structure(ops.convert_to_tensor, cache), ops.convert_to_tensor(logits), model
        )

    def check_fits(self, template: Tensors) -> None:
        """Raises ValueError unless the cache has the leaves of `template`, except for their capacities."""
        found, expected = _layout(self.cache), _layout(template)
        if found != expected:
            differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise ValueError(
                f"The cache of a prompt state must be a cache of the model. Received: {differ[0]!r}, "
                f"{found.get(differ[0], 'missing')}, where the model has {expected.get(differ[0], 'none')}. Prefill "
                "again."
            )


def _layout(cache):
    """Returns `{block/leaf: "integers" or "floats" of a shape}`, where None replaces the capacities."""

    def form(leaf, x):
        shape = tuple(None if _CAPACITY.get(leaf) == i else n for i, n in enumerate(x.shape))
        return f"{'integers' if 'int' in keras.backend.standardize_dtype(x.dtype) else 'floats'} of shape {shape}"

    return {f"{block}/{leaf}": form(leaf, x) for block, leaves in cache.items() for leaf, x in leaves.items()}


def _check_checksum(arrays, file):
    """Removes the checksum from the arrays of a file; raises ValueError if it does not match the others."""
    checksum = arrays.pop(_checksums.KEY, None)
    if checksum is None:
        _logger.warning("%s was written without a checksum; saving the state again adds one.", file)
    elif str(checksum) != _checksums.of_arrays(arrays):
        raise ValueError("whose arrays do not match their checksum")


def _check_finite(arrays, source):
    for name, x in arrays.items():
        # Other kinds of numbers are no state, and float64 may exceed float32.
        good = x.dtype.kind in "fiu" or name == "model"
        with np.errstate(over="ignore"):
            good = good and (x.dtype.kind != "f" or np.isfinite(x.astype("float32")).all())
        if not good:
            raise ValueError(
                f"A prompt's state must be finite. Received: NaN, infinity or no numbers in {name!r} of "
                f"{str(source)!r}. Prefill again."
            )


def _storable(x):
    x = ops.convert_to_numpy(ops.stop_gradient(x))
    # NumPy files do not support bfloat16. The conversion to float32 is exact.
    return x.astype("float32") if x.dtype.name == "bfloat16" else x
