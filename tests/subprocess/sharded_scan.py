"""Scan and convolution, with kernels and without, on shards of rows and channels.

Runs in its own process, on 4 devices.
"""

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from keras_jamba.ops import causal_depthwise_conv, selective_scan
from keras_jamba.ops.convolution import triton as convolution_in_triton
from keras_jamba.ops.scan import triton

MESH = jax.make_mesh((2, 2), ("b", "e"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
WIDE, NARROW, CHANNEL = P("b", None, "e"), P("b"), P("e")


def check(function, tensors, specs, out_specs):
    """Checks that sharded outputs and gradients equal the unsharded ones."""
    sharded = jax.shard_map(function, mesh=MESH, in_specs=tuple(specs), out_specs=out_specs)
    loss = lambda f: lambda tensors: sum((x * x).sum() for x in jax.tree.leaves(f(*tensors)))  # noqa: E731
    for run in (lambda f: jax.jit(f)(*tensors), lambda f: jax.jit(jax.grad(loss(f)))(tensors)):
        for a, e in zip(jax.tree.leaves(run(sharded)), jax.tree.leaves(run(function)), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


def main():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype("float32"))  # noqa: E731
    b, t, e, n = 4, 7, 6, 3
    tensors = (normal(b, t, e), normal(b, t, e) - 2, -jnp.exp(normal(e, n)), normal(b, t, n), normal(b, t, n))
    tensors += (normal(e), normal(b, t, e), normal(e))
    specs = (WIDE, WIDE, CHANNEL, NARROW, NARROW, CHANNEL, WIDE, CHANNEL)
    states = (WIDE, P("b", "e"))
    # On a CPU, the GPU kernels lower to their portable implementations, so this checks the code around the kernels.
    check(lambda *x: triton.run(*x, True, None, None, None), tensors, specs, states)
    check(lambda *x: selective_scan(*x, delta_softplus=True, return_last_state=True), tensors, specs, states)
    tensors, specs = (normal(b, t, e), normal(4, e), normal(e)), (WIDE, P(None, "e"), CHANNEL)
    check(lambda *x: convolution_in_triton.run(*x, None, None, None, True), tensors, specs, WIDE)
    check(lambda *x: causal_depthwise_conv(*x, activation="silu"), tensors, specs, WIDE)
    print("all are equal")


if __name__ == "__main__":
    main()
