"""Importance of pixels and frames for a class, by gradients and by occlusion."""

from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Array, PathLike, Tensor
from keras_jamba.models import DHCJamba
from keras_jamba.ops import _checks
from keras_jamba.visualize import _drawing
from keras_jamba.visualize._model import checked_classes, checked_images, frames_of, in_batches, logits_of, pure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def saliency(
    model: DHCJamba,
    images: Tensor,
    classes: int | Sequence[int] | Array | None = None,
    samples: int = 0,
    noise: float = 0.15,
    seed: int = 0,
    batch_size: int = 32,
) -> Array:
    """Computes saliency: the absolute gradient of a class's logit with respect to each pixel, summed over channels.

    Args:
        model: a `DHCJamba`.
        images: `(b, H, W, C)` or `(b, T, H, W, C)`.
        classes: an integer, or one per image; None takes the predicted classes.
        samples: noisy copies per image. Their gradients are averaged before the absolute value (SmoothGrad). 0 takes
            the gradient of the image itself, which is often noisy.
        noise: standard deviation of the noise, as a share of the image's range of values.
        seed: seed of the noise, which is the same on every backend.
        batch_size: images per call.

    Returns:
        `(b, H, W)` or `(b, T, H, W)` float32, never negative.

    Raises:
        ValueError: for images that the model does not take, a class that it does not have, or numbers out of range.

    Example:
        >>> maps = keras_jamba.visualize.saliency(model, images, samples=25)

    Reference:
        [Simonyan et al. (2014)](https://arxiv.org/abs/1312.6034),
        [Smilkov et al. (2017)](https://arxiv.org/abs/1706.03825).
    """
    images = checked_images(model, images)
    _checks.check_integer("samples", samples, at_least=0)
    _checks.check_number("noise", noise, low=0)
    targets = checked_classes(model, images, classes, batch_size)
    call = pure(
        model, lambda x, c: _backend.autodiff.input_gradient(lambda x: ops.sum(_score(model, x, c, "logit")), x)
    )
    axes = tuple(range(1, images.ndim))
    spread = noise * (images.max(axes, keepdims=True) - images.min(axes, keepdims=True))
    random = np.random.default_rng(seed)
    total = np.zeros_like(images)
    for _ in range(max(1, samples)):
        noisy = images + spread * random.standard_normal(images.shape, "float32") if samples else images
        total += in_batches(call, lambda i, x=noisy: (x[i], targets[i]), len(images), batch_size)
    return np.abs(total / max(1, samples)).sum(axis=-1)


def occlusion(
    model: DHCJamba,
    images: Tensor,
    size: int | Sequence[int],
    stride: int | None = None,
    classes: int | Sequence[int] | Array | None = None,
    fill: float | Sequence[float] | Array | None = None,
    score: Literal["probability", "logit"] = "probability",
    batch_size: int = 32,
) -> Array:
    """Computes occlusion: the fall of a class's score if a sliding window over the image is filled with one colour.

    Args:
        model: a `DHCJamba`.
        images: `(b, H, W, C)` or `(b, T, H, W, C)`. In a clip the window covers one frame at a time.
        size: side of the window in pixels, or `(height, width)`.
        stride: pixels between two windows, at most size; None is size. The last window of a row or column ends at the
            image's edge.
        classes: an integer, or one per image; None takes the predicted classes.
        fill: the colour, a number or one per channel; None is the mean colour of the image or clip.
        score: "probability" or "logit".
        batch_size: filled images per call.

    Returns:
        `(b, H, W)` or `(b, T, H, W)` float32, the mean fall per pixel over the windows that contain it. It is negative
        if the score rises.

    Raises:
        ValueError: for a window larger than the image, images that the model does not take, or a class that it does
            not have.

    Example:
        >>> maps = keras_jamba.visualize.occlusion(model, images, size=4, stride=2)

    Reference:
        [Zeiler and Fergus (2014)](https://arxiv.org/abs/1311.2901).
    """
    images = checked_images(model, images)
    rows, columns = _windows(size, stride, images.shape[-3:-1])
    windows: list[tuple[Any, ...]] = [(row, column) for row in rows for column in columns]
    if images.ndim == 5:
        windows = [(frame, *window) for frame in range(images.shape[1]) for window in windows]
    falls = _falls(model, images, windows, classes, fill, score, batch_size)
    total, count = np.zeros(images.shape[:-1], "float32"), np.zeros(images.shape[1:-1], "float32")
    for window, fall in zip(windows, falls.T, strict=True):
        count[window] += 1
        held = total[(slice(None), *window)]
        held += fall.reshape(-1, *(1 for _ in held.shape[1:]))
    return total / count


