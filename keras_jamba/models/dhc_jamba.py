"""The classifier of images and clips: encoder, tokens, Jamba, readout and head."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, Self

import keras
from keras import ops

from keras_jamba import _backend, presets
from keras_jamba._typing import DType, PathLike, Tensor, Tensors
from keras_jamba.layers import (
    FrameTokens,
    GridTokens,
    LastReadout,
    MeanReadout,
    PatchEncoder,
    ResidualEncoder,
    SequencePooling,
    SpatialEncoder,
    detach_state,
)
from keras_jamba.models._backbone_config import BACKBONE_ARGUMENTS, check_sizes
from keras_jamba.models._class_names import ClassNamesModel, checked_class_names
from keras_jamba.models._images import (
    AXES,
    check_shape_and_dtype,
    check_values,
    checked_image_shape,
    checked_pixel_range,
    values_are_checked,
    warn_of_scaled_images,
)
from keras_jamba.models._label_checks import check_labels
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks

_STEMS = {"conv": SpatialEncoder, "patchify": PatchEncoder, "residual": ResidualEncoder}
_READOUTS = {"mean": MeanReadout, "last": LastReadout, "seqpool": SequencePooling}


@keras.saving.register_keras_serializable(package="keras_jamba")
class DHCJamba(ClassNamesModel, keras.Model):
    """A classifier of images or clips: image encoder, tokens, Jamba backbone, readout and linear head.

    The name is that of the design document of the project, which does not expand "DHC".

    An image becomes a grid of `ceil(H / downsample) * ceil(W / downsample)` tokens. The frames of a clip are encoded in
    one batch, and each frame becomes one token or a grid of tokens. `step` classifies a stream frame by frame: after
    each frame, the logits are those of the clip so far. Compile with a loss that takes logits:
    `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`.

    Args:
        num_classes: number of classes.
        image_shape: `(H, W, C)` of images or `(T, H, W, C)` of clips, channels last. T, H and W may be None, for any
            number of frames and images of any size.
        tokens: "grid", one token per cell of an image's grid. For clips, "frames", one token per frame (`FrameTokens`),
            or "grid+frames", one token per cell of every frame.
        downsample: side of a token's cell in pixels; a power of two, except for the stem "patchify".
        stem: "conv", a small CNN (`SpatialEncoder`); "residual", a deep one (`ResidualEncoder`); or "patchify", one
            projection (`PatchEncoder`).
        stem_blocks: residual blocks per stage of the stem "residual"; 1 for the others, which have none.
        scan_order: "row" or "snake", the order of the cells of a grid; see `GridTokens`.
        readout: "mean" or "last" token, or "seqpool", a mean with learned weights (`SequencePooling`).
        pixel_range: range of the pixel values. `(0, 1)` takes floats. `(0, 255)` takes integers or floats, which the
            model divides by 255. None takes floats and does not check their values.
        class_names: names of the classes, a sequence of `num_classes` distinct strings; or None. `fit` copies them from
            data with an attribute `class_names`, such as `training.ImageFolder`.
        **backbone: any argument of `JambaBackbone`, for example d_model, num_layers, direction and mixer.

    Call arguments:
        images: ONE tensor `(b, H, W, C)` or `(b, T, H, W, C)` with values in `pixel_range`. Floats may exceed the range
            by a tenth of its width, as augmentation does. Integers need `pixel_range=(0, 255)`. Shape and dtype are
            always checked. Values are checked where the host can read them, outside of compiled functions: in a call,
            in the first batch of `fit`, `evaluate` and `predict`, and in every batch of `train_on_batch` and the like.

    Returns:
        ONE float32 tensor of logits `(b, num_classes)`, without softmax.

    Raises:
        ValueError: for arguments out of range or unknown; for images of another shape, dtype or range; for labels that
            do not fit the loss or the classes; and in `compile` for a loss of probabilities.

    Example:
        >>> import keras_jamba
        >>> photos = keras_jamba.DHCJamba.from_preset("small", pixel_range=(0, 255))  # trained, takes uint8
        >>> model = keras_jamba.DHCJamba.from_preset("small", load_weights=False, image_shape=(64, 64, 3), downsample=4)
    """

    @_checks.python_numbers
    def __init__(
        self,
        num_classes: int = 10,
        image_shape: Sequence[int | None] = (32, 32, 3),
        tokens: Literal["grid", "frames", "grid+frames"] = "grid",
        downsample: int = 4,
        stem: Literal["conv", "residual", "patchify"] = "conv",
        stem_blocks: int = 1,
        scan_order: Literal["row", "snake"] = "row",
        readout: Literal["mean", "last", "seqpool"] = "mean",
        pixel_range: Sequence[float] | None = (0, 1),
        class_names: Sequence[str] | None = None,
        dtype: DType | None = None,
        name: str | None = None,
        **backbone: Any,
    ) -> None:
        # Layers
        _checks.check_integer("num_classes", num_classes)
        _checks.check_choice("tokens", tokens, tuple(AXES))
        _checks.check_choice("stem", stem, tuple(_STEMS))
        _checks.check_choice("readout", readout, tuple(_READOUTS))
        _checks.check_integer("stem_blocks", stem_blocks)
        if stem_blocks != 1 and stem != "residual":
            raise ValueError(
                f"Only the stem 'residual' has blocks. Received: stem_blocks={stem_blocks} with stem={stem!r}. Pass "
                "stem='residual', or leave stem_blocks out."
            )
        _checks.check_choice("scan_order", scan_order, ("row", "snake") if tokens != "frames" else ("row",))
        image_shape = checked_image_shape(image_shape, tokens)
        pixel_range = checked_pixel_range(pixel_range)
        class_names = checked_class_names(class_names, num_classes)
        for argument in backbone:
            _checks.check_choice("a constructor argument", argument, _ARGUMENTS)
        jamba = JambaBackbone(**backbone, dtype=dtype, name="backbone")
        d_model = jamba.constructor_arguments()["d_model"]
        depth = {"blocks": stem_blocks} if stem == "residual" else {}
        encoder = _STEMS[stem](d_model, downsample, **depth, dtype=dtype, name="encoder")
        if tokens == "frames":
            tokenizer = FrameTokens(d_model, dtype=dtype, name="tokens")
        else:
            tokenizer = GridTokens(scan_order, dtype=dtype, name="tokens")
        reader = _READOUTS[readout](dtype=dtype, name="readout")
        head = keras.layers.Dense(num_classes, dtype="float32", name="head")
        rescaling = None
        if pixel_range == (0, 255):
            rescaling = keras.layers.Rescaling(1 / 255, dtype="float32", name="rescaling")

        # Functional model
        images = keras.Input(image_shape, name="images")
        _, embedded = _grid_and_tokens(images, rescaling, encoder, tokenizer)
        super().__init__(images, head(reader(jamba(embedded))), name=name)
        # A functional model has the global policy, with which `compile` would not scale a float16 loss.
        self.dtype_policy = jamba.dtype_policy

        # Config
        self.encoder, self.tokens, self.backbone, self.readout, self.head = encoder, tokenizer, jamba, reader, head
        self.rescaling, self.block_pattern = rescaling, jamba.block_pattern
        self._warned_of_scaled_images = False
        self._config = {
            "num_classes": num_classes,
            "image_shape": image_shape,
            "tokens": tokens,
            "downsample": downsample,
            "stem": stem,
            "stem_blocks": stem_blocks,
            "scan_order": scan_order,
            "readout": readout,
            "pixel_range": pixel_range,
            "class_names": class_names,
            **jamba.constructor_arguments(),
        }
        self._add_routing_metrics()

    @property
    def pixel_range(self) -> tuple[int, int] | None:
        """The argument `pixel_range`: (0, 1), (0, 255) or None."""
        return self._config["pixel_range"]

    def __call__(self, images: Tensor, training: bool | None = None, mask: Tensors | None = None) -> Tensor:
        # This check precedes Keras' conversion and shape check, which raise other errors.
        self._check_images(images, values=not self._inside_step)
        return super().__call__(images, training=training, mask=mask)

    def call(self, images: Tensor, training: bool | None = None, mask: Tensors | None = None) -> Tensor:
        # Steps on JAX do not run `__call__`.
        self._check_images(images, values=False)
        images = _backend.tensors.ensure_shape(images, (None, *self._config["image_shape"]))
        return super().call(images, training=training, mask=mask)

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images that a call refuses."""
        self._check_images(images)

    def check_batch(self, x: Tensors, y: Tensors | None = None, sample_weight: Tensors | None = None) -> None:
        """Raises ValueError for a batch of images and labels that does not fit the model and its loss."""
        self.check_images(x)
        if y is not None:
            check_labels(y, self.loss, (x.shape[0], self._config["num_classes"]), sample_weight)

    def _check_images(self, images, values=True, frame=False):
        """Checks images, or with `frame` one frame per stream: shape and dtype, and values the host can read."""
        expected, axes = self._config["image_shape"], AXES[self._config["tokens"]]
        if frame:
            expected, axes = expected[1:], axes[1:]
        check_shape_and_dtype(images, expected, axes, self.pixel_range)
        if values and values_are_checked() and check_values(images, self.pixel_range):
            if not self._warned_of_scaled_images:
                self._warned_of_scaled_images = True
                warn_of_scaled_images(self.pixel_range)

    def _features(self, images):
        """Returns `(grid (b, H', W', d), tokens (b, t, d))` of images, in inference."""
        # On PyTorch this also moves the images to the default device.
        images = ops.convert_to_tensor(images)
        return _grid_and_tokens(images, self.rescaling, self.encoder, self.tokens, training=False)

    def embed(self, images: Tensor) -> Tensor:
        """Returns the inputs `(b, t, d)` of the backbone for images, in inference."""
        return self._features(images)[1]

    def init_cache(self, batch_size: int, max_frames: int | None = None) -> dict[str, Tensors]:
        """Returns the state of a stream before its first frame, for `step`.

        Args:
            batch_size: number of streams b.
            max_frames: the most frames of a stream; required for attention without a window. With `attention_window`,
                or without attention, the state has a constant size.

        Returns:
            `{"backbone": ..., "readout": ...}`, nested dicts of tensors.

        Raises:
            ValueError: for a model of images, for a bidirectional model, and for a missing max_frames.
        """
        self._check_can_stream()
        capacity = None
        if self._config["attention_window"] is None and any(mixer == "attention" for mixer, _ in self.block_pattern):
            _checks.check_integer("max_frames", max_frames)
            capacity = max_frames * self._tokens_per_frame()
        return {
            "backbone": self.backbone.init_cache(batch_size, capacity),
            "readout": self.readout.init_cache(batch_size, self._config["d_model"]),
        }

    def step(
        self, frame: Tensor, cache: dict[str, Tensors], reset_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensors]]:
        """Classifies a stream after one more frame.

        Args:
            frame: `(b, H, W, C)`, values in `pixel_range`.
            cache: the result of `init_cache` or of an earlier step. It is not changed.
            reset_mask: `(b,)` bool or None: True where this frame is the first frame of a new stream.

        Returns:
            `(logits, cache)`. The logits `(b, num_classes)` equal those of a call on the clip of all frames so far, at
            the cost of one frame and without gradients between frames. No other part of the model changes: `jax.jit`,
            `tf.function` or `torch.no_grad` may wrap this method. More than max_frames frames raise an error on a CPU
            outside of compiled functions; elsewhere the logits of the stream are NaN from there on.

        Raises:
            ValueError: for a model without streams, a frame of another shape, dtype or range, or a cache of another
                model or batch.
        """
        self._check_can_stream()
        self._check_images(frame, frame=True)
        have = sorted(cache) if isinstance(cache, dict) else type(cache).__name__
        if have != ["backbone", "readout"]:
            raise ValueError(
                f"cache must be a dict with backbone and readout. Received: {have}. "
                "Pass what init_cache or step of the same model returned."
            )
        frame = _backend.tensors.ensure_shape(frame, (None, *self._config["image_shape"][1:]))
        tokens, readout, token_reset_mask = self.embed(frame[:, None]), cache["readout"], None
        if reset_mask is not None:
            token_reset_mask, readout = self._reset_rows(reset_mask, tokens, readout)
        features, backbone = self.backbone.step(tokens, cache["backbone"], reset_mask=token_reset_mask)
        pooled, readout = self.readout.step(features, readout)
        # On PyTorch, an attached state would keep all earlier frames for the gradient.
        return self.head(pooled), detach_state({"backbone": backbone, "readout": readout})

    def _reset_rows(self, reset_mask, tokens, readout):
        """Returns the reset mask `(b, t)` of a frame's tokens, and the readout's state, cleared in reset rows."""
        reset_mask = ops.convert_to_tensor(reset_mask)
        _checks.check_shapes({"tokens": tokens, "reset_mask": reset_mask}, {"tokens": "btd", "reset_mask": "b"})
        rows = ops.cast(reset_mask, "bool")
        batch, count, width = tokens.shape
        first = ops.arange(count, dtype="int32") == 0
        empty = self.readout.init_cache(batch, width)
        wide = lambda x: ops.reshape(rows, (-1, *(1 for _ in x.shape[1:])))  # noqa: E731
        readout = {name: ops.where(wide(x), empty[name], x) for name, x in readout.items()}
        return ops.logical_and(rows[:, None], first[None]), readout

    def _tokens_per_frame(self):
        """Returns the number of tokens per frame; raises ValueError if the frame size is unknown."""
        grid = self.encoder.compute_output_shape((1, 1, *self.input_shape[2:]))
        tokens = self.tokens.compute_output_shape(grid)[1]
        if tokens is None:
            raise ValueError(
                "The capacity of a stream can be computed only if the frame size is known. Received: image_shape="
                f"{self._config['image_shape']}. Build the model with H and W, or with an attention_window."
            )
        return tokens

    def _check_can_stream(self):
        """Raises ValueError unless the model is causal and takes clips."""
        if self._config["tokens"] == "grid" or self._config["direction"] != "causal":
            raise ValueError(
                "Only a causal model of clips can classify a stream frame by frame. Received: "
                f"tokens={self._config['tokens']!r}, direction={self._config['direction']!r}. "
                "Build it with tokens='frames' or 'grid+frames', and direction='causal'."
            )

    def extract_features(self, images: Tensor) -> dict[str, Tensors]:
        """Returns the outputs of each part of the model.

        Args:
            images: see a call.

        Returns:
            A dict of tensors. `"spatial"` is the encoder's grid, `(b, H', W', d)`, or `(b, T, H', W', d)` for clips.
            `"tokens"` `(b, t, d)` are the inputs of the first block. `"block_0"`, `"block_1"`, ... `(b, t, d)` are the
            outputs of each block. `"pooled"` `(b, d)` is the input of the head. `"routing"` is `{"block_1": routing as
            MoELayer returns it, ...}`.

        Raises:
            ValueError: for images that a call refuses.
        """
        self.check_images(images)
        spatial, tokens = self._features(images)
        blocks, routing = self.backbone.block_outputs(tokens)
        pooled = self.readout(self.backbone.final_norm(blocks[-1]))
        named = {f"block_{i}": block for i, block in enumerate(blocks)}
        return {"spatial": spatial, "tokens": tokens, **named, "pooled": pooled, "routing": routing}

    @classmethod
    def from_preset(cls, preset: PathLike, load_weights: bool = True, **overrides: Any) -> Self:
        """Builds a model from a preset.

        Args:
            preset: a name in `keras_jamba.presets.list_presets()`, or a folder that `save_to_preset` wrote on any
                backend.
            load_weights: whether to load the preset's weights, if it has any.
            **overrides: constructor arguments that replace the preset's. With another num_classes, all weights except
                the head's are loaded, and the preset's class_names are dropped. The weights load for any sizes in
                image_shape and any pixel_range. For images much larger than the preset's the accuracy falls.

        Returns:
            The model. If the preset has no weights, the model starts from random weights and logs a message.

        Raises:
            ValueError: if the preset is unknown or damaged, if an override is unknown, or if the weights do not fit the
                model of the overrides.

        Example:
            ```python
            model = DHCJamba.from_preset("digits", num_classes=5)  # new task, same encoder and backbone
            model.encoder.trainable = model.backbone.trainable = False
            ```
        """
        if overrides.get("stem", "residual") != "residual":
            overrides.setdefault("stem_blocks", 1)
        head = dict(head=("num_classes",), head_only=("class_names",))
        return presets.build(cls, preset, load_weights, overrides, check_sizes, **head)

    def save_to_preset(self, folder: PathLike, weights_dtype: Literal["float16", "float32"] | None = None) -> None:
        """Writes configuration and weights to a folder that is new or empty.

        Args:
            folder: a path. The folder appears completely or not at all.
            weights_dtype: dtype of the floats in the file: "float16", which halves the file and rounds, numbers below
                6e-8 to zero; "float32"; or None, which keeps the dtype of the variables. A loaded model has the dtype
                of its policy in all cases.

        Raises:
            ValueError: if the folder is not empty, the model has adapters, or a weight is too large for the dtype.
        """
        self._check_has_no_adapters()
        self._check_quantization_matches_config()
        presets.write(self, folder, weights_dtype)


def _grid_and_tokens(images, rescaling, encoder, tokens, **given):
    """Returns the encoder's grid of images, and the tokens for the backbone."""
    pixels = images if rescaling is None else rescaling(images)
    grid = encoder(pixels, **given)
    return grid, tokens(grid)


_ARGUMENTS = tuple(name for name in inspect.signature(DHCJamba.__init__).parameters if name not in ("self", "backbone"))
_ARGUMENTS += BACKBONE_ARGUMENTS
