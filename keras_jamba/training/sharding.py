"""Models whose weights are split among devices, through `keras.distribution.ModelParallel` on JAX."""

import keras

from keras_jamba.ops import _checks

# What is split, by paths of variables: the axes of each, "model" where the devices of that axis have parts.
_SPLIT = {
    # (v, d) and (d, v): words.
    r".*token_embedding/embeddings": ("model", None),
    r".*token_embedding/reverse_embeddings": (None, "model"),
    # Mamba: channels.
    r".*mixer/in_proj/kernel": (None, "model"),
    r".*ssm/(conv_kernel|dt_proj/kernel)": (None, "model"),
    r".*ssm/(conv_bias|dt_bias|D)": ("model",),
    r".*ssm/(A_log|x_proj/kernel)": ("model", None),
    # Attention: heads. Both mixers: back to the width of the model.
    r".*mixer/(q|k|v)_proj/kernel": (None, "model"),
    r".*mixer/out_proj/kernel": ("model", None),
    # Perceptrons: hidden units. Experts: some for each device.
    r".*feed_forward/(gate|up)_proj/kernel": (None, "model"),
    r".*feed_forward/down_proj/kernel": ("model", None),
    r".*feed_forward/(gate|up|down)_bank": ("model", None, None),
}


class _LayoutMap(keras.distribution.LayoutMap):
    """With the axes of the mesh for rows and for the model, for operations that split tensors themselves."""

    def __init__(self, mesh):
        super().__init__(mesh)
        self.axes = tuple(mesh.axis_names)


def layout_map(mesh):
    """How the models of this package are split among the devices of a mesh, for `keras.distribution.ModelParallel`.

    Rows of a batch go over the first axis of the mesh. Over the second go the vocabulary, the channels of Mamba layers,
    the heads of attention, the hidden units of perceptrons, and the experts, to which tokens travel; an optimizer's
    variables lie where their weights do. What no rule names, norms, routers and image encoders, every device has.

    Args:
        mesh: a `keras.distribution.DeviceMesh` with two axes, whatever their names. The sizes that are split must be
            multiples of the second.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: on other backends than JAX, or for a mesh without two axes.

    Example:
        >>> mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
        >>> distribution = keras.distribution.ModelParallel(layout_map=keras_jamba.training.layout_map(mesh))
        >>> with distribution.scope():
        ...     model = keras_jamba.JambaCausalLM.from_preset("hf://ai21labs/AI21-Jamba-Mini-1.7")
        ...     model.compile(keras_jamba.training.optimizer(model, steps=1000))
        ...     model.fit(batches)

    Reference:
        [Shoeybi et al. (2019)](https://arxiv.org/abs/1909.08053);
        experts: [Lepikhin et al. (2020)](https://arxiv.org/abs/2006.16668).
    """
    if keras.backend.backend() != "jax":
        raise ValueError(
            "keras.distribution.ModelParallel splits models on JAX alone. Received: "
            f"KERAS_BACKEND={keras.backend.backend()!r}. Set it to jax, or share batches by training.DataParallel."
        )
    _checks.check_choice("the number of axes of the mesh", len(mesh.shape), (2,))
    found = _LayoutMap(mesh)
    for path, axes in _SPLIT.items():
        found[path] = tuple(None if axis is None else mesh.axis_names[1] for axis in axes)
    return found
