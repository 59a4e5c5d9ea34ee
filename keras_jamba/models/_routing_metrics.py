"""How the experts fare, in the logs of `fit` and `evaluate`."""

import keras
from keras import ops

from keras_jamba.layers import MoELayer
from keras_jamba.ops.routing import max_load, share_entropy


class RoutedModel(keras.Model):
    """A model with `MoELayer`s: `moe_aux_loss`, `moe_max_load` and `moe_entropy` stand among its metrics.

    `moe_aux_loss` is what all of them add to the loss; `moe_max_load` the load of the busiest expert, 1
    when balanced, num_experts when one expert gets everything; `moe_entropy` the entropy of the experts'
    shares, 1 when balanced, 0 when one expert gets everything; `moe_drop_rate`, where experts have a
    capacity, the share of assignments that found no room. All but the first are means over the layers.
    In the model, because a metric that a layer updates in its `call` fails on JAX.
    """

    def _watch_routing(self, layers):
        self._moe_layers = [layer for layer in layers if isinstance(layer, MoELayer)]
        names = ["moe_aux_loss", "moe_max_load", "moe_entropy"] if self._moe_layers else []
        if any(layer.capacity_factor is not None for layer in self._moe_layers):
            names.append("moe_drop_rate")
        self._moe_metrics = [keras.metrics.Mean(name=name) for name in names]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self._moe_layers:
            last = lambda name: [ops.convert_to_tensor(getattr(layer, name)) for layer in self._moe_layers]  # noqa: E731
            shares = last("usage")
            values = sum(last("aux_loss")), _mean(map(max_load, shares)), _mean(map(share_entropy, shares))
            values = (*values, _mean(last("drop_rate")))[: len(self._moe_metrics)]
            for metric, value in zip(self._moe_metrics, values, strict=True):
                metric.update_state(value)
        return loss


def _mean(values):
    values = list(values)
    return sum(values) / len(values)
