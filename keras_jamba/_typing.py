"""Types of the public signatures.

Keras and the backends share no class of tensors, and Keras has no type information. `Tensor` therefore checks
nothing. It says what a reader may pass.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

# A tensor of the backend, a `keras.KerasTensor`, a `keras.Variable` or a NumPy array.
Tensor: TypeAlias = Any
# A nested structure of tensors: a tensor, or a tuple, list or dictionary of structures.
Tensors: TypeAlias = Any
# Names of dtypes, a `keras.dtype_policies.DTypePolicy`, or the dictionary of a saved one.
DType: TypeAlias = Any
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
# None stands for an axis whose size is open.
Shape: TypeAlias = tuple[int | None, ...]
PathLike: TypeAlias = str | os.PathLike[str]
# What `get_config` returns and `from_config` takes.
Config: TypeAlias = dict[str, Any]
# What callbacks of Keras receive: the metrics of a batch or an epoch.
Logs: TypeAlias = Mapping[str, Any] | None
