"""Peers of DHCJamba in image benchmarks: a ViT and a ResNet with the same number of parameters."""

import bisect
import functools

import keras
from keras import layers


class Positions(layers.Layer):
    """Adds a learned vector to each token."""

    def build(self, shape):
        self.table = self.add_weight(shape[1:], "random_normal", name="table")

    def call(self, x):
        return x + self.table


def vit(width, image_shape, patch=4, depth=8, heads=None):
    """Returns a vision transformer on square patches, Dosovitskiy et al. (2021). Default: one head per 16 channels."""
    heads = heads or width // 16
    inputs = keras.Input(image_shape)
    x = layers.Reshape((-1, width))(layers.Conv2D(width, patch, strides=patch)(inputs))
    x = Positions()(x)
    for _ in range(depth):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y)
        y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def resnet(width, image_shape, blocks=3, num_classes=10):
    """Returns a ResNet with three stages of `blocks` residual blocks, He et al. (2016), section 4.2."""
    inputs = keras.Input(image_shape)
    x = layers.Conv2D(width, 3, padding="same")(inputs)
    for stage in range(3):
        for block in range(blocks):
            channels, stride = width * 2**stage, 2 if stage and not block else 1
            y = layers.Conv2D(channels, 3, strides=stride, padding="same", use_bias=False)(x)
            y = layers.Activation("relu")(layers.BatchNormalization()(y))
            y = layers.BatchNormalization()(layers.Conv2D(channels, 3, padding="same", use_bias=False)(y))
            x = x if stride == 1 else layers.Conv2D(channels, 1, strides=stride)(x)
            x = layers.Activation("relu")(x + y)
    return keras.Model(inputs, layers.Dense(num_classes)(layers.GlobalAveragePooling2D()(x)))


def width_of_equal_size(make, widths, image_shape, parameters):
    """Returns the width whose model has the number of parameters nearest to `parameters`.

    `widths` must rise. The binary search builds few models, because JAX takes ten seconds per model to compile the
    initializers of new shapes.
    """
    count = functools.cache(lambda width: make(width, image_shape).count_params())
    index = bisect.bisect_left(widths, parameters, key=count)
    return min(widths[max(0, index - 1) : index + 1], key=lambda width: abs(count(width) - parameters))


def of_equal_size(make, widths, image_shape, parameters):
    """Returns the model with the width of `width_of_equal_size`."""
    return make(width_of_equal_size(make, widths, image_shape, parameters), image_shape)
