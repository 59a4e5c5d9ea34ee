"""Metrics of expert layers in the logs of `fit` and `evaluate`.

`moe_aux_loss` is the sum of the auxiliary losses. The other metrics are means over the layers. `moe_max_load` is the
load of the busiest expert: 1 if balanced, num_experts if one expert gets all tokens. `moe_entropy` is the entropy of
the experts' shares: 1 if balanced, 0 if one expert gets all tokens. `moe_drop_rate`, for experts with a capacity, is
the share of dropped assignments. The model updates these metrics: on JAX, a metric updated in a layer's `call` fails.
"""

import keras
from keras import ops

from keras_jamba import _keras_internals
from keras_jamba.layers import MoELayer
from keras_jamba.ops.routing import max_load, share_entropy


def expert_layers(model):
    """Returns the `MoELayer`s of a model."""
    return [layer for layer in _keras_internals.sublayers(model) if isinstance(layer, MoELayer)]


def routing_metrics(model):
    """Returns `{name: metric}` for a model; the dict is empty without expert layers."""
    layers = expert_layers(model)
    names = ["moe_aux_loss", "moe_max_load", "moe_entropy"] if layers else []
    if any(layer.capacity_factor is not None for layer in layers):
        names.append("moe_drop_rate")
    return {name: _MeanOfScalars(name=name) for name in names}


def update_routing_metrics(model, metrics):
    """Updates the metrics of `routing_metrics` with the statistics of the last call."""
    if not metrics:
        return
    layers = expert_layers(model)
    values = {
        "moe_aux_loss": lambda: sum(map(ops.convert_to_tensor, _aux_losses(model))),
        "moe_max_load": lambda: ops.mean(max_load(_stacked(layers, "usage"))),
        "moe_entropy": lambda: ops.mean(share_entropy(_stacked(layers, "usage"))),
        "moe_drop_rate": lambda: ops.mean(_stacked(layers, "drop_rate")),
    }
    for name, metric in metrics.items():
        metric.update_state(values[name]())


def _aux_losses(model):
    """Returns the auxiliary losses: one per expert layer, or one per backbone that shares its loss."""
    backbones = [layer for layer in _keras_internals.sublayers(model) if hasattr(layer, "block_pattern")]
    shared = [getattr(backbone, "aux_loss", None) for backbone in backbones]
    return [loss for loss in shared if loss is not None] or [layer.aux_loss for layer in expert_layers(model)]


def _stacked(layers, name):
    return ops.stack([getattr(layer, name).value for layer in layers])


class _MeanOfScalars(keras.metrics.Mean):
    """The mean of scalars. On PyTorch, Keras' `Mean` copies a count to the device and synchronises."""

    def update_state(self, value):
        self.total.assign_add(value)
        self.count.assign_add(ops.ones((), self.dtype))
