"""Model parallelism: layouts that shard weights over a mesh, for `keras.distribution.ModelParallel` on JAX."""

import keras

from keras_jamba import _backend
from keras_jamba.ops import _checks

# Sharded axes by variable path. "model" is the second mesh axis. "d_model" is the first, with `fully_sharded` only.
_ALWAYS = {
    # (v, d) and (d, v): the vocabulary is split.
    r".*token_embedding/embeddings": ("model", "d_model"),
    r".*token_embedding/reverse_embeddings": ("d_model", "model"),
    # Mamba: channels are split.
    r".*(ssm|conv)/(conv_kernel|dt_proj/kernel)": (None, "model"),
    r".*(ssm|conv)/(conv_bias|dt_bias|D)": ("model",),
    r".*ssm/(A_log|x_proj/kernel)": ("model", None),
    # Experts: each device holds some of them.
    r".*(gate|up)_bank": ("model", "d_model", None),
    r".*down_bank": ("model", None, "d_model"),
}
# Without `sequence_parallel` each device computes its own channels, heads or hidden units.
_BY_CHANNELS = {
    r".*(in|q|k|v)_proj/kernel": ("d_model", "model"),
    r".*out_proj/kernel": ("model", "d_model"),
    r".*(gate|up)_proj/kernel": ("d_model", "model"),
    r".*down_proj/kernel": ("model", "d_model"),
}


class _LayoutMap(keras.distribution.LayoutMap):
    """A layout map that also carries the axes and options that `_backend.sharding.active_mesh()` returns."""

    def __init__(self, mesh, sequence_parallel, at_use):
        super().__init__(mesh)
        self.active_mesh = (*mesh.axis_names, sequence_parallel, at_use)


def layout_map(
    mesh: keras.distribution.DeviceMesh, sequence_parallel: bool = False, fully_sharded: bool = False
) -> keras.distribution.LayoutMap:
    """Returns the layouts that shard a model of this package over a mesh, for `keras.distribution.ModelParallel`.

    The first mesh axis splits the rows of a batch. The second splits the vocabulary, Mamba channels, attention heads,
    hidden units of perceptrons, and experts. Tokens travel to the devices of their experts. An optimizer's variables
    are sharded like their weights. All other weights are replicated: norms, routers and image encoders.

    `sequence_parallel` splits the tokens of a row over the second axis, for contexts whose activations exceed one
    device. Scan and convolution need all tokens of a channel, and attention all tokens of a head. For these, devices
    exchange tokens for channels or heads. Projections and perceptrons see one token at a time and are replicated.
    Experts stay sharded.

    `fully_sharded` also splits matrices over the first axis, along `d_model`, with their gradients and the optimizer's
    variables. Each of N devices holds 1/N of a matrix, and gathers the rest when its block runs. It is for models whose
    training state exceeds one row of the mesh.

    In several processes, call `keras.distribution.initialize` first and pass `auto_shard_dataset=False` to
    `ModelParallel`. Pass the rows of this process' devices to `Batches` as `shard`. That is (0, 1), all rows, if the
    devices of each process cover all parts of a batch.

    Args:
        mesh: a `keras.distribution.DeviceMesh` with two axes of any names. Split sizes must be multiples of the second
            axis. With `fully_sharded`, `d_model` must be a multiple of the first.
        sequence_parallel: whether tokens are split. A length that is no multiple of the second axis stays unsharded.
            Rows that `fit` gets without targets count one token less.
        fully_sharded: whether the first axis shards matrices too.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: on backends other than JAX, or for a mesh without two axes. Building a layer raises one if a size
            cannot be split.

    Example:
        >>> mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
        >>> distribution = keras.distribution.ModelParallel(layout_map=keras_jamba.training.layout_map(mesh))
        >>> with distribution.scope():
        ...     model = keras_jamba.JambaCausalLM.from_preset("hf://ai21labs/AI21-Jamba-Mini-1.7")
        ...     model.compile(keras_jamba.training.optimizer(model, steps=1000))
        ...     model.fit(batches)

    Reference:
        [Shoeybi et al. (2019)](https://arxiv.org/abs/1909.08053);
        experts: [Lepikhin et al. (2020)](https://arxiv.org/abs/2006.16668);
        `sequence_parallel`: [Jacobs et al. (2023)](https://arxiv.org/abs/2309.14509);
        `fully_sharded`: [Rajbhandari et al. (2020)](https://arxiv.org/abs/1910.02054).
    """
    if not _backend.sharding.supports_model_parallel():
        raise ValueError(
            "keras.distribution.ModelParallel splits models on JAX alone. Received: a mesh on another backend. Set "
            "KERAS_BACKEND to jax, or share batches by training.DataParallel."
        )
    _checks.check_choice("the number of axes of the mesh", len(mesh.shape), (2,))
    at_use = layout_map(mesh, sequence_parallel) if fully_sharded else None
    found = _LayoutMap(mesh, sequence_parallel, at_use)
    first, second = mesh.axis_names
    axes: dict[str | None, str] = {"model": second}
    if fully_sharded:
        axes["d_model"] = first
    # `fully_sharded` stores matrices in shards even if a product needs them complete.
    by_channels = {} if sequence_parallel and not fully_sharded else _BY_CHANNELS
    for path, split in (_ALWAYS | by_channels).items():
        found[path] = tuple(axes.get(axis) for axis in split)
    return found
