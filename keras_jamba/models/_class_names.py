"""The names of a classifier's classes."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_jamba._typing import Tensor, Tensors
from keras_jamba.models._logits_model import LogitsModel
from keras_jamba.ops import _checks


class ClassNamesModel(LogitsModel):
    """The abstract base of classifiers with `class_names` and `decode_predictions`.

    `fit` copies the class names of a data set that has them: `training.ImageFolder`, `training.Batches` of data with an
    attribute `class_names`, or the result of `keras.utils.image_dataset_from_directory`.
    """

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes: a tuple of `num_classes` distinct strings, or None. Assignable."""
        return self._config["class_names"]

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        self._config["class_names"] = checked_class_names(names, self._config["num_classes"])

    def decode_predictions(self, logits: Tensor, top: int = 5) -> list[list[tuple[str, float]]]:
        """Returns the most probable classes of each row of logits.

        Args:
            logits: `(b, num_classes)`, the output of a call or of `predict`. This method applies the softmax: pass no
                probabilities.
            top: classes per row, at least 1. A model with fewer classes returns all of them.

        Returns:
            A list of b lists of `(class_name, probability)`, the most probable class first. Without `class_names`, the
            name of a class is its index: "0", "1", ...

        Raises:
            ValueError: for logits of another shape, for values that are not finite, for probabilities, and for a `top`
                that is not a positive integer.

        Example:
            >>> model = keras_jamba.DHCJamba.from_preset("digits")
            >>> names = model.decode_predictions(model.predict(images), top=2)[0]  # [('7', 0.98), ('9', 0.01)]
        """
        _checks.check_integer("top", top)
        count = self._config["num_classes"]
        logits = np.asarray(ops.convert_to_numpy(logits), "float64")
        if logits.ndim != 2 or logits.shape[1] != count or not np.isfinite(logits).all():
            finite = "" if np.isfinite(logits).all() else ", with values that are not finite"
            raise ValueError(
                f"logits must be finite numbers of shape (b, num_classes) with num_classes={count}. Received: "
                f"shape={logits.shape}{finite}. Pass what predict returns; for one row add an axis, logits[None]."
            )
        if count > 1 and len(logits) and (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
            raise ValueError(
                "logits must be the outputs of the model before any softmax. Received: rows of probabilities, which "
                "sum to 1. Pass what predict returns."
            )
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        names = self.class_names or tuple(map(str, range(count)))
        return [[(names[i], float(row[i])) for i in order] for row, order in zip(probabilities, best, strict=True)]

    def fit(self, x: Tensors | None = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        self._compare_class_names(x, adopt=True)
        self._compare_class_names(kwargs.get("validation_data"))
        return super().fit(x, *args, **kwargs)

    def evaluate(self, x: Tensors | None = None, *args: Any, **kwargs: Any) -> Any:
        self._compare_class_names(x)
        return super().evaluate(x, *args, **kwargs)

    def _compare_class_names(self, data, adopt=False):
        """Compares the class names of data and model; with `adopt`, a model without names takes those of the data.

        Raises:
            ValueError: if the names differ.
        """
        names = getattr(data, "class_names", None)
        if names is None:
            return
        if self.class_names is None and (not adopt or len(names) != self._config["num_classes"]):
            return  # One output may serve two classes, and a model may have outputs for classes that this data lacks.
        names = checked_class_names(names, self._config["num_classes"])
        if self.class_names is None:
            self.class_names = names
        elif names != self.class_names:
            i = next(i for i, (a, b) in enumerate(zip(names, self.class_names, strict=True)) if a != b)
            raise ValueError(
                "The data must have the class_names of the model, in the same order. Received: class "
                f"{i} is {names[i]!r} in the data and {self.class_names[i]!r} in the model. Sort the data like the "
                "model, or rename the classes by assigning model.class_names."
            )


def checked_class_names(names, num_classes):
    """Returns the argument `class_names` as a tuple, or None.

    Raises:
        ValueError: unless the names are `num_classes` distinct strings.
    """
    if names is None:
        return None
    valid = isinstance(names, (tuple, list)) and all(isinstance(name, str) and name for name in names)
    if not valid or len(set(names)) != len(names) or len(names) != num_classes:
        shown = f"{len(names)} names, " if valid else ""
        raise ValueError(
            f"class_names must be None or a sequence of num_classes={num_classes} distinct strings. Received: "
            f"{shown}class_names={names!r}. Pass one name per class, or build the model with another num_classes."
        )
    return tuple(str(name) for name in names)
