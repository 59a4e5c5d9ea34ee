"""Reading of NumPy archives (`.npz`) whose declared sizes are checked before memory is allocated."""

import math
import zipfile
from pathlib import Path

import numpy as np

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read(file):
    """Returns `{name: array}` of an archive that `numpy.savez` wrote.

    Raises:
        ValueError: if the file is not such an archive, or an array is larger than its entry.
    """
    try:
        size = Path(file).stat().st_size
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise ValueError("an entry that is listed twice")
            return {name: _array(archive, info, size) for name, info in entries.items()}
    except MemoryError:
        raise
    # zipfile, and numpy's reader of headers, raise errors of many classes.
    except Exception as error:
        raise ValueError(repr(error)) from error


def _array(archive, info, size):
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
        raise ValueError(f"entry {info.filename!r} declares {info.file_size} bytes in a file of {size}")
    with archive.open(info) as stream:
        shape, fortran_order, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
        left = info.file_size - stream.tell()
        if not dtype.isnative:
            raise ValueError(f"entry {info.filename!r} has the byte order of {dtype.str!r}")
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
            raise ValueError(f"entry {info.filename!r} declares {shape} {dtype} in {left} bytes")
        content = bytearray(left)
        # Only the read at the end compares the CRC.
        if stream.readinto(content) != left or stream.read(1):
            raise ValueError(f"entry {info.filename!r} does not have {left} bytes")
        return np.ndarray(shape, dtype, content, order="F" if fortran_order else "C")
