"""Outputs, and what flags such as `return_state` request besides."""


def append_requested(outputs, *extras):
    """Returns `outputs`, or a tuple of `outputs` and each value of `(whether, value)` that is requested."""
    extras = [value for whether, value in extras if whether]
    return (outputs, *extras) if extras else outputs


def split_requested(result, *whether):
    """Returns `(outputs, *values)` of what `append_requested` returned, None for values that were not requested."""
    outputs, *values = result if any(whether) else (result,)
    values = iter(values)
    return outputs, *(next(values) if requested else None for requested in whether)
