"""The classifier of images and clips: encoder, tokens, Jamba, readout, head."""

import inspect
import numbers

import keras
from keras import ops

from keras_jamba import presets
from keras_jamba.layers import (
    FrameTokens,
    GridTokens,
    LastReadout,
    MeanReadout,
    PatchEncoder,
    SequencePooling,
    SpatialEncoder,
    detach_state,
)
from keras_jamba.models._adapting import Adapting
from keras_jamba.models._routing_metrics import RoutingMetrics
from keras_jamba.models._trainer_hooks import TrainerHooks
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks

_BACKBONE_ARGUMENTS = tuple(
    name for name in inspect.signature(JambaBackbone.__init__).parameters if name not in ("self", "dtype", "name")
)
_STEMS = {"conv": SpatialEncoder, "patchify": PatchEncoder}
_READOUTS = {"mean": MeanReadout, "last": LastReadout, "seqpool": SequencePooling}
# Axes of the inputs, the batch left out, by kind of tokens.
_AXES = {"grid": "HWC", "frames": "THWC", "grid+frames": "THWC"}


@keras.saving.register_keras_serializable(package="keras_jamba")
class DHCJamba(Adapting, TrainerHooks, RoutingMetrics, keras.Model):
    """A classifier of images or clips: an encoder makes tokens, Jamba mixes them, what it reads out is classified.

    An image becomes a grid of `ceil(H / downsample) * ceil(W / downsample)` tokens. Of a clip, whose frames are
    encoded in one batch, each frame becomes one token or a grid of them, and `step` classifies a stream frame by
    frame: after each frame its logits are those of the clip so far. Compile with a loss that takes logits:
    `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`.

    Args:
        num_classes: classes.
        image_shape: `(H, W, C)`, or `(T, H, W, C)` of clips; T, H and W may be None, for any number of frames and
            images of any size.
        tokens: "grid", every cell of an image's grid; for clips "frames", one token a frame (`FrameTokens`), or
            "grid+frames", every cell of every frame.
        downsample: pixels along one side of a token's cell; a power of two for the stem "conv".
        stem: "conv", a small CNN (`SpatialEncoder`), or "patchify", one projection (`PatchEncoder`).
        scan_order: "row" or "snake", in which order the cells of a grid are read; see `GridTokens`.
        readout: "mean" or "last" token, or "seqpool", a mean with learned weights (`SequencePooling`).
        **backbone: any argument of `JambaBackbone`, d_model, num_layers, direction and mixer among them.

    Call arguments:
        images: ONE floating-point tensor `(b, H, W, C)` or `(b, T, H, W, C)`, values from 0 to 1.

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
        tokens="grid",
        downsample=4,
        stem="conv",
        scan_order="row",
        readout="mean",
        dtype=None,
        name=None,
        **backbone,
    ):
        # Layers
        _checks.check_integer("num_classes", num_classes)
        _checks.check_choice("tokens", tokens, tuple(_AXES))
        _checks.check_choice("stem", stem, tuple(_STEMS))
        _checks.check_choice("readout", readout, tuple(_READOUTS))
        _checks.check_choice("scan_order", scan_order, ("row", "snake") if tokens != "frames" else ("row",))
        image_shape = _checked_image_shape(image_shape, tokens)
        for argument in backbone:
            _checks.check_choice("a constructor argument", argument, _ARGUMENTS)
        jamba = JambaBackbone(**backbone, dtype=dtype, name="backbone")
        d_model = jamba.get_config()["d_model"]
        encoder = _STEMS[stem](d_model, downsample, dtype=dtype, name="encoder")
        if tokens == "frames":
            tokenizer = FrameTokens(d_model, dtype=dtype, name="tokens")
        else:
            tokenizer = GridTokens(scan_order, dtype=dtype, name="tokens")
        reader = _READOUTS[readout](dtype=dtype, name="readout")
        head = keras.layers.Dense(num_classes, dtype="float32", name="head")

        # Functional model
        images = keras.Input(image_shape, name="images")
        super().__init__(images, head(reader(jamba(tokenizer(encoder(images))))), name=name)
        # A functional model has the global policy: `compile` would not scale the loss of one in float16.
        self.dtype_policy = jamba.dtype_policy

        # Config
        self.encoder, self.tokens, self.backbone, self.readout, self.head = encoder, tokenizer, jamba, reader, head
        self.block_pattern = jamba.block_pattern
        self._config = {
            "num_classes": num_classes,
            "image_shape": image_shape,
            "tokens": tokens,
            "downsample": downsample,
            "stem": stem,
            "scan_order": scan_order,
            "readout": readout,
            **jamba.get_config(),
        }
        self._watch_routing()

    def __call__(self, images, training=None, mask=None):
        self.check_images(images)
        return super().__call__(images, training=training, mask=mask)

    def check_images(self, images):
        """Raises a ValueError for images that a call would not take."""
        self._check_images(images, self._config["image_shape"], _AXES[self._config["tokens"]])

    def _check_images(self, images, expected, axes):
        shape = tuple(getattr(images, "shape", ()))
        fits = len(shape) == 1 + len(axes) and all(
            wanted is None or size in (None, wanted) for size, wanted in zip(shape[1:], expected, strict=True)
        )
        if not fits:
            letters = ", ".join(axes)
            raise ValueError(
                f"images must be one tensor of shape (b, {letters}) with ({letters}) = {expected}. "
                f"Received: shape={shape}, {type(images).__name__}. Resize the images, add the axis that "
                "is missing, or build the model with another image_shape."
            )
        _checks.check_floating({"images": images})

    def init_cache(self, batch_size, max_frames=None):
        """The state of a stream before its first frame, for `step`.

        Args:
            batch_size: streams b.
            max_frames: the most frames of a stream; needed where there is attention without a window. Of a
                backbone with `attention_window`, or without attention, the state has one size for ever.

        Returns:
            `{"backbone": ..., "readout": ...}`, nested dicts of tensors.

        Raises:
            ValueError: for a model of images, a bidirectional one, or without a max_frames that is needed.
        """
        self._check_streams()
        room = None
        if self._config["attention_window"] is None and any(mixer == "attention" for mixer, _ in self.block_pattern):
            _checks.check_integer("max_frames", max_frames)
            room = max_frames * self._tokens_of_a_frame()
        return {
            "backbone": self.backbone.init_cache(batch_size, room),
            "readout": self.readout.init_cache(batch_size, self._config["d_model"]),
        }

    def step(self, frame, cache):
        """One more frame of a stream.

        Args:
            frame: `(b, H, W, C)`, values from 0 to 1.
            cache: what `init_cache` or an earlier step returned. It is not changed.

        Returns:
            `(logits, cache)`: what a call on the clip of all frames so far returns, `(b, num_classes)`, for the cost of
            one frame, without gradients from frame to frame. Nothing else of the model changes: `jax.jit`,
            `tf.function` or `torch.no_grad` may be put around it. More than max_frames frames are refused on a CPU
            outside of compiled functions; inside, the oldest make way, and logits are no longer the clip's.

        Raises:
            ValueError: for a model without streams, a frame of another shape, or a cache of another model or batch.
        """
        self._check_streams()
        self._check_images(frame, self._config["image_shape"][1:], "HWC")
        have = sorted(cache) if isinstance(cache, dict) else type(cache).__name__
        if have != ["backbone", "readout"]:
            raise ValueError(
                f"cache must be a dict with backbone and readout. Received: {have}. "
                "Pass what init_cache or step of the same model returned."
            )
        frame = ops.cast(frame, self.compute_dtype)
        tokens = self.tokens(self.encoder(frame[:, None], training=False))
        features, backbone = self.backbone.step(tokens, cache["backbone"])
        pooled, readout = self.readout.step(features, cache["readout"])
        # On PyTorch the state would otherwise keep all frames before for a gradient.
        return self.head(pooled), detach_state({"backbone": backbone, "readout": readout})

    def _tokens_of_a_frame(self):
        grid = self.encoder.compute_output_shape((1, 1, *self.input_shape[2:]))
        tokens = self.tokens.compute_output_shape(grid)[1]
        if tokens is None:
            raise ValueError(
                "Room for frames can be made only where their size is known. Received: image_shape="
                f"{self._config['image_shape']}. Build the model with H and W, or with an attention_window."
            )
        return tokens

    def _check_streams(self):
        if self._config["tokens"] == "grid" or self._config["direction"] != "causal":
            raise ValueError(
                "Only a causal model of clips can go on frame by frame. Received: "
                f"tokens={self._config['tokens']!r}, direction={self._config['direction']!r}. "
                "Build it with tokens='frames' or 'grid+frames', and direction='causal'."
            )

    def extract_features(self, images):
        """What the parts of the model make of images.

        Args:
            images: `(b, H, W, C)`, values from 0 to 1.

        Returns:
            A dict of tensors: `"spatial"`, the encoder's grid `(b, H', W', d)`, of clips `(b, T, H', W', d)`;
            `"tokens"`, what enters the first block, `(b, t, d)`; `"block_0"`, `"block_1"`, ..., the sequence after
            each block `(b, t, d)`; `"pooled"`, what the head classifies, `(b, d)`; and `"routing"`, what the routers
            decided, `{"block_1": what MoELayer returns, ...}`.
        """
        spatial = self.encoder(ops.convert_to_tensor(images), training=False)
        tokens = self.tokens(spatial)
        blocks, routing = self.backbone.block_outputs(tokens)
        pooled = self.readout(self.backbone.final_norm(blocks[-1]))
        named = {f"block_{i}": block for i, block in enumerate(blocks)}
        return {"spatial": spatial, "tokens": tokens, **named, "pooled": pooled, "routing": routing}

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
            **overrides: constructor arguments that replace the preset's. With another num_classes all but the
                head is loaded; any sizes in image_shape fit the weights.

        Returns:
            The model. Where the preset has no weights it starts from random ones, and says so.

        Raises:
            ValueError: if the preset is unknown or damaged, an override unknown, or the weights do not fit
                the model that the overrides ask for.

        Example:
            ```python
            model = DHCJamba.from_preset("digits", num_classes=5)  # another task, the same body
            model.encoder.trainable = model.backbone.trainable = False
            ```
        """
        return presets.build(cls, preset, load_weights, overrides, head=("num_classes",))

    def save_to_preset(self, folder):
        """Writes configuration and weights to a folder that does not exist yet or is empty.

        The folder appears whole or not at all.

        Raises:
            ValueError: if the folder exists and holds anything.
        """
        self._check_is_as_configured()
        presets.write(self, folder)


_ARGUMENTS = tuple(name for name in inspect.signature(DHCJamba.__init__).parameters if name not in ("self", "backbone"))
_ARGUMENTS += _BACKBONE_ARGUMENTS


def _checked_image_shape(image_shape, tokens):
    shape = tuple(image_shape) if isinstance(image_shape, (tuple, list)) else (image_shape,)
    axes = _AXES[tokens]
    good = len(shape) == len(axes) and shape[-1] is not None
    good = good and all(s is None or (isinstance(s, numbers.Integral) and s > 0) for s in shape)
    if good and not any(isinstance(s, bool) for s in shape):
        return tuple(s if s is None else int(s) for s in shape)
    if len(shape) in (3, 4) and len(shape) != len(axes):
        remedy = "tokens='frames' or 'grid+frames' for clips" if len(shape) == 4 else "tokens='grid' for images"
    else:
        remedy = "for example (32, 32, 3), or (16, 32, 32, 3) for clips of 16 frames"
    raise ValueError(
        f"With tokens={tokens!r} image_shape must be ({', '.join(axes)}), positive integers, where all but C may be "
        f"None. Received: image_shape={image_shape!r}. Pass {remedy}."
    )
