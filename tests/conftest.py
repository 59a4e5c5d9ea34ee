"""Shared by all tests: helper modules on the path, fixed seeds, one store of what JAX compiled."""

import os
import sys
from pathlib import Path

# Most of the time on JAX is compilation: tests build the same small models again and again, and examples run
# in processes of their own. To be set before keras imports jax.
STORE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(STORE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Half the time to compile a drawing of random weights, which each new shape needs; the numbers are others.
os.environ.setdefault("JAX_THREEFRY_PARTITIONABLE", "0")

import keras  # noqa: E402
import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_seeds():
    keras.utils.set_random_seed(0)
