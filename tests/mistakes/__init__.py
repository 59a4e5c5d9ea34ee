"""Mistakes that users make, by the entry point that meets them, and what comes of each.

`python -m mistakes` in `tests` writes the table of docs/mistakes.md.
"""

from mistakes.images import IMAGES
from mistakes.parts import EXTRAS, LAYERS
from mistakes.subjects import NAN, RIGHT
from mistakes.text import TEXT

MISTAKES = IMAGES + TEXT + LAYERS + EXTRAS


def table():
    """The table of docs/mistakes.md."""
    outcome = lambda m: m.outcome if m.outcome in (RIGHT, NAN) else "an error"  # noqa: E731
    rows = [f"| `{m.entry}` | {m.name} | {outcome(m)} |" for m in MISTAKES]
    return "\n".join(["| entry point | mistake | outcome |", "| --- | --- | --- |", *rows, ""])
