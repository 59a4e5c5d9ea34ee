"""Kernels for few tokens: PyTorch on a GPU only. XLA fuses these operations itself."""


def applies(x):
    return False


def product(x, matrix, divisor=None):
    return None


def gated_product(x, gate, up, gate_divisor=None, up_divisor=None):
    return None


def added_norm(x, other, scale, epsilon):
    return None


def norm(x, scale, epsilon):
    return None


def norms_of_slices(x, scales, epsilon):
    return None


def convolution_step(x, kernel, bias, state, silu):
    return None


def scan_step(u, delta, A, B, C, D, z, bias, softplus, state):
    return None


def ssm_step(x, z, conv, state, weights, epsilon):
    return None
