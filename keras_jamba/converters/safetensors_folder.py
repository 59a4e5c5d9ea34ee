"""A folder of safetensors files, a single file or shards. All metadata is checked before it is used."""

import collections
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from keras_jamba import _files
from keras_jamba.converters import _safetensors

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Threads that read ahead, and the bytes of values that may wait, unless a single one has more.
_THREADS, _AHEAD = 2, 2**28
# Numbers per block that are checked at a time. They fit into a cache of the processor.
_BLOCK = 2**17
# The bits of the exponent in bfloat16. NaN and infinity have them all.
_EXPONENT = 0x7F80


@dataclass(frozen=True)
class Array:
    """An array in a file: the open file, the dtype in the format, the shape, and the offset of the first byte."""

    file: Path
    stream: BinaryIO
    dtype: str
    shape: tuple
    offset: int


@dataclass(frozen=True)
class Place:
    """The place of a tensor: a stored array, and the index of the tensor in it."""

    array: Array
    shape: tuple
    part: tuple = ()

    @property
    def file(self):
        return self.array.file


class SafetensorsFolder:
    """A context with the tensors of a checkpoint, by name. Its files stay open until the end of the context.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.
        unstacked: `unstacked(name, shape)` returns `{name: index}` of the tensors that are stacked in one, or None.

    Raises:
        ValueError: if a file is missing, damaged, or outside of the folder.
    """

    def __init__(self, folder, unstacked):
        self.folder = Path(folder)
        self.places, self.dtypes = {}, set()
        with contextlib.ExitStack() as streams:
            for file, promised in self._files():
                self._read_header(file, promised, unstacked, streams)
            self._streams = streams.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._streams.close()

    def _files(self):
        """Returns a list of `(file, names that the index lists for it, or None)`."""
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / ONE).is_file():
                raise ValueError(
                    f"A checkpoint must hold {ONE}, or {INDEX} and its shards. Received: {str(self.folder)!r} without "
                    "them. Convert weights in another format with transformers' save_pretrained first."
                )
            return [(self.folder / ONE, None)]
        names = _weight_map(index)
        shards = {}
        for name, file in names.items():
            if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
                raise ValueError(
                    f"{INDEX} must name safetensors files beside it. Received: {file!r} for {name!r} in "
                    f"{str(index)!r}. Do not load this checkpoint: its index may be an attack."
                )
            shards.setdefault(self.folder / file, set()).add(name)
        return sorted(shards.items())

    def _read_header(self, file, promised, unstacked, streams):
        with _opened(file) as tensors:
            keys = set(tensors.keys())
            if promised is not None and promised != keys:
                missing, more = sorted(promised - keys), sorted(keys - promised)
                raise ValueError(
                    f"A shard must hold the tensors that {INDEX} lists. Received: {str(file)!r} without "
                    f"{missing[:3]} and with additional {more[:3]}. Download the checkpoint again."
                )
            # Another file of this name, with other offsets, may replace it meanwhile.
            stream = streams.enter_context(open(file, "rb"))
            offsets = _safetensors.offsets(stream)
            for key in sorted(keys):
                entry = tensors.get_slice(key)
                array = Array(file, stream, entry.get_dtype(), tuple(entry.get_shape()), offsets[key])
                self.dtypes.add(array.dtype)
                parts = unstacked(key, array.shape) or {key: ()}
                for name, part in parts.items():
                    self._add(name, Place(array, _shape_of(array.shape, part), part))

    def _add(self, name, place):
        if name in self.places:
            raise ValueError(
                f"A tensor must be stored once. Received: {name!r} in {self.places[name].file.name!r} and in "
                f"{place.file.name!r}. Download the checkpoint again."
            )
        self.places[name] = place

    def check(self, weights, optional=()):
        """Raises ValueError unless each tensor of `weights` has its shape, and all others are named in `optional`."""
        expected = {name: weight.shape for weight in weights for name in weight.names}
        wrong = [f"{name} is missing" for name in expected if name not in self.places]
        wrong += [f"{name} is unexpected" for name in self.places if name not in expected and name not in optional]
        wrong += [
            f"{name} has the shape {self.places[name].shape}, not {shape}"
            for name, shape in expected.items()
            if name in self.places and self.places[name].shape != shape
        ]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                "The tensors of a checkpoint must be those that its config.json describes. Received: "
                f"{str(self.folder)!r}, where {'; '.join(wrong[:5])}{more}. They belong to different models, or one "
                "of them is damaged. Download the checkpoint again."
            )

    def values(self, weights):
        """Yields `(weight, value of its variable)` in the order of the files. Threads read ahead.

        Raises:
            ValueError: see `read`.
        """
        ordered = sorted(weights, key=lambda weight: (self.places[weight.names[0]].file, weight.path))
        pending, waiting = collections.deque(), 0
        with ThreadPoolExecutor(_THREADS) as threads:
            try:
                for weight in ordered:
                    size = self._bytes_of(weight)
                    while pending and waiting + size > _AHEAD:
                        waiting -= self._bytes_of(pending[0][0])
                        yield _next_of(pending)
                    pending.append((weight, threads.submit(weight.ours, self.read)))
                    waiting += size
                while pending:
                    yield _next_of(pending)
            finally:
                for _, reading in pending:
                    reading.cancel()

    def _bytes_of(self, weight):
        dtype = _safetensors.float_dtype(self.places[weight.names[0]].array.dtype)
        return len(weight.names) * math.prod(weight.shape) * (dtype.itemsize if dtype else 1)

    def read(self, name):
        """Returns a tensor in NumPy, mapped from its file.

        Raises:
            ValueError: if the file is damaged, or the tensor has integers, NaN or infinity.
        """
        place = self.places[name]
        dtype = _safetensors.float_dtype(place.array.dtype)
        if dtype is None:
            raise ValueError(
                f"Weights must be floating-point numbers. Received: {name!r} in {str(place.file)!r} in "
                f"{place.array.dtype}. Convert a model without quantized weights."
            )
        x = _mapped(place.array, dtype)[place.part]
        if not _is_finite(x):
            raise ValueError(
                f"Weights must be finite numbers. Received: {name!r} in {str(place.file)!r} with NaN or infinity. "
                "The training diverged, or the file is damaged. Load another checkpoint."
            )
        return x


