"""Outputs, and what was asked for besides."""


def asked(outputs, *extras):
    """`outputs`, or a tuple of them and of those of `(whether, what)` that were asked for."""
    extras = [what for whether, what in extras if whether]
    return (outputs, *extras) if extras else outputs