def frame_importance(
    model: DHCJamba,
    clips: Tensor,
    classes: int | Sequence[int] | Array | None = None,
    fill: float | Sequence[float] | Array | None = None,
    score: Literal["probability", "logit"] = "probability",
    batch_size: int = 32,
) -> Array:
    """Computes the fall of a class's score if a complete frame is filled with one colour.

    Args:
        model: a `DHCJamba` for clips.
        clips: `(b, T, H, W, C)`.
        classes, fill, score, batch_size: see `occlusion`.

    Returns:
        `(b, T)` float32, negative if the score rises.

    Raises:
        ValueError: for a model of images, clips that the model does not take, or a class that it does not have.

    Example:
        >>> most_important = keras_jamba.visualize.frame_importance(model, clips).argmax(axis=1)
    """
    clips = checked_images(model, clips)
    if clips.ndim != 5:
        raise ValueError(
            f"Only clips have frames. Received: a model with tokens={model.get_config()['tokens']!r}, of images. "
            "Call occlusion or saliency."
        )
    return _falls(model, clips, [(frame,) for frame in range(clips.shape[1])], classes, fill, score, batch_size)


def draw_saliency(
    model: DHCJamba,
    images: Tensor,
    classes: int | Sequence[int] | Array | None = None,
    names: Iterable[str] | None = None,
    file: PathLike | IO[bytes] | None = None,
    **options: Any,
) -> "Figure":
    """Draws `saliency` beside each image, or below the frames of each clip.

    Args:
        model, images, classes: see `saliency`.
        names: names of the classes; None takes the model's class_names, else their numbers.
        file: path or file of the picture, or None.
        **options: other arguments of `saliency`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: see `saliency`; for another number of names than of classes.
        ImportError: without matplotlib.

    Example:
        >>> figure = keras_jamba.visualize.draw_saliency(model, images[:4], samples=25, file="saliency.png")
    """
    return _draw_maps(saliency, "|gradient|", "positive", model, images, classes, names, file, options)


def draw_occlusion(
    model: DHCJamba,
    images: Tensor,
    size: int | Sequence[int],
    classes: int | Sequence[int] | Array | None = None,
    names: Iterable[str] | None = None,
    file: PathLike | IO[bytes] | None = None,
    **options: Any,
) -> "Figure":
    """Draws `occlusion` beside each image, or below the frames of each clip. Red pixels support the class.

    Args:
        model, images, size, classes: see `occlusion`.
        names, file: see `draw_saliency`.
        **options: other arguments of `occlusion`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: see `occlusion`; for another number of names than of classes.
        ImportError: without matplotlib.

    Example:
        >>> figure = keras_jamba.visualize.draw_occlusion(model, images[:4], size=4, stride=2, file="occlusion.png")
    """
    label = f"fall of the {options.get('score', 'probability')}\nwhen hidden"
    return _draw_maps(occlusion, label, "signed", model, images, classes, names, file, options | {"size": size})


def draw_frame_importance(
    model: DHCJamba,
    clips: Tensor,
    classes: int | Sequence[int] | Array | None = None,
    names: Iterable[str] | None = None,
    file: PathLike | IO[bytes] | None = None,
    **options: Any,
) -> "Figure":
    """Draws `frame_importance` as bars below the frames of each clip.

    Args:
        model, clips, classes: see `frame_importance`.
        names, file: see `draw_saliency`.
        **options: other arguments of `frame_importance`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: see `frame_importance`; for another number of names than of classes.
        ImportError: without matplotlib.

    Example:
        >>> figure = keras_jamba.visualize.draw_frame_importance(model, clips[:2], file="frames.png")
    """
    _drawing.needs_matplotlib()
    clips = checked_images(model, clips)
    classes, predicted, explained = _titles(model, clips, classes, names, options)
    falls = frame_importance(model, clips, classes, **options)
    label = f"fall of the {options.get('score', 'probability')} when hidden"
    return _drawing.draw_bars(frames_of(model, clips), falls, predicted, explained, label, file)


