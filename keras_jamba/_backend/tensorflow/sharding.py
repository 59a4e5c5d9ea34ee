"""Sharding on TensorFlow, where Keras splits no tensors."""

from keras_jamba._backend.common.unsharded import (  # noqa: F401
    active_mesh,
    all_gather_weight,
    all_to_all,
    pmax,
    shard_map,
    sharded_full,
    supports_model_parallel,
    to_default_device,
    to_numpy,
    why_not_sharded,
    with_sharding_constraint,
)
