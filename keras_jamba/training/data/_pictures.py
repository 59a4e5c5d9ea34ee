"""Pictures and clips on disk: their paths, labels and pixels."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB"}


class Pictures:
    """A sequence of examples `(pixels, label)`, read on access.

    Args:
        paths: picture files or, for clips, folders of frames or animated files.
        labels: one integer per path.
        image_size: `(h, w)` in pixels.
        channels: 1 or 3.
        frames: frames T of a clip; None for pictures.
    """

    def __init__(self, paths, labels, image_size, channels, frames):
        self._paths, self._labels = paths, np.asarray(labels, "int32")
        self._size, self._mode, self._frames = image_size, MODES[channels], frames

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        path = self._paths[index]
        return self._pixels_of(path).astype("float32") / 255, self._labels[index]

    def only(self, indices):
        """Returns a new object with the examples at `indices` only."""
        chosen = copy.copy(self)
        chosen._paths, chosen._labels = [self._paths[i] for i in indices], self._labels[indices]
        return chosen

    def unreadable(self):
        """Reads every example and returns `{index: error}` of the unreadable ones."""

        def errors_from(begin):
            errors = {}
            for index in range(begin, min(begin + at_a_time, len(self))):
                try:
                    self._pixels_of(self._paths[index])
                except ValueError as error:
                    errors[index] = error
            return errors

        at_a_time = 64
        with ThreadPoolExecutor(thread_name_prefix="keras_jamba_pictures") as pool:
            found = list(pool.map(errors_from, range(0, len(self), at_a_time)))
        return {index: error for errors in found for index, error in errors.items()}

    def _pixels_of(self, path):
        return self._picture(path) if self._frames is None else self._clip(path)

    def _picture(self, path):
        with opened(path) as image:
            return self._pixels(image)

    def _clip(self, path):
        if path.is_dir():
            files = sorted((file for file in path.iterdir() if is_picture(file)), key=_by_number)
            return np.stack([self._picture(files[i]) for i in _evenly(len(files), self._frames)])
        with opened(path) as image:
            frames = []
            for i in _evenly(getattr(image, "n_frames", 1), self._frames):
                image.seek(int(i))
                frames.append(self._pixels(image))
            return np.stack(frames)

    def _pixels(self, image):
        """Returns `(h, w, channels)` uint8 pixels, rotated as EXIF says and stretched to the image size."""
        from PIL import Image, ImageOps

        if image.mode.startswith(("I", "F")):
            raise ValueError(f"the pixels are of mode {image.mode}, not 8 bits per channel")
        height, width = self._size
        image = ImageOps.exif_transpose(image).convert(self._mode)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        return pixels[..., None] if pixels.ndim == 2 else pixels


@contextmanager
def opened(path):
    """Opens a picture and adds its path to errors."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # pillow's decoders raise errors of many kinds
        raise ValueError(
            f"Each picture must be a file that pillow reads, of 8 bits per channel. Received: {str(path)!r}, "
            f"{type(error).__name__}: {error}. Replace or remove the file, or pass skip_unreadable=True to ImageFolder."
        ) from error


def check_pillow():
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Pictures are read with pillow. Received: {error}. Install it: pip install 'keras-jamba[images]'."
        ) from error


def is_picture(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def is_clip(path):
    """Checks whether the path is a picture file, or a folder with a picture."""
    if path.is_dir():
        return not path.name.startswith(".") and any(is_picture(file) for file in path.iterdir())
    return is_picture(path)


def _evenly(count, frames):
    """Returns the middle index of each of `frames` equal parts. Indices repeat if `count` is smaller than `frames`."""
    return ((2 * np.arange(frames) + 1) * count) // (2 * frames)


def _by_number(path):
    """Returns a sort key that puts `frame_2` before `frame_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
