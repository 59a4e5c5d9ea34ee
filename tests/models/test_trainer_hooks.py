"""Hooks of our models in Keras' loops: the host checks the first batch of each loop, and no data changes."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.utils.tracking import Tracker

from keras_jamba import training
from keras_jamba.models import JambaBackbone

pytestmark = pytest.mark.filterwarnings("ignore:.*(shuffle=True|ran out of data|jit_compile).*")
BACKEND = keras.backend.backend()
X = np.arange(6, dtype="float32")[:, None, None] * np.ones((1, 2, 4), "float32")
Y = np.zeros((6, 2, 4), "float32")


def ids(x):
    return [int(i) for i in ops.convert_to_numpy(x)[:, 0, 0]]


class Watched(JambaBackbone):
    """A model that records checked and trained examples, and refuses negative examples."""

    def __init__(self):
        super().__init__(d_model=4, num_layers=1, mamba_ratio=None, mixer="gated_conv", d_ff=0)
        self.checked, self.seen, self.traced, self.inside = [], [], 0, set()

    def check_batch(self, x, y=None, sample_weight=None):
        x = x["features"] if isinstance(x, dict) else x
        self.checked.append(ids(x))
        self.weights_in_check = [ops.convert_to_numpy(v).copy() for v in self.weights]
        self.inside.add(self._inside_step)
        if ops.convert_to_numpy(x).min() < 0:
            raise ValueError("negative")

    def call(self, features, **given):
        self.inside.add(("call", self._inside_step))
        features = features["features"] if isinstance(features, dict) else features
        if self.run_eagerly and self._inside_step:
            self.seen.append(ids(features))
        else:
            self.traced += 1
        return super().call(features, **given)


def watched(**compiled):
    model = Watched()
    model.compile("sgd", "mse", **compiled)
    return model


class Slow(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[2 * i : 2 * i + 2], Y[2 * i : 2 * i + 2]


def pairs(*more):
    for i in range(0, 6, 2):
        yield (X[i : i + 2], Y[i : i + 2], *more)


def endless():
    while True:
        yield from pairs()


def tf_data(repeat=False):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(2)
    return data.repeat() if repeat else data


def loader():
    import torch

    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(data, batch_size=2)


def grains():
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(list(zip(X, Y, strict=True))).batch(2)


KINDS = {
    "arrays": lambda: dict(x=X, y=Y, batch_size=2),
    "tensors": lambda: dict(x=ops.convert_to_tensor(X), y=ops.convert_to_tensor(Y), batch_size=2),
    "a dict": lambda: dict(x={"features": X}, y=Y, batch_size=2),
    "workers": lambda: dict(x=Slow(workers=2)),
    "Batches": lambda: dict(x=training.Batches((X, Y), 2, shuffle=False)),
    "a generator": lambda: dict(x=pairs()),
    "a generator with None": lambda: dict(x=pairs(None)),
    "an endless generator": lambda: dict(x=endless(), steps_per_epoch=3),
    "tf.data": lambda: dict(x=tf_data()),
    "endless tf.data": lambda: dict(x=tf_data(True), steps_per_epoch=3),
    "a DataLoader": lambda: dict(x=loader()),
    "grain": lambda: dict(x=grains()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_batch_is_checked_and_every_step_gets_its_data(kind):
    model = watched(run_eagerly=True)
    model.test_on_batch({"features": X} if kind == "a dict" else X, Y)
    model.checked, model.seen = [], []
    model.fit(**KINDS[kind](), shuffle=False, verbose=0)
    assert model.checked == [[0, 1]] and model.seen == [[0, 1], [2, 3], [4, 5]]
    evaluated = {"steps" if name == "steps_per_epoch" else name: value for name, value in KINDS[kind]().items()}
    model.checked, model.seen = [], []
    model.evaluate(**evaluated, verbose=0)
    assert model.checked == [[0, 1]] and model.seen == [[0, 1], [2, 3], [4, 5]]
    model.checked, model.seen = [], []
    evaluated = {"steps" if name == "steps_per_epoch" else name: value for name, value in KINDS[kind]().items()}
    evaluated.pop("y", None)
    assert model.predict(**evaluated, verbose=0).shape == X.shape
    assert model.checked == [[0, 1]] and model.seen == [[0, 1], [2, 3], [4, 5]]
    assert model.inside == {False, ("call", False), ("call", True)} or model.inside == {False, ("call", True)}


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on PyTorch")
@pytest.mark.parametrize("kind", ["arrays", "a generator", "a generator with None", "tf.data", "endless tf.data"])
def test_executions_of_several_steps_receive_their_data(kind):
    model = watched(run_eagerly=True, steps_per_execution=2)
    given = KINDS[kind]()
    model.fit(**given, shuffle=False, verbose=0)
    assert model.seen == [[0, 1], [2, 3], [4, 5]] or (kind == "endless tf.data" and model.seen[3:] == [[0, 1]])


def test_checks_trace_nothing_and_skip_later_epochs():
    model = watched()
    model.fit(X, Y, batch_size=2, epochs=2, verbose=0, shuffle=False, validation_data=(X[::-1], Y))
    first = model.traced
    model.fit(X, Y, batch_size=2, verbose=0, shuffle=False)
    model.evaluate(X, Y, batch_size=2, verbose=0)
    if BACKEND != "torch":
        assert model.traced == first
    # First fit: the batch that gives Keras its shapes, the first batch, one per validation. Later loops: one each.
    checked = model.checked if BACKEND == "tensorflow" else model.checked[1:]
    assert checked == [[0, 1], [5, 4], [5, 4], [0, 1], [0, 1]]


@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}])
def test_a_refused_batch_leaves_weights_and_model_as_they_were(compiled):
    model = watched(**compiled)
    before = [ops.convert_to_numpy(v).copy() for v in model.weights]
    for again in range(2):
        for run in (
            lambda: model.fit(-1 - X, Y, verbose=0),
            lambda: model.evaluate(-1 - X, Y, verbose=0),
            lambda: model.predict(-1 - X, verbose=0),
            lambda: model.train_on_batch(-1 - X, Y),
            lambda: model.test_on_batch(-1 - X, Y),
            lambda: model.predict_on_batch(-1 - X),
        ):
            with pytest.raises(ValueError, match="^negative$"):
                run()
            for old, seen, new in zip(before, model.weights_in_check, model.weights, strict=True):
                np.testing.assert_array_equal(seen, old)
                np.testing.assert_array_equal(ops.convert_to_numpy(new), old)
        if not again:
            model.fit(X, Y, verbose=0)
            before = [ops.convert_to_numpy(v).copy() for v in model.weights]


def test_an_evaluation_inside_fit_counts_only_its_own_batches():
    """The callback closes over the model; `Callback.model` of Keras would fetch the values of fit first."""
    keras.utils.set_random_seed(0)
    model, found, expected = watched(metrics=["mae"]), [], []

    class Evaluates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            found.append(list(model.evaluate(10 + X, Y, batch_size=2, verbose=0, return_dict=True).values()))
            copy = watched(metrics=["mae"])
            copy.build(X.shape)
            copy.set_weights(model.get_weights())
            expected.append(list(copy.evaluate(10 + X, Y, batch_size=2, verbose=0, return_dict=True).values()))

    model.fit(X, Y, batch_size=2, verbose=0, shuffle=False, callbacks=[Evaluates()])
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.skipif(BACKEND != "jax", reason="other backends keep no state between steps")
def test_steps_leave_the_state_of_a_loop_untracked(monkeypatch):
    """Keras tracks attributes of layers. Tracking all arrays after each step took half of the host's time on JAX."""
    tracked, track = [], Tracker.track
    monkeypatch.setattr(Tracker, "track", lambda self, value: tracked.append(value) or track(self, value))
    model, counts = watched(), []
    for epochs in (1, 1, 4):
        tracked.clear()
        model.fit(X, Y, batch_size=2, epochs=epochs, verbose=0)
        counts.append(sum(keras.ops.is_tensor(value) for value in tracked))
    assert counts[1] == counts[2]


