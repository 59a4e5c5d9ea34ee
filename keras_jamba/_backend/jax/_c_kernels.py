"""Kernels of the C library on JAX: primitives that XLA's CPU compiler lowers to a call of the library.

On other devices, and in what is exported, a primitive is lowered to the portable form: whether there is a CPU to run
on is known only then.
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
    """The function `(tensors, options) -> outputs` that a kernel is, with its gradient.

    Args:
        kernel: of `keras_jamba._native` or `keras_jamba._triton`.
        portable: the same function in operations of Keras, for all platforms but one and for exports.
        lowered: `(kernel, backward, inputs, outputs)` to that platform and the rule by which a primitive is lowered
            there.
    """
    shown = len(kernel.outputs) - kernel.num_residuals
    residuals = kernel.outputs[shown:]

    def outputs(tensors, options, train):
        shapes = {name: x.shape for name, x in zip(kernel.inputs, tensors, strict=True) if not _is_none(x)}
        return kernel.output_specs(shapes, tensors[0].dtype, train)

    def gradients(tensors, options, train):
        return [(x.shape, x.dtype) for x in tensors[: kernel.differentiable]]

    def portable_forward(*tensors, options, train):
        found = portable(present(tensors), options)
        specs = outputs(tensors, options, train)[shown:]
        return [*found, *(jnp.zeros(shape, dtype) for shape, dtype in specs)]

    def portable_backward(*tensors, options, train):
        count = len(kernel.inputs)
        function = lambda *wanted: portable(present((*wanted, *tensors[kernel.differentiable : count])), options)  # noqa: E731
        _, pullback = jax.vjp(lambda *wanted: tuple(function(*wanted)), *tensors[: kernel.differentiable])
        return pullback(tuple(tensors[count + len(residuals) :]))

    names = (*kernel.inputs, *residuals, *(f"grad_{name}" for name in kernel.outputs[:shown]))
    forward = _primitive(kernel, False, kernel.inputs, kernel.outputs, outputs, portable_forward, lowered)
    if kernel.backward:
        backward = _primitive(kernel, True, names, kernel.gradients, gradients, portable_backward, lowered).bind
    else:
        backward = portable_backward

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def function(tensors, options):
        return tuple(forward.bind(*_filled(tensors), options=options, train=False)[:shown])

    def remember(tensors, options):
        found = forward.bind(*_filled(tensors), options=options, train=True)
        return tuple(found[:shown]), (tensors, found[shown:])

    def pull_back(options, residuals, grads):
        tensors, kept = residuals
        found = backward(*_filled(tensors), *kept, *grads, options=options, train=True)
        found = [None if x is None else grad for x, grad in zip(tensors, found, strict=False)]
        return ((*found, *[None] * (len(tensors) - len(found))),)

    function.defvjp(remember, pull_back)
    compiled = jax.jit(function, static_argnums=1)
    return lambda tensors, options: compiled(_varying_alike(tensors), options)


def _varying_alike(tensors):
    """Inside a `shard_map` all of them differ over the axes over which one of them does.

    A tensor that is the same everywhere so gets the sum of its gradients.
    """
    over = [frozenset() if x is None else _axes(x) for x in tensors]
    every = frozenset().union(*over)
    missing = [None if x is None else tuple(every - axes) for x, axes in zip(tensors, over, strict=True)]
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(tensors, missing, strict=True))


def _axes(x):
    aval = jax.typeof(x)
    # Their name in jax 0.10 and 0.11, and before.
    return aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())


def _filled(tensors):
    """A vector of no length in the place of each None."""
    return [jnp.zeros((0,), "float32") if x is None else x for x in tensors]


def _is_none(x):
    return x.shape == (0,)


def present(tensors):
    return [None if _is_none(x) else x for x in tensors]


def _primitive(kernel, backward, inputs, outputs, specs, portable, lowered):
    primitive = jax.extend.core.Primitive(f"keras_jamba_{kernel.name}_{'backward' if backward else 'forward'}")
    primitive.multiple_results = True

    def abstract(*tensors, options, train):
        # Of the first, so that they vary over the same axes of a `shard_map`.
        return [
            tensors[0].update(shape=shape, dtype=np.dtype(dtype), weak_type=False)
            for shape, dtype in specs(tensors, options, train)
        ]

    platform, rule_there = lowered(kernel, backward, inputs, outputs)

    def lower_portable(context, *operands, options, train):
        return portable_rule(_bare(context), *operands, options=options, train=train)

    def lower(context, *operands, options, train):
        exported = context.module_context.lowering_parameters.for_export
        rule = portable_rule if exported else rule_there
        return rule(_bare(context), *operands, options=options, train=train)

    def over_rows(tensors, axes, options, train):
        """Under `vmap` one element after the other; the kernel uses all cores for each."""
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
        """Second derivatives, by way of the portable form: `custom_vjp` has the first."""
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
    batching.primitive_batchers[primitive] = over_rows
    return primitive


def _bare(context):
    """What a rule traces is inside a `shard_map` too a function of one device."""
    bare = lambda avals: [jax.core.ShapedArray(x.shape, x.dtype) for x in avals]  # noqa: E731
    return context.replace(avals_in=bare(context.avals_in), avals_out=bare(context.avals_out))


def lowered_on_cpu(kernel, backward, inputs, outputs):
    def lower(context, *operands, options, train):
        layout = _layout(kernel, backward, inputs, outputs, context.avals_in, options)
        return jax.ffi.ffi_lowering(_TARGET)(context, *operands, layout=layout)

    return "cpu", lower


def _layout(kernel, backward, inputs, outputs, specs, options):
    """What xla_ffi.h asks for."""
    sizes = kernel.sizes({name: x.shape for name, x in zip(inputs, specs, strict=True) if not _is_none(x)})
    # XLA's own pool has a thread a core, too.
    integers = [*sizes.values(), *options, _native.cores(), _native.instruction_set()]
    fields = [kernel.field(name) for name in (*inputs, *outputs)]
    codes = [2 * offset + is_tensor for offset, is_tensor in fields]
    return np.array([kernel.number + backward, len(integers), *integers, *codes], "int64")
