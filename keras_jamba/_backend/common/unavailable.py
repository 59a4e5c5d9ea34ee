"""The error of a function that a backend cannot offer."""


def refuse(name, reason, ask):
    """Raises the error of a function that was called where it is not available.

    Args:
        name: of the function.
        reason: why it is not available here.
        ask: the function that tells beforehand.
    """
    raise NotImplementedError(
        f"{name} is not available here. Received: a call of it, though {reason}. Ask {ask} first."
    )
