"""Several trainings of one model in one JAX program: different seeds and data, equal shapes.

Each replica equals a training by `Recipe.fit`: the same batches, optimizer, loss and averaging, through Keras'
stateless methods under `jax.vmap`. Ten seeds need one compilation, and on a GPU hardly more time than one seed.
"""

import types

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_jamba.training import Augmentation, Batches

STEPS = 4  # per call of the compiled program


def train(make, recipe, data, seeds):
    """Trains one replica per seed.

    Args:
        make: a function without arguments that returns a new model, with equal shapes every time.
        recipe: a `keras_jamba.training.Recipe`.
        data: a list with one pair `(images, integer labels)` per seed, all of equal length.
        seeds: integers, for the weights, the order and the augmentation.

    Returns:
        `(model, weights)`: a model, and one list per seed for its `set_weights`.
    """
    starts = []
    for seed in seeds:
        keras.utils.set_random_seed(seed)
        model = make()
        starts.append((_values(model.trainable_variables), _values(model.non_trainable_variables)))
    _use_products(model)
    batches = [_batches(model, recipe, *pair, seed) for pair, seed in zip(data, seeds, strict=True)]
    steps = recipe.epochs * len(batches[0])
    recipe.compile(model, steps)
    model.optimizer.build(model.trainable_variables)
    optimizer = [_values(model.optimizer.variables)] * len(seeds)
    state = tuple(_stacked(part) for part in (*zip(*starts, strict=True), optimizer))
    program = jax.jit(jax.vmap(_steps_of(model)))
    for first in range(0, steps, STEPS):
        chunk = range(first, min(first + STEPS, steps))
        images, labels = zip(*([_stack_pairs([b.batch(step) for step in chunk]) for b in batches]), strict=True)
        state = program(state, np.stack(images), np.stack(labels))
    return model, _weights(model, state, len(seeds))


def _batches(model, recipe, images, labels, seed):
    classes = model.output_shape[-1]
    transform = recipe.augmentation and Augmentation(recipe.augmentation(classes), classes)
    return Batches((images, np.eye(classes, dtype="float32")[labels]), recipe.batch_size, seed, transform=transform)


def _steps_of(model):
    """Returns a function `(state, images, labels) -> state` that runs a few training steps."""

    def loss(trainable, others, images, labels):
        logits, others, losses = model.stateless_call(trainable, others, images, training=True, return_losses=True)
        return model.loss(labels, logits) + sum(losses, 0.0), others

    def step(state, batch):
        trainable, others, optimizer = state
        gradients, others = jax.grad(loss, has_aux=True)(trainable, others, *batch)
        trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
        return (list(trainable), list(others), list(optimizer)), None

    return lambda state, images, labels: jax.lax.scan(step, state, (images, labels))[0]


def _weights(model, state, count):
    """Returns weights in the order of `set_weights`, averaged if the recipe averages."""
    trainable, others, optimizer = (dict(zip(map(id, names), part, strict=True)) for names, part in (
        (model.trainable_variables, state[0]),
        (model.non_trainable_variables, state[1]),
        (model.optimizer.variables, state[2]),
    ))  # fmt: skip
    if model.optimizer.use_ema:
        averages = model.optimizer._model_variables_moving_average
        trainable = {id(v): optimizer[id(a)] for v, a in zip(model.trainable_variables, averages, strict=True)}
    values = trainable | others
    return [[np.asarray(values[id(v)][i]) for v in model.weights] for i in range(count)]


def _use_products(model):
    """Computes convolutions as products of shifted images, because one kernel per replica makes convolutions slow."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Conv2D):
            layer.convolution_op = types.MethodType(_convolution, layer)


def _convolution(layer, inputs, kernel):
    x, kernel = keras.ops.convert_to_tensor(inputs), keras.ops.convert_to_tensor(kernel)
    (rows, columns), (down, right) = kernel.shape[:2], layer.strides
    padding = [(0, 0), _same(x.shape[1], rows, down), _same(x.shape[2], columns, right), (0, 0)]
    height, width = -(-x.shape[1] // down), -(-x.shape[2] // right)
    x = jnp.pad(x, padding)
    taps = [
        x[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _same(size, kernel, stride):
    """Returns the "same" padding before and after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _values(variables):
    return [np.asarray(variable) for variable in variables]


def _stacked(replicas):
    return [jnp.stack(values) for values in zip(*replicas, strict=True)]


def _stack_pairs(pairs):
    return tuple(np.stack(part) for part in zip(*pairs, strict=True))
