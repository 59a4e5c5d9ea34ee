"""`export`: writes a file for another runtime, and runs it there before it appears."""

import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import keras

from keras_jamba import _backend
from keras_jamba._files import atomic_file, atomic_files, atomic_folder
from keras_jamba._typing import PathLike
from keras_jamba.exporting import runtimes
from keras_jamba.exporting.comparison import TOLERANCES, largest_difference
from keras_jamba.exporting.formats import FORMATS, checked_format
from keras_jamba.exporting.programs import call_program, stream_program
from keras_jamba.models._text_model import TextModel
from keras_jamba.ops import _checks
from keras_jamba.tokenizers import load_tokenizer, save_tokenizer
from keras_jamba.tokenizers.files import check_can_be_restored

_Format = Literal["tf_saved_model", "onnx", "litert", "openvino", "torch", "jax_export"]
_Precision = Literal["float32", "float16"]
_SUFFIXES = {each.suffix for each in FORMATS.values()}


def export(
    model: keras.Layer,
    path: PathLike,
    format: _Format,
    batch_size: int | None = None,
    length: int | None = None,
    streaming: bool = False,
    capacity: int | None = None,
    input_signature: Any = None,
    precision: _Precision = "float32",
    check: bool = True,
) -> float | None:
    """Writes a model to a file that another runtime reads, after it has run the file in that runtime.

    The file computes a call in inference, or one step of a stream. The batch size and the length, which is the second
    axis where the model leaves it open, are open in the file unless they are given. All inputs share these two sizes.
    Outputs have the keys of a dict of outputs, `"output_0"` and so on for a list, and `"output"` for a tensor.

    Args:
        model: a model of this package, or any `keras.Layer` that contains its layers.
        path: the file to write, or the folder of a SavedModel. An older file is replaced. OpenVINO's weights are
            written beside it, to NAME.bin, and the tokenizer of a text model to the folder NAME_tokenizer.
        format: the name of a format. `"tf_saved_model"` is written on JAX and TensorFlow; `"onnx"`, `"openvino"` and
            `"torch"`, which is `torch.export`, on PyTorch; `"litert"` on TensorFlow; `"jax_export"` on JAX.
        batch_size: a fixed batch size, or None for any.
        length: a fixed length, or None for any.
        streaming: whether to export one step of a stream. Its inputs are `"frame"` `(b, H, W, C)` or `"token_ids"`
            `(b, t)`, `"reset"` `(b,)` bool, and the state, `"state_..."`. Its outputs are `"logits"`, for a language
            model those of the last token, and the next state, `"next_state_..."`. A stream begins with zeros as state
            and True for `"reset"`.
        capacity: with `streaming`, the most tokens or frames of a stream; required for attention without a window.
        input_signature: a nested structure of `keras.InputSpec` for the first argument of a call. It is required for
            layers, and for text models it replaces `{"token_ids": (b, t)}`.
        precision: "float32", or "float16" for OpenVINO.
        check: whether to run the file in its own runtime and to compare it with the model, at two batch sizes and two
            lengths where they are open. Without it nothing tells whether the file is right.

    Returns:
        The largest difference from the model relative to the largest number of the output, or None without `check`.

    Raises:
        ValueError: for arguments that do not fit together, a format of another backend, operations that the format
            lacks, and outputs that differ by more than 1e-4 (5e-2 for float16). No file is written then.
        ImportError: if a package of the format is missing.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.DHCJamba.from_preset("digits")
        >>> difference = keras_jamba.export(model, "digits.onnx", "onnx")  # doctest: +SKIP
    """
    path = Path(path)
    kind = checked_format(format, path, precision).kind
    program = _program(model, batch_size, length, streaming, capacity, input_signature)
    _check_runs(program)
    with _tokenizer_beside(model, path), _staged(path, kind) as staged:
        try:
            _backend.exporting.write(format, program, staged, precision)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"The format {format!r} cannot express this model. Received: {type(model).__name__}, "
                f"{type(error).__name__}: {_short(error)}. Fix its open sizes with batch_size, length or "
                "input_signature, or export another format."
            ) from error
        difference = _checked(program, format, staged, precision) if check else None
    return difference


