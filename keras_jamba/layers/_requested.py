"""Outputs with optional extras, which flags such as `return_state` request."""


def append_requested(outputs, *extras):
    """Returns `outputs`, or `(outputs, *values)` with the values of the extras `(flag, value)` whose flag is set."""
    extras = [value for whether, value in extras if whether]
    return (outputs, *extras) if extras else outputs


def split_requested(result, *whether):
    """Returns `(outputs, *values)` from a result of `append_requested`; one value per flag, None if it is not set."""
    outputs, *values = result if any(whether) else (result,)
    values = iter(values)
    return outputs, *(next(values) if requested else None for requested in whether)
