"""Models split among 8 devices take the steps of one device: in a process of its own."""

import keras
import numpy as np

import keras_jamba
from keras_jamba import training

SHAPES = ((2, 4), (4, 2), (1, 8))
WIDE = dict(d_model=32, num_layers=4, mamba_ratio=1, num_heads=8, num_kv_heads=8, num_experts=8, d_ff=64)


def language_model():
    model = keras_jamba.JambaCausalLM(vocab_size=64, **WIDE)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype("int32")
    return model, tokens[:, :-1], tokens[:, 1:]


def image_model():
    model = keras_jamba.DHCJamba(num_classes=8, image_shape=(8, 8, 3), downsample=2, **WIDE)
    rng = np.random.default_rng(0)
    return model, rng.random((8, 8, 8, 3)).astype("float32"), rng.integers(0, 8, 8)


def steps(make):
    keras.utils.set_random_seed(0)
    model, x, y = make()
    loss = None if make is language_model else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, **({} if loss is None else {"loss": loss}))
    losses = [float(model.train_on_batch(x, y, return_dict=True)["loss"]) for _ in range(3)]
    weights = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    return losses, weights, model, optimizer


def main():
    for make in (language_model, image_model):
        losses, weights, *_ = steps(make)
        for shape in SHAPES:
            mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), keras.distribution.list_devices("cpu"))
            with keras.distribution.ModelParallel(layout_map=training.layout_map(mesh)).scope():
                found, others, model, optimizer = steps(make)
            worst = max(np.abs(others[path] - weights[path]).max() for path in weights)
            print(make.__name__, shape, losses, found, worst, flush=True)
            np.testing.assert_allclose(found, losses, rtol=1e-5)
            assert worst < 1e-5
            for v in model.trainable_variables + optimizer.variables:
                whole = v.value.size == v.value.addressable_shards[0].data.size
                assert whole == (not v._layout or all(axis is None for axis in v._layout.axes)), v.path
    print("all are equal")


if __name__ == "__main__":
    main()
