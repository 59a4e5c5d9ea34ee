"""The error of a function that a backend cannot offer."""


def refuse(name, reason):
    """Raises the error of a function that was called though its `why_no_...` gives a reason.

    Args:
        name: of the function.
        reason: why it cannot run here.
    """
    raise NotImplementedError(
        f"{name} must be able to run where it is called. Received: a call of {name}, though {reason}. "
        "Choose another implementation of the op."
    )
