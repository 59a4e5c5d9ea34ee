"""Figures of pictures and maps in rows of panels. matplotlib is imported only to draw."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

import numpy as np

from keras_jamba import _files

# Inches along the longer side of a panel.
SIDE = 2.1


class Scale:
    """A colour scale for the values of some maps, with the label of its colour bar.

    Args:
        label: label of the bar.
        values: all values that the scale must cover.
        kind: "positive", from 0 up; "signed", with white at 0; or "logarithm", with white for exact zeros.
    """

    def __init__(self, label, values, kind):
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm, Normalize

        top = float(np.abs(values).max()) or 1.0
        self.label = label
        self.norm = {
            "positive": lambda: Normalize(0, top),
            "signed": lambda: Normalize(-top, top),
            "logarithm": lambda: LogNorm(top * 1e-6, top, clip=True),
        }[kind]()
        self.colours = colormaps["RdBu_r" if kind == "signed" else "inferno"].with_extremes(bad="white")
        self.masked = kind == "logarithm"


@dataclass
class Strip:
    """The panels of one image (one panel) or clip (one panel per frame), which show pictures, maps or both.

    Args:
        title: title of the panel, or of a clip's panels at their left.
        frames: pictures `(T, H, W, C)`, or None if there are maps.
        maps: maps `(T, H', W')`, or None.
        scale: the maps' `Scale`.
        size: `(h, w)`, pixels per map value.
        shown: `(H, W)`, pixels of the image, which crops cells that reach beyond it. None does not crop.
        boxes: `{frame: (top, left, height, width)}`, marked rectangles.
        path: `{frame: (numbers, x, y)}`, points that are joined and numbered.
        axes: the names of the two axes. None hides the axes.
    """

    title: str
    frames: np.ndarray | None = None
    maps: np.ndarray | None = None
    scale: Scale | None = None
    size: tuple = (1, 1)
    shown: tuple | None = None
    boxes: dict = field(default_factory=dict)
    path: dict = field(default_factory=dict)
    axes: tuple | None = None

    def __len__(self):
        return len(self.maps if self.frames is None else self.frames)


def needs_matplotlib():
    """Raises an ImportError that names the extra if matplotlib is absent."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib. Received: an environment without it. "
            "Install it: pip install 'keras-jamba[visualize]'"
        ) from error


def draw_strips(groups, file, side=SIDE):
    """Draws one group of strips per image: side by side for images, one below the other for clips."""
    clips = len(groups[0][0]) > 1
    rows = [[(strip, f) for f in range(len(strip))] for strips in groups for strip in strips]
    if not clips:
        rows = [[(strip, 0) for strip in strips] for strips in groups]
    side = 0.65 * side if clips else side
    figure, panels = _panels(len(rows), len(rows[0]), side, rows[0][0][0])
    for number, (row, axes) in enumerate(zip(rows, panels, strict=True)):
        drawn = {}
        for axis, (strip, frame) in zip(axes, row, strict=True):
            _draw_panel(axis, strip, frame, drawn)
            if not clips:
                axis.set_title(fill(strip.title, 28), fontsize=9)
            elif number == 0:
                axis.set_title(f"frame {frame}", fontsize=9)
        if clips:
            _name_row(axes[0], fill(row[0][0].title, 18))
        for scale, (image, where) in drawn.items():
            figure.colorbar(image, ax=where, label=scale.label, shrink=0.9)
    return _finished(figure, file)


