"""Models sharded over 8 devices take the training steps of one device. Runs in its own process."""

import functools
import sys
from pathlib import Path

import jax
import keras
import numpy as np

import keras_jamba
from keras_jamba import training
from keras_jamba.ops import expert_mlp, quantization, selective_scan

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.scaling.collectives import collectives, usual_collectives  # noqa: E402

# The mesh shape; whether tokens are sharded too; whether the first axis shards matrices.
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
        # No variable may keep the mesh of an earlier model in this process.
        meshes = {tuple(v.value.sharding.mesh.shape.values()) for v in model.variables}
        assert meshes == {keras.distribution.distribution().device_mesh.shape}
    loss = None if make is language_model else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, **({} if loss is None else {"loss": loss}))
    losses = [float(model.train_on_batch(x, y, return_dict=True)["loss"]) for _ in range(3)]
    weights = {v.path: np.asarray(v.value) for v in model.trainable_variables}
    return losses, weights, model, optimizer


def check_an_empty_cache(model):
    """Checks that an empty cache is sharded. Two key-value heads cannot be divided by four devices."""
    shards = {"conv": 8, "ssm": 8, "key": 2, "value": 2}
    for each in model.init_cache(8, 64).values():
        for name, x in each.items():
            assert x.addressable_shards[0].data.size * shards.get(name, 2) == x.size, (name, x.sharding)


def greedy(model):
    return np.asarray(model.generate(np.arange(20).reshape(4, 5) % 64, max_length=12))


def check_bytes_sent_to_experts():
    """Checks that tokens sent to experts and back take 1.5 times the bytes of an even routing."""
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
    # 128 tokens per device make 2 choices each, and each device receives an eighth of them.
    # A choice sends a token, its output, 2 weights and 2 indices.
    expected = 1.5 * (128 * 2) * (4 * 64 + 4 * 64 + 4 * 2 + 4 * 2)
    assert abs(usual_collectives(compiled.as_text())["all-to-all"][1] / expected - 1) < 0.1


def banks(split, mode=None):
    """Yields the three banks of eight experts, sharded over the model axis, in floating point or quantized."""
    layout = lambda x: keras.distribution.TensorLayout(("model",) + (None,) * (x.ndim - 1), split.device_mesh)  # noqa: E731
    sharded = lambda x: keras.distribution.distribute_tensor(x, layout(x))  # noqa: E731
    for shape in ((8, 16, 24), (8, 24, 16), (8, 16, 24)):
        x = np.random.default_rng(shape[1]).standard_normal(shape).astype("float32")
        arrays = quantization.quantized(x, mode) if mode else None
        yield quantization.QuantizedTensor(*(sharded(np.asarray(a)) for a in arrays.values())) if mode else sharded(x)


def check_no_device_fetches_experts(tokens, mode):
    """Checks that no device fetches experts of another, with quantized experts and with fewer tokens than devices."""
    given = np.ones((tokens, 16), "float32"), np.ones((tokens, 2), "float32"), np.tile([3, 2], (tokens, 1))
    expected = np.asarray(expert_mlp(*given, *banks(distribution((1, 8)), mode), implementation="dense"))
    with distribution((2, 4)).scope():
        own = tuple(banks(distribution((2, 4)), mode))
        compiled = jax.jit(lambda *given: expert_mlp(*given)).lower(*given, *own).compile()
        np.testing.assert_allclose(np.asarray(compiled(*given, *own)), expected, rtol=1e-4, atol=1e-4)
    # The bytes of all banks of one device in int8.
    assert sum(size for _, size in usual_collectives(compiled.as_text()).values()) < 3 * 2 * 16 * 24


def check_data_parallel_sends_nothing():
    """Checks that scan and experts send nothing between devices under Keras' DataParallel."""
    rng = np.random.default_rng(0)
    u, delta = rng.standard_normal((2, 8, 16, 8)).astype("float32")
    A, B = -np.ones((8, 4), "float32"), rng.standard_normal((8, 16, 4)).astype("float32")
    given = np.ones((64, 16), "float32"), np.ones((64, 2), "float32"), np.tile([3, 2], (64, 1))
    split = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu"))
    rows = keras.distribution.TensorLayout(("batch", None, None), split.device_mesh)
    tokens = keras.distribution.TensorLayout(("batch", None), split.device_mesh)
    complete = tuple(np.asarray(x) for x in banks(distribution((1, 8))))
    with split.scope():
        placed = [keras.distribution.distribute_tensor(x, rows) for x in (u, delta, B)]
        scan = jax.jit(lambda u, delta, B: selective_scan(u, delta, A, B, B))
        given = [keras.distribution.distribute_tensor(x, tokens) for x in given]
        experts = jax.jit(lambda *given: expert_mlp(*given, *complete))
        for compiled in (scan.lower(*placed).compile(), experts.lower(*given).compile()):
            assert not collectives(compiled.as_text()), collectives(compiled.as_text())


def check_an_indivisible_batch_is_refused():
    """Checks that a batch not divisible by the devices is refused, and that the model still predicts the same."""
    with distribution((4, 2)).scope():
        model, x, y = image_model()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        before = model.predict(x, verbose=0)
        for call in (model.predict, lambda x, **given: model.evaluate(x, y[: len(x)], **given)):
            try:
                call(x[:6], batch_size=4, verbose=0)
            except ValueError as error:
                assert "must be a multiple of the devices" in str(error) and "Received" in str(error), error
            else:
                raise AssertionError("no error")
            np.testing.assert_array_equal(model.predict(x, verbose=0), before)


def check_any_routing(tokens):
    """Checks a routing of all tokens to the same experts. Many tokens exceed the capacity."""
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
    check_bytes_sent_to_experts()
    check_any_routing(64)
    check_any_routing(8)  # as many as in a decoding step
    check_any_routing(3)
    for mode in (None, "int8", "int4"):
        check_no_device_fetches_experts(3, mode)
    check_data_parallel_sends_nothing()
    check_an_indivisible_batch_is_refused()
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
            for v, slot in zip(model.trainable_variables, optimizer.momentums, strict=True):
                assert slot.value.sharding.is_equivalent_to(v.value.sharding, v.value.ndim), v.path
            for v in model.trainable_variables + optimizer.variables:
                complete = v.value.size == v.value.addressable_shards[0].data.size
                assert complete == (not v._layout or all(axis is None for axis in v._layout.axes)), v.path
                if how[2] and v._layout and "model" in v._layout.axes and "ssm" not in v.path:
                    assert 8 * v.value.addressable_shards[0].data.size == v.value.size, v.path
    print("all are equal")


if __name__ == "__main__":
    main()
