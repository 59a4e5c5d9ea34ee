"""Models whose outputs are logits."""

from keras_jamba._typing import Tensor, Tensors
from keras_jamba.models._label_checks import check_compile, check_has_labels, loss_of_labels
from keras_jamba.models.base import JambaModel


class LogitsModel(JambaModel):
    """The abstract base of models of logits. It refuses losses of probabilities, and labels that are not classes."""

    def _check_compile(self, loss, metrics, weighted_metrics):
        check_compile(loss, metrics, weighted_metrics, self._config.get("num_classes"))

    def compute_loss(
        self,
        x: Tensors | None = None,
        y: Tensors | None = None,
        y_pred: Tensors | None = None,
        sample_weight: Tensors | None = None,
        training: bool = True,
    ) -> Tensor:
        check_has_labels(y, self.loss)
        compute_loss = super().compute_loss
        keras_loss = lambda y: compute_loss(x, y, y_pred, sample_weight, training)  # noqa: E731
        return loss_of_labels(keras_loss, self.loss, y, self._class_count(y_pred), sample_weight)

    def _class_count(self, y_pred):
        """Returns the number of classes, or None for outputs of several tensors."""
        return y_pred.shape[-1] if hasattr(y_pred, "shape") else None
