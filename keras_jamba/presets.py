"""Presets: folders with `config.json` and, for trained models, `model.weights.h5`.

Built-in presets lie in `presets/` beside the package in a clone, and in `_presets/` inside an installed package. A
preset contains no code, and the complete preset is checked before anything is loaded.
"""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import h5py
import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_jamba import _checksums, _files, _keras_internals
from keras_jamba._typing import Config, PathLike

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
# Format 1 has no checksum of config.json.
FORMAT = 2
# Weights that only record statistics and do not affect outputs.
STATISTICS = ("usage", "drop_rate", "aux_loss")

_Model = TypeVar("_Model")

_PACKAGE = Path(__file__).resolve().parent
_logger = logging.getLogger("keras_jamba")


def _built_in_folder():
    installed = _PACKAGE / "_presets"
    return installed if installed.is_dir() else _PACKAGE.parent / "presets"


def list_presets() -> tuple[str, ...]:
    """Returns the names of the built-in presets, a sorted tuple."""
    return tuple(sorted(path.parent.name for path in _built_in_folder().glob(f"*/{CONFIG}")))


def folder_of(preset: PathLike) -> Path:
    """Returns the folder of a preset, given as a built-in name or a folder with a config.json.

    Raises:
        ValueError: if `preset` is neither.
    """
    folder, good = _built_in_folder() / str(preset), isinstance(preset, (str, os.PathLike))
    if good and str(preset) not in list_presets():
        folder = Path(preset)
    if not (good and _files.exists(folder / CONFIG)):
        raise ValueError(
            f"A preset must be a built-in name, {', '.join(list_presets())}, or a folder with a {CONFIG}. "
            f"Received: {preset!r}. Pass one of the names, or a folder that save_to_preset wrote."
        )
    return folder


