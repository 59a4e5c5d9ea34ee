"""Functions that Keras lacks, or has only on some backends.

`contract.py` has one Protocol per capability. Each of the packages `jax`, `tensorflow` and `torch` has a module per
Protocol. This package imports the modules of the active backend: `_backend.sharding.shard_map(...)`.
"""

# ruff: noqa: F401
from typing import TYPE_CHECKING

import keras

name = keras.backend.backend()

# A type checker sees the modules of one backend only. All backends follow the same contract.
if TYPE_CHECKING or name == "jax":
    from keras_jamba._backend.jax import (
        autodiff,
        compilation,
        decoding,
        device,
        exporting,
        kernels,
        numerics,
        optimizer,
        processes,
        sharding,
        tensors,
        trainer,
    )
elif name == "tensorflow":
    from keras_jamba._backend.tensorflow import (
        autodiff,
        compilation,
        decoding,
        device,
        exporting,
        kernels,
        numerics,
        optimizer,
        processes,
        sharding,
        tensors,
        trainer,
    )
elif name == "torch":
    from keras_jamba._backend.torch import (
        autodiff,
        compilation,
        decoding,
        device,
        exporting,
        kernels,
        numerics,
        optimizer,
        processes,
        sharding,
        tensors,
        trainer,
    )
else:
    rule = "keras_jamba runs on the Keras backends 'jax', 'tensorflow' and 'torch'."
    raise ImportError(f"{rule} Received: KERAS_BACKEND={name!r}. Set it to one of the three before importing keras.")
