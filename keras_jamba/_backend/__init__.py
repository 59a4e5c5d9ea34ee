"""Functions that Keras lacks, or has only on some backends.

`contract` has a Protocol per capability. `_backend.sharding.shard_map(...)` calls that of the active backend.
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
    raise ImportError(f"KERAS_BACKEND must be jax, tensorflow or torch. Received: {name!r}. Set it before Keras.")
