"""Watching a training: experts, speed, memory, gradients; to a CSV file and to TensorBoard."""

import csv
import logging
import math
import re
import time
from pathlib import Path

import keras
import numpy as np

from keras_jamba import _backend, _keras_internals
from keras_jamba.layers import MoELayer
from keras_jamba.ops import _checks
from keras_jamba.ops.routing import share_entropy
from keras_jamba.training import _devices
from keras_jamba.training.adamw import JambaAdamW

_logger = logging.getLogger("keras_jamba")


class Monitor(keras.callbacks.Callback):
    """Measures something every so many steps, and writes it down.

    The probes are asked all at once, so that the device is waited for once; the last values of an epoch stand among
    its logs too, where `History` and Keras' own callbacks find them. The first step of all, which is compiled, is not
    timed, and neither is validation. Where processes train together the first one writes.

    Args:
        probes: any of `ExpertUsage`, `Throughput`, `Utilisation`, `Memory`, `GradientNorm`, `LearningRate`, or
            objects of your own with `begin(model)`, and `measure(model, steps, seconds)`, which returns
            `{name: number}` for the steps since the last time, always the same names.
        every: steps between two measurements.
        csv: a file that gets one row a measurement, with its step (batches, whatever gradients are accumulated),
            epoch and the model's own logs. One of the same columns is gone on with; beside one of others, another is
            begun, `log-1.csv`. Steps that a resumed training took twice stand there twice.
        tensorboard: a folder for TensorBoard, written by tensorboardX, of the extra `monitoring`.

    Raises:
        ValueError: for arguments out of range; in `fit`, for a probe that the model has nothing for.
        ImportError: for `tensorboard` without tensorboardX.

    Example:
        >>> from keras_jamba import training
        >>> usage = training.ExpertUsage()
        >>> monitor = training.Monitor([usage, training.Throughput(64)], csv="runs/a/log.csv", tensorboard="runs/a")
        >>> model.fit(batches, epochs=20, callbacks=[monitor])
        >>> usage.heat_map("runs/a/experts.png")
    """

    def __init__(self, probes, every=50, csv=None, tensorboard=None):
        super().__init__()
        _checks.check_integer("every", every)
        self.probes, self.every = list(probes), every
        writes = _backend.processes.process_index() == 0
        self._sinks = [_Table(csv)] if writes and csv is not None else []
        self._sinks += [_Board(tensorboard)] if writes and tensorboard is not None else []

    def on_train_begin(self, logs=None):
        for probe in self.probes:
            probe.begin(self.model)
        self._count, self._compiled = None, False

    def on_epoch_begin(self, epoch, logs=None):
        if self._count is None:  # after all callbacks have loaded what they load
            self._count = self._wait() * (self.model.optimizer.gradient_accumulation_steps or 1)
        self._epoch, self._before, self._values, self._logs = epoch, self._count, {}, {}
        self._restart(0)

    def on_train_batch_end(self, batch, logs=None):
        # Several steps at once may reach beyond the end of the epoch.
        done = batch + 1 if self.params["steps"] is None else min(batch + 1, self.params["steps"])
        self._count, self._logs = self._before + done, logs or {}
        if not self._compiled:
            # The first step of all is compiled: the clock starts when it has ended.
            self._compiled = True
            self._wait()
            self._restart(self._count - self._before)
        elif self._count - self._before - self._timed_from >= self.every:
            self._measure()

    def on_epoch_end(self, epoch, logs=None):
        if self._count > self._before + self._timed_from or not self._values:
            self._measure()
        if logs is not None:
            logs.update(self._values)

    def on_train_end(self, logs=None):
        for sink in self._sinks:
            sink.close()

    def _restart(self, timed_from):
        """The clock, after so many steps of the epoch."""
        self._timed_from, self._started = timed_from, time.perf_counter()

    def _wait(self):
        """Until the steps have been computed: the optimizer's own, where a model that a callback sees is up to date."""
        return int(_numbers(self.model.optimizer.iterations))

    def _measure(self):
        self._wait()
        steps, seconds = self._count - self._before - self._timed_from, time.perf_counter() - self._started
        self._values = {}
        for probe in self.probes:
            self._values |= probe.measure(self.model, steps, seconds)
        row = _scalars(self._logs) | self._values
        for sink in self._sinks:
            sink.write(self._count, self._epoch, row)
        self._restart(self._count - self._before)


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
        self._layers = {name: layers[name] for name in sorted(layers, key=_with_numbers)}
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
            values[f"{name}/entropy"] = _number(share_entropy(layer.usage))
            values[f"{name}/max_load"] = float(load.max())
            values[f"{name}/dead"] = int((load < self.dead_below).sum())
            values[f"{name}/drop_rate"] = _number(layer.drop_rate)
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
        pyplot = _imported("matplotlib.pyplot", "matplotlib", "heat_map")
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
        return {"gradient_norm": _number(self._optimizer.gradient_norm)}


class LearningRate:
    """`learning_rate` of the step to come."""

    def begin(self, model):
        pass

    def measure(self, model, steps, seconds):
        return {"learning_rate": _number(model.optimizer.learning_rate)}


class _Table:
    """Rows of a CSV file, each written out at once."""

    def __init__(self, file):
        self.file, self._stream = Path(file), None

    def write(self, step, epoch, values):
        row = {"step": step, "epoch": epoch} | values
        if self._stream is None:
            self._open(list(row))
        self._writer.writerow(row)
        self._stream.flush()

    def _open(self, columns):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        file, number = self.file, 0
        while (have := _columns(file)) is not None and set(have) != set(columns):
            number += 1
            file = self.file.with_stem(f"{self.file.stem}-{number}")
        if number:
            _logger.warning("Monitor writes to %s: what is in %s has other columns.", file, self.file)
        self._stream = open(file, "a", newline="", encoding="utf-8")
        # Later rows may lack a column; one that the first did not have is left out.
        self._writer = csv.DictWriter(self._stream, have or columns, restval="", extrasaction="ignore")
        if have is None:
            self._writer.writeheader()

    def close(self):
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _columns(file):
    """Of a CSV file; None where there is nothing in it."""
    if not file.exists():
        return None
    with open(file, newline="", encoding="utf-8") as stream:
        return next(csv.reader(stream), None)


class _Board:
    def __init__(self, folder):
        self._writer = _imported("tensorboardX", "tensorboardX", "tensorboard=").SummaryWriter(str(folder))

    def write(self, step, epoch, values):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self):
        self._writer.flush()


def _numbers(x):
    return keras.ops.convert_to_numpy(x)


def _number(x):
    return float(_numbers(x))


def _scalars(logs):
    """What the model logs, as numbers; those of a metric with several have one after their name."""
    row = {}
    for name, value in logs.items():
        values = np.ravel(_numbers(value))
        row |= {name: float(values[0])} if values.size == 1 else {f"{name}_{i}": float(x) for i, x in enumerate(values)}
    return row


def _imported(module, package, wanted):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{wanted} needs {package}. Received: an environment without it. "
            "Install it: pip install 'keras-jamba[monitoring]'"
        ) from error


def _with_numbers(name):
    """A key that puts block_2 before block_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _name(layer):
    """The last two names of the layer's path, `block_1/feed_forward`, without the model's."""
    parts = [part for part in layer.path.split("/") if part]
    return "/".join(parts[-2:]) if len(parts) > 1 else parts[-1]
