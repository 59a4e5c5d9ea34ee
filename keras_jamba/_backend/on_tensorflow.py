"""The functions of `_backend` on TensorFlow.

`keras.ops.scan` cannot train under XLA (its loop has no bound, and its outputs must look like its
carry), hence a loop of our own.
"""

import threading

import keras
import tensorflow as tf

from keras_jamba._backend.native_on_tensorflow import compiling, native, why_not_native  # noqa: F401


def scan(body, carry, inputs, reverse=False):
    length = tf.nest.flatten(inputs)[0].shape[0]
    if length is None:
        length = tf.shape(tf.nest.flatten(inputs)[0])[0]
    specs = _output_specs(body, carry, inputs)
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


def _output_specs(body, carry, inputs):
    """Shapes and dtypes of what one turn of the loop puts out, from a graph that is thrown away."""
    spec_of = lambda x: tf.TensorSpec(x.shape, x.dtype)  # noqa: E731
    turn = tf.function(lambda carry, slices: body(carry, slices)[1], autograph=False)
    carry_specs = tf.nest.map_structure(spec_of, carry)
    slice_specs = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape[1:], x.dtype), inputs)
    graph = turn.get_concrete_function(carry_specs, slice_specs)
    return tf.nest.map_structure(spec_of, graph.structured_outputs)


def custom_gradient(forward, backward, plain=None):
    # On a CPU Keras runs TensorFlow without XLA; these loops are an order of magnitude slower there.
    forward = tf.function(forward, jit_compile=True, autograph=False)
    backward = tf.function(backward, jit_compile=True, autograph=False)

    @tf.custom_gradient
    def function(*tensors):
        # A tape that follows the inputs would differentiate the compiled loops too, which it cannot.
        outputs, residuals = forward(*map(tf.stop_gradient, tensors))
        return outputs, lambda *gradients: backward(residuals, tf.nest.pack_sequence_as(outputs, gradients))

    # A variable among the inputs would be taken for one that the function has caught.
    return lambda *tensors: function(*map(tf.convert_to_tensor, tensors))


def matmul_in_float32(x, y):
    return tf.cast(tf.matmul(x, y), "float32")


def platform(x=None):
    if x is not None and tf.executing_eagerly():
        return "cpu" if "CPU" in x.device else "gpu"
    return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"


def host_values(x):
    return x.numpy() if hasattr(x, "numpy") and "CPU" in x.device else None


def with_shape(x, shape):
    return tf.ensure_shape(x, shape) if None in tuple(x.shape)[1:] else x


def split(x, counts):
    return tf.split(x, counts, num=counts.shape[0])


def compiles():
    return True


def compiled(function):
    return tf.function(function, autograph=False)


def inference(function, variables):
    return _traced(function)


# Threads that want the same program trace it once. A traced function may call another.
_tracing = threading.RLock()


def _traced(function, jit_compile=None):
    # One for each kind of arguments: TensorFlow warns where one function is traced for many shapes.
    traced = {}

    def run(*args):
        args = tf.nest.map_structure(tf.convert_to_tensor, args)
        leaves = tf.nest.flatten(args)
        kind = tuple((tuple(x.shape), x.dtype) for x in leaves), str(tf.nest.map_structure(lambda _: 0, args))
        if kind not in traced:
            with _tracing:
                if kind not in traced:
                    graph = tf.function(function, autograph=False, jit_compile=jit_compile)
                    traced[kind] = graph.get_concrete_function(*args)
        return traced[kind](*args)

    return run


def repeated(body, variables):
    def run(going, state):
        return tf.while_loop(lambda going, state: going, lambda going, state: body(state), (going, state))[1]

    # Thousands of small operations: without XLA most of the time is spent between them.
    return _traced(run, jit_compile=True)


def recomputed(function):
    # Eagerly, Keras 3.15's gives the weights no gradient.
    if tf.executing_eagerly():
        return function

    def run(*tensors):
        # Masks and ids are no arguments: TensorFlow gives each a gradient of its own dtype, and cannot add booleans.
        tensors = [tf.convert_to_tensor(x) for x in tensors]
        places = [i for i, x in enumerate(tensors) if x.dtype.is_floating]

        def on_floats(*floats):
            given = list(tensors)
            for i, x in zip(places, floats, strict=True):
                given[i] = x
            return function(*given)

        return keras.remat(on_floats)(*(tensors[i] for i in places))

    return run


def input_gradient(function, x):
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        result = function(x)
    return tape.gradient(result, x, unconnected_gradients="zero")


def may_log():
    return True


def sum_over_replicas(tensors):
    tensors = [tf.convert_to_tensor(x) for x in tensors]
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def device_name():
    devices = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU") if devices else "CPU"


def device_memory():
    if platform() == "cpu":
        return {}
    told = tf.config.experimental.get_memory_info("GPU:0")
    return {"device_memory": told["current"], "device_memory_peak": told["peak"]}


def start_trace(folder):
    tf.profiler.experimental.start(str(folder))
    return tf.profiler.experimental.stop


def out_of_memory(error):
    return isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError))


def random_states():
    return []


def set_random_states(states):
    pass


def process_index():
    return 0


def process_count():
    return 1


def of_all_processes(number):
    return [number]


def weights_changed(layer):
    pass
