"""Replicas of the quality benchmark get the same weights as models that `Recipe.fit` trains."""

import functools
from dataclasses import replace

import keras
import numpy as np
import pytest
from checks import full, numpy

import keras_jamba
from keras_jamba.training import recipes

TINY = dict(num_classes=3, image_shape=(6, 6, 1), downsample=2, d_model=8, num_layers=2, mamba_ratio=1, num_heads=2)


@full()
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="replicas run on JAX only")
def test_replicas_end_with_the_weights_of_separate_fits(monkeypatch):
    from benchmarks.images import replicas

    # With Adam's default epsilon, the step for a gradient close to 0 depends on the rounding of sums.
    monkeypatch.setattr(recipes, "optimizer", functools.partial(recipes.optimizer, epsilon=1e-3))

    make = lambda: keras_jamba.DHCJamba(**TINY, moe_frequency=0, dropout=0.1, drop_path=0.2)  # noqa: E731
    rng = np.random.default_rng(0)
    data = [(rng.random((24, 6, 6, 1), "float32"), rng.integers(0, 3, 24)) for _ in range(2)]
    recipe = replace(recipes.DIGITS, epochs=2, batch_size=6)
    _, weights = replicas.train(make, recipe, data, seeds=[3, 5])
    for seed, pair, replica in zip((3, 5), data, weights, strict=True):
        keras.utils.set_random_seed(seed)
        model = make()
        recipe.fit(model, *pair, seed=seed, verbose=0)
        for variable, value in zip(model.weights, replica, strict=True):
            np.testing.assert_allclose(value, numpy(variable.value), atol=2e-5, err_msg=variable.path)