def check_export(
    model: keras.Layer,
    path: PathLike,
    format: _Format,
    batch_size: int | None = None,
    length: int | None = None,
    streaming: bool = False,
    capacity: int | None = None,
    input_signature: Any = None,
    precision: _Precision = "float32",
) -> float:
    """Runs an exported file in its own runtime, and compares it with the model.

    Args:
        model: the model that was exported.
        path: the file.
        format, batch_size, length, streaming, capacity, input_signature, precision: as in `export`.

    Returns:
        The largest difference, as `export` returns it.

    Raises:
        ValueError: if the file cannot be read, or its outputs differ; see `export`.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    checked_format(format, path, precision)
    if not path.exists():
        raise FileNotFoundError(
            f"There must be an exported file at the path. Received: {str(path)!r}. Export the model first."
        )
    program = _program(model, batch_size, length, streaming, capacity, input_signature)
    return _checked(program, format, path, precision)


def _program(model, batch_size, length, streaming, capacity, input_signature):
    if not isinstance(model, keras.Layer):
        raise ValueError(f"model must be a keras.Layer. Received: {type(model).__name__}. Pass a layer or a model.")
    if model.compute_dtype != "float32":
        raise ValueError(
            f"Exports compute in float32. Received: a model with compute_dtype={model.compute_dtype!r}. Load it with "
            "dtype='float32'."
        )
    for name, value in dict(batch_size=batch_size, length=length, capacity=capacity).items():
        if value is not None:
            _checks.check_integer(name, value)
    if streaming and input_signature is not None:
        raise ValueError("A stream defines its own inputs. Received: input_signature with streaming=True. Remove it.")
    if capacity is not None and not streaming:
        raise ValueError(f"capacity is for streams. Received: capacity={capacity} without streaming=True. Remove it.")
    if streaming:
        return stream_program(model, batch_size, length, capacity)
    return call_program(model, batch_size, length, input_signature)


def _check_runs(program):
    """Runs the model once, which builds its layers and raises the model's own errors."""
    _backend.exporting.run(program, program.example({size: 2 for size in program.sizes()}))


@contextmanager
def _staged(path, kind):
    """Yields the path to write, which moves to `path` on success."""
    if kind == "file":
        with atomic_file(path) as staged:
            yield Path(staged)
    elif kind == "folder":
        with atomic_folder(path, replaces=(path / "saved_model.pb").is_file()) as staged:
            yield Path(staged)
    else:
        with atomic_files(path.parent) as folder:
            yield Path(folder) / path.name


def _checked(program, format, path, precision):
    def of_runtime(function, *given):
        try:
            return function(*given)
        except Exception as error:
            raise ValueError(
                f"The runtime of {format!r} must be able to read and run the file. Received: {path.name!r}, "
                f"{type(error).__name__}: {_short(error)}. Export the model again, or in another format."
            ) from error

    run = of_runtime(runtimes.load, format, path, precision)
    return largest_difference(program, lambda arrays: of_runtime(run, arrays), TOLERANCES[precision])


def _short(error):
    """Returns the beginning of an error's message in one line."""
    return textwrap.shorten(str(error) or "no message", 300).rstrip(".")


@contextmanager
def _tokenizer_beside(model, path):
    """Writes the tokenizer of a text model to the folder NAME_tokenizer beside the file, if the context succeeds."""
    tokenizer = model.tokenizer if isinstance(model, TextModel) else None
    if tokenizer is None:
        yield
        return
    check_can_be_restored(tokenizer)
    name = path.stem if path.suffix in _SUFFIXES else path.name
    place = path.with_name(f"{name}_tokenizer")
    if place.exists() and not _is_tokenizer(place):
        raise FileExistsError(
            f"The folder of the tokenizer must be new or hold a tokenizer. Received: {str(place)!r}. Move it away."
        )
    with atomic_folder(place, replaces=True) as folder:
        save_tokenizer(tokenizer, folder)
        yield


def _is_tokenizer(place):
    try:
        return load_tokenizer(place) is not None
    except (OSError, ValueError):
        return False
