"""The loss in chunks with rows on 2 devices is that of one device. A sharded vocabulary keeps all logits."""

import keras
import numpy as np

import keras_jamba
from keras_jamba import training
from keras_jamba.layers._token_embedding import TokenEmbedding
from keras_jamba.models import _chunked_loss
from keras_jamba.ops import cross_entropy

VOCABULARY = 64
USES, OWN = [], TokenEmbedding.cross_entropy


def counted(layer, features, targets):
    USES.append(features.shape)
    return OWN(layer, features, targets)


def step():
    """Returns the logs of a training step, the weights after it, and whether the loss was computed in chunks."""
    USES.clear()
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(vocab_size=VOCABULARY, d_model=8, num_layers=1, mamba_ratio=1)
    model.compile(keras.optimizers.SGD(1.0))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (4, 8)).astype("int32")
    logs = model.train_on_batch(tokens[:, :-1], tokens[:, 1:], return_dict=True)
    return list(map(float, logs.values())), [np.asarray(v.value) for v in model.trainable_variables], bool(USES)


def check(distribution, in_chunks, expected):
    with distribution.scope():
        logs, weights, used = step()
    assert used == in_chunks
    np.testing.assert_allclose(logs, expected[0], rtol=1e-6)
    for actual, value in zip(weights, expected[1], strict=True):
        np.testing.assert_allclose(actual, value, rtol=0, atol=1e-6)


def main():
    TokenEmbedding.cross_entropy = counted
    cross_entropy._FEWEST = 1
    for module in (cross_entropy, _chunked_loss):
        module.CHUNK_BYTES = 4 * VOCABULARY * 5
    expected = step()
    assert expected[2]
    devices = keras.distribution.list_devices("cpu")
    check(keras.distribution.DataParallel(devices=devices), True, expected)
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
    check(keras.distribution.ModelParallel(layout_map=training.layout_map(mesh)), False, expected)
    print("all are equal")


if __name__ == "__main__":
    main()