def _next_of(pending):
    weight, reading = pending.popleft()
    return weight, reading.result()


def _mapped(array, dtype):
    """Returns an array of a file. Its memory is released with the array."""
    if 0 in array.shape:
        return np.empty(array.shape, dtype)
    try:
        # Copied on write: PyTorch warns of memory that cannot be written to.
        x = np.memmap(array.stream, dtype, "c", array.offset, array.shape or (1,))
    except ValueError as error:  # the file became shorter
        raise ValueError(_damaged(array.file, error)) from error
    return np.asarray(x).reshape(array.shape)


def _is_finite(x):
    """Returns whether a floating-point array has neither NaN nor infinity."""
    flat = np.ascontiguousarray(x).reshape(-1)
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        if block.dtype.name == "bfloat16":
            finite = np.bitwise_and(block.view("uint16"), _EXPONENT).max() < _EXPONENT
        else:
            finite = np.isfinite(block if block.dtype.kind == "f" else block.astype("float32")).all()
        if not finite:
            return False
    return True


def write(folder, sizes, tensors, shard_bytes):
    """Writes tensors to a folder in the layout of transformers: one file, or shards and their index.

    Args:
        folder: an existing folder.
        sizes: `{name: bytes}` of all tensors, in their order.
        tensors: an iterable of `(name, array)`. Memory holds at most a shard and one larger tensor at a time.
        shard_bytes: maximum bytes per file, unless a single tensor is larger.

    Raises:
        ImportError: if safetensors or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import split_state_dict_into_shards_factory
    except ImportError as error:
        raise ImportError(
            f"Shards of checkpoints are planned with the library huggingface_hub. Received: {error}. Install it: "
            'pip install "keras-jamba[text]".'
        ) from error
    _safetensors.library()
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    held = {file: {} for file in plan.filename_to_tensors}
    for name, x in tensors:
        file = plan.tensor_to_filename[name]
        held[file][name] = x
        if len(held[file]) == len(plan.filename_to_tensors[file]):
            _safetensors.write(held[file], Path(folder) / file, {"format": "pt"})
            held[file].clear()
    if plan.is_sharded:
        _files.write_json(Path(folder) / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _weight_map(index):
    try:
        names = _files.read_json(index)["weight_map"]
        good = isinstance(names, dict) and names
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(index, error)) from error
    if not good:
        raise ValueError(_damaged(index, "no weight_map"))
    return names


def _opened(file):
    _safetensors.library()
    try:
        return _safetensors.opened(file)
    except Exception as error:  # safetensors raises its own errors and those of the system
        raise ValueError(_damaged(file, error)) from error


def _damaged(file, error):
    return (
        f"A checkpoint must be made of complete safetensors files. Received: {str(file)!r}, {error}. "
        "Download the checkpoint again."
    )


def _shape_of(shape, part):
    shape = list(shape)
    for axis, index in reversed(list(enumerate(part))):
        if isinstance(index, slice):
            shape[axis] = len(range(*index.indices(shape[axis])))
        else:
            del shape[axis]
    return tuple(shape)
