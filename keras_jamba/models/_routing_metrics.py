"""How the experts fare, in the logs of `fit` and `evaluate`."""

import keras
from keras import ops

from keras_jamba import _keras_internals
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
        self._moe_metrics = {name: _MeanOfScalars(name=name) for name in names}

    def _moe_layers(self):
        return [layer for layer in _keras_internals.sublayers(self) if isinstance(layer, MoELayer)]

    def _aux_losses(self):
        """Of each layer with experts, or the one that a backbone takes over all of them."""
        together = [
            getattr(layer, "aux_loss", None)
            for layer in _keras_internals.sublayers(self)
            if hasattr(layer, "block_pattern")
        ]
        return [x for x in together if x is not None] or [layer.aux_loss for layer in self._moe_layers()]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self._moe_metrics:
            layers = self._moe_layers()
            mean_over_layers = {
                "moe_max_load": lambda: max_load(_together(layers, "usage")),
                "moe_entropy": lambda: share_entropy(_together(layers, "usage")),
                "moe_drop_rate": lambda: _together(layers, "drop_rate"),
            }
            for name, metric in self._moe_metrics.items():
                if name == "moe_aux_loss":
                    metric.update_state(sum(map(ops.convert_to_tensor, self._aux_losses())))
                else:
                    metric.update_state(ops.mean(mean_over_layers[name]()))
        return loss


class _MeanOfScalars(keras.metrics.Mean):
    """Keras' mean, but for this: on PyTorch that takes the number of values to the device and waits for it there."""

    def update_state(self, value):
        self.total.assign_add(value)
        self.count.assign_add(ops.ones((), self.dtype))


def _together(layers, name):
    return ops.stack([getattr(layer, name).value for layer in layers])