class WithOwnStep(JambaBackbone):
    """A model whose step on JAX returns the first variable changed by `change`."""

    def __init__(self, change, **options):
        super().__init__(d_model=4, num_layers=1, mamba_ratio=None, mixer="gated_conv", d_ff=0, **options)
        self.change = change

    def train_step(self, state, data):
        logs, (trained, *others) = super().train_step(state, data)
        return logs, ([self.change(trained[0]), *trained[1:]], *others)


@pytest.mark.skipif(BACKEND != "jax", reason="other backends assign variables in their steps")
def test_values_of_a_step_are_cast_to_their_variables_and_other_shapes_are_refused():
    model = WithOwnStep(lambda value: value.astype("float32"), dtype="bfloat16")
    model.compile("sgd", "mse")
    for step in (lambda: model.fit(X, Y, batch_size=2, verbose=0), lambda: model.train_on_batch(X, Y)):
        step()
        assert {str(v.value.dtype) for v in model.trainable_variables} == {"bfloat16"}
    model = WithOwnStep(lambda value: value.reshape(-1, 1, 1))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="shape of the target variable"):
        model.train_on_batch(X, Y)


@pytest.mark.skipif(BACKEND != "jax", reason="only Keras' trainer on JAX asks the model for these lists")
def test_a_model_may_choose_the_variables_that_train():
    class Chosen(Watched):
        @property
        def trainable_variables(self):
            return self.final_norm.trainable_variables

        @property
        def non_trainable_variables(self):
            chosen = {id(v) for v in self.trainable_variables}
            return [v for v in self.variables if id(v) not in chosen]

    model = Chosen()
    model.compile("sgd", "mse")
    before = {v.path: ops.convert_to_numpy(v).copy() for v in model.weights}
    model.fit(X, Y, batch_size=2, verbose=0)
    changed = {v.path for v in model.weights if (ops.convert_to_numpy(v) != before[v.path]).any()}
    assert changed == {v.path for v in model.final_norm.trainable_variables}
    assert model.predict(X, verbose=0).shape == X.shape
