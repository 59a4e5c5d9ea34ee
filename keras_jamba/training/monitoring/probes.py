"""Probes for `Monitor`: experts, speed, memory, gradients and learning rate."""

import math
from typing import Literal

import keras
import numpy as np

from keras_jamba import _backend, _keras_internals, _keras_optimizers
from keras_jamba._typing import Array, PathLike
from keras_jamba.layers import MoELayer
from keras_jamba.ops import _checks
from keras_jamba.ops.routing import share_entropy
from keras_jamba.training.adamw import JambaAdamW
from keras_jamba.training.monitoring import _devices
from keras_jamba.training.monitoring._values import imported, natural_key, number


class ExpertUsage:
    """A probe of the expert load of each MoE layer, in the last step before a measurement.

    Values per MoE layer:

    - `NAME/expert_3`: the share of assignments of expert 3.
    - `NAME/entropy`: 1 if all experts get equal shares, 0 if one expert gets everything.
    - `NAME/max_load`: the largest load as a multiple of an even share.
    - `NAME/drop_rate`: the layer's drop rate.
    - `NAME/dead`: the number of experts with less than `dead_below` of an even share.

    Args:
        dead_below: the threshold for dead experts, as a fraction of an even share.

    Attributes:
        history: `{layer: [shares]}`, one `(num_experts,)` array per measurement.
    """

    def __init__(self, dead_below: float = 0.01) -> None:
        _checks.check_number("dead_below", dead_below, low=0, high=1)
        self.dead_below = dead_below
        self.history: dict[str, list[Array]] = {}

    def begin(self, model: keras.Model) -> None:
        layers = {_name(layer): layer for layer in _keras_internals.sublayers(model) if isinstance(layer, MoELayer)}
        self._layers = {name: layers[name] for name in sorted(layers, key=natural_key)}
        if not self._layers:
            raise ValueError(
                f"ExpertUsage needs a model with experts. Received: {model.name!r}, which has no MoELayer. "
                "Leave the probe out."
            )

    def measure(self, model: keras.Model, steps: int, seconds: float) -> dict[str, float]:
        values: dict[str, float] = {}
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

    def heat_map(self, file: PathLike) -> None:
        """Draws the load of each expert over time to an image file, with one panel per layer.

        Raises:
            ValueError: if nothing was measured yet.
            ImportError: without matplotlib, of the extra `monitoring`.
        """
        if not self.history:
            raise ValueError(
                "heat_map needs at least one measurement. Received: a probe without any. Pass the probe to fit first."
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
    """A probe of speed: `steps_per_second`, `examples_per_second` and, with `tokens`, `tokens_per_second`.

    Args:
        batch_size: examples per step.
        tokens: tokens per example, or None.
    """

    def __init__(self, batch_size: int, tokens: int | None = None) -> None:
        _checks.check_integer("batch_size", batch_size)
        if tokens is not None:
            _checks.check_integer("tokens", tokens)
        self.batch_size, self.tokens = batch_size, tokens

    def begin(self, model: keras.Model) -> None:
        pass

    def measure(self, model: keras.Model, steps: int, seconds: float) -> dict[str, float]:
        rate = steps / seconds if steps else math.nan
        values = {"steps_per_second": rate, "examples_per_second": rate * self.batch_size}
        return values | ({"tokens_per_second": rate * self.batch_size * self.tokens} if self.tokens else {})


class Utilisation:
    """A probe of `model_flops_utilisation`: the model's FLOPs per second as a share of the devices' peak.

    Recomputation by gradient checkpointing does not count (Chowdhery et al. 2022, appendix B).

    Args:
        flops_per_step: FLOPs of forward and backward pass, such as `model_report(...).flops_per_step`.
        peak: FLOPs per second of one device; a dtype, "bfloat16", "float16" or "float32", for its entry in the table of
            data sheets; or "measured", for a product of large float32 matrices on this device. The float32 entries are
            without TF32, which JAX and TensorFlow use for float32 by default.
        devices: the number of devices that share a step.

    Raises:
        ValueError: for a device without an entry in the table, or arguments out of range.

    Reference:
        [Chowdhery et al. (2022)](https://arxiv.org/abs/2204.02311).
    """

    def __init__(
        self,
        flops_per_step: float,
        peak: float | Literal["bfloat16", "float16", "float32", "measured"] = "bfloat16",
        devices: int = 1,
    ) -> None:
        _checks.check_number("flops_per_step", flops_per_step, low=1)
        _checks.check_integer("devices", devices)
        self.flops_per_step = flops_per_step
        self.peak = devices * _devices.peak_flops(peak)

    def begin(self, model: keras.Model) -> None:
        pass

    def measure(self, model: keras.Model, steps: int, seconds: float) -> dict[str, float]:
        return {"model_flops_utilisation": self.flops_per_step * steps / seconds / self.peak if steps else math.nan}


class Memory:
    """A probe of memory in MiB: resident `process_memory` and, on an accelerator, `device_memory` and its peak."""

    def begin(self, model: keras.Model) -> None:
        pass

    def measure(self, model: keras.Model, steps: int, seconds: float) -> dict[str, float]:
        return {
            name: value / 2**20 for name, value in (_devices.process_memory() | _backend.device.device_memory()).items()
        }


class GradientNorm:
    """A probe of `gradient_norm`, which `JambaAdamW` keeps: the last update's before clipping, 0 before the first."""

    def begin(self, model: keras.Model) -> None:
        self._optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if not isinstance(self._optimizer, JambaAdamW):
            raise ValueError(
                "GradientNorm needs an optimizer that keeps the norm. "
                f"Received: {type(self._optimizer).__name__}. Compile with keras_jamba.training.optimizer(...)."
            )

    def measure(self, model: keras.Model, steps: int, seconds: float) -> dict[str, float]:
        return {"gradient_norm": number(self._optimizer.gradient_norm)}


class LearningRate:
    """A probe of `learning_rate`, that of the next step."""

    def begin(self, model: keras.Model) -> None:
        self._rate, optimizer = None, model.optimizer
        if _keras_optimizers.has_schedule(optimizer):
            # Without this, JAX compiles a schedule's branches at each reading, and keeps them all.
            self._rate = _backend.compilation.jit_inference(lambda: optimizer.learning_rate, [optimizer.iterations])

    def measure(self, model: keras.Model, steps: int, seconds: float) -> dict[str, float]:
        return {"learning_rate": number(self._rate() if self._rate else model.optimizer.learning_rate)}


def _name(layer):
    """Returns the last two names of the layer's path, such as `block_1/feed_forward`."""
    parts = [part for part in layer.path.split("/") if part]
    return "/".join(parts[-2:]) if len(parts) > 1 else parts[-1]
