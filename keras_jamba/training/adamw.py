"""The optimizer and the schedule that the architecture's authors recommend."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_jamba import _backend, _keras_optimizers
from keras_jamba._typing import Config, Tensor
from keras_jamba.layers._decay import decays
from keras_jamba.ops import _checks


@keras.saving.register_keras_serializable(package="keras_jamba")
class JambaAdamW(_keras_optimizers.AdamWHooks):
    """AdamW that decays matrices only, and keeps the norm of the last gradient.

    The layers of this package mark the variables that decay: expert banks and the kernels of dense layers. A_log, D,
    the time step's bias, norms, biases, convolutions and routers do not decay. In other layers, variables named
    `kernel` or `embeddings` decay.

    `build` applies this rule each time. A model loaded from a file therefore trains on unchanged, although the file
    does not hold the exclusions of `AdamW.exclude_from_weight_decay`.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: the share of a weight, times the learning rate, that a step subtracts.
        global_clipnorm: the largest norm of the complete gradient, over all replicas. A larger gradient is scaled down
            to it. None does not clip.
        no_decay: regular expressions. Variables whose path matches one of them (`re.search`) do not decay either.
        **kwargs: arguments of `keras.optimizers.AdamW`: beta_1, beta_2, use_ema, gradient_accumulation_steps, ...
            With `use_ema=True`, update n + 1 keeps `min(ema_momentum, n / (n + 9))` of the weights' average. A short
            training thus does not end near its first weights.

    Attributes:
        gradient_norm: a float32 variable, the norm of the last gradient before clipping. With gradient accumulation it
            is the norm of the mean gradient.

    Reference:
        [Loshchilov and Hutter (2019)](https://arxiv.org/abs/1711.05101); variables without decay:
        [Gu and Dao (2023)](https://arxiv.org/abs/2312.00752), appendix E, and its authors' code; the momentum of
        averaged weights: `num_updates` of `tf.train.ExponentialMovingAverage`.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-4,
        weight_decay: float | None = 0.1,
        global_clipnorm: float | None = 1.0,
        no_decay: str | Iterable[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, global_clipnorm=global_clipnorm, **kwargs)
        self.no_decay = [no_decay] if isinstance(no_decay, str) else list(no_decay)
        self._counter = _backend.optimizer.HostStepCounter() if _backend.optimizer.has_fused_adamw() else None
        self._step = None

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        self._exclude_more_from_weight_decay([variable for variable in variables if not self._decays(variable)])
        super().build(variables)
        self.gradient_norm = self.add_variable(
            (), dtype="float32", aggregation="only_first_replica", name="gradient_norm"
        )

    def _decays(self, variable):
        return decays(variable) and not any(re.search(pattern, variable.path) for pattern in self.no_decay)

    def decayed(self, variables: Iterable[keras.Variable]) -> list[keras.Variable]:
        """Returns the members of `variables` that decay."""
        return [variable for variable in variables if self._decays(variable)]

    def _update_averages(self, trainable_variables):
        # Keras starts the average at the weights after step one, and keeps `ema_momentum**n` of them after n more.
        pairs = zip(self._averages(), trainable_variables, strict=True)
        pairs = [(average, variable) for average, variable in pairs if average is not None]
        last = 1.0 - self.ema_momentum
        if self._step is not None:
            updates = (self._step - 1) // (self.gradient_accumulation_steps or 1)
            return _backend.optimizer.move_averages(pairs, max(last, 9.0 / (updates + 9.0)))
        updates = ops.cast(self.iterations, "float32")
        # The maximum of the two, without `ops.maximum`: see `_clip_all`.
        share = last + ops.relu(9.0 / (updates + 9.0) - last)
        for average, variable in pairs:
            average.assign(average + ops.cast(share, average.dtype) * (variable - average))

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        super().finalize_variable_values(var_list)
        if self.use_ema:
            # Keras assigns the averages' own arrays to the model. On JAX `predict` or a second `fit` may donate these
            # buffers, which would free the averages too.
            for variable in var_list:
                variable.assign(ops.copy(variable))

    def apply(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[keras.Variable] | None = None
    ) -> None:
        if not self._counter or _backend.tensors.needs_static_shapes():
            return super().apply(grads, trainable_variables)
        before = self._counter.read(_keras_optimizers.step_counter(self))
        self._step = before + 1
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._step = None
        if len(grads):
            self._counter.keep(_keras_optimizers.step_counter(self), before + 1)

    def _current_learning_rate(self):
        schedule = self._given_learning_rate
        if self._step is None or not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            return super()._current_learning_rate()
        # A schedule runs many operations and reads values. On a GPU each read would synchronise.
        with keras.device("cpu"):
            return schedule(ops.convert_to_tensor(self._step - 1, _keras_optimizers.step_counter(self).dtype))

    def _update_all(self, grads, trainable_variables, learning_rate):
        if self._step is None:
            return super()._update_all(grads, trainable_variables, learning_rate)
        pairs = list(zip(trainable_variables, grads, strict=True))
        for shrinks, share in ((True, self.weight_decay or 0.0), (False, 0.0)):
            chosen = [pair for pair in pairs if self._decays_in_step(pair[0]) == shrinks]
            if chosen:
                self._step_together(*zip(*chosen, strict=True), learning_rate, share)

    def _step_together(self, variables, grads, learning_rate, decay):
        _backend.optimizer.fused_adamw(
            variables,
            grads,
            *self._slots(variables),
            step=self._step,
            rate=learning_rate,
            betas=(self.beta_1, self.beta_2),
            epsilon=self.epsilon,
            decay=decay,
        )

    def _clip_all(self, grads):
        # Keras takes the norm of each replica's gradient separately.
        total = _backend.processes.all_reduce_sum([g for g in grads if g is not None])
        norm = _backend.optimizer.global_norm(total)
        self.gradient_norm.assign(norm)
        if not self.global_clipnorm:
            return super()._clip_all(grads)
        # Like Keras, a non-finite norm makes the complete gradient NaN. `ops.maximum` is avoided: on PyTorch it copies
        # the number to the device and synchronises.
        scale = 1.0 / (1.0 + ops.relu(norm / self.global_clipnorm - 1.0)) + (norm - norm)
        return _backend.optimizer.scale_gradients(grads, scale)

    def _decay_all(self, variables):
        # Keras' method fails on PyTorch if no variable decays. The fused step applies decay itself.
        if self._step is None and any(self._decays_in_step(variable) for variable in variables):
            super()._decay_all(variables)

    def get_config(self) -> Config:
        return super().get_config() | {"no_decay": self.no_decay}


def schedule(
    steps: int, learning_rate: float = 1e-4, warmup: float = 0.1, final: float = 0.0
) -> keras.optimizers.schedules.CosineDecay:
    """Returns a schedule with linear warm-up from 0 and half-cosine decay.

    Args:
        steps: batches of the complete training.
        learning_rate: the peak learning rate.
        warmup: the share of the steps with a rising rate.
        final: the last learning rate, as a share of the peak.

    Returns:
        A `keras.optimizers.schedules.CosineDecay`.

    Raises:
        ValueError: for numbers out of range.
    """
    _checks.check_integer("steps", steps)
    _checks.check_number("learning_rate", learning_rate, low=0)
    _checks.check_number("warmup", warmup, low=0, high=1)
    _checks.check_number("final", final, low=0, high=1)
    rising = round(warmup * steps)
    falling = max(1, steps - rising)
    if not rising:
        return keras.optimizers.schedules.CosineDecay(learning_rate, falling, alpha=final)
    return keras.optimizers.schedules.CosineDecay(
        0.0, falling, alpha=final, warmup_target=learning_rate, warmup_steps=rising
    )


def optimizer(
    model: keras.Model,
    steps: int,
    learning_rate: float = 1e-4,
    warmup: float = 0.1,
    final: float = 0.0,
    weight_decay: float | None = 0.1,
    global_clipnorm: float | None = 1.0,
    **kwargs: Any,
) -> JambaAdamW:
    """Returns the optimizer for a model: AdamW with decay of matrices, clipping, warm-up and cosine decay.

    Args:
        model: a built model. Its variables are checked for decay and not changed.
        steps: batches of the complete training, `epochs * steps_per_epoch`.
        learning_rate, warmup, final: see `schedule`.
        weight_decay, global_clipnorm: see `JambaAdamW`.
        **kwargs: arguments of `JambaAdamW`: no_decay, gradient_accumulation_steps, use_ema, beta_2, ...

    Returns:
        A `JambaAdamW`, for `model.compile`.

    Raises:
        ValueError: for numbers out of range, a model without weights, or a model in which no weight would decay.

    Example:
        >>> import keras, keras_jamba
        >>> model = keras_jamba.DHCJamba.from_preset("small", load_weights=False)
        >>> optimizer = keras_jamba.training.optimizer(model, steps=10 * 200, learning_rate=1e-3)
        >>> model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    """
    _checks.check_number("weight_decay", weight_decay or 0, low=0)
    made = JambaAdamW(
        schedule(steps, learning_rate, warmup, final),
        weight_decay=weight_decay,
        global_clipnorm=global_clipnorm,
        **kwargs,
    )
    if not model.trainable_variables:
        raise ValueError(
            "An optimizer needs a model that has weights to train. "
            f"Received: {model.name!r}, built={model.built}. Build it, or call it on a batch, first."
        )
    if weight_decay and not made.decayed(model.trainable_variables):
        raise ValueError(
            "Weight decay must have something to act on. "
            f"Received: weight_decay={weight_decay} for {model.name!r}, none of whose variables decays. "
            "Pass weight_decay=None, or change no_decay."
        )
    return made
