"""The implementation of the `_backend` contract on TensorFlow."""
