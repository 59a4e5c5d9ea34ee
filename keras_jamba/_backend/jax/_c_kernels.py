"""Kernels of the C library on JAX: primitives that are lowered to a call of the library on a CPU.

On other devices and in exports, a primitive is lowered to the portable form, because only the lowering knows the
platform.
"""

import functools

import jax
import jax.extend
import numpy as np
from jax import numpy as jnp
from jax.interpreters import ad, batching, mlir

from keras_jamba import _native

_TARGET = "keras_jamba"


def register():
    if _native.why_not() is None:
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_native.xla_function()), platform="cpu")


def differentiable(kernel, portable, lowered):
    """Returns a kernel as a function `(tensors, options) -> outputs` with its gradient.

    Args:
        kernel: a kernel of `keras_jamba._native` or `keras_jamba._triton`.
        portable: the same function in Keras operations, for exports and all platforms except that of `lowered`.
        lowered: `lowered(kernel, backward, inputs, outputs)` returns a platform and its lowering rule.
    """
    num_outputs = len(kernel.outputs) - kernel.num_residuals
    residuals = kernel.outputs[num_outputs:]

    def outputs(tensors, options, train):
        shapes = {name: x.shape for name, x in zip(kernel.inputs, tensors, strict=True) if not _is_none(x)}
        return kernel.output_specs(shapes, tensors[0].dtype, train)

    def gradients(tensors, options, train):
        return [(x.shape, x.dtype) for x in tensors[: kernel.differentiable]]

    def portable_forward(*tensors, options, train):
        found = portable(present(tensors), options)
        specs = outputs(tensors, options, train)[num_outputs:]
        return [*found, *(jnp.zeros(shape, dtype) for shape, dtype in specs)]

    def portable_backward(*tensors, options, train):
        count = len(kernel.inputs)
        function = lambda *wanted: portable(present((*wanted, *tensors[kernel.differentiable : count])), options)  # noqa: E731
        _, pullback = jax.vjp(lambda *wanted: tuple(function(*wanted)), *tensors[: kernel.differentiable])
        return pullback(tuple(tensors[count + len(residuals) :]))

    names = (*kernel.inputs, *residuals, *(f"grad_{name}" for name in kernel.outputs[:num_outputs]))
    forward = _primitive(kernel, False, kernel.inputs, kernel.outputs, outputs, portable_forward, lowered)
    if kernel.backward:
        backward = _primitive(kernel, True, names, kernel.gradients, gradients, portable_backward, lowered).bind
    else:
        backward = portable_backward

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def function(tensors, options):
        return tuple(forward.bind(*_without_none(tensors), options=options, train=False)[:num_outputs])

    def forward_rule(tensors, options):
        found = forward.bind(*_without_none(tensors), options=options, train=True)
        return tuple(found[:num_outputs]), (tensors, found[num_outputs:])

    def backward_rule(options, residuals, grads):
        tensors, kept_residuals = residuals
        found = backward(*_without_none(tensors), *kept_residuals, *grads, options=options, train=True)
        found = [None if x is None else grad for x, grad in zip(tensors, found, strict=False)]
        return ((*found, *[None] * (len(tensors) - len(found))),)

    function.defvjp(forward_rule, backward_rule)
    compiled = jax.jit(function, static_argnums=1)
    return lambda tensors, options: compiled(_varying_over_same_axes(tensors), options)


def _varying_over_same_axes(tensors):
    """Returns tensors that all vary over the same mesh axes inside `shard_map`.

    A replicated tensor thus gets the sum of its gradients over the devices.
    """
    over = [frozenset() if x is None else _axes(x) for x in tensors]
    every = frozenset().union(*over)
    missing = [None if x is None else tuple(every - axes) for x, axes in zip(tensors, over, strict=True)]
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(tensors, missing, strict=True))


def _axes(x):
    aval = jax.typeof(x)
    # jax 0.10 and 0.11 have `mat`, earlier versions `vma`.
    return aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())


def _without_none(tensors):
    """Returns the tensors with an empty vector in place of each None."""
    return [jnp.zeros((0,), "float32") if x is None else x for x in tensors]


