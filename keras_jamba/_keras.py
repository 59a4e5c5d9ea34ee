"""Imports Keras first, and raises a helpful error if its backend is missing or unknown."""

import os

BACKENDS = ("jax", "tensorflow", "torch")
_named = os.environ.get("KERAS_BACKEND")

if _named and _named not in BACKENDS:
    raise ImportError(
        f"keras_jamba runs on the Keras backends {', '.join(BACKENDS)}. Received: KERAS_BACKEND={_named!r}. Set "
        "KERAS_BACKEND to one of the three before Python imports keras."
    )
try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "keras_jamba needs the backend of KERAS_BACKEND, else of ~/.keras/keras.json, else tensorflow. "
        f"Received: KERAS_BACKEND={_named}, {error}. Set KERAS_BACKEND to an installed one of {', '.join(BACKENDS)} "
        "before Python imports keras; or install one, for example by pip install 'keras-jamba[jax]'."
    ) from error
