"""Shared by all tests: helper modules on the path, fixed seeds."""

import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_seeds():
    keras.utils.set_random_seed(0)
