"""The formats of exported files: their backends, suffixes and packages."""

from dataclasses import dataclass

from keras_jamba import _backend
from keras_jamba.exporting.runtimes import missing

_TITLES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    Attributes:
        backends: the backends that write it.
        suffix: the suffix of its files, or None for any.
        extra: the extra of this package with its packages, or None.
        modules: the modules that write and run it.
        kind: "file", "folder", or "files" for several files beside `path`.
        precisions: the precisions of its numbers.
    """

    backends: tuple[str, ...]
    suffix: str | None = None
    extra: str | None = None
    modules: tuple[str, ...] = ()
    kind: str = "file"
    precisions: tuple[str, ...] = ("float32",)


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "tf_saved_model": Format(("jax", "tensorflow"), None, "tensorflow", ("tensorflow",), kind="folder"),
    "onnx": Format(("torch",), ".onnx", "onnx", _ONNX),
    "litert": Format(("tensorflow",), ".tflite", "litert", ("ai_edge_litert",)),
    "openvino": Format(("torch",), ".xml", "openvino", (*_ONNX[:2], "openvino"), "files", ("float32", "float16")),
    "torch": Format(("torch",), ".pt2"),
    "jax_export": Format(("jax",)),
}


def checked_format(name, path, precision):
    """Returns the `Format` of a name.

    Raises:
        ValueError: for an unknown format or precision, another suffix, or a format of another backend.
        ImportError: if a package is missing.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}. Received: format={name!r}.")
    found = FORMATS[name]
    if name not in _backend.exporting.formats():
        writers = " or ".join(_TITLES[each] for each in found.backends)
        raise ValueError(
            f"The format {name!r} is written on {writers}. Received: format={name!r} on a backend that writes "
            f"{list(_backend.exporting.formats())}. Save the model, and load and export it with "
            f"KERAS_BACKEND={found.backends[-1]}. The weights are the same."
        )
    if found.suffix is not None and path.suffix != found.suffix:
        raise ValueError(f"The path of the format {name!r} must end with {found.suffix!r}. Received: {str(path)!r}.")
    if precision not in found.precisions:
        raise ValueError(
            f"precision of the format {name!r} must be one of {list(found.precisions)}. Received: "
            f"precision={precision!r}."
        )
    if absent := missing(found.modules):
        raise ImportError(
            f"The format {name!r} needs the packages {', '.join(found.modules)}. Received: no {', '.join(absent)}. "
            f"Install them with: pip install 'keras-jamba[{found.extra}]'."
        )
    return found
