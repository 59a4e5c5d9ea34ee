"""Numbers from the device, names in natural order, and optional imports."""

import re

import keras


def numbers(x):
    """Returns a tensor as a NumPy array."""
    return keras.ops.convert_to_numpy(x)


def number(x):
    """Returns a scalar tensor as a float."""
    return float(numbers(x))


def imported(module, package, wanted):
    """Returns an optional module, or raises an ImportError that names `package` and the feature `wanted`."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{wanted} needs {package}. Received: an environment without it. "
            "Install it: pip install 'keras-jamba[monitoring]'"
        ) from error


def natural_key(name):
    """Returns a sort key that puts block_2 before block_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
