"""An interrupt of fit, evaluate or predict at any line leaves the model usable."""

import warnings

import keras
import numpy as np
import pytest
from checks import full
from interrupts import IDS, at_line, batches, compiled_model, problems, process_state

from keras_jamba import training

# A scope of Keras stays open if an interrupt arrives between two lines of these files.
SCOPES = ("name_scope.py", "global_state.py", "stateless_scope.py", "symbolic_scope.py", "tracking.py", "jax/core.py")
LOOPS = ("keras_jamba/models/_training_loops.py", "keras_jamba/_backend/jax/_loops.py")


@pytest.fixture(scope="module")
def model():
    found = compiled_model()
    for kind in CALLS:
        CALLS[kind](found)
    return found


CALLS = {
    "fit": lambda model: model.fit(batches(), epochs=2, verbose=0, validation_data=(IDS[4:6], IDS[4:6])),
    "evaluate": lambda model: model.evaluate(IDS[4:6], IDS[4:6], verbose=0),
    "predict": lambda model: model.predict(IDS[4:6], verbose=0),
}


def interrupted_everywhere(model, kind, step, files=LOOPS):
    """Interrupts a call at every `step`-th line of its loops. Returns the number of interrupts."""
    before, wanted, count = process_state(), 0, 0
    while True:
        lines, error = at_line(lambda: CALLS[kind](model), files, wanted)
        assert problems(model, before) == [], lines[-1]
        if len(lines) <= wanted:
            return count
        assert isinstance(error, KeyboardInterrupt), (lines[-1], error)
        wanted, count = wanted + step, count + 1


@full("jax", "tensorflow")
def test_an_interrupted_fit_leaves_the_model_usable(model):
    assert interrupted_everywhere(model, "fit", step=29) > 1


@full()
@pytest.mark.parametrize("kind", CALLS)
def test_an_interrupt_at_any_line_leaves_the_model_usable(model, kind):
    assert interrupted_everywhere(model, kind, step=3) > 10


@full()
@pytest.mark.parametrize("kind", CALLS)
def test_an_interrupt_in_a_scope_of_keras_leaves_no_scope_open(model, kind):
    model.make_train_function(force=True)  # traced anew
    assert interrupted_everywhere(model, kind, step=2, files=SCOPES) > 2


@full("jax", "tensorflow")
def test_a_load_that_is_interrupted_in_a_scope_of_keras_leaves_no_scope_open(tmp_path, model):
    model.save_to_preset(tmp_path / "a")
    before, wanted, error = process_state(), 0, True
    while error is not None:
        lines, error = at_line(lambda: type(model).from_preset(tmp_path / "a"), SCOPES, wanted)
        assert process_state() == before, lines[-1]
        wanted += 7
    assert wanted > 30


@full("jax", "tensorflow")
@pytest.mark.parametrize(
    "moment, error",
    [
        ("on_train_begin", SystemExit),
        ("on_train_batch_end", KeyboardInterrupt),
        ("on_test_batch_end", ValueError),
        ("on_epoch_end", KeyboardInterrupt),
    ],
)
def test_an_exception_in_a_callback_leaves_the_model_usable(model, error, moment):
    def stop(*args, **kwargs):
        raise error

    callback, before = keras.callbacks.Callback(), process_state()
    setattr(callback, moment, stop)
    with pytest.raises(error):
        model.fit(batches(), epochs=1, verbose=0, validation_data=(IDS[4:6], IDS[4:6]), callbacks=[callback])
    assert problems(model, before) == []


@full("jax", "tensorflow")
def test_an_interrupted_fit_with_a_checkpoint_changes_no_later_fit(tmp_path, model):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    def fit():
        data = batches()
        checkpoint = training.Checkpoint(tmp_path, data, every=1)
        with pytest.raises(KeyboardInterrupt):
            model.fit(data, epochs=3, verbose=0, callbacks=[checkpoint, Stop()])
        return checkpoint

    model.optimizer.iterations.assign(0)
    filters = list(warnings.filters)
    fit()
    # The second fit resumes within the epoch, and ignores a warning of Keras until the epoch ends.
    resumed = fit()
    assert resumed._done == 2 and warnings.filters == filters
    history = model.fit(batches(), epochs=2, verbose=0)
    assert history.epoch == [0, 1] and np.isfinite(history.history["loss"]).all()