def _score(model, images, classes, score):
    """Returns the score `(b,)` of each image's class as a tensor."""
    logits = model(images, training=False)
    values = ops.softmax(logits) if score == "probability" else logits
    return ops.sum(values * ops.one_hot(classes, logits.shape[-1], dtype=logits.dtype), axis=-1)


def _falls(model, images, windows, classes, fill, score, batch_size):
    """Returns `(b, windows)`, the fall of the score of each image's class per filled window."""
    _checks.check_choice("score", score, ("probability", "logit"))
    colours = _colours(images, fill)
    classes = checked_classes(model, images, classes, batch_size)
    call = pure(model, lambda x, c: _score(model, x, c, score))

    def batch_of(index):
        # Per image: one copy per window, then the image itself.
        image, window = np.divmod(index, len(windows) + 1)
        copies = images[image]
        for copy, i, j in zip(copies, image, window, strict=True):
            if j < len(windows):
                copy[windows[j]] = colours[i]
        return copies, classes[image]

    scores = in_batches(call, batch_of, len(images) * (len(windows) + 1), batch_size).reshape(len(images), -1)
    return scores[:, -1:] - scores[:, :-1]


def _colours(images, fill):
    """Returns the fill colour of each image, `(b, C)`."""
    if fill is None:
        return images.mean(axis=tuple(range(1, images.ndim - 1)))
    colour = np.asarray(fill)
    channels = images.shape[-1]
    if colour.dtype.kind not in "iuf" or colour.shape not in ((), (channels,)):
        raise ValueError(
            f"fill must be None, a number, or one for each of the {channels} channels. Received: fill={fill!r}. "
            "None takes the mean colour of each image."
        )
    return np.broadcast_to(colour.astype("float32"), (len(images), channels))


def _windows(size, stride, sides):
    """Returns the windows along height and along width, each a list of slices."""
    sizes = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) != 2:
        raise ValueError(f"size must be an integer or two. Received: size={size!r}. Pass size=4 or size=(4, 2).")
    for part, side in zip(sizes, sides, strict=True):
        _checks.check_integer("size", part)
        if part > side:
            raise ValueError(
                f"A window must be no larger than the image, {sides[0]} x {sides[1]} pixels. "
                f"Received: size={size!r}. Pass a smaller one."
            )
    if stride is not None:
        _checks.check_integer("stride", stride)
        if stride > min(sizes):
            raise ValueError(
                "stride must be at most size: no pixel may be left out. "
                f"Received: stride={stride}, size={size!r}. Pass a smaller stride."
            )
    begins = [
        sorted({*range(0, side - part, stride or part), side - part}) for part, side in zip(sizes, sides, strict=True)
    ]
    return [[slice(begin, begin + part) for begin in some] for some, part in zip(begins, sizes, strict=True)]


def _titles(model, images, classes, names, options):
    """Returns the classes, the prediction of each image as text, and the name of each image's class."""
    count, batch_size = model.get_config()["num_classes"], options.get("batch_size", 32)
    if names is None:
        names = model.class_names or [f"class\xa0{i}" for i in range(count)]
    names = list(names)
    if len(names) != count:
        raise ValueError(
            f"There must be a name for each of the {count} classes. Received: names={names}. Pass {count} names."
        )
    logits = logits_of(model, images, batch_size)
    classes = logits.argmax(axis=-1) if classes is None else checked_classes(model, images, classes, batch_size)
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    odds /= odds.sum(axis=-1, keepdims=True)
    predicted = [f"predicted: {names[row.argmax()]}, {100 * row.max():.0f}\xa0%" for row in odds]
    return classes, predicted, [names[i] for i in classes]


def _draw_maps(function, label, kind, model, images, classes, names, file, options):
    _drawing.needs_matplotlib()
    images = checked_images(model, images)
    classes, predicted, explained = _titles(model, images, classes, names, options)
    maps = function(model, images, classes=classes, **options)
    maps = maps.reshape(len(images), -1, *maps.shape[-2:])
    groups = []
    for frames, strip, title, name in zip(frames_of(model, images), maps, predicted, explained, strict=True):
        scale = _drawing.Scale(label, strip, kind)
        shown = _drawing.Strip(f"{function.__name__}, {name}", maps=strip, scale=scale)
        groups.append([_drawing.Strip(title, frames), shown])
    return _drawing.draw_strips(groups, file)
