"""The receptive field of a token, and the attention weights of each head."""

from typing import IO, TYPE_CHECKING

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Array, PathLike, Tensor
from keras_jamba.models import DHCJamba
from keras_jamba.ops import _checks
from keras_jamba.visualize import _drawing
from keras_jamba.visualize._model import checked_images, frames_of, in_batches, pure
from keras_jamba.visualize.tokens import Cells, checked_token

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def receptive_field(model: DHCJamba, images: Tensor, token: int | None = None, batch_size: int = 32) -> Array:
    """Computes the effective receptive field of one token.

    This is the absolute gradient of the sum of the token's features after the backbone's final norm. It is summed over
    channels and averaged over images.

    Args:
        model: a `DHCJamba`.
        images: `(b, H, W, C)` or `(b, T, H, W, C)`. More images lower the influence of a single one.
        token: index of the token, from the end if negative. `token_order` returns each token's cell. None takes the
            last token of a causal model, which sees most, and the middle cell of a bidirectional one.
        batch_size: images per call.

    Returns:
        `(H, W)` or `(T, H, W)` float32 with maximum 1. It is exactly 0 for pixels that the token does not see. In a
        causal model these are the pixels that only later tokens see.

    Raises:
        ValueError: for images that the model does not take, or a token out of range.

    Example:
        >>> field = keras_jamba.visualize.receptive_field(model, images, token=12)

    Reference:
        [Luo et al. (2016)](https://arxiv.org/abs/1701.04128).
    """
    images = checked_images(model, images)
    token = checked_token(model, images, token)

    def feature(x):
        tokens = model.backbone(model.embed(x), training=False)
        return ops.sum(ops.cast(tokens[:, token], "float32"))

    call = pure(model, lambda x: _backend.autodiff.input_gradient(feature, x))
    gradients = in_batches(call, lambda i: (images[i],), len(images), batch_size)
    field = np.abs(gradients).sum(axis=-1).mean(axis=0)
    return field / (field.max() or 1)


def attention_maps(model: DHCJamba, images: Tensor, batch_size: int = 32) -> dict[str, Array]:
    """Computes the attention weights between all tokens, in every block with attention.

    Args:
        model: a `DHCJamba`.
        images: `(b, H, W, C)` or `(b, T, H, W, C)`.
        batch_size: images per call.

    Returns:
        `{"block_7": (b, h, t, t), ...}` float32, queries before keys: every row sums to 1. `token_order` returns each
        token's cell.

    Raises:
        ValueError: for a model without attention or images that it does not take.

    Example:
        >>> maps = keras_jamba.visualize.attention_maps(model, images)
        >>> {name: weights.shape for name, weights in maps.items()}
        {'block_7': (4, 4, 64, 64)}

    Reference:
        [Vaswani et al. (2017)](https://arxiv.org/abs/1706.03762).
    """
    images = checked_images(model, images)
    if not any(mixer == "attention" for mixer, _ in model.block_pattern):
        raise ValueError(
            "There must be a block with attention. Received: a model whose mixers are "
            f"{[mixer for mixer, _ in model.block_pattern]}. Build it with a mamba_ratio below num_layers."
        )
    call = pure(model, lambda x: model.backbone.attention_weights(model.embed(x)))
    return in_batches(call, lambda i: (images[i],), len(images), batch_size)


def draw_receptive_field(
    model: DHCJamba,
    images: Tensor,
    token: int | None = None,
    file: PathLike | IO[bytes] | None = None,
    batch_size: int = 32,
) -> "Figure":
    """Draws `receptive_field` beside the first image, on a linear and a logarithmic scale. On the latter 0 is white.

    Args:
        model, images, token, batch_size: see `receptive_field`. A box marks the token's cell.
        file: path or file of the picture, or None.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: see `receptive_field`.
        ImportError: without matplotlib.

    Example:
        >>> figure = keras_jamba.visualize.draw_receptive_field(model, images, file="field.png")
    """
    _drawing.needs_matplotlib()
    images = checked_images(model, images)
    token, cells = checked_token(model, images, token), Cells(model, images)
    field = receptive_field(model, images, token, batch_size)
    field = field.reshape(-1, *field.shape[-2:])
    frames, box = frames_of(model, images)[0], cells.box(token)
    strips = [_drawing.Strip(cells.name(token), frames, boxes=box)]
    for title, kind in (("receptive field", "positive"), ("on a logarithmic scale, white:\xa00", "logarithm")):
        scale = _drawing.Scale("|gradient|", field, kind)
        strips.append(_drawing.Strip(title, maps=field, scale=scale, boxes=box))
    return _drawing.draw_strips([strips], file)


def draw_attention(
    model: DHCJamba,
    images: Tensor,
    token: int | None = None,
    block: str | None = None,
    file: PathLike | IO[bytes] | None = None,
    batch_size: int = 32,
) -> "Figure":
    """Draws the attention weights of one query on the grid, with one map per head, beside images or below clips.

    Args:
        model, images, batch_size: see `attention_maps`.
        token: the query, marked by a box; see `receptive_field`.
        block: a key of the dict that `attention_maps` returns; None is the last.
        file: path or file of the picture, or None.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: see `attention_maps`; for a token out of range or an unknown block.
        ImportError: without matplotlib.

    Example:
        >>> figure = keras_jamba.visualize.draw_attention(model, images[:2], token=12, file="attention.png")
    """
    _drawing.needs_matplotlib()
    images = checked_images(model, images)
    token, cells = checked_token(model, images, token), Cells(model, images)
    block, weights = _chosen(attention_maps(model, images, batch_size), block)
    box, groups = cells.box(token), []
    for frames, heads in zip(frames_of(model, images), weights[:, :, token], strict=True):
        scale = _drawing.Scale(f"weight in {block}", heads, "positive")
        strips = [_drawing.Strip(f"query: {cells.name(token)}", frames, boxes=box)]
        for i, head in enumerate(heads):
            grid = cells.to_grid(head)
            strips.append(_drawing.Strip(f"head {i}", None, grid, scale, cells.size, frames.shape[1:3], box))
        groups.append(strips)
    return _drawing.draw_strips(groups, file)


def draw_attention_matrices(
    model: DHCJamba,
    images: Tensor,
    block: str | None = None,
    file: PathLike | IO[bytes] | None = None,
    batch_size: int = 32,
) -> "Figure":
    """Draws all attention weights of a block, one row per image and one matrix per head, queries from top to bottom.

    Args:
        model, images, block, file, batch_size: see `draw_attention`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: see `attention_maps`; for an unknown block.
        ImportError: without matplotlib.

    Example:
        >>> figure = keras_jamba.visualize.draw_attention_matrices(model, images[:2], file="matrices.png")
    """
    _drawing.needs_matplotlib()
    images = checked_images(model, images)
    block, weights = _chosen(attention_maps(model, images, batch_size), block)
    groups = []
    for number, heads in enumerate(weights):
        scale = _drawing.Scale(f"weight in {block}", heads, "positive")
        titles = [f"image {number}, head {i}" for i in range(len(heads))]
        pairs = zip(titles, heads, strict=True)
        groups.append([_drawing.Strip(t, None, h[None], scale, axes=("token that is seen", "query")) for t, h in pairs])
    return _drawing.draw_strips(groups, file, side=1.4 * _drawing.SIDE)


def _chosen(maps, block):
    block = list(maps)[-1] if block is None else block
    _checks.check_choice("block", block, tuple(maps))
    return block, maps[block]
