"""The sizes of a model and of a run that the estimators need."""

import dataclasses
import inspect
import math
from dataclasses import dataclass

import keras

from keras_jamba.layers.router import router_from_config
from keras_jamba.layers.vision._convolution_encoder import check_power_of_two, residual_sizes, spatial_sizes
from keras_jamba.models import DHCJamba, JambaBackbone, JambaCausalLM
from keras_jamba.models._images import AXES, checked_image_shape
from keras_jamba.models._pattern import pattern_of
from keras_jamba.models.dhc_jamba import _READOUTS, _STEMS
from keras_jamba.ops import _checks

# Arguments of `DHCJamba` and `JambaCausalLM` without effect on costs.
_FREE = ("pixel_range", "class_names", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_config")
_LANGUAGE = ("vocab_size", "tie_embeddings")
_SIZES = (
    "d_model",
    "num_experts",
    "num_experts_per_token",
    "d_ff",
    "num_heads",
    "num_kv_heads",
    "d_state",
    "d_conv",
    "expand",
    "dt_rank",
)
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Image:
    """Arguments of `DHCJamba` that its backbone does not take."""

    num_classes: int
    image_shape: tuple
    tokens: str
    downsample: int
    stem: str
    stem_blocks: int
    scan_order: str
    readout: str


_IMAGE = tuple(field.name for field in dataclasses.fields(Image))


@dataclass(frozen=True)
class Plan:
    """Sizes of a model, named by the letters of `keras_jamba.ops`, and other arguments that determine costs.

    Attributes:
        pattern: one `(mixer, feed_forward)` per block.
        d, f, e, n, w, r, h, g, x: widths and counts. f is d_ff; the property c is d / h.
        chosen: experts per token.
        config: the backbone's arguments, including defaults.
        image: an `Image` or None.
        vocabulary: `(v, tied)` or None.
        dtype: the dtype policy, or None if not given.
    """

    pattern: tuple
    d: int
    f: int
    e: int
    n: int
    w: int
    r: int
    h: int
    g: int
    x: int
    chosen: int
    config: dict
    image: Image | None
    vocabulary: tuple | None
    dtype: object

    @property
    def c(self):
        return self.d // self.h

    @property
    def directions(self):
        """1 for a causal model, 2 for a bidirectional one."""
        return 1 if self.config["direction"] == "causal" else 2


def plan_of(model):
    """Returns the plan of a `JambaBackbone`, a `DHCJamba`, a `JambaCausalLM` or a dict of constructor arguments."""
    if isinstance(model, (JambaBackbone, DHCJamba)):
        given = model.constructor_arguments() | {"dtype": model.get_config()["dtype"]}
    elif isinstance(model, JambaCausalLM):
        known = {*_defaults(JambaBackbone), *_LANGUAGE}
        given = {name: value for name, value in model.get_config().items() if name in known}
    elif isinstance(model, dict):
        given = dict(model)
    else:
        raise ValueError(
            "model must be a JambaBackbone, a DHCJamba, a JambaCausalLM or a dict of constructor arguments. Received: "
            f"{type(model).__name__}. Pass for example dict(d_model=4096, num_layers=32, vocab_size=65536)."
        )
    given = {name: value for name, value in given.items() if name not in _FREE}
    backbone = _defaults(JambaBackbone)
    allowed = [*backbone, *_IMAGE, *_LANGUAGE]
    for name in given:
        _checks.check_choice("a constructor argument", name, allowed)
    image, vocabulary = _image_of(given), _vocabulary_of(given)
    if image and vocabulary:
        raise ValueError(
            "A model must read images or words. Received: "
            f"{sorted(set(given) & {*_IMAGE, *_LANGUAGE})}. Leave out the arguments of one of the two."
        )
    config = backbone | {name: value for name, value in given.items() if name in backbone}
    _checks.check_choice("direction", config["direction"], ("causal", "bidirectional"))
    dtype = config.pop("dtype")
    return Plan(**_letters(config), config=config, image=image, vocabulary=vocabulary, dtype=dtype)


def _defaults(cls):
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _image_of(given):
    if not set(given) & set(_IMAGE):
        return None
    defaults = _defaults(DHCJamba)
    image = Image(**{name: given.get(name, defaults[name]) for name in _IMAGE})
    _checks.check_integer("num_classes", image.num_classes)
    _checks.check_integer("downsample", image.downsample)
    _checks.check_integer("stem_blocks", image.stem_blocks)
    choices = dict(tokens=AXES, stem=_STEMS, scan_order=("row", "snake"), readout=_READOUTS)
    for name, allowed in choices.items():
        _checks.check_choice(name, getattr(image, name), tuple(allowed))
    if image.stem != "patchify":
        check_power_of_two(image.downsample)
    return dataclasses.replace(image, image_shape=checked_image_shape(image.image_shape, image.tokens))


def _vocabulary_of(given):
    if "vocab_size" not in given:
        if "tie_embeddings" in given:
            raise ValueError(
                "Only a language model has embeddings to tie. Received: tie_embeddings without vocab_size. "
                "Pass vocab_size too, or leave it out."
            )
        return None
    _checks.check_integer("vocab_size", given["vocab_size"])
    return given["vocab_size"], bool(given.get("tie_embeddings", False))


def _letters(config):
    pattern = pattern_of(config)
    for name in _SIZES:
        if config[name] is not None:
            # d_ff is 0 without a feed-forward part.
            _checks.check_integer(name, config[name], at_least=0 if name == "d_ff" else 1)
    router = config["router"]
    if isinstance(router, dict):
        router = router_from_config(router)
    d, h = config["d_model"], config["num_heads"]
    # A backbone without attention may have any number of heads.
    if d % h and any(mixer == "attention" for mixer, _ in pattern):
        raise ValueError(f"num_heads must divide d_model. Received: num_heads={h}, d_model={d}. Change one of the two.")
    return dict(
        pattern=pattern,
        d=d,
        f=config["d_ff"] or 4 * d,
        e=config["expand"] * d,
        n=config["d_state"],
        w=config["d_conv"],
        r=config["dt_rank"] or math.ceil(d / 16),
        h=h,
        g=config["num_kv_heads"] or h,
        x=router.num_experts if router else config["num_experts"],
        chosen=router.num_experts_per_token if router else config["num_experts_per_token"],
    )


@dataclass(frozen=True)
class Run:
    """Settings of a run of a model.

    Attributes:
        b, t: batch size, and tokens per sequence.
        stored, computed: bytes per number of the variable dtype and of the compute dtype.
        platform: "cpu", "gpu" or "tpu".
        scan, convolution: names of the implementations.
        grid: `[(height, width)]` of an image before and after each convolution of the encoder; empty without images.
        frames: images per clip; 1 without clips.
    """

    b: int
    t: int
    stored: int
    computed: int
    platform: str
    scan: str
    convolution: str
    grid: tuple = ()
    frames: int = 1

    @property
    def images(self):
        """Images in the batch."""
        return self.b * self.frames

    @property
    def cells(self):
        """Grid cells of all images in the batch."""
        return self.images * math.prod(self.grid[-1])

    @property
    def s(self):
        """Tokens in the batch."""
        return self.b * self.t

    @property
    def cast(self):
        """Whether float32 operations of a layer need a second copy of its inputs."""
        return self.computed < 4


def bytes_of(dtype):
    """Returns the bytes per number of a dtype."""
    dtype = keras.backend.standardize_dtype(dtype)
    _checks.check_choice("dtype", dtype, _BYTES)
    return _BYTES[dtype]


def encoder_convolutions(plan):
    """Returns `[(in channels, out channels, side of the kernel, stride)]` of the stem."""
    channels, downsample = plan.image.image_shape[-1], plan.image.downsample
    if plan.image.stem == "patchify":
        return [(channels, plan.d, downsample, downsample)]
    sizes = spatial_sizes(plan.d, downsample)
    if plan.image.stem == "residual":
        sizes = residual_sizes(plan.d, downsample, plan.image.stem_blocks)
    widths = [channels, *(width for width, _ in sizes)]
    return [(before, width, 3, stride) for before, (width, stride) in zip(widths, sizes, strict=False)]


def ends_residual_block(plan, i):
    """Returns whether the input of a residual block of the stem is added to the output of convolution i."""
    if plan.image.stem != "residual":
        return False
    place = i % (2 * plan.image.stem_blocks + 1)
    return place > 0 and place % 2 == 0


def sizes_of(plan, image_size):
    """Returns `(tokens, grid, frames)` of a model of images or clips: see `Run`."""
    shape, axes = plan.image.image_shape, AXES[plan.image.tokens][:-1]
    size = shape[:-1] if image_size is None else image_size
    letters = ", ".join(axes)
    example = (16, 224, 224)[-len(axes) :]
    if not isinstance(size, (tuple, list)) or len(size) != len(axes):
        raise ValueError(
            f"image_size must be ({letters}) with tokens={plan.image.tokens!r}. Received: image_size={image_size!r}. "
            f"Pass for example image_size={example}."
        )
    if None in size:
        raise ValueError(
            f"A model that takes images of any size needs image_size. Received: image_shape={shape}, "
            f"image_size={image_size!r}. Pass ({letters}), for example image_size={example}."
        )
    for axis, length in zip(axes, size, strict=True):
        _checks.check_integer(f"{axis} of image_size", length)
    *frames, height, width = size
    frames = frames[0] if frames else 1
    grid = [(height, width)]
    for *_, stride in encoder_convolutions(plan):
        grid.append(tuple(-(-pixels // stride) for pixels in grid[-1]))
    cells = 1 if plan.image.tokens == "frames" else math.prod(grid[-1])
    return frames * cells, tuple(grid), frames
