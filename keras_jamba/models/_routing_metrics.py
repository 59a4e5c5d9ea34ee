"""How the experts fare, in the logs of `fit` and `evaluate`."""

import keras
from keras import ops

from keras_jamba.layers import MoELayer
from keras_jamba.ops.routing import max_load, share_entropy


class RoutingMetrics:
    """A model with `MoELayer`s: `moe_aux_loss`, `moe_max_load` and `moe_entropy` stand among its metrics.

    `moe_aux_loss` is what all of them add to the loss; `moe_max_load` the load of the busiest expert, 1
    when balanced, num_experts when one expert gets everything; `moe_entropy` the entropy of the experts'
    shares, 1 when balanced, 0 when one expert gets everything; `moe_drop_rate`, where experts have a
    capacity, the share of assignments that found no room. All but the first are means over the layers.
    In the model, because a metric that a layer updates in its `call` fails on JAX.
    """

    def _watch_routing(self):
        """To be called when the layers are there."""
        layers = self._moe_layers()
        names = ["moe_aux_loss", "moe_max_load", "moe_entropy"] if layers else []
        if any(layer.capacity_factor is not None for layer in layers):
            names.append("moe_drop_rate")
        self._moe_metrics = {name: keras.metrics.Mean(name=name) for name in names}

    def _moe_layers(self):
        return [layer for layer in self._flatten_layers() if isinstance(layer, MoELayer)]

    def _aux_losses(self):
        """Of each layer with experts, or the one that a backbone takes over all of them."""
        together = [
            getattr(layer, "aux_loss", None) for layer in self._flatten_layers() if hasattr(layer, "block_pattern")
        ]
        return [x for x in together if x is not None] or [layer.aux_loss for layer in self._moe_layers()]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self._moe_metrics:
            layers = self._moe_layers()
            last = lambda name: [ops.convert_to_tensor(getattr(layer, name)) for layer in layers]  # noqa: E731
            shares = last("usage")
            values = {
                "moe_aux_loss": sum(map(ops.convert_to_tensor, self._aux_losses())),
                "moe_max_load": _mean(map(max_load, shares)),
                "moe_entropy": _mean(map(share_entropy, shares)),
                "moe_drop_rate": _mean(last("drop_rate")),
            }
            for name, metric in self._moe_metrics.items():
                metric.update_state(values[name])
        return loss


def _mean(values):
    values = list(values)
    return sum(values) / len(values)
