"""Reading and writing of safetensors files."""

import json
import re

import numpy as np


def library():
    """Returns the module `safetensors`, with its submodule `numpy`.

    Raises:
        ImportError: if safetensors is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"Checkpoints and adapters are files of the library safetensors. Received: {error}. Install it: "
            'pip install "keras-jamba[text]".'
        ) from error
    return safetensors


def opened(file):
    """Returns a context of the tensors of a safetensors file, as NumPy arrays.

    Raises:
        ImportError: if safetensors is not installed.
        OSError: if the file is missing or not readable. The library raises other errors for a damaged file.
    """
    safetensors = library()
    # The library reports a file without permission as missing.
    with open(file, "rb"):
        return safetensors.safe_open(file, framework="numpy")


def offsets(stream):
    """Returns `{name: offset of the first byte}` of an open file that `opened` has checked."""
    stream.seek(0)
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def float_dtype(name):
    """Returns the NumPy dtype of a dtype of the format, for example of "BF16", or None if it is no floating point."""
    import ml_dtypes

    known = {"F64": "float64", "F32": "float32", "F16": "float16"}
    known |= {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    return np.dtype(known[name]) if name in known else None


def write(tensors, file, metadata):
    """Writes `{name: NumPy array}` and metadata, `{name: string}`, to a safetensors file.

    Raises:
        ImportError: if safetensors is not installed.
        OSError: if the system cannot write the file.
    """
    safetensors = library()
    try:
        safetensors.numpy.save_file(tensors, file, metadata=metadata)
    except safetensors.SafetensorError as error:
        # The library gives the number of the system's error only in its message.
        if (number := re.search(r"(.*)\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[2]), number[1].split(": ")[-1].strip(), str(file)) from error
