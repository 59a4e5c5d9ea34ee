"""Reads a damaged copy of a good file, and judges what came of it."""

import re

import numpy as np
from tamper.mutations import copied, damage

# The ends of a trial that are right.
REFUSED, SAME, EDITED = "refused", "same numbers", "other numbers of a file without a checksum"


class Trials:
    """Trials of one format.

    Args:
        form: a `Format`.
        folder: an empty folder. The good file is written there, and read as the standard.
    """

    def __init__(self, form, folder):
        self.form, self.folder = form, folder
        self.good = folder / "good"
        self.good.mkdir()
        form.write(self.good)
        self.expected = form.read(self.good)

    def damaged(self, seed):
        """Returns a damaged copy of the good file, and a description of the damage."""
        place = copied(self.good, self.folder / "damaged")
        return place, damage(place, np.random.default_rng(seed))

    def end(self, place):
        """Returns how reading a file ends: REFUSED, SAME, EDITED, or a fault."""
        try:
            found = self.form.read(place)
        except Exception as error:
            return REFUSED if in_form(error) or not self.form.ours else f"a raw {type(error).__name__}: {error}"
        # Keras reads its archives itself, and accepts any numbers.
        if self.form.ours and any(_is_wrong(x) for x in found):
            return "NaN or infinity"
        if len(found) == len(self.expected) and all(map(np.array_equal, found, self.expected)):
            return SAME
        return "other numbers" if self.form.sealed else EDITED


def in_form(error):
    """Returns whether an error has the form of the project."""
    return isinstance(error, ValueError) and re.search(r"Received: .+", str(error), re.DOTALL) is not None


def _is_wrong(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "f" and not np.isfinite(x).all()
