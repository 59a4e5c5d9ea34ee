"""Mistakes that users make, with the entry point and the outcome of each.

Run `python -m mistakes` in `tests` to write the table of docs/guides/mistakes.md.
"""

from mistakes.images import IMAGES
from mistakes.parts import EXTRAS, LAYERS
from mistakes.subjects import NAN, RIGHT
from mistakes.text import TEXT

MISTAKES = IMAGES + TEXT + LAYERS + EXTRAS


def table():
    """Returns the table of docs/guides/mistakes.md."""
    outcome = lambda m: m.outcome if m.outcome in (RIGHT, NAN) else "an error"  # noqa: E731
    rows = [f"| `{m.entry}` | {m.name} | {outcome(m)} |" for m in MISTAKES]
    return "\n".join(["| entry point | mistake | outcome |", "| --- | --- | --- |", *rows, ""])
