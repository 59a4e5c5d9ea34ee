"""Low-rank adapters of single layers: gradients against those of the full matrices, merging, and refusals."""

import numpy as np
import pytest
from checks import full, jitted, numpy, variable_gradients
from keras import ops

from keras_jamba.layers import AttentionLayer, FeedForward, MambaLayer, MoELayer, enable_lora, merge_lora, quantize
from keras_jamba.layers._quantizable import quantizable_layers
from keras_jamba.ops import implementations

MAMBA = dict(d_model=8, d_state=4, dt_rank=3, mixer_rms_norm=True)
X = np.random.default_rng(0).standard_normal((2, 9, 8)).astype("float32")
WEIGHT = np.random.default_rng(1).standard_normal((2, 9, 8)).astype("float32")


def built(layer):
    layer.build((None, None, 8))
    return layer


def adapted(layer, targets, **given):
    """Returns a layer with random adapters, as after training."""
    enable_lora(built(layer), 2, targets, lora_alpha=3, **given)
    rng = np.random.default_rng(2)
    for variable in layer.trainable_weights:
        variable.assign(0.3 * rng.standard_normal(variable.shape))
    return layer


def gradients_of(layer, variables):
    found = variable_gradients(lambda: ops.sum(layer(X) * ops.convert_to_tensor(WEIGHT)), variables)
    return {v.path.removeprefix(f"{layer.name}/"): x for v, x in zip(variables, found, strict=True)}


def check_gradients(layer, merged):
    """Checks dA = s dW B' and dB = s A' dW, the gradients of the adapters of a matrix W."""
    merged.set_weights(layer.get_weights())
    merge_lora(merged)
    names = [
        f"{path}/{name}" for path, each in quantizable_layers(layer) for name in each.matrices() if each.lora_enabled
    ]
    names = [name.lstrip("/") for name in names]
    matrices = [v for v in merged.trainable_weights if v.path.removeprefix(f"{merged.name}/") in names]
    expected, actual = gradients_of(merged, matrices), gradients_of(layer, layer.trainable_weights)
    values = {v.path.removeprefix(f"{layer.name}/"): numpy(v.value) for v in layer.trainable_weights}
    assert set(actual) == {f"{name}{suffix}" for name in names for suffix in ("_lora_a", "_lora_b")}
    for name in names:
        a, b = values[f"{name}_lora_a"], values[f"{name}_lora_b"]
        for suffix, gradient in (
            ("_lora_a", 1.5 * expected[name] @ np.swapaxes(b, -1, -2)),
            ("_lora_b", 1.5 * np.swapaxes(a, -1, -2) @ expected[name]),
        ):
            assert np.abs(gradient).max() > 1e-3
            np.testing.assert_allclose(actual[name + suffix], gradient, rtol=2e-3, atol=2e-4 * np.abs(gradient).max())


@full("jax", "tensorflow")
@pytest.mark.parametrize("implementation", implementations())
def test_gradients_reach_every_projection_of_mamba_through_every_scan(implementation):
    layers = [adapted(MambaLayer(**MAMBA, implementation=implementation), "mamba") for _ in range(2)]
    check_gradients(*layers)


@full("jax")
@pytest.mark.parametrize(
    ("target", "make"),
    {
        "attention": lambda: AttentionLayer(8, 2, 1),
        "feed_forward": lambda: FeedForward(8, 6),
        "experts": lambda: MoELayer(8, 4, d_ff=6),
    }.items(),
)
def test_gradients_reach_every_matrix_of_other_layers(target, make):
    check_gradients(adapted(make(), target), adapted(make(), target))


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize(
    ("target", "make"), {"mamba": lambda: MambaLayer(**MAMBA), "experts": lambda: MoELayer(8, 4, d_ff=6)}.items()
)
def test_new_adapters_change_nothing_and_merging_keeps_outputs(target, make, mode):
    layer = built(make())
    if mode:
        quantize(layer, mode)
    before = numpy(jitted(lambda x: layer(x, **GIVEN[target]))(X))
    enable_lora(layer, 2, target)
    np.testing.assert_array_equal(numpy(jitted(lambda x: layer(x, **GIVEN[target]))(X)), before)
    for variable in layer.trainable_weights:
        variable.assign(0.3 * np.random.default_rng(2).standard_normal(variable.shape))
    trained = numpy(jitted(lambda x: layer(x, **GIVEN[target]))(X))
    assert np.abs(trained - before).max() > 0.01
    count = len(layer.weights)
    merge_lora(layer)
    assert len(layer.weights) < count
    merged = numpy(jitted(lambda x: layer(x, **GIVEN[target]))(X))
    # Merging into quantized weights rounds the sum again.
    allowed = {None: 1e-5, "int8": 0.05, "int4": 0.6}[mode]
    assert np.abs(merged - trained).max() < allowed * max(1, np.abs(trained).max())


# No statistics: a separately compiled program cannot assign them.
GIVEN = {"mamba": {}, "experts": {"record": False}}


def test_only_adapters_are_trained_and_their_share_is_printed(capsys):
    layer = built(MambaLayer(**MAMBA))
    count = sum(int(np.prod(v.shape)) for v in layer.weights)
    reported = enable_lora(layer, 2, "mamba.in_proj")
    assert [v.path for v in layer.trainable_weights] == [
        f"{layer.name}/in_proj/kernel_lora_a",
        f"{layer.name}/in_proj/kernel_lora_b",
    ]
    assert reported == {"trained": 2 * (8 + 32), "weights": count + 80, "share": 80 / (count + 80)}
    assert f"80 of {count + 80:,} weights are trained" in capsys.readouterr().out


def test_merging_makes_all_weights_trainable_again():
    layer = built(MambaLayer(**MAMBA))
    before = [v.path for v in layer.trainable_weights]
    enable_lora(layer, 2)
    merge_lora(layer)
    assert sorted(v.path for v in layer.trainable_weights) == sorted(before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(rank=0), "rank must be an integer of at least 1"),
        (dict(rank=2, lora_alpha=0), "lora_alpha must be a number"),
        (dict(rank=2, targets="q_proj"), "targets must be among"),
        (dict(rank=2, targets="attention"), "A target must be in the model"),
        (dict(rank=2, also_train="head"), "also_train must name layers"),
    ],
)
def test_invalid_adapters_are_refused_without_changes(given, message):
    layer = built(MambaLayer(**MAMBA))
    names = [v.path for v in layer.weights]
    with pytest.raises(ValueError, match=message):
        enable_lora(layer, **given)
    assert [v.path for v in layer.trainable_weights] == names


def test_repeated_adapters_and_merging_without_adapters_are_refused():
    layer = built(MambaLayer(**MAMBA))
    with pytest.raises(ValueError, match="There must be adapters"):
        merge_lora(layer)
    enable_lora(layer, 2, "mamba.in_proj")
    with pytest.raises(ValueError, match="has adapters already"):
        enable_lora(layer, 2, "mamba")
    with pytest.raises(ValueError, match="is not built"):
        enable_lora(MambaLayer(**MAMBA), 2)
    with pytest.raises(ValueError, match="without mixers"):
        enable_lora(built(FeedForward(8, 6)), 2)
