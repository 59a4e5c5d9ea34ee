"""A damaged file raises an error in the form of the project, or gives the numbers of the good file."""

import re

import keras
import numpy as np
import pytest
from checks import full, once
from tamper.mutations import copied, damage

import keras_jamba
from keras_jamba.generation import PromptState
from keras_jamba.training.checkpointing import _saves, _snapshots

# Files are read alike on every backend.
pytestmark = once


def language_model():
    keras.utils.set_random_seed(0)
    return keras_jamba.JambaCausalLM(
        vocab_size=11, d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, moe_frequency=0
    )


def arrays_of(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def write_preset(folder):
    language_model().save_to_preset(folder / "preset")


def read_preset(folder):
    return arrays_of(keras_jamba.JambaCausalLM.from_preset(folder / "preset").weights)


def write_prompt_state(folder):
    language_model().prefill([1, 2, 3]).save(folder / "state")


def read_prompt_state(folder):
    model, state = language_model(), PromptState.load(folder / "state")
    return [model.generate([1, 2, 3, 4], max_new_tokens=3, state=state), *arrays_of(keras.tree.flatten(state.cache))]


def write_adapters(folder):
    model = language_model()
    model.enable_lora(2)
    model.save_lora(folder / "adapters.safetensors")


def read_adapters(folder):
    model = language_model()
    model.load_lora(folder / "adapters.safetensors")
    return arrays_of(model.weights)


def write_save(folder):
    rng = np.random.default_rng(0)
    arrays = [rng.random((4, 3), "float32"), np.array(7, "int64"), rng.random(5).astype("float16")]
    state = {"variables": 2, "processes": 1, "run": 0, "epoch": 3, "step_in_epoch": 2, "stopped": False}
    _snapshots.write(folder, 8, map(_snapshots.as_single_shard, arrays), state)


def read_save(folder):
    step, processes = _saves.last(folder, 1) or (-1, 1)
    places = _saves.folders(folder, processes)
    if (found := _saves.damaged(places, step)) is not None:
        raise ValueError(f"A save must match the sha256 in its state. Received: {found}.")
    arrays, own, state = _saves.read(places, step, 0)
    return [*(x.read() for x in (*arrays, *own)), np.array([state["epoch"], state["step_in_epoch"]])]


FORMATS = {
    "preset": (write_preset, read_preset),
    "prompt state": (write_prompt_state, read_prompt_state),
    "adapters": (write_adapters, read_adapters),
    "save": (write_save, read_save),
}


def check(kind, folder, seeds):
    write, read = FORMATS[kind]
    good = folder / "good"
    good.mkdir()
    write(good)
    expected = read(good)
    refused = 0
    for seed in seeds:
        place = copied(good, folder / "damaged")
        what = damage(place, np.random.default_rng(seed))
        try:
            found = read(place)
        except ValueError as error:
            assert re.search(r"Received: .+", str(error), re.DOTALL), (seed, what, error)
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"case {seed}, {what}: a raw {type(error).__name__}: {error}") from error
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, e, err_msg=f"case {seed}, {what}")
    # A test that refuses nothing would compare good files.
    assert refused > len(seeds) // 2


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_refused_or_gives_the_same_numbers(kind, tmp_path):
    check(kind, tmp_path, range(16))


@full()
@pytest.mark.parametrize("kind", FORMATS)
def test_many_damaged_files_are_refused_or_give_the_same_numbers(kind, tmp_path):
    check(kind, tmp_path, range(16, 91))
