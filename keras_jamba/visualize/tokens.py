"""The cell of each token, and the order in which tokens are read."""

from typing import IO, TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_jamba._typing import Array, PathLike, Tensor
from keras_jamba.layers import FrameTokens
from keras_jamba.models import DHCJamba
from keras_jamba.visualize import _drawing
from keras_jamba.visualize._model import checked_images, frames_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def token_order(model: DHCJamba, images: Tensor) -> Array:
    """Returns the grid cell of each token, in the order of the model's own layer.

    Args:
        model: a `DHCJamba`.
        images: images or clips that the model takes. Their number and values have no effect.

    Returns:
        `(t, 2)` integers, row and column of each token's cell. For clips `(t, 3)`, frame, row and column, or `(t, 1)`,
        the frame, with `tokens="frames"`.

    Raises:
        ValueError: for a model that is no `DHCJamba`, or images of another shape.

    Example:
        >>> import numpy as np, keras_jamba
        >>> model = keras_jamba.DHCJamba(image_shape=(4, 4, 1), downsample=2, d_model=8, scan_order="snake")
        >>> keras_jamba.visualize.token_order(model, np.zeros((1, 4, 4, 1), "float32")).tolist()
        [[0, 0], [0, 1], [1, 1], [1, 0]]
    """
    images = checked_images(model, images)
    grid: tuple[Any, ...] = model.encoder.compute_output_shape((1, *images.shape[1:]))[1:-1]
    if isinstance(model.tokens, FrameTokens):
        return np.arange(grid[0])[:, None]
    # Integers: the layer would round floating-point numbers to its compute dtype.
    cells = np.arange(np.prod(grid), dtype="int32").reshape(1, *grid, 1)
    read = ops.convert_to_numpy(model.tokens(ops.convert_to_tensor(cells)))
    return np.stack(np.unravel_index(read.ravel(), grid), axis=-1)


def draw_token_order(model: DHCJamba, images: Tensor, file: PathLike | IO[bytes] | None = None) -> "Figure":
    """Draws the reading order of the cells and their token indices over the first image or clip.

    Args:
        model, images: see `token_order`.
        file: path or file of the picture, or None.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: see `token_order`.
        ImportError: without matplotlib.

    Example:
        >>> figure = keras_jamba.visualize.draw_token_order(model, images, file="order.png")
    """
    _drawing.needs_matplotlib()
    images = checked_images(model, images)
    cells = Cells(model, images)
    strip = _drawing.Strip("order of the tokens", frames_of(model, images)[0], path=cells.path())
    return _drawing.draw_strips([[strip]], file, side=2 * _drawing.SIDE)


class Cells:
    """The cells of the tokens of images or clips.

    Attributes:
        places: `(t, 3)`, frame, row and column of each token's cell.
        shape: the shape of the grid, `(T, H', W')`.
        size: `(h, w)`, pixels per cell.
    """

    def __init__(self, model, images):
        order = token_order(model, images)
        before, after = {2: (1, 0), 3: (0, 0), 1: (0, 2)}[order.shape[1]]
        self.places = np.pad(order, ((0, 0), (before, after)))
        self.shape = tuple(self.places.max(axis=0) + 1)
        side = model.get_config()["downsample"]
        self.size = images.shape[-3:-1] if order.shape[1] == 1 else (side, side)

    def to_grid(self, values):
        """Returns one value per token, `(t,)`, as a grid `(T, H', W')`."""
        grid = np.zeros(self.shape, values.dtype)
        grid[tuple(self.places.T)] = values
        return grid

    def box(self, token):
        """Returns the token's cell in pixels, `{frame: (top, left, height, width)}`."""
        frame, row, column = (int(x) for x in self.places[token])
        height, width = self.size
        return {frame: (row * height, column * width, height, width)}

    def name(self, token):
        """Returns a title with the token and its cell."""
        frame, row, column = (int(x) for x in self.places[token])
        parts = [f"frame\xa0{frame}"] if self.shape[0] > 1 else []
        parts += [f"row\xa0{row}, column\xa0{column}"] if self.shape[1:] != (1, 1) else []
        return f"token\xa0{token}" + (f" ({', '.join(parts)})" if parts else "")

    def path(self):
        """Returns `{frame: (token indices, x, y)}` in reading order, with the centres of the cells in pixels."""
        height, width = self.size
        x, y = (self.places[:, 2] + 0.5) * width - 0.5, (self.places[:, 1] + 0.5) * height - 0.5
        inside = {frame: np.flatnonzero(self.places[:, 0] == frame) for frame in range(self.shape[0])}
        return {frame: (numbers, x[numbers], y[numbers]) for frame, numbers in inside.items()}


def checked_token(model, images, token):
    """Returns a token's index from 0. None is the last of a causal model, which sees most, else the middle cell."""
    cells = Cells(model, images)
    count = len(cells.places)
    if token is None:
        middle = (cells.places == np.array(cells.shape) // 2).all(axis=1)
        return count - 1 if model.get_config()["direction"] == "causal" else int(middle.argmax())
    integer = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
    if not (integer and -count <= token < count):
        raise ValueError(
            f"token must be None or an integer from {-count} to {count - 1}: these images have {count} tokens. "
            f"Received: token={token!r}. `token_order` returns the cell of each token."
        )
    return int(token) % count
