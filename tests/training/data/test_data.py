"""Batches: the order of the data depends on seed and step only, in `fit` and after resuming."""

import warnings

import keras
import numpy as np
import pytest
from checks import full

import keras_jamba
from keras_jamba.training.data import Batches

EXAMPLES, BATCH, STEPS = 16, 3, 5  # one example is left out each epoch


def numbered(**arguments):
    """Returns batches whose targets are the indices of the examples."""
    ids = np.arange(EXAMPLES, dtype="float32")[:, None]
    return Batches((np.ones_like(ids), ids), BATCH, **arguments)


def remembering_model():
    """Returns a model whose single weight encodes the order of the batches.

    Each step replaces the weight by the mean of the weight and the batch's targets.
    """
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.25), "mse")
    return model


def remembered(batches, steps):
    weight = np.float64(0)
    for step in steps:
        weight = (weight + batches.batch(step)[1].mean()) / 2
    return weight


def weight_of(model):
    return float(model.get_weights()[0][0, 0])


class StartWithinEpoch(keras.callbacks.Callback):
    """Callback that starts the first epoch at a given step, as a checkpoint does, and counts steps."""

    def __init__(self, batches, step_in_epoch):
        super().__init__()
        self.batches, self.step_in_epoch, self.steps = batches, step_in_epoch, []

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.begin_epoch(epoch, self.step_in_epoch)
        self.step_in_epoch = 0
        self.steps.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.steps[-1] += 1


