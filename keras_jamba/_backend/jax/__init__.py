"""The contract of `_backend` on JAX."""