def read(preset: PathLike) -> tuple[Config, Path]:
    """Reads a preset's metadata.

    Returns:
        `(metadata, folder)`: a dict with `format`, `class_name`, `config`, `weights` (None, or
        `{"sha256", "variables": {path: shape}}`) and `files` (`{name: sha256}` of the other files; absent in older
        presets), and the folder of the preset.

    Raises:
        ValueError: if there is no such preset, or if its config.json has another format or does not match its checksum.
    """
    folder = folder_of(preset)
    file = folder / CONFIG
    try:
        metadata = _files.read_json(file)
        good = metadata["format"] in (1, FORMAT) and isinstance(metadata["config"], dict)
        good = good and isinstance(metadata["class_name"], str) and _are_valid_weights(metadata["weights"])
        good = good and all(map(_is_inside, metadata.get("files", {})))
        is_complete = _checksums.matches(metadata, required=metadata["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(_format_error(file, repr(error))) from error
    if not good:
        raise ValueError(_format_error(file, f"format={metadata['format']!r}"))
    if not is_complete:
        raise ValueError(
            f"{CONFIG} of a preset must be as it was written. Received: {str(file)!r}, which does not match its "
            "checksum. Copy the preset again, and pass changes as arguments of from_preset."
        )
    return metadata, folder


def _are_valid_weights(weights):
    if weights is None:
        return True
    shapes = weights["variables"].values()
    good = all(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) for shape in shapes)
    return good and isinstance(weights["sha256"], str)


def _is_inside(name):
    """Returns whether a name of a file stays in the folder of its preset."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _format_error(file, received):
    return (
        f"{CONFIG} of a preset must be JSON with format={FORMAT} or 1, class_name, config and weights. "
        f"Received: {str(file)!r} with {received}. Write the preset again with save_to_preset."
    )


@_keras_internals.restored_scopes()
def build(
    cls: type[_Model],
    preset: PathLike,
    load_weights: bool,
    overrides: Config,
    check_sizes: Callable[[Config, int, str], None],
    head: Sequence[str] = (),
    head_only: Sequence[str] = (),
) -> _Model:
    """Returns a model of class `cls` from a preset, see `DHCJamba.from_preset`.

    `check_sizes(arguments, count, source)` raises ValueError if a model with these arguments has more than `count`
    weights. It runs before the model is built, because a damaged size would take much memory and time.

    `head` names constructor arguments that only the layer named "head" depends on. If an override changes one of them,
    that layer starts from random weights, and the preset's values of the arguments in `head_only` are dropped.
    """
    metadata, folder = read(preset)
    if metadata["class_name"] != cls.__name__:
        raise ValueError(
            f"The preset must be one of the class that loads it. Received: {str(preset)!r} of class "
            f"{metadata['class_name']}, loaded by {cls.__name__}. Call {metadata['class_name']}.from_preset."
        )
    stored = metadata["config"].get("quantization")
    if load_weights and stored is not None and overrides.get("quantization", stored) != stored:
        raise ValueError(
            "A quantized preset must be loaded with its own quantization. Received: "
            f"{str(preset)!r} in {stored!r}, and quantization={overrides['quantization']!r}. Leave it out, or load "
            "a preset in floating point."
        )
    for name, sha256 in metadata.get("files", {}).items():
        _check_asset(folder / name, sha256)
    weights = metadata["weights"] if load_weights else None
    if weights is not None:
        if _checksums.KEY not in metadata:
            _logger.warning("The preset %r was written without a checksum; save_to_preset adds one.", str(preset))
        _check_file(folder / WEIGHTS, weights)
    config = metadata["config"]
    changed = {name: overrides[name] for name in head if name in overrides and overrides[name] != config.get(name)}
    dropped = head_only if changed else ()
    if weights is not None:
        sizes = {name: value for name, value in (config | overrides).items() if name not in changed}
        check_sizes(sizes, sum(map(math.prod, weights["variables"].values())), str(preset))
    # A new head keeps its initial values.
    filled = weights["variables"] if weights is not None and not changed else {}
    with _keras_internals.without_initial_values(filled.__contains__) as skipped:
        model: Any = cls(**({name: value for name, value in config.items() if name not in dropped} | overrides))
    _keras_internals.initialize_others(skipped, model.weights)
    if weights is not None:
        _fill(model, config, changed, dropped, weights["variables"], preset, folder / WEIGHTS)
    elif load_weights:
        _logger.warning("The preset %r has no weights: the model starts from random ones.", str(preset))
    return model


def _fill(model, config, changed, dropped, variables, preset, file):
    """Loads the weights of a file into a model, except those of the head if `changed` is not empty."""
    if not changed:
        _check_variables(model, variables, preset)
        _load(model, file)
        return
    same = {name: value for name, value in model.get_config().items() if name not in {*changed, *dropped}}
    with _keras_internals.without_initial_values(variables.__contains__) as skipped:
        source = type(model)(**same, **{name: config[name] for name in changed if name in config})
    _keras_internals.initialize_others(skipped, source.weights)
    _check_variables(source, variables, preset)
    _load(source, file)
    values = {variable.path: variable for variable in source.weights}
    for variable in model.weights:
        if not variable.path.startswith("head/"):
            variable.assign(values[variable.path])
    changes = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    _logger.warning("The preset %r was not made for %s: the head starts from random weights.", str(preset), changes)


def write(
    model: Any,
    folder: PathLike,
    weights_dtype: Literal["float16", "float32"] | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Writes a preset, see `DHCJamba.save_to_preset`. `more(folder)` writes further files."""
    if weights_dtype not in (None, "float16", "float32"):
        raise ValueError(
            "weights_dtype must be 'float16', 'float32' or None, for the dtype of the variables. Received: "
            f"weights_dtype={weights_dtype!r}. Pass one of them."
        )
    check_finite(model, model.name)
    if weights_dtype is not None:
        _check_fits(model, weights_dtype)
    with preset_folder(folder) as staging:
        _save(model, staging / WEIGHTS, weights_dtype)
        weights = {"sha256": _sha256(staging / WEIGHTS), "variables": _variables(model)}
        if more is not None:
            more(staging)
        others = sorted(file for file in staging.rglob("*") if file.is_file() and file != staging / WEIGHTS)
        metadata = {
            "format": FORMAT,
            "class_name": type(model).__name__,
            "config": model.constructor_arguments(),
            "weights": weights,
            "files": {file.relative_to(staging).as_posix(): _sha256(file) for file in others},
        }
        _files.write_json(staging / CONFIG, _checksums.sealed(metadata))


@contextlib.contextmanager
def preset_folder(folder: PathLike) -> Iterator[Path]:
    """Yields a staged folder, which becomes `folder` on success and is removed otherwise.

    Raises:
        ValueError: if `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    taken = ValueError(
        f"A preset must be written to a folder that does not exist or is empty. Received: {str(folder)!r}, "
        "which is not. Choose another folder, or remove this one first."
    )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise taken
    try:
        with _files.atomic_folder(folder) as staging:
            yield staging
    except OSError as error:
        # Another process was faster.
        raise taken if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else error from error


def _save(model, file, dtype=None):
    """Saves the weights without the optimizer state, which is two or three times as large."""
    optimizer = getattr(model, "optimizer", None)
    change = None if dtype is None else functools.partial(_with_floats_in, dtype)
    try:
        model.optimizer = None
        _keras_internals.save_weights(model, file, change)
    finally:
        model.optimizer = optimizer


def _with_floats_in(dtype, stream):
    """Returns a copy of an HDF5 file in memory, with its floats in another dtype."""
    copied = io.BytesIO()
    with h5py.File(stream) as source, h5py.File(copied, "w") as target:

        def copy(name, item):
            attributes = dict(item.attrs)
            if isinstance(item, h5py.Group):
                made = target.require_group(name)
            else:
                values = item[...]
                # HDF5 has no bfloat16: Keras writes bytes, and names the dtype.
                if attributes.get("dtype") == "bfloat16":
                    values = values.view(ml_dtypes.bfloat16).astype("float32")
                    del attributes["dtype"]
                with np.errstate(over="ignore"):
                    made = target.create_dataset(
                        name, data=values.astype(dtype) if values.dtype.kind == "f" else values
                    )
            made.attrs.update(attributes)

        target.attrs.update(source.attrs)
        source.visititems(copy)
    return copied


def _check_fits(model, dtype):
    """Raises ValueError if a weight is too large for a dtype. Statistics of the last call may be anything."""
    largest = float(np.finfo(dtype).max)
    for variable in model.weights:
        is_float = "float" in keras.backend.standardize_dtype(variable.dtype)
        if is_float and variable.path.rsplit("/", 1)[-1] not in STATISTICS:
            found = float(ops.convert_to_numpy(ops.max(ops.abs(ops.cast(variable.value, "float32")))))
            if found > largest:
                raise ValueError(
                    f"weights_dtype must hold all weights. Received: weights_dtype={dtype!r}, and {variable.path!r} "
                    f"with numbers up to {found:.3g}. Pass weights_dtype=None, which keeps the dtype of the variables."
                )


def _load(model, file):
    """Loads the weights, and restores the random number generators as the caller seeded them."""
    weights = {id(v) for v in model.weights}
    generators = [(v, ops.copy(v.value)) for v in model.variables if id(v) not in weights]
    model.load_weights(file)
    for variable, state in generators:
        variable.assign(state)


def check_finite(model: Any, source: str) -> None:
    """Raises ValueError for a weight with NaN or infinity. Statistics of the last call may have them."""
    for variable in model.weights:
        is_float = "float" in keras.backend.standardize_dtype(variable.dtype)
        is_statistic = variable.path.rsplit("/", 1)[-1] in STATISTICS
        if is_float and not is_statistic and not bool(ops.all(ops.isfinite(ops.convert_to_tensor(variable)))):
            raise ValueError(
                f"Weights must be finite numbers. Received: {variable.path!r} of {source!r} with NaN or infinity. The "
                "training diverged, or the file is damaged. Use other weights."
            )


def _variables(model):
    return {path: list(shape) for path, shape in model.float_shapes().items()}


def _check_variables(model, expected, preset):
    have = _variables(model)
    wrong = [
        f"{path} is {expected.get(path, 'missing')} in the preset and {have.get(path, 'missing')} in the model"
        for path in sorted(expected.keys() | have.keys())
        if expected.get(path) != have.get(path)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            "The weights of a preset must fit the model. "
            f"Received: {str(preset)!r}, where {'; '.join(wrong[:3])}{more}. "
            "Drop the overrides that change the sizes, or pass load_weights=False to start from random weights."
        )


def _check_file(file, weights):
    sha256, found = weights["sha256"], _sha256(file) if _files.exists(file) else "no such file"
    if found == sha256 and sum(map(math.prod, weights["variables"].values())) > 2 * file.stat().st_size:
        found = f"{file.stat().st_size} bytes, fewer than its variables need"
    if found != sha256:
        raise ValueError(
            f"The weights of a preset must be the file that was saved, sha256 {sha256}. "
            f"Received: {str(file)!r}, {found}. Copy the preset again, or pass load_weights=False."
        )


def _check_asset(file, sha256):
    if not _files.exists(file) or _sha256(file) != sha256:
        problem = "which was changed" if file.exists() else "which is missing"
        raise ValueError(
            f"The files of a preset must be as they were written. Received: {str(file)!r}, {problem}. Copy the preset "
            "again, or change the loaded model and write a new preset."
        )


def _sha256(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