def test_a_batch_is_a_function_of_seed_and_step():
    noise = dict(transform=lambda batch, rng: (batch[0] + rng.normal(size=batch[0].shape), batch[1]))
    one, other = numbered(seed=4, **noise), numbered(seed=4, **noise)
    expected = [one.batch(step) for step in range(3 * STEPS)]
    for step in (14, 0, 7, 7, 3):
        for a, b in zip(other.batch(step), expected[step], strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(numbered(seed=5).batch(0)[1], expected[0][1])
    assert not np.array_equal(expected[0][0], expected[1][0])


def test_each_example_comes_once_per_epoch_in_a_new_order():
    batches = numbered(drop_last=False)
    orders = [np.concatenate([batches.batch(e * 6 + i)[1] for i in range(6)])[:, 0] for e in range(3)]
    for order in orders:
        assert sorted(order) == list(range(EXAMPLES))
    assert len({tuple(order) for order in orders}) == 3
    assert len(numbered()) == numbered().steps_per_epoch == STEPS
    in_order = numbered(shuffle=False)
    np.testing.assert_array_equal(in_order.batch(STEPS + 1)[1][:, 0], [3, 4, 5])


def test_structures_single_arrays_and_lists_of_examples_are_accepted():
    a, b = np.arange(6), np.arange(12).reshape(6, 2)
    x, y, weight = Batches(({"a": a, "b": (b, a)}, a, a), 2, shuffle=False).batch(1)
    np.testing.assert_array_equal(x["b"][0], b[2:4])
    np.testing.assert_array_equal(y, weight)
    np.testing.assert_array_equal(Batches(b, 2, shuffle=False).batch(2), b[4:])
    x, y = Batches([({"a": row}, i) for i, row in enumerate(b)], 2, shuffle=False).batch(1)
    np.testing.assert_array_equal(x["a"], b[2:4])
    np.testing.assert_array_equal(y, [2, 3])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("built", [False, True], ids=["unbuilt", "built"])
def test_fit_gets_the_batches_in_order(workers, built):
    model, batches = remembering_model(), numbered(seed=1, workers=workers)
    if built:
        # Keras draws a batch to build losses and metrics. A built model does not require it.
        model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    model.fit(batches, epochs=2, verbose=0)
    assert weight_of(model) == pytest.approx(remembered(batches, range(2 * STEPS)), abs=1e-5)
    assert weight_of(model) != pytest.approx(remembered(batches, range(STEPS)), abs=1e-2)
    model.fit(batches, epochs=1, verbose=0)
    assert weight_of(model) == pytest.approx(remembered(batches, range(3 * STEPS)), abs=1e-5)


@full("jax", "tensorflow")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("before_fit", [False, True], ids=["in_callback", "before_fit"])
def test_a_fit_resumed_within_an_epoch_equals_an_uninterrupted_one(workers, before_fit):
    complete = remembering_model()
    complete.fit(numbered(seed=2), epochs=4, verbose=0)
    interrupted, batches = remembering_model(), numbered(seed=2, workers=workers)
    for step in range(STEPS + 2):
        interrupted.train_on_batch(*batches.batch(step))
    resumed = remembering_model()
    resumed.set_weights(interrupted.get_weights())
    if before_fit:
        batches.begin_epoch(1, 2)
    start = StartWithinEpoch(batches, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        resumed.fit(batches, initial_epoch=1, epochs=4, verbose=0, callbacks=[start])
    assert start.steps == [STEPS - 2, STEPS, STEPS]
    assert weight_of(resumed) == weight_of(complete)


def test_validation_and_prediction_see_each_batch():
    model = remembering_model()
    train, validation = numbered(), numbered(shuffle=False)
    history = model.fit(train, validation_data=validation, epochs=2, verbose=0).history
    targets = np.concatenate([validation.batch(i)[1] for i in range(STEPS)])
    assert history["val_loss"][-1] == pytest.approx(((weight_of(model) - targets) ** 2).mean(), rel=1e-4)
    assert model.evaluate(validation, verbose=0) == pytest.approx(history["val_loss"][-1])
    assert model.predict(validation, verbose=0).shape == (STEPS * BATCH, 1)


def test_iteration_starts_at_the_step_of_begin_epoch():
    batches = numbered(workers=2)
    batches.begin_epoch(3, 2)
    seen = [y for _, y in batches]
    np.testing.assert_array_equal(seen, [batches.batch(3 * STEPS + i)[1] for i in (2, 3, 4)])
    with pytest.raises(IndexError, match=r"from 0 to 2. Received: 3"):
        batches[3]


def test_errors_of_a_transform_reach_the_caller_from_a_thread():
    def broken(batch, rng):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        numbered(transform=broken, workers=2)[0]


def test_an_unknown_keras_adapter_causes_a_warning():
    with pytest.warns(UserWarning, match="shuffle=False"):
        numbered().on_epoch_begin()


@pytest.mark.parametrize(
    "data, arguments, message",
    [
        ((np.ones(3), np.ones(4)), {}, r"equally many examples.*\(3,\), \(4,\).*Check"),
        ((np.ones(1),), {}, r"fill a batch.*1 examples, batch_size=2.*drop_last=False"),
        ((np.ones(0),), {"drop_last": False}, "0 examples"),
        ([], {}, "0 examples"),
        ((np.ones(4),) * 4, {}, "a tuple of 4"),
        ((np.ones(4), [1, 2, 3, 4]), {}, "arrays.*int.*numpy.asarray"),
        ((np.ones(4), np.ones(4), None), {}, "NoneType.*leave out"),
        (iter([1, 2]), {}, "with a length.*list_iterator"),
        (np.ones(4), {"seed": 1.5}, "seed must be an integer.*1.5"),
        (np.ones(4), {"seed": -1}, "seed must be an integer.*-1"),
        (np.ones(4), {"batch_size": 0}, "batch_size must be an integer.*0"),
        (np.ones(4), {"workers": True}, "workers must be an integer.*True"),
        (np.ones(4), {"transform": 3}, "transform must be a function.*3"),
    ],
)
def test_errors_give_the_rule_what_was_received_and_the_remedy(data, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Batches(data, **{"batch_size": 2} | arguments)


def test_steps_outside_of_an_epoch_are_refused():
    with pytest.raises(ValueError, match=r"below steps_per_epoch=5. Received: step_in_epoch=5.*begin_epoch\(3\)"):
        numbered().begin_epoch(2, 5)
    with pytest.raises(ValueError, match="epoch must be an integer"):
        numbered().begin_epoch(-1)
    with pytest.raises(ValueError, match="step must be an integer"):
        numbered().batch(0.5)


# Every data source that Keras accepts.

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.random((8, 8, 8, 1), "float32"), RNG.integers(0, 3, 8).astype("int32")


class Plain(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return IMAGES[4 * i :][:4], LABELS[4 * i :][:4]


def tf_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(4, drop_remainder=True)


def torch_loader():
    import torch

    pairs = torch.utils.data.TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS))
    return torch.utils.data.DataLoader(pairs, batch_size=4)


class Pairs:
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return IMAGES[i], LABELS[i]


def grain_map():
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(Pairs()).batch(4)


def grain_loader():
    grain = pytest.importorskip("grain")
    sampler = grain.samplers.SequentialSampler(len(IMAGES), grain.sharding.NoSharding())
    return grain.DataLoader(data_source=Pairs(), sampler=sampler, operations=[grain.transforms.Batch(4)])


SOURCES = {
    "ours": lambda: Batches((IMAGES, LABELS), 4, shuffle=False),
    "ours_of_pairs": lambda: Batches(Pairs(), 4, shuffle=False, workers=2),
    "keras": Plain,
    "tf_data": tf_data,
    "torch": torch_loader,
    "grain_map": grain_map,
    "grain_loader": grain_loader,
}


@pytest.fixture(scope="module")
def image_model():
    model = keras_jamba.DHCJamba(3, (8, 8, 1), d_model=4, num_layers=1, mamba_ratio=None, d_ff=4, d_state=2)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, model.get_weights()


@full("jax", "tensorflow")
# Keras learns the length of Grain's data at their end, and warns that the input ran out.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("source", SOURCES)
def test_a_model_trains_on_every_data_source_of_keras(image_model, source):
    model, start = image_model
    data = SOURCES[source]()
    model.set_weights(start)
    for first in (0, 4, 0, 4):
        model.train_on_batch(IMAGES[first:][:4], LABELS[first:][:4])
    expected = model.get_weights()
    model.set_weights(start)
    # Keras warns by default that it does not shuffle such data.
    model.fit(data, epochs=2, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert any(not np.array_equal(a, c) for a, c in zip(model.get_weights(), start, strict=True))


def test_shards_divide_the_complete_batch():
    data = np.arange(24.0), np.arange(24)
    complete = Batches(data, batch_size=6, seed=1)
    shards = [Batches(data, batch_size=6, seed=1, shard=(index, 3)) for index in range(3)]
    for step in (0, 3, 5):
        x = np.empty(6)
        for index, shard in enumerate(shards):
            x[index::3] = shard.batch(step)[0]
        np.testing.assert_array_equal(x, complete.batch(step)[0])
    with pytest.raises(ValueError, match=r"shard must be.*Received: shard=\(0, 4\), batch_size=6"):
        Batches(data, batch_size=6, shard=(0, 4))
    with pytest.raises(ValueError, match="equal parts.*Received: .*drop_last=False"):
        Batches(data, batch_size=6, shard=(0, 3), drop_last=False)
