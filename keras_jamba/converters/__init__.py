"""Converters between checkpoints of other libraries and the constructor arguments and weights of this package.

No converter imports a model. Models pass their arguments and variables to the converters.
"""
