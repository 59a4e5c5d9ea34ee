"""Recipes: named training settings for classifiers of images or clips."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from keras_jamba.ops import _checks
from keras_jamba.training.adamw import optimizer
from keras_jamba.training.data import Augmentation, Batches, PhotoAugmentation, RandomAffine
from keras_jamba.training.data.augmentation import one_hot

# Pixel positions need float32, also under a mixed-precision policy.
_EXACT = dict(dtype="float32")


@dataclass(frozen=True)
class Recipe:
    """Training settings of a classifier: AdamW, warm-up, cosine decay, label smoothing, averaging, augmentation.

    Args:
        epochs: passes over the data.
        batch_size: examples b per batch.
        learning_rate: the peak learning rate.
        weight_decay, warmup: see `training.optimizer`.
        ema_momentum: the share of the weights' moving average that a step keeps. The first steps keep less (see
            `JambaAdamW`). `fit` ends with the average in the model. None does not average.
        label_smoothing: the share of a label that is spread over all classes, from 0 to 1.
        augmentation: a function of the number of classes. It returns a new list of Keras layers for `Augmentation`, or
            a transform of `Batches` that takes one-hot labels, such as `PhotoAugmentation`. None does not augment.

    Example:
        ```python
        from dataclasses import replace
        from keras_jamba.training import recipes

        model = keras_jamba.DHCJamba.from_preset("small", load_weights=False, image_shape=(8, 8, 1))
        history = recipes.DIGITS.fit(model, images, labels, validation_data=(test_images, test_labels))
        shorter = replace(recipes.DIGITS, epochs=20)
        ```
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup: float = 0.1
    ema_momentum: float | None = None
    label_smoothing: float = 0.0
    augmentation: Callable[[int], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _checks.check_integer(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay"):
            _checks.check_number(name, getattr(self, name), low=0)
        _checks.check_number("label_smoothing", self.label_smoothing, low=0, high=1)
        is_made = isinstance(self.augmentation, (Augmentation, PhotoAugmentation, keras.layers.Layer, type))
        if self.augmentation is not None and (is_made or not callable(self.augmentation)):
            raise ValueError(
                "augmentation must be a function of the number of classes that returns Keras layers, new ones for each "
                f"training, or a transform. Received: augmentation={self.augmentation!r}. Pass lambda "
                "num_classes: [...]."
            )

    def compile(self, model: keras.Model, steps: int) -> None:
        """Compiles a built model with logits `(b, classes)` for one-hot labels and a new optimizer.

        Args:
            model: a Keras model.
            steps: batches of the complete training.

        Raises:
            ValueError: see `training.optimizer`.
        """
        averaging = {} if self.ema_momentum is None else dict(use_ema=True, ema_momentum=self.ema_momentum)
        made = optimizer(model, steps, self.learning_rate, self.warmup, weight_decay=self.weight_decay, **averaging)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=self.label_smoothing)
        model.compile(made, loss, metrics=["accuracy"])

    def _transform(self, num_classes, pixel_range):
        """Returns a transform of `Batches` for pixels of this range, or None."""
        if self.augmentation is None:
            return None
        made = self.augmentation(num_classes)
        if made is None:
            return None
        if isinstance(made, type):
            raise ValueError(
                f"augmentation must return Keras layers or a transform. Received: the class {made.__name__}. Return an "
                "object of the class."
            )
        if callable(made) and not isinstance(made, (keras.layers.Layer, Augmentation)):
            return made
        layers = Augmentation(made, num_classes)
        return _for_byte_range(layers) if pixel_range == (0, 255) else layers

    def fit(
        self,
        model: keras.Model,
        images: npt.ArrayLike,
        labels: npt.ArrayLike,
        seed: int = 0,
        validation_data: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
        callbacks: Iterable[keras.callbacks.Callback] = (),
        verbose: int | Literal["auto"] = "auto",
        workers: int = 1,
    ) -> keras.callbacks.History:
        """Compiles a model and fits it on batches that depend on seed and step only.

        Args:
            model: a built Keras model with outputs `(b, classes)`, logits.
            images: `(n, h, w, c)`, or clips `(n, T, h, w, c)`. Floats from 0 to 1, or values from 0 to 255 for a
                `DHCJamba` with `pixel_range` (0, 255). Keras layers get values from 0 to 1 in both cases.
            labels: `(n,)` integers.
            seed: seed of order and augmentation. `keras.utils.set_random_seed` seeds the model's own random numbers,
                such as dropout.
            validation_data: `(images, labels)` as above, or None. An epoch's metrics are those of the weights
                themselves, not of their average.
            callbacks, verbose: as in `keras.Model.fit`.
            workers: threads that prefetch batches, see `Batches`.

        Returns:
            The `keras.callbacks.History`.

        Raises:
            ValueError: for labels that are not integers below the number of classes, or fewer examples than a batch.
                Also for arguments that `Augmentation` and `training.optimizer` refuse.
        """
        images = np.asarray(images)
        num_classes = model.compute_output_spec(keras.KerasTensor((self.batch_size, *images.shape[1:]))).shape[-1]
        transform = self._transform(num_classes, getattr(model, "pixel_range", None))
        data = (images, one_hot(labels, num_classes))
        batches = Batches(data, self.batch_size, seed, transform=transform, workers=workers)
        if validation_data is not None:
            validation_images, validation_labels = validation_data
            validation_data = (validation_images, one_hot(validation_labels, num_classes))
        self.compile(model, self.epochs * batches.steps_per_epoch)
        return model.fit(
            batches,
            epochs=self.epochs,
            validation_data=validation_data,
            validation_batch_size=self.batch_size,
            callbacks=list(callbacks),
            verbose=verbose,
        )


def _for_byte_range(augmentation):
    """Adapts an augmentation of floats from 0 to 1 to values from 0 to 255."""

    def transform(batch, rng):
        images, labels = augmentation((batch[0].astype("float32") / 255, batch[1]), rng)
        return images * 255, labels

    return transform


def _digit_augmentation(num_classes):
    affine = RandomAffine(rotation=15.0, zoom=0.1, shear=0.1, translation=0.1, **_EXACT)
    return [affine, keras.layers.MixUp(alpha=0.3)]


def _photo_augmentation(num_classes):
    return PhotoAugmentation(shift=1 / 8, erasing=0.25, cut_mix=0.5, num_classes=num_classes)


DIGITS = Recipe(
    epochs=60,
    batch_size=32,
    learning_rate=4e-3,
    ema_momentum=0.98,
    label_smoothing=0.1,
    augmentation=_digit_augmentation,
)

CIFAR10 = Recipe(
    epochs=200,
    batch_size=128,
    learning_rate=1e-3,
    ema_momentum=0.9995,
    label_smoothing=0.1,
    augmentation=_photo_augmentation,
)
