"""The image classifier: CNN, Jamba, head."""

import inspect

import keras

from keras_jamba import presets
from keras_jamba.layers import SpatialEncoder
from keras_jamba.models._routing_metrics import RoutingMetrics
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks

_BACKBONE_ARGUMENTS = tuple(
    name for name in inspect.signature(JambaBackbone.__init__).parameters if name not in ("self", "dtype", "name")
)


@keras.saving.register_keras_serializable(package="keras_jamba")
class DHCJamba(RoutingMetrics, keras.Model):
    """An image classifier: a CNN makes a grid of tokens, Jamba mixes them, their mean is classified.

    The grid is read row by row into a sequence of `ceil(H / downsample) * ceil(W / downsample)`
    tokens. Compile with a loss that takes logits:
    `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`.

    Args:
        num_classes: classes.
        image_shape: `(H, W, C)`; H and W may be None, for images of any size.
        downsample: pixels along one side of a token's cell, a power of two.
        **backbone: any argument of `JambaBackbone`, d_model and num_layers among them.

    Call arguments:
        images: ONE floating-point tensor `(b, H, W, C)`, values from 0 to 1.

    Returns:
        ONE float32 tensor of logits `(b, num_classes)`, no softmax.

    Raises:
        ValueError: for arguments out of range or unknown, and for images of another shape or dtype.

    Example:
        >>> import keras_jamba
        >>> model = keras_jamba.DHCJamba.from_preset("small", num_classes=10, image_shape=(32, 32, 3))
    """

    def __init__(
        self,
        num_classes=10,
        image_shape=(32, 32, 3),
        downsample=4,
        dtype=None,
        name=None,
        **backbone,
    ):
        # Layers
        _checks.check_integer("num_classes", num_classes)
        image_shape = _checked_image_shape(image_shape)
        for argument in backbone:
            _checks.check_choice("a constructor argument", argument, _ARGUMENTS)
        jamba = JambaBackbone(**backbone, dtype=dtype, name="backbone")
        d_model = jamba.get_config()["d_model"]
        encoder = SpatialEncoder(d_model, downsample, dtype=dtype, name="encoder")
        flatten = keras.layers.Reshape((-1, d_model), dtype=dtype, name="tokens")
        pool = keras.layers.GlobalAveragePooling1D(data_format="channels_last", dtype=dtype, name="pool")
        head = keras.layers.Dense(num_classes, dtype="float32", name="head")

        # Functional model
        images = keras.Input(image_shape, name="images")
        super().__init__(images, head(pool(jamba(flatten(encoder(images))))), name=name)
        # A functional model has the global policy: `compile` would not scale the loss of one in float16.
        self.dtype_policy = jamba.dtype_policy

        # Config
        self.encoder, self.flatten, self.backbone, self.pool, self.head = (
            encoder,
            flatten,
            jamba,
            pool,
            head,
        )
        self.block_pattern = jamba.block_pattern
        self._config = {
            "num_classes": num_classes,
            "image_shape": image_shape,
            "downsample": downsample,
            **jamba.get_config(),
        }
        self._watch_routing()

    def __call__(self, images, training=None, mask=None):
        shape = tuple(getattr(images, "shape", ()))
        expected = self._config["image_shape"]
        fits = len(shape) == 4 and all(
            wanted is None or size in (None, wanted) for size, wanted in zip(shape[1:], expected, strict=True)
        )
        if not fits:
            raise ValueError(
                f"images must be one tensor of shape (b, H, W, C) with (H, W, C) = {expected}. "
                f"Received: shape={shape}, {type(images).__name__}. Resize the images, add the axis that "
                "is missing, or build the model with another image_shape."
            )
        _checks.check_floating({"images": images})
        return super().__call__(images, training=training, mask=mask)

    def extract_features(self, images):
        """What the parts of the model make of images.

        Args:
            images: `(b, H, W, C)`, values from 0 to 1.

        Returns:
            A dict of tensors: `"spatial"`, the encoder's grid `(b, H', W', d)`; `"block_0"`, `"block_1"`,
            ..., the sequence after each block `(b, t, d)`; `"pooled"`, what the head classifies, `(b, d)`; and
            `"routing"`, what the routers decided, `{"block_1": what MoELayer returns, ...}`.
        """
        images = keras.ops.convert_to_tensor(images)
        spatial = self.encoder(images, training=False)
        blocks, routing = self.backbone.block_outputs(self.flatten(spatial))
        pooled = self.pool(self.backbone.final_norm(blocks[-1]))
        named = {f"block_{i}": block for i, block in enumerate(blocks)}
        return {"spatial": spatial, **named, "pooled": pooled, "routing": routing}

    def get_config(self):
        return {**self._config, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **overrides):
        """Builds a model from a preset.

        Args:
            preset: a name among `keras_jamba.presets.list_presets()`, or a folder that
                `save_to_preset` wrote, on whichever backend.
            load_weights: whether to load the preset's weights, if it has any.
            **overrides: constructor arguments that replace the preset's.

        Returns:
            The model. Where the preset has no weights it starts from random ones, and says so.

        Raises:
            ValueError: if the preset is unknown or damaged, an override unknown, or the weights do not fit
                the model that the overrides ask for.
        """
        return presets.build(cls, preset, load_weights, overrides)

    def save_to_preset(self, folder):
        """Writes configuration and weights to a folder that does not exist yet or is empty.

        The folder appears whole or not at all.

        Raises:
            ValueError: if the folder exists and holds anything.
        """
        presets.write(self, folder)


_ARGUMENTS = ("num_classes", "image_shape", "downsample", "dtype", "name", *_BACKBONE_ARGUMENTS)


def _checked_image_shape(image_shape):
    shape = tuple(image_shape) if isinstance(image_shape, (tuple, list)) else (image_shape,)
    sizes = shape[:2] + shape[2:]
    good = len(shape) == 3 and shape[2] is not None
    good = good and all(s is None or (isinstance(s, int) and s > 0) for s in sizes)
    if not good:
        raise ValueError(
            "image_shape must be (H, W, C), positive integers, where H and W may be None. "
            f"Received: image_shape={image_shape!r}. Pass for example (32, 32, 3), or (28, 28, 1) for grey images."
        )
    return shape
