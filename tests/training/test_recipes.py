"""Recipes: compilation, augmentation and training."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from checks import full

import keras_jamba
from keras_jamba.training import JambaAdamW, recipes
from keras_jamba.training.data import Augmentation, PhotoAugmentation

CLASSES = 3


def data(count=24, frames=None):
    """Returns images that are bright in the columns of their class, and their labels."""
    labels = np.arange(count) % CLASSES
    shape = (count, 6, 6, 1) if frames is None else (count, frames, 6, 6, 1)
    images = np.random.default_rng(0).random(shape, "float32") / 4
    for label in range(CLASSES):
        images[labels == label, ..., 2 * label : 2 * label + 2, :] += 0.7
    return images, labels


def model(shape=(6, 6, 1)):
    keras.utils.set_random_seed(0)
    layers = [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    return keras.Sequential(layers)


class SubclassedModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = model()

    def call(self, x):
        return self.inner(x)


def brighter(num_classes):
    return [keras.layers.RandomBrightness(0.1, value_range=(0, 1)), keras.layers.MixUp()]


SHORT = recipes.Recipe(epochs=8, batch_size=6, learning_rate=0.05, ema_momentum=0.5, label_smoothing=0.1)


@full("jax", "tensorflow")
@pytest.mark.parametrize("frames", [None, 2], ids=["images", "clips"])
def test_a_recipe_trains_a_classifier(frames):
    images, labels = data(frames=frames)
    recipe = replace(SHORT, augmentation=brighter)
    history = recipe.fit(
        classifier := model(images.shape[1:]), images, labels, validation_data=data(12, frames), verbose=0
    )
    assert len(history.history["loss"]) == 8
    assert history.history["val_accuracy"][-1] > 0.9
    predicted = classifier.predict(images, verbose=0).argmax(axis=-1)
    assert (predicted == labels).mean() > 0.9


@full("jax", "tensorflow")
def test_uint8_images_are_augmented_like_floats():
    images, labels = data()
    images = np.round(images / 2 * 255).astype("uint8")
    recipe, losses = replace(SHORT, epochs=2, augmentation=brighter), []
    for pixel_range, scaled in (((0, 255), images), ((0, 1), images.astype("float32") / 255)):
        keras.utils.set_random_seed(0)
        sizes = dict(d_model=4, num_layers=1, mamba_ratio=None, d_state=2, moe_frequency=0, stem="patchify")
        classifier = keras_jamba.DHCJamba(CLASSES, (6, 6, 1), downsample=2, pixel_range=pixel_range, **sizes)
        losses.append(recipe.fit(classifier, scaled, labels, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@full("jax", "tensorflow")
def test_averaged_weights_of_a_short_training_leave_the_initial_ones():
    recipe = replace(SHORT, ema_momentum=0.9995)
    history = recipe.fit(classifier := model(), *data(), validation_data=data(12), verbose=0).history
    predicted = classifier.predict(data()[0], verbose=0).argmax(axis=-1)
    assert (predicted == data()[1]).mean() > history["val_accuracy"][-1] - 0.1 > 0.8


@full("jax", "tensorflow")
def test_the_seed_determines_a_fit():
    recipe = replace(SHORT, epochs=1, augmentation=brighter)
    weights = {}
    for name, seed, workers in (("one", 1, 1), ("again", 1, 2), ("other", 2, 1)):
        recipe.fit(fitted := model(), *data(), seed=seed, verbose=0, workers=workers)
        weights[name] = fitted.get_weights()[0]
    np.testing.assert_array_equal(weights["one"], weights["again"])
    assert not np.allclose(weights["one"], weights["other"])


@full("jax", "tensorflow")
def test_a_second_fit_uses_a_new_optimizer():
    recipe = replace(SHORT, epochs=2)
    recipe.fit(twice := model(), *data(), verbose=0)
    first, losses = twice.optimizer, twice.evaluate(data()[0], np.eye(CLASSES)[data()[1]], verbose=0)
    history = recipe.fit(twice, *data(), verbose=0)
    assert twice.optimizer is not first and int(twice.optimizer.iterations) == 8
    assert history.history["loss"][-1] < losses[0]


def test_a_subclassed_model_is_trained():
    subclassed = SubclassedModel()
    subclassed(data()[0][:1])
    assert len(replace(SHORT, epochs=1).fit(subclassed, *data(), verbose=0).history["loss"]) == 1


def test_a_recipe_compiles_its_optimizer_and_loss():
    recipe = replace(SHORT, weight_decay=0.03, warmup=0.25)
    recipe.compile(compiled := model(), steps=40)
    optimizer = compiled.optimizer
    assert isinstance(optimizer, JambaAdamW) and optimizer.use_ema
    assert (optimizer.weight_decay, optimizer.ema_momentum) == (0.03, 0.5)
    rates = [float(optimizer._learning_rate(step)) for step in (0, 5, 10, 40)]
    np.testing.assert_allclose(rates, [0, 0.025, 0.05, 0], atol=1e-6)
    logits, target = np.array([[2.0, -1.0, 0.5]]), np.array([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    expected = -(target * (logits - np.log(np.exp(logits).sum()))).sum()
    loss = float(compiled.loss(np.eye(CLASSES)[:1], logits))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    replace(recipe, ema_momentum=None).compile(compiled, steps=40)
    assert not compiled.optimizer.use_ema


def test_the_augmentation_of_digits_moves_them_by_less_than_a_pixel():
    images = np.zeros((32, 8, 8, 1), "float32")
    images[:, 3:5, 3:5] = 1
    layers = recipes.DIGITS.augmentation(10)
    assert layers[0] is not recipes.DIGITS.augmentation(10)[0]
    mixed, labels = Augmentation(layers, 10)((images, np.arange(32) % 10), np.random.default_rng(0))
    assert mixed.shape == images.shape
    np.testing.assert_allclose(labels.sum(axis=-1), 1, atol=1e-6)
    *affine, _ = layers
    moved, labels = Augmentation(affine, 10)((images, np.arange(32) % 10), np.random.default_rng(0))
    np.testing.assert_array_equal(labels, np.arange(32) % 10)
    # Translations of at most a tenth are less than a pixel, and new pixels at the edge are empty.
    np.testing.assert_allclose(moved.sum(axis=(1, 2, 3)), 4, rtol=0.4)
    assert moved[:, [0, 0, 7, 7], [0, 7, 0, 7]].max() < 1e-3
    assert len(np.unique(np.round(moved, 4), axis=0)) == 32


def test_the_augmentation_of_photographs_keeps_size_dtype_and_range():
    transform = recipes.CIFAR10.augmentation(10)
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype("uint8")
    mixed, labels = transform((images, np.arange(64) % 10), np.random.default_rng(0))
    assert mixed.shape == images.shape and mixed.dtype == np.uint8 and labels.shape == (64, 10)
    np.testing.assert_allclose(labels.sum(axis=-1), 1, atol=1e-6)


def test_an_augmentation_may_return_nothing_and_not_a_class():
    replace(SHORT, epochs=1, augmentation=lambda num_classes: None).fit(model(), *data(), verbose=0)
    with pytest.raises(ValueError, match="Received: the class PhotoAugmentation. Return an object"):
        replace(SHORT, augmentation=lambda num_classes: PhotoAugmentation).fit(model(), *data(), verbose=0)


def test_a_transform_gets_the_images_of_a_recipe_as_they_are():
    images, labels = data()
    given = []

    def transform(batch, rng):
        given.append(batch)
        return batch

    recipe = replace(SHORT, epochs=1, augmentation=lambda num_classes: transform)
    sizes = dict(d_model=4, num_layers=1, mamba_ratio=None, d_state=2, moe_frequency=0, stem="patchify", downsample=2)
    classifier = keras_jamba.DHCJamba(CLASSES, (6, 6, 1), pixel_range=(0, 255), **sizes)
    recipe.fit(classifier, np.round(images * 255).astype("uint8"), labels, verbose=0)
    assert len(given) >= 4
    assert all(x.dtype == np.uint8 and y.shape == (6, CLASSES) for x, y in given)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1. Received"),
        ({"label_smoothing": 2.0}, "label_smoothing must be a number from 0 to 1. Received"),
        ({"augmentation": [keras.layers.RandomFlip()]}, "augmentation must be a function.*Received.*lambda"),
        ({"augmentation": PhotoAugmentation()}, "augmentation must be a function.*Received.*lambda"),
        ({"augmentation": PhotoAugmentation}, "augmentation must be a function.*Received.*lambda"),
    ],
)
def test_invalid_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **changes)


@pytest.mark.parametrize(
    "labels, message",
    [(np.arange(24), "from 0 to 23, num_classes=3"), (np.eye(24), r"integers of shape \(b,\).*\(24, 24\).*argmax")],
)
def test_errors_give_the_rule_what_was_received_and_the_remedy(labels, message):
    with pytest.raises(ValueError, match=message):
        SHORT.fit(model(), data()[0], labels, verbose=0)
