"""A small image model, a batch for it, and its compilation with our optimizer."""

import keras
import numpy as np

import keras_jamba
from keras_jamba import training


def small_model(**changes):
    keras.utils.set_random_seed(0)
    arguments = dict(d_model=16, num_layers=2, mamba_ratio=1, num_experts=2, num_heads=2, image_shape=(8, 8, 1))
    return keras_jamba.DHCJamba(num_classes=3, **arguments | changes)


def batch():
    rng = np.random.default_rng(0)
    return rng.random((4, 8, 8, 1), "float32"), np.array([0, 1, 2, 0])


def compiled(model, **arguments):
    optimizer = training.optimizer(model, **dict(steps=10) | arguments)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
