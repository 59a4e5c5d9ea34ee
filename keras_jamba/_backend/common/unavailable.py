"""The error of a function that is unavailable on a backend."""


def refuse(name, reason, ask):
    """Raises NotImplementedError for a function that is unavailable.

    Args:
        name: name of the function.
        reason: the reason why it is unavailable.
        ask: the function that reports this before a call.
    """
    raise NotImplementedError(
        f"{name} is not available here. Received: a call of it, though {reason}. Ask {ask} first."
    )
