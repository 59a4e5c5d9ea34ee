"""Triton kernels on JAX: primitives that are lowered to calls of jax-triton on a GPU."""

import concurrent.futures
import contextlib
import fnmatch
import functools
import importlib.metadata
import importlib.util
import logging
import math
import time

import jax
from jax import numpy as jnp
from jax.interpreters import mlir

from keras_jamba._backend.jax._c_kernels import present
from keras_jamba._triton import Gpu

# The versions with which the kernels were tried. Others may fail in the middle of a call: jax-triton 0.4.1 does with
# Triton 3.6.
_TRIED = {"jax-triton": "0.3.1", "triton": "3.6.*"}
_logger = logging.getLogger("keras_jamba")


def lowered_on_gpu(program, backward, inputs, outputs):
    def run(*arrays, options, train):
        tensors = dict(zip(inputs, present(arrays), strict=True))
        options = dict(zip(program.options, options, strict=True))
        if backward:
            found = program.backward(launcher(), tensors, options)
        else:
            found = program.forward(launcher(), tensors, options, train)
        # A primitive returns an empty vector in place of None.
        return [jnp.zeros((0,), "float32") if x is None else x for x in found]

    rule = mlir.lower_fun(run, multiple_results=True)

    def lower(context, *operands, options, train):
        with _registers(program.registers and program.registers[backward]):
            return rule(context, *operands, options=options, train=train)

    return "cuda", lower


@contextlib.contextmanager
def _registers(limit):
    """A context that limits the registers per thread of compiled kernels. jax-triton 0.3.1 has no option for it."""
    if limit is None:
        yield
        return
    from triton.backends.nvidia.compiler import CUDABackend

    parse = CUDABackend.parse_options
    CUDABackend.parse_options = lambda self, given: parse(self, given | {"maxnreg": limit})
    try:
        yield
    finally:
        CUDABackend.parse_options = parse


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


@functools.cache
def why_not_here():
    """Returns None, or the reason why no Triton kernel runs on this machine."""
    if any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")):
        return "Triton and jax-triton are not both installed"
    if jax.default_backend() != "gpu" or float(getattr(jax.devices()[0], "compute_capability", 0)) < 8:
        return "Triton kernels need an NVIDIA GPU of capability 8.0 or more"
    pair = {name: _version(name) for name in _TRIED}
    if not all(fnmatch.fnmatch(pair[name], tried) for name, tried in _TRIED.items()):
        have = " with ".join(f"{name} {version}" for name, version in pair.items())
        reason = f"{have} was not tried: install " + " and ".join(f'"{name}=={x}"' for name, x in _TRIED.items())
        _logger.warning("JAX's own operations replace the Triton kernels and are slower: %s", reason)
        return reason
    return None


def launcher():
    device = jax.devices()[0]
    has_rules = float(device.compute_capability) == 9.0
    cast = lambda x, dtype: x.astype(dtype)  # noqa: E731
    return Gpu(launch, lambda x: x.shape[-1], cast, device.core_count, device.device_kind, has_rules, _clock)


def _clock(specs, run):
    # Plans are timed while a program is traced. In this thread, the timed code would become part of that program.
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        return threads.submit(_seconds, specs, run).result()


def _seconds(specs, run):
    try:
        arrays = {name: _filled(*spec) for name, spec in specs.items()}
        run = jax.jit(run)
        times = []
        for _ in range(7):
            jax.block_until_ready(arrays)
            started = time.perf_counter()
            jax.block_until_ready(run(arrays))
            times.append(time.perf_counter() - started)
    except Exception as error:
        # Device memory may be free later. The resources of a multiprocessor never grow.
        return None if "RESOURCE_EXHAUSTED" in str(error) and "shared memory" not in str(error) else math.inf
    return sorted(times[2:])[2]


def _filled(shape, dtype, value):
    if isinstance(value, range):
        return (jnp.arange(math.prod(shape)) % len(value)).astype(dtype).reshape(shape)
    return jnp.full(shape, value, dtype)


def launch(kernel, grid, inputs, outputs, constants, num_warps=4, num_stages=3, registers=None, zeroed=()):
    # Without a GPU it cannot be imported.
    import jax_triton

    specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs]
    given = dict(kernel=kernel, out_shape=specs, grid=grid, num_warps=num_warps, num_stages=num_stages)
    call = functools.partial(jax_triton.triton_call, **given, zeroed_outputs=tuple(zeroed), **constants)
    # jax-triton has no rule for `vmap`.
    return jax.custom_batching.sequential_vmap(call)(*inputs)
