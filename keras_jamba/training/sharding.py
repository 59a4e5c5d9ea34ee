"""Models whose weights are split among devices, through `keras.distribution.ModelParallel` on JAX."""

import keras

from keras_jamba import _backend
from keras_jamba.ops import _checks

# What is split, by paths of variables: along "model" among the devices of the second axis, along "d_model" among those
# of the first, where they share everything.
_ALWAYS = {
    # (v, d) and (d, v): words.
    r".*token_embedding/embeddings": ("model", "d_model"),
    r".*token_embedding/reverse_embeddings": ("d_model", "model"),
    # Mamba: channels.
    r".*(ssm|conv)/(conv_kernel|dt_proj/kernel)": (None, "model"),
    r".*(ssm|conv)/(conv_bias|dt_bias|D)": ("model",),
    r".*ssm/(A_log|x_proj/kernel)": ("model", None),
    # Experts: some for each device.
    r".*(gate|up)_bank": ("model", "d_model", None),
    r".*down_bank": ("model", None, "d_model"),
}
# Where all devices have all tokens, a product gives each its part of the channels, heads or hidden units.
_BY_CHANNELS = {
    r".*(in|q|k|v)_proj/kernel": ("d_model", "model"),
    r".*out_proj/kernel": ("model", "d_model"),
    r".*(gate|up)_proj/kernel": ("d_model", "model"),
    r".*down_proj/kernel": ("model", "d_model"),
}


class _LayoutMap(keras.distribution.LayoutMap):
    """With what operations that split tensors themselves have to know, as in `_backend.sharding.active_mesh()`."""

    def __init__(self, mesh, sequence_parallel, at_use):
        super().__init__(mesh)
        self.parts = (*mesh.axis_names, sequence_parallel, at_use)


def layout_map(mesh, sequence_parallel=False, fully_sharded=False):
    """How the models of this package are split among the devices of a mesh, for `keras.distribution.ModelParallel`.

    Rows of a batch go over the first axis of the mesh. Over the second go the vocabulary, the channels of Mamba layers,
    the heads of attention, the hidden units of perceptrons, and the experts, to which tokens travel; an optimizer's
    variables lie where their weights do. What no rule names, norms, routers and image encoders, every device has.

    With `sequence_parallel` the tokens of a row go over the second axis, for contexts whose activations one device
    could not hold. Scan and convolution need all tokens of a channel, attention all tokens of a head: there devices
    exchange tokens for channels or heads. Projections and perceptrons, which see one token at a time, are then whole on
    every device; experts are shared as ever.

    With `fully_sharded` matrices are split over the first axis as well, along `d_model`, and with them their gradients
    and the optimizer's variables: each device holds one part in as many as there are devices, and has a matrix from the
    others when its block is computed. For models whose training state one row of the mesh could not hold.

    In several processes `keras.distribution.initialize` comes first, `ModelParallel` takes `auto_shard_dataset=False`,
    and `Batches` as `shard` the rows that the devices of this process have: all, (0, 1), where each process has some of
    all parts of a batch.

    Args:
        mesh: a `keras.distribution.DeviceMesh` with two axes, whatever their names. The sizes that are split must be
            multiples of the second; `d_model`, with `fully_sharded`, of the first.
        sequence_parallel: whether tokens are split; a length that is no multiple of the second axis is not.
            Of rows that `fit` gets without targets the length is one less.
        fully_sharded: whether the devices of the first axis share matrices too.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: on other backends than JAX, or for a mesh without two axes. Building a layer raises one where a size
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
        tokens: [Jacobs et al. (2023)](https://arxiv.org/abs/2309.14509);
        all of the state: [Rajbhandari et al. (2020)](https://arxiv.org/abs/1910.02054).
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
    axes = {"model": second} | ({"d_model": first} if fully_sharded else {})
    # Matrices that a product needs whole may be stored in parts nevertheless.
    by_channels = {} if sequence_parallel and not fully_sharded else _BY_CHANNELS
    for path, split in (_ALWAYS | by_channels).items():
        found[path] = tuple(axes.get(axis) for axis in split)
    return found
