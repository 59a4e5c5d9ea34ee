"""Kernels in Triton, and how they are launched; imports neither a backend nor, by itself, Triton."""
