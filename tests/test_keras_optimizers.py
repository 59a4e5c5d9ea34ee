"""Every private attribute of Keras' optimizers that the package uses does what `_keras_optimizers` says.

`make test-nightly` runs this file with keras-nightly.
"""

import keras
import numpy as np
from keras import ops

from keras_jamba import _keras_optimizers as optimizers


class Recording(optimizers.AdamWHooks):
    seen = ()

    def _note(self, name, *given):
        self.seen += (name,)
        return getattr(super(), name)(*given)

    def _update_averages(self, trainable_variables):
        return self._note("_update_averages", trainable_variables)

    def _current_learning_rate(self):
        return self._note("_current_learning_rate")

    def _update_all(self, grads, trainable_variables, learning_rate):
        return self._note("_update_all", grads, trainable_variables, learning_rate)

    def _clip_all(self, grads):
        return self._note("_clip_all", grads)

    def _decay_all(self, variables):
        return self._note("_decay_all", variables)


def stepped(optimizer):
    variables = [keras.Variable([[1.0, -2.0]], name="kernel"), keras.Variable([3.0], name="bias")]
    if isinstance(optimizer, optimizers.AdamWHooks):
        optimizer._exclude_more_from_weight_decay([variables[1]])
    optimizer.build(variables)
    for _ in range(2):
        optimizer.apply([ops.convert_to_tensor([[0.5, 1.0]]), ops.convert_to_tensor([2.0])], variables)
    return variables


def test_adamw_hooks_change_no_step():
    given = dict(weight_decay=0.1, clipnorm=1.0, use_ema=True, amsgrad=True)
    mine, theirs = Recording(0.1, **given), keras.optimizers.AdamW(0.1, **given)
    theirs.exclude_from_weight_decay(var_names=["bias"])
    found, expected = stepped(mine), stepped(theirs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    assert set(mine.seen) == {name for name in vars(Recording) if name.startswith("_") and name[1] not in "_n"}
    assert [mine._decays_in_step(variable) for variable in found] == [True, False]
    assert [list(v.shape) for slots in mine._slots(found) for v in slots] == [[1, 2], [1]] * 3
    assert len(mine._averages()) == 2
    assert int(optimizers.step_counter(mine)) == 2


def test_the_given_schedule_is_found():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert optimizers.AdamWHooks(schedule)._given_learning_rate is schedule
