"""Stored files of every format give their recorded numbers on every backend."""

import csv
import functools
import hashlib
import shutil

import fixture_models as made
import fixture_trainings as trainings
import keras
import numpy as np
import pytest
from checks import once
from fixture_models import FORMATS, PRESETS, described, logits, read_numbers, written

import keras_jamba
from keras_jamba import JambaCausalLM, JambaClassifier, training
from keras_jamba.tokenizers import load_tokenizer

BACKEND = keras.backend.backend()
DHCJamba = keras_jamba.DHCJamba
# Tolerance between the three backends, relative to the largest logit.
NEAR = 2e-6
# Processors with and without AVX-512 round the sums of the custom model otherwise, and differ by 4e-6.
OF_PROCESSORS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def files_stay_as_they_are():
    before = contents()
    yield
    assert contents() == before


def contents():
    files = (path for folder in (FORMATS, PRESETS) for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@functools.cache
def numbers(name, file="numbers.json"):
    return read_numbers(FORMATS / name / file)


@functools.cache
def preset(name):
    return PRESETS_OF_FORMAT_1[name][0].from_preset(FORMATS / "preset-1" / name / "preset")


@functools.cache
def loaded(name):
    return keras.models.load_model(FORMATS / "keras" / name / "model.keras")


def near(actual, expected, share=NEAR):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=share * np.abs(expected).max())


def check(model, name, inputs, statistics=True):
    """Checks that a model has the recorded weights, bit for bit, and the recorded logits."""
    assert described(model, statistics) == numbers(name)["weights"]
    near(logits(model, inputs), numbers(name)["logits"])


# Presets and Keras' files

PRESETS_OF_FORMAT_1 = {
    "image_classifier": (DHCJamba, made.IMAGES),
    "clip_classifier": (DHCJamba, made.CLIPS),
    "language_model": (JambaCausalLM, made.IDS),
    "text_classifier": (JambaClassifier, made.IDS),
}


@pytest.mark.parametrize("name", PRESETS_OF_FORMAT_1)
def test_a_preset_has_its_weights_and_logits(name):
    check(preset(name), f"preset-1/{name}", PRESETS_OF_FORMAT_1[name][1])


@pytest.mark.parametrize("name", ["image_classifier", "language_model"])
def test_a_preset_with_a_checksum_has_its_weights_and_logits(name, caplog):
    cls, inputs = PRESETS_OF_FORMAT_1[name]
    check(cls.from_preset(FORMATS / "preset-2" / name / "preset"), f"preset-2/{name}", inputs)
    assert "checksum" not in caplog.text


def test_a_preset_keeps_class_names_tokenizer_and_generation_config():
    assert preset("image_classifier").class_names == ("cat", "dog", "owl")
    model = preset("language_model")
    assert model.tokenizer.add_bos is False
    assert model.generation_config == {"do_sample": False, "eos_token_id": 2, "max_new_tokens": 5}
    assert preset("text_classifier").tokenizer.encode(made.TEXT) == numbers("tokenizers/jamba")["ids"]


def test_a_language_model_of_a_preset_generates_its_tokens():
    assert written(preset("language_model")).tolist() == numbers("preset-1/language_model")["tokens"]


KERAS = {"image_classifier": made.BYTES, "language_model": made.IDS}


@pytest.mark.parametrize("name", KERAS)
def test_a_keras_file_has_its_weights_and_logits(name):
    check(loaded(name), f"keras/{name}", KERAS[name])


def test_a_classifier_of_a_keras_file_repeats_the_recorded_step(tmp_path):
    """The log holds the loss with smoothed labels, schedule, gradient and experts. Training appends to it."""
    name = "keras/image_classifier"
    model = keras.models.load_model(FORMATS / name / "model.keras")
    assert (model.class_names, model.pixel_range) == (("cat", "dog", "owl"), (0, 255))
    assert made.slots(model) == numbers(name)["optimizer"]
    log = shutil.copy(FORMATS / name / "log.csv", tmp_path)
    monitor = training.Monitor(made.probes(), csv=log)
    model.fit(made.BYTES, made.LABELS, batch_size=4, verbose=0, callbacks=[monitor])
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    with open(log, newline="") as file:
        before, now = ({name: float(x) for name, x in row.items()} for row in csv.DictReader(file))
    assert now == pytest.approx(before, rel=NEAR)


def test_a_keras_file_keeps_everything_beside_the_weights():
    model, expected = loaded("language_model"), numbers("keras/language_model")
    assert made.slots(model) == expected["optimizer"]
    assert made.seeds(model) == expected["seeds"]
    trained = (v.path.removeprefix(f"{model.name}/") for v in model.trainable_variables)
    assert sorted(trained) == expected["trained"]
    assert model.tokenizer.add_bos is True and model.generation_config == {"max_new_tokens": 6}
    assert model.get_config()["quantization"] == "int8"
    # The file stores the value of jax; another backend chooses again.
    assert model.get_compile_config()["jit_compile"] == (False if BACKEND == "jax" else "auto")


def test_a_language_model_of_a_keras_file_samples_its_tokens():
    assert written(loaded("language_model")).tolist() == numbers("keras/language_model")["tokens"]


def test_a_keras_file_of_a_custom_model_has_its_weights_seeds_and_logits():
    model, expected = loaded("layers"), numbers("keras/layers")
    assert made.in_order(model) == expected["weights"]
    assert made.seeds(model) == expected["seeds"]
    near(logits(model, made.CLIPS), expected["logits"], share=OF_PROCESSORS)


@pytest.mark.parametrize("mode", made.QUANTIZED)
def test_quantized_weights_have_their_logits(mode):
    model = made.language_model(seed=1, quantization=mode, **made.QUANTIZED[mode])
    model.load_weights(FORMATS / "weights" / mode / "model.weights.h5")
    check(model, f"weights/{mode}", made.IDS)


