"""How the experts fare, in the logs of `fit` and `evaluate`."""

import keras
from keras import ops

from keras_jamba.layers import MoELayer


class RoutedModel(keras.Model):
    """A model with `MoELayer`s: `moe_aux_loss`, `moe_max_load` and `moe_entropy` stand among its metrics.

    `moe_aux_loss` is what all of them add to the loss; `moe_max_load` the load of the busiest expert, 1
    when balanced, num_experts when one expert gets everything; `moe_entropy` the entropy of the experts'
    shares, 1 when balanced, 0 when one expert gets everything. The last two are means over the layers.
    In the model, because a metric that a layer updates in its `call` fails on JAX.
    """

    def _watch_routing(self, layers):
        self._moe_layers = [layer for layer in layers if isinstance(layer, MoELayer)]
        names = ("moe_aux_loss", "moe_max_load", "moe_entropy") if self._moe_layers else ()
        self._moe_metrics = [keras.metrics.Mean(name=name) for name in names]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self._moe_layers:
            aux_loss = sum(ops.convert_to_tensor(layer.aux_loss) for layer in self._moe_layers)
            usages = [ops.convert_to_tensor(layer.usage) for layer in self._moe_layers]
            values = (aux_loss, _mean(_max_load, usages), _mean(_entropy, usages))
            for metric, value in zip(self._moe_metrics, values, strict=True):
                metric.update_state(value)
        return loss


def _mean(function, usages):
    return sum(map(function, usages)) / len(usages)


def _max_load(usage):
    return ops.max(usage) * usage.shape[0]


def _entropy(usage):
    # x log x is 0 at 0; the logarithm of one expert's share is 0 however it is normalised.
    entropy = -ops.sum(usage * ops.log(ops.maximum(usage, 1e-9)))
    return entropy / ops.log(ops.cast(max(usage.shape[0], 2), "float32"))