def _is_none(x):
    return x.shape == (0,)


def present(tensors):
    return [None if _is_none(x) else x for x in tensors]


def _primitive(kernel, backward, inputs, outputs, specs, portable, lowered):
    primitive = jax.extend.core.Primitive(f"keras_jamba_{kernel.name}_{'backward' if backward else 'forward'}")
    primitive.multiple_results = True

    def abstract(*tensors, options, train):
        # An update of the first input keeps the mesh axes over which it varies inside `shard_map`.
        return [
            tensors[0].update(shape=shape, dtype=np.dtype(dtype), weak_type=False)
            for shape, dtype in specs(tensors, options, train)
        ]

    platform, platform_rule = lowered(kernel, backward, inputs, outputs)

    def lower_portable(context, *operands, options, train):
        return portable_rule(_without_mesh_axes(context), *operands, options=options, train=train)

    def lower(context, *operands, options, train):
        exported = context.module_context.lowering_parameters.for_export
        rule = portable_rule if exported else platform_rule
        return rule(_without_mesh_axes(context), *operands, options=options, train=train)

    def batching_rule(tensors, axes, options, train):
        """Runs `vmap` one element after the other. The kernel uses all cores for each."""
        mapped = [jnp.moveaxis(x, axis, 0) for x, axis in zip(tensors, axes, strict=True) if axis is not None]

        def one(slices):
            slices = iter(slices)
            given = [x if axis is None else next(slices) for x, axis in zip(tensors, axes, strict=True)]
            return primitive.bind(*given, options=options, train=train)

        return jax.lax.map(one, mapped), [0] * len(outputs)

    @functools.cache
    def program(options, train):
        return jax.jit(functools.partial(primitive.bind, options=options, train=train))

    def compiled(*tensors, options, train):
        with jax.disable_jit(False):
            return program(options, train)(*tensors)

    def differentiate(tensors, tangents, options, train):
        """Computes second derivatives with the portable form. `custom_vjp` defines the first ones."""
        found = primitive.bind(*tensors, options=options, train=train)
        wanted = [i for i, x in enumerate(tangents) if type(x) is not ad.Zero]

        def function(*moved):
            given = list(tensors)
            for i, x in zip(wanted, moved, strict=True):
                given[i] = x
            return tuple(portable(*given, options=options, train=train))

        _, moved = jax.jvp(function, [tensors[i] for i in wanted], [tangents[i] for i in wanted])
        return found, list(moved)

    ad.primitive_jvps[primitive] = differentiate
    portable_rule = mlir.lower_fun(portable, multiple_results=True)
    primitive.def_impl(compiled)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lower_portable)
    mlir.register_lowering(primitive, lower, platform=platform)
    batching.primitive_batchers[primitive] = batching_rule
    return primitive


def _without_mesh_axes(context):
    """Returns the context without mesh axes: inside `shard_map` a rule also traces a function of one device."""
    bare = lambda avals: [jax.core.ShapedArray(x.shape, x.dtype) for x in avals]  # noqa: E731
    return context.replace(avals_in=bare(context.avals_in), avals_out=bare(context.avals_out))


def lowered_on_cpu(kernel, backward, inputs, outputs):
    def lower(context, *operands, options, train):
        layout = _layout(kernel, backward, inputs, outputs, context.avals_in, options)
        return jax.ffi.ffi_lowering(_TARGET)(context, *operands, layout=layout)

    return "cpu", lower


def _layout(kernel, backward, inputs, outputs, specs, options):
    """Returns the integers of the call, in the order that xla_ffi.h defines."""
    sizes = kernel.sizes({name: x.shape for name, x in zip(inputs, specs, strict=True) if not _is_none(x)})
    # XLA's own pool also has one thread per core.
    integers = [*sizes.values(), *options, _native.cores(), _native.instruction_set()]
    fields = [kernel.field(name) for name in (*inputs, *outputs)]
    codes = [2 * offset + is_tensor for offset, is_tensor in fields]
    return np.array([kernel.number + backward, len(integers), *integers, *codes], "int64")
