"""The contract of the backend packages: one Protocol per capability.

Each of the packages `jax`, `tensorflow` and `torch` has one module per Protocol, with its name in lower case.
`tensors.py` has the functions of `Tensors` without `self`. The docstrings here also document the implementations and
state the differences between backends. An unavailable function raises NotImplementedError. The `why_no_...` or
`has_...` function beside it reports this before a call. For the functions of `Sharding`, `active_mesh` does.
"""
