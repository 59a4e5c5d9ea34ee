"""Graphs and loops, on TensorFlow.

`scan` replaces `keras.ops.scan`, which cannot train under XLA: its loop has no bound, and its outputs must have the
shapes of its carry.
"""

import threading

import tensorflow as tf

from keras_jamba._backend.common.exporting_state import exports, exports_for_other_runtime
from keras_jamba._backend.common.known_steps import has_known_step  # noqa: F401


def has_jit():
    return True


def jit(function):
    return tf.function(function, autograph=False)


def jit_inference(function, variables):
    return _traced(function)


# Threads trace a shared program once. The lock is reentrant, because a traced function may call another.
_tracing = threading.RLock()


def _traced(function, jit_compile=None):
    # One function per structure, shape and dtype: TensorFlow warns if one is traced for many shapes.
    traced = {}

    def run(*args):
        args = tf.nest.map_structure(tf.convert_to_tensor, args)
        leaves = tf.nest.flatten(args)
        kind = tuple((tuple(x.shape), x.dtype) for x in leaves), str(tf.nest.map_structure(lambda _: 0, args))
        if kind not in traced:
            with _tracing:
                if kind not in traced:
                    # tf.function calls a functools.partial with wrong arguments: the lambda hides it.
                    graph = tf.function(lambda *given: function(*given), autograph=False, jit_compile=jit_compile)
                    traced[kind] = graph.get_concrete_function(*args)
        return traced[kind](*args)

    return run


def compiled_while_loop(body, variables, folds=False, overwrites=False):
    def run(going, state):
        return tf.while_loop(lambda going, state: going, lambda going, state: body(state), (going, state))[1]

    # Without XLA, launching thousands of small operations takes most of the time.
    compiled = _traced(run, jit_compile=True)
    return lambda going, state, steps=None: compiled(going, state)


def has_fast_dynamic_loop():
    return False


def is_exporting(shape):
    return exports()


def needs_portable_operations(shape):
    return exports_for_other_runtime()


def scan(body, carry, inputs, reverse=False, constants=()):
    step_of = body
    body = lambda carry, slices: step_of(carry, slices, *constants)  # noqa: E731
    length = tf.nest.flatten(inputs)[0].shape[0]
    if length is None:
        length = tf.shape(tf.nest.flatten(inputs)[0])[0]
    specs = _output_specs(body, carry, inputs)
    if exports_for_other_runtime():
        return _scan_without_lists(body, carry, inputs, reverse, length, specs)
    stacks = tf.nest.map_structure(
        lambda spec: tf.TensorArray(spec.dtype, size=length, element_shape=spec.shape), specs
    )

    def step(count, carry, stacks):
        index = length - 1 - count if reverse else count
        carry, outputs = body(carry, tf.nest.map_structure(lambda x: x[index], inputs))
        stacks = tf.nest.map_structure(lambda s, o: s.write(index, o), stacks, outputs)
        return count + 1, carry, stacks

    _, carry, stacks = tf.while_loop(
        lambda count, *_: count < length,
        step,
        (tf.constant(0), carry, stacks),
        maximum_iterations=length,
    )
    return carry, tf.nest.map_structure(lambda s: s.stack(), stacks)


def _scan_without_lists(body, carry, inputs, reverse, length, specs):
    """Returns the results of `scan`, from a loop that writes each output into its place of a tensor.

    LiteRT has no lists of tensors of unknown shape.
    """
    first = tf.nest.map_structure(lambda x: x[0], inputs)
    shapes = tf.nest.map_structure(tf.shape, body(carry, first)[1])
    stacks = tf.nest.map_structure(
        lambda shape, spec: tf.zeros(tf.concat([[length], shape], 0), spec.dtype), shapes, specs
    )

    def step(count, carry, stacks):
        index = length - 1 - count if reverse else count
        carry, outputs = body(carry, tf.nest.map_structure(lambda x: tf.gather(x, index), inputs))
        return count + 1, carry, tf.nest.map_structure(lambda s, o: _written(s, o, index), stacks, outputs)

    _, carry, stacks = tf.while_loop(lambda count, *_: count < length, step, (tf.constant(0), carry, stacks))
    return carry, stacks


def _written(stack, row, index):
    # No public function has this operation, which LiteRT translates to one that writes in place.
    from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_dynamic_update_slice

    start = tf.concat([[index], tf.zeros([stack.shape.rank - 1], tf.int32)], 0)
    return xla_dynamic_update_slice(stack, tf.expand_dims(row, 0), start)


def _output_specs(body, carry, inputs):
    """Returns the shapes and dtypes of the outputs of one loop step, from a temporary graph."""
    spec_of = lambda x: tf.TensorSpec(x.shape, x.dtype)  # noqa: E731
    step = tf.function(lambda carry, slices: body(carry, slices)[1], autograph=False)
    carry_specs = tf.nest.map_structure(spec_of, carry)
    slice_specs = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape[1:], x.dtype), inputs)
    graph = step.get_concrete_function(carry_specs, slice_specs)
    return tf.nest.map_structure(spec_of, graph.structured_outputs)


def use_persistent_cache():
    pass
