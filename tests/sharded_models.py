"""Models split among 8 devices take the steps of one device: in a process of its own."""

import functools
import sys
from pathlib import Path

import jax
import keras
import numpy as np

import keras_jamba
from keras_jamba import training
from keras_jamba.ops import expert_mlp
from keras_jamba.ops.experts import parallel

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from collectives import collectives  # noqa: E402

# The mesh; whether tokens are split too; whether the first axis shares matrices.
SPLIT = {
    "language_model": [((2, 4), False, False), ((1, 8), True, False), ((4, 2), False, True)],
    "image_model": [((4, 2), False, False), ((2, 4), True, True)],
}
WIDE = dict(d_model=32, num_layers=4, mamba_ratio=1, num_heads=8, num_kv_heads=2, num_experts=8, d_ff=64)


def distribution(shape, *how):
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), keras.distribution.list_devices("cpu"))
    return keras.distribution.ModelParallel(layout_map=training.layout_map(mesh, *how))


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
    if keras.distribution.distribution() is not None:
        # None stays where another model of this process was.
        meshes = {tuple(v.value.sharding.mesh.shape.values()) for v in model.variables}
        assert meshes == {keras.distribution.distribution().device_mesh.shape}
    loss = None if make is language_model else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, **({} if loss is None else {"loss": loss}))
    losses = [float(model.train_on_batch(x, y, return_dict=True)["loss"]) for _ in range(3)]
    weights = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    return losses, weights, model, optimizer


def check_an_empty_cache(model):
    """It lies in parts from the beginning; two key-value heads are not divided by four."""
    parts = {"conv": 8, "ssm": 8, "key": 2, "value": 2}
    for each in model.init_cache(8, 64).values():
        for name, x in each.items():
            assert x.addressable_shards[0].data.size * parts.get(name, 2) == x.size, (name, x.sharding)


def greedy(model):
    return np.asarray(model.generate(np.arange(20).reshape(4, 5) % 64, max_length=12))


def check_what_travels_to_experts():
    """As many bytes as the rows that there is room for have, there and back, in both branches of the program."""
    tokens, k, experts, d, f, count = 1024, 2, 8, 64, 128, 8
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    indices = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype("int32")
    given = normal(tokens, d), rng.random((tokens, k), "float32"), indices
    given += normal(experts, d, f), normal(experts, f, d), normal(experts, d, f)
    with distribution((1, count)).scope():
        compiled = jax.jit(lambda *given: expert_mlp(*given)).lower(*given).compile()
        found = np.asarray(compiled(*given))
    np.testing.assert_allclose(found, np.asarray(expert_mlp(*given, implementation="dense")), rtol=1e-4, atol=1e-4)
    own = tokens // count
    row = 4 * (2 * d + 2 * k)
    expected = count * row * (own + parallel.room_for(own, k, count))
    assert collectives(compiled.as_text())["all-to-all"][1] == expected


def check_few_tokens_fetch_no_experts():
    """Of fewer tokens than devices none gets a bank of another device."""
    given = np.ones((3, 16), "float32"), np.ones((3, 2), "float32"), np.tile([3, 2], (3, 1)).astype("int32")
    split = distribution((2, 4))
    layout = keras.distribution.TensorLayout(("model", None, None), split.device_mesh)
    with split.scope():
        for shape in ((8, 16, 24), (8, 24, 16), (8, 16, 24)):
            given += (keras.distribution.distribute_tensor(np.ones(shape, "float32"), layout),)
        compiled = jax.jit(lambda *given: expert_mlp(*given)).lower(*given).compile()
    bank = 4 * 8 * 16 * 24
    assert sum(size for _, size in collectives(compiled.as_text()).values()) < bank


def check_any_routing(tokens):
    """All tokens to the same experts: more than there is room for, if there are many."""
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((tokens, 16)).astype("float32"), rng.random((tokens, 2), "float32")]
    given += [np.tile([3, 2], (tokens, 1)).astype("int32")]
    given += [rng.standard_normal(shape).astype("float32") for shape in ((8, 16, 24), (8, 24, 16), (8, 16, 24))]

    def gradients(*given, implementation):
        loss = lambda tokens, weights, *banks: (  # noqa: E731
            expert_mlp(tokens, weights, given[2], *banks, implementation=implementation) ** 2
        ).sum()
        return jax.grad(loss, argnums=tuple(range(5)))(*given[:2], *given[3:])

    expected = gradients(*given, implementation="dense")
    for shape in ((2, 4), (1, 8)):
        with distribution(shape).scope():
            found = jax.jit(functools.partial(gradients, implementation=None))(*given)
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=1e-3, atol=1e-4 * np.abs(e).max())


def main():
    check_what_travels_to_experts()
    check_any_routing(64)
    check_any_routing(8)  # as many as a step of decoding has
    check_any_routing(3)
    check_few_tokens_fetch_no_experts()
    for make in (language_model, image_model):
        losses, weights, model, _ = steps(make)
        tokens = greedy(model) if make is language_model else None
        for how in SPLIT[make.__name__]:
            with distribution(*how).scope():
                found, others, model, optimizer = steps(make)
                if make is language_model:
                    if how[0] == (2, 4):
                        check_an_empty_cache(model)
                    np.testing.assert_array_equal(greedy(model), tokens)
            worst = max(np.abs(others[path] - weights[path]).max() for path in weights)
            print(make.__name__, *how, losses, found, worst, flush=True)
            np.testing.assert_allclose(found, losses, rtol=1e-5)
            assert worst < 1e-5
            for v in model.trainable_variables + optimizer.variables:
                whole = v.value.size == v.value.addressable_shards[0].data.size
                assert whole == (not v._layout or all(axis is None for axis in v._layout.axes)), v.path
                if how[2] and v._layout and "model" in v._layout.axes and "ssm" not in v.path:
                    assert 8 * v.value.addressable_shards[0].data.size == v.value.size, v.path
    print("all are equal")


if __name__ == "__main__":
    main()