def test_loading_quantizes_floating_point_weights():
    model = made.language_model(seed=1, quantization="int8")
    model.load_weights(FORMATS / "preset-1" / "language_model" / "preset" / "model.weights.h5")
    expected = numbers("weights/int8")["weights"]
    assert described(model, statistics=False).items() <= expected.items()


# Adapters and checkpoints of transformers

ADAPTERS = {
    "lora-1/language_model": "adapters.safetensors",
    "lora-1/image_classifier": "adapters.safetensors",
    "lora-1-checksum/language_model": "adapters.safetensors",
    "peft/language_model": "adapters",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_have_the_logits_of_their_model(name):
    base = name.partition("/")[2]
    cls, inputs = PRESETS_OF_FORMAT_1[base]
    model = cls.from_preset(FORMATS / "preset-1" / base / "preset")
    model.load_lora(FORMATS / name / ADAPTERS[name])
    check(model, name, inputs, statistics=False)


CHECKPOINTS = {
    "one_file": JambaCausalLM,
    "shards": JambaCausalLM,
    "mamba": JambaCausalLM,
    "classifier": JambaClassifier,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_transformers_has_its_weights_and_logits(name):
    model = CHECKPOINTS[name].from_preset(FORMATS / "transformers" / name / "checkpoint")
    check(model, f"transformers/{name}", made.IDS, statistics=False)
    if name == "one_file":
        assert model.tokenizer.encode(made.TEXT) == numbers("tokenizers/jamba")["ids"]


# Tokenizers and prompts


@pytest.mark.parametrize("name", ["byte", "jamba"])
def test_a_tokenizer_has_its_ids_and_texts(name):
    tokenizer, expected = load_tokenizer(FORMATS / "tokenizers" / name), numbers(f"tokenizers/{name}")
    assert tokenizer.encode(made.TEXT) == expected["ids"]
    assert tokenizer.decode(expected["ids"]) == made.TEXT
    for template, text in expected.get("chats", {}).items():
        assert tokenizer.apply_chat_template(made.CHAT, chat_template=template) == text


@pytest.mark.parametrize("name", ["prompt_state/language_model", "prompt_state-checksum/language_model"])
def test_generation_continues_from_a_prompt_state(name):
    model, expected = preset("language_model"), numbers(name)
    state = type(model.prefill(made.PROMPT)).load(FORMATS / name / "state")
    assert state.token_ids.tolist() == expected["token_ids"]
    np.testing.assert_array_equal(made.numpy(state.logits), np.array(expected["logits"], "float32"))
    assert written(model, state=state).tolist() == expected["tokens"]


# Trainings

ONE = ["checkpoint-2/one_process_jax", "checkpoint-2/one_process_tensorflow", "checkpoint-2/one_process_torch"]
ONE += ["checkpoint-1/one_process_jax", "checkpoint-3/one_process_jax", "checkpoint-3/one_process_torch"]
ONE += ["checkpoint-3-identity/one_process_torch"]
TWO = ["checkpoint-2/two_processes_jax", "checkpoint-2/two_processes_torch"]


def resumed(name, tmp_path, model, data):
    keras.utils.set_random_seed(1)
    shutil.copytree(FORMATS / name / "saves", tmp_path / "saves")
    return trainings.resumed(tmp_path / "saves", model, data)


def check_resumed(found, expected, *left_out):
    """Compares a resumed training with its record. PyTorch's generators are saved on PyTorch only."""
    expected, found = ({key: x for key, x in each.items() if key not in left_out} for each in (expected, found))
    draws = expected.pop("draws", {}), found.pop("draws", {})
    assert found == expected
    assert all(x == draws[1].get(kind, x) for kind, x in draws[0].items())


@pytest.mark.parametrize("name", ONE)
def test_training_resumes_from_a_save_of_one_process(name, tmp_path):
    found = resumed(name, tmp_path, trainings.image_model(), trainings.image_data())
    check_resumed(found, numbers(name))


@pytest.mark.parametrize("name", TWO)
def test_training_resumes_in_one_process_from_a_save_of_two(name, tmp_path):
    found = resumed(name, tmp_path, trainings.text_model(), trainings.text_data())
    check_resumed(found, numbers(name, "numbers_0.json"), "draws", "batch")
    assert found["batch"] == made.digests(trainings.text_data().batch(trainings.BREAKS))


@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize("name", TWO)
def test_each_of_two_processes_resumes_from_its_shard_of_a_save(name, index, tmp_path):
    found = resumed(name, tmp_path, trainings.text_model(), trainings.text_data(shard=(index, 2)))
    # On JAX, each of the two processes has all rows of a batch.
    check_resumed(found, numbers(name, f"numbers_{index}.json"), *(["batch"] if "jax" in name else []))


# Trained presets

PHOTOGRAPHS = ("small", "medium", "large", "fashion")


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.npz")))
def test_a_trained_preset_has_its_recorded_logits_on_this_backend(name):
    with np.load(PRESETS / f"{name}.npz") as file:
        inputs, expected = file["inputs"], file[BACKEND]
    # Presets of photographs have sums of more terms.
    share = 1e-5 if name in PHOTOGRAPHS else 1e-6
    near(logits(DHCJamba.from_preset(name), inputs), expected, share)


@once
@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.npz")))
def test_the_recorded_logits_of_a_trained_preset_are_equal_on_all_backends(name):
    with np.load(PRESETS / f"{name}.npz") as file:
        for backend in ("tensorflow", "torch"):
            np.testing.assert_allclose(file[backend], file["jax"], rtol=0, atol=1e-4)
