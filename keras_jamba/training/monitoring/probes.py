"""Probes of `Monitor`: experts, speed, memory, gradients and learning rate."""

import math

import keras
import numpy as np

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers import MoELayer
from keras_jamba.ops import _checks
from keras_jamba.ops.routing import share_entropy
from keras_jamba.training.adamw import JambaAdamW
from keras_jamba.training.monitoring import _devices
from keras_jamba.training.monitoring._values import imported, natural_key, number


class ExpertUsage:
    """How tokens are shared among the experts of each layer, in the last step before a measurement.

    Per layer with experts, `NAME/expert_3` for the share of assignments each expert got; `NAME/entropy`, 1 when all
    get as much, 0 when one gets everything; `NAME/max_load`, the load of the busiest as a multiple of an even
    share; `NAME/drop_rate`; `NAME/dead`, how many got less than `dead_below` of an even share.

    Args:
        dead_below: a share of an even share.

    Attributes:
        history: `{layer: [shares]}`, a `(num_experts,)` array a measurement.
    """

    def __init__(self, dead_below=0.01):
        _checks.check_number("dead_below", dead_below, low=0, high=1)
        self.dead_below, self.history = dead_below, {}

    def begin(self, model):
        layers = {_name(layer): layer for layer in _keras_internals.sublayers(model) if isinstance(layer, MoELayer)}
        self._layers = {name: layers[name] for name in sorted(layers, key=natural_key)}
        if not self._layers:
            raise ValueError(
                f"ExpertUsage is for a model with experts. Received: {model.name!r}, which has no MoELayer. "
                "Leave the probe out."
            )

    def measure(self, model, steps, seconds):
        values = {}
        for name, layer in self._layers.items():
            shares = keras.ops.convert_to_numpy(layer.usage)
            self.history.setdefault(name, []).append(shares)
            load = shares * len(shares)
            values |= {f"{name}/expert_{i}": float(share) for i, share in enumerate(shares)}
            values[f"{name}/entropy"] = number(share_entropy(layer.usage))
            values[f"{name}/max_load"] = float(load.max())
            values[f"{name}/dead"] = int((load < self.dead_below).sum())
            values[f"{name}/drop_rate"] = number(layer.drop_rate)
        return values

    def heat_map(self, file):
        """Draws the load of each expert over time, a panel a layer, to a picture.

        Raises:
            ValueError: where nothing was measured yet.
            ImportError: without matplotlib, of the extra `monitoring`.
        """
        if not self.history:
            raise ValueError(
                "There must be something to draw. Received: a probe that has measured nothing. Fit with it first."
            )
        pyplot = imported("matplotlib.pyplot", "matplotlib", "heat_map")
        figure, panels = pyplot.subplots(
            len(self.history),
            sharex=True,
            squeeze=False,
            layout="constrained",
            figsize=(8, 1 + 1.4 * len(self.history)),
        )
        for panel, (name, shares) in zip(panels[:, 0], self.history.items(), strict=True):
            load = np.array(shares).T * len(shares[0])
            image = panel.imshow(load, aspect="auto", vmin=0, vmax=max(2, load.max()), interpolation="nearest")
            panel.set(ylabel=f"{name}\nexpert", yticks=range(len(load)))
            figure.colorbar(image, ax=panel, label="load, 1 is even")
        panels[-1, 0].set(xlabel="measurement")
        figure.savefig(file, dpi=120)
        pyplot.close(figure)


class Throughput:
    """`steps_per_second`, and `examples_per_second` and `tokens_per_second` of those sizes.

    Args:
        batch_size: examples a step.
        tokens: tokens an example, or None.
    """

    def __init__(self, batch_size, tokens=None):
        _checks.check_integer("batch_size", batch_size)
        if tokens is not None:
            _checks.check_integer("tokens", tokens)
        self.batch_size, self.tokens = batch_size, tokens

    def begin(self, model):
        pass

    def measure(self, model, steps, seconds):
        rate = steps / seconds if steps else math.nan
        values = {"steps_per_second": rate, "examples_per_second": rate * self.batch_size}
        return values | ({"tokens_per_second": rate * self.batch_size * self.tokens} if self.tokens else {})


class Utilisation:
    """`model_flops_utilisation`: what the model needs a second, as a share of what the devices can do.

    What gradient checkpointing computes again does not count (Chowdhery et al. 2022, appendix B).

    Args:
        flops_per_step: of forward and backward, such as `model_report(...).flops_per_step`.
        peak: FLOPs a second of a device; a dtype, "bfloat16", "float16" or "float32", for what the table of devices
            says of matrices in it, without TF32, which JAX and TensorFlow use for float32 by themselves; or "measured",
            for a product of large float32 matrices here.
        devices: how many of them share a step.

    Raises:
        ValueError: for a device that the table does not have, or arguments out of range.

    Reference:
        [Chowdhery et al. (2022)](https://arxiv.org/abs/2204.02311).
    """

    def __init__(self, flops_per_step, peak="bfloat16", devices=1):
        _checks.check_number("flops_per_step", flops_per_step, low=1)
        _checks.check_integer("devices", devices)
        self.flops_per_step = flops_per_step
        self.peak = devices * _devices.peak_flops(peak)

    def begin(self, model):
        pass

    def measure(self, model, steps, seconds):
        return {"model_flops_utilisation": self.flops_per_step * steps / seconds / self.peak if steps else math.nan}


class Memory:
    """`process_memory`, resident, and on an accelerator `device_memory` and its peak, in MiB."""

    def begin(self, model):
        pass

    def measure(self, model, steps, seconds):
        return {
            name: value / 2**20 for name, value in (_devices.process_memory() | _backend.device.device_memory()).items()
        }


class GradientNorm:
    """`gradient_norm`, before clipping, that a `JambaAdamW` keeps: of the last update, 0 before the first."""

    def begin(self, model):
        self._optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if not isinstance(self._optimizer, JambaAdamW):
            raise ValueError(
                "GradientNorm is for an optimizer that keeps the norm. "
                f"Received: {type(self._optimizer).__name__}. Compile with keras_jamba.training.optimizer(...)."
            )

    def measure(self, model, steps, seconds):
        return {"gradient_norm": number(self._optimizer.gradient_norm)}


class LearningRate:
    """`learning_rate` of the step to come."""

    def begin(self, model):
        pass

    def measure(self, model, steps, seconds):
        return {"learning_rate": number(model.optimizer.learning_rate)}


def _name(layer):
    """The last two names of the layer's path, `block_1/feed_forward`, without the model's."""
    parts = [part for part in layer.path.split("/") if part]
    return "/".join(parts[-2:]) if len(parts) > 1 else parts[-1]
