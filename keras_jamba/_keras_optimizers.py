"""All private attributes of Keras' optimizers that the package uses; see `_keras_internals`."""

from typing import Any

import keras


def step_counter(optimizer):
    """Returns the variable that counts all steps, including steps that only accumulate gradients."""
    return optimizer._iterations


# On PyTorch, Keras replaces this class by its own AdamW, which updates all weights in one call.
_AdamW: Any = type(keras.optimizers.AdamW.__new__(keras.optimizers.AdamW))


def has_schedule(optimizer):
    """Returns whether the learning rate of an optimizer is a schedule, which is computed anew at each reading."""
    return isinstance(getattr(optimizer, "_learning_rate", None), keras.optimizers.schedules.LearningRateSchedule)


class AdamWHooks(_AdamW):
    """`keras.optimizers.AdamW` with stable names for its private hooks, which subclasses override."""

    def _exclude_more_from_weight_decay(self, variables):
        left_out = {self._var_key(variable) for variable in variables}
        self._exclude_from_weight_decay = getattr(self, "_exclude_from_weight_decay", set()) | left_out

    def _decays_in_step(self, variable):
        return self._use_weight_decay(variable)

    @property
    def _given_learning_rate(self):
        """Returns the learning rate as it was passed: a variable or a schedule."""
        return self._learning_rate

    def _averages(self):
        return self._model_variables_moving_average

    def _slots(self, variables):
        """Returns lists of momentums, velocities and maximum velocities. The last is [] without AMSGrad."""
        places = [self._get_variable_index(variable) for variable in variables]
        slots = [self._momentums, self._velocities, self._velocity_hats if self.amsgrad else None]
        return [[] if slot is None else [slot[i] for i in places] for slot in slots]

    def _update_model_variables_moving_average(self, trainable_variables):
        self._update_averages(trainable_variables)

    def _update_averages(self, trainable_variables):
        super()._update_model_variables_moving_average(trainable_variables)

    def _get_current_learning_rate(self):
        return self._current_learning_rate()

    def _current_learning_rate(self):
        return super()._get_current_learning_rate()

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        return self._update_all(grads, trainable_variables, learning_rate)

    def _update_all(self, grads, trainable_variables, learning_rate):
        return super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _clip_gradients(self, grads):
        return self._clip_all(grads)

    def _clip_all(self, grads):
        return super()._clip_gradients(grads)

    def _apply_weight_decay(self, variables):
        self._decay_all(variables)

    def _decay_all(self, variables):
        super()._apply_weight_decay(variables)
