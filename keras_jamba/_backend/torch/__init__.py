"""The contract of `_backend` on PyTorch."""
