"""The contract of `_backend` on TensorFlow."""
