"""Reading and writing of safetensors files."""

import re


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