def draw_bars(clips, values, titles, names, label, file):
    """Draws the frames of each clip, with one bar per frame below them."""
    figure, panels = _panels(2 * len(clips), clips.shape[1], 0.65 * SIDE, Strip("", clips[0]))
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    margin = 0.05 * (high - low) or 1.0
    for i, frames in enumerate(clips):
        _name_row(panels[2 * i][0], fill(titles[i], 18))
        _name_row(panels[2 * i + 1][0], fill(f"{label}, {names[i]}", 18))
        for t, (above, below) in enumerate(zip(panels[2 * i], panels[2 * i + 1], strict=True)):
            _draw_panel(above, Strip("", frames), t, {})
            above.set_title(f"frame {t}", fontsize=9)
            value = float(values[i, t])
            below.bar([0], [value], color="tab:red" if value > 0 else "tab:blue")
            below.axhline(0, color="black", linewidth=0.8)
            below.set(xlim=(-0.6, 0.6), ylim=(low - margin, high + margin), xticks=[], xlabel=f"{value:.2g}")
            below.tick_params(labelleft=t == 0, labelsize=8)
            below.set_box_aspect(1)
    return _finished(figure, file)


def _panels(rows, columns, side, strip):
    from matplotlib.figure import Figure

    # Not pyplot, which keeps every figure until it is closed.
    height, width = strip.frames.shape[1:3] if strip.frames is not None else strip.maps.shape[1:]
    longer = max(height, width)
    # Leaves space for titles and bars. The layout removes surplus space between panels.
    size = (columns * side * width / longer + 2.4, rows * (side * height / longer + 0.35) + 0.3)
    figure = Figure(figsize=size, layout="compressed")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_panel(axis, strip, frame, drawn):
    """Draws one panel, and adds its map to `drawn`, `{scale: (image, axes)}`."""
    if strip.frames is not None:
        _draw_image(axis, strip.frames[frame])
    if strip.maps is not None:
        values = strip.maps[frame]
        values = np.ma.masked_equal(values, 0) if strip.scale.masked else values
        (height, width), (h, w) = values.shape, strip.size
        image = axis.imshow(
            values,
            cmap=strip.scale.colours,
            norm=strip.scale.norm,
            extent=(-0.5, width * w - 0.5, height * h - 0.5, -0.5),
            interpolation="nearest",
        )
        drawn.setdefault(strip.scale, (image, []))[1].append(axis)
    if frame in strip.boxes:
        _draw_box(axis, *strip.boxes[frame])
    if frame in strip.path:
        _draw_path(axis, *strip.path[frame])
    if strip.shown is not None:
        # The last cells may reach beyond the image.
        height, width = strip.shown
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if strip.axes is None:
        axis.set(xticks=[], yticks=[])
    else:
        axis.set_xlabel(strip.axes[0], fontsize=8)
        axis.set_ylabel(strip.axes[1], fontsize=8)
        axis.tick_params(labelsize=7)


def _draw_image(axis, image):
    shown = image if image.shape[-1] == 3 else image.mean(axis=-1)
    axis.imshow(np.clip(shown, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _draw_box(axis, top, left, height, width):
    from matplotlib.patches import Rectangle

    for colour, line in (("black", 3.5), ("cyan", 1.8)):
        box = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, clip_on=False)
        box.set(edgecolor=colour, linewidth=line)
        axis.add_patch(box)


def _draw_path(axis, numbers, x, y):
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2.5, foreground="black")]
    for start, end in zip(zip(x, y, strict=True), zip(x[1:], y[1:], strict=False), strict=False):
        arrow = dict(arrowstyle="->", color="orange", linewidth=1.5, shrinkA=6, shrinkB=6)
        axis.annotate("", end, start, arrowprops=arrow)
    # More numbers would hide the path.
    shown = range(len(numbers)) if len(numbers) <= 64 else (0, len(numbers) - 1)
    for i in shown:
        axis.text(x[i], y[i], numbers[i], color="white", fontsize=8, ha="center", va="center", path_effects=edge)


def _name_row(axis, name):
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)


def _finished(figure, file):
    if isinstance(file, (str, os.PathLike)):
        file = Path(file)
        # matplotlib appends this suffix to a name without one.
        if not file.suffix:
            file = file.with_name(f"{file.name.rstrip('.')}.{figure.canvas.get_default_filetype()}")
        with _files.atomic_file(file) as staged:
            figure.savefig(staged, dpi=150)
    elif file is not None:
        figure.savefig(file, dpi=150)
    return figure
