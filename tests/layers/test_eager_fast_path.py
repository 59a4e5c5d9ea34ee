"""Calls that PyTorch runs without Keras' checks of arguments, against `keras.layers.Layer.__call__`."""

import keras
import numpy as np
import pytest
from checks import close, numpy, once
from keras import ops

from keras_jamba import _backend
from keras_jamba._keras_internals import get_keras_mask, set_keras_mask
from keras_jamba.layers import AttentionLayer, FeedForward, GatedConvLayer, MambaLayer

pytestmark = once
X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
MASK = np.array([[False, True, True, True, True], [True] * 5])
LAYERS = {
    "mamba": lambda **given: MambaLayer(8, d_state=4, mixer_rms_norm=True, **given),
    "gated_conv": lambda **given: GatedConvLayer(8, **given),
    "attention": lambda **given: AttentionLayer(8, num_heads=2, **given),
    "feed_forward": lambda **given: FeedForward(8, **given),
}


def called_by_keras(layer, *args, **kwargs):
    return keras.layers.Layer.__call__(layer, *args, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_states_and_masks_equal_those_of_a_call_by_keras(kind, dtype):
    layer = LAYERS[kind](dtype=dtype)
    x, mask = ops.cast(X, layer.compute_dtype), ops.convert_to_tensor(MASK)
    layer(x)
    given = [{}] if kind == "feed_forward" else [{}, {"mask": mask}, {"return_state": True}]
    for kwargs in given:
        assert _backend.trainer.can_bypass_layer_call(layer, x, **kwargs)
        found, expected = layer(x, **kwargs), called_by_keras(layer, x, **kwargs)
        keras.tree.map_structure(lambda a, b: np.testing.assert_array_equal(a, b), numpy(found), numpy(expected))
        masks = [get_keras_mask(keras.tree.flatten(each)[0]) for each in (found, expected)]
        assert (masks[0] is None) == (masks[1] is None) == ("mask" not in kwargs)


def test_a_call_after_a_state_needs_no_conversion():
    layer = LAYERS["mamba"]()
    x = ops.convert_to_tensor(X)
    _, state = layer(x, return_state=True)
    assert _backend.trainer.can_bypass_layer_call(layer, x, initial_state=state)
    close(numpy(layer(x, initial_state=state)), numpy(called_by_keras(layer, x, initial_state=state)), absolute=0)


def test_keras_converts_arguments_of_another_kind():
    layer = LAYERS["attention"](dtype="bfloat16")
    layer(X)
    x = ops.cast(X, "bfloat16")
    bypassed = _backend.trainer.can_bypass_layer_call
    assert bypassed(layer, x)
    assert not bypassed(layer, X)
    assert not bypassed(layer, ops.convert_to_tensor(X))
    assert not bypassed(layer, x, mask=MASK)
    assert not bypassed(layer, x, initial_state={"key": np.ones(1)})
    assert not bypassed(LAYERS["attention"](), x)
    autocast = LAYERS["feed_forward"](dtype="bfloat16")
    autocast(X)
    assert autocast.autocast and not bypassed(autocast, x, scale=ops.ones((1,), "float32"))
    assert bypassed(autocast, x, scale=ops.ones((1,), "bfloat16"), mask=ops.convert_to_tensor(MASK))
    set_keras_mask(x, MASK)
    assert not bypassed(layer, x)


def global_hook(layer, hook):
    import torch

    return torch.nn.modules.module.register_module_forward_hook(hook)


def torch_compile(layer):
    import torch

    torch.nn.Module.compile(layer, backend="eager")


HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "before backward": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "of all modules": global_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run_around_layers_inside_a_mixer(kind):
    layer = LAYERS["mamba"]()
    x = ops.convert_to_tensor(X)
    layer(x)
    seen = []
    handle = HOOKS[kind](layer.ssm, lambda module, *given: seen.append(module) if module is layer.ssm else None)
    ops.sum(layer(x)).backward()
    handle.remove()
    ops.sum(layer(x)).backward()
    assert len(seen) == 1


class Scaled(FeedForward):
    """A user's layer, with all that Keras adds to a call."""

    def call(self, inputs, training=False):
        self.add_loss(ops.sum(inputs))
        return super().call(inputs) * (2.0 if training else 1.0)

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else mask[:, ::2]


class Outer(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = Scaled(8)

    def call(self, x):
        return self.inner(x)


def test_a_subclass_keeps_training_losses_and_masks():
    model, x = Outer(), ops.convert_to_tensor(X)
    plain = numpy(model(x))
    close(numpy(model(x, training=True)), 2 * plain, absolute=1e-6)
    assert len(model.losses) == 1
    set_keras_mask(x, ops.convert_to_tensor(MASK))
    assert get_keras_mask(model.inner(x)).shape == (2, 3)


def test_rematerialized_and_compiled_layers_go_through_keras():
    bypassed = _backend.trainer.can_bypass_layer_call
    with keras.RematScope(mode="full"):
        remat = LAYERS["mamba"]()
    compiled, x = LAYERS["mamba"](), ops.convert_to_tensor(X)
    remat(x), compiled(x)
    assert not bypassed(remat, x) and bypassed(compiled, x)
    torch_compile(compiled)
    assert not bypassed(compiled, x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_are_those_of_keras_on_its_device(dtype):
    x, matrix = ops.cast(X, dtype), ops.cast(X[0].T, dtype)
    found, expected = _backend.numerics.matmul(x, matrix), ops.matmul(x, matrix)
    np.testing.assert_array_equal(numpy(found), numpy(expected))
    with keras.device("meta"):
        assert _backend.numerics.matmul(x, matrix).is_meta


def test_a_functional_model_passes_training_to_layers_without_that_argument():
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, LAYERS["feed_forward"]()(LAYERS["mamba"]()(inputs)))
    close(numpy(model(X, training=True)), numpy(model(X, training=False)), absolute=0)


def test_a_tensor_is_converted_to_the_default_device():
    variable, array = keras.Variable(X), X
    for x in (variable, array, ops.convert_to_tensor(X)):
        assert _backend.tensors.as_tensor(x).device.type == keras.ops.zeros(1).device.type
        with keras.device("meta"):
            assert _backend.tensors.as_tensor(x).is_meta
