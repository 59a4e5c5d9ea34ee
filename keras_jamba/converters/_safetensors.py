"""Writing of safetensors files."""

import re


def write(tensors, file, metadata):
    """Writes `{name: NumPy array}` and metadata, `{name: string}`, to a safetensors file.

    Raises:
        OSError: if the system cannot write the file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        # The library gives the number of the system's error only in its message.
        if (number := re.search(r"(.*)\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[2]), number[1].split(": ")[-1].strip(), str(file)) from error
