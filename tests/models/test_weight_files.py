"""Files of weights and adapters: declared sizes, values beyond the dtype of a variable, paths."""

import json

import h5py
import keras
import numpy as np
import pytest
from checks import numpy, once
from safetensors.numpy import load_file, save_file
from tamper.formats import language_model

import keras_jamba
from keras_jamba import presets

# Independent of the backend.
pytestmark = once


def test_an_array_that_is_declared_and_not_stored_is_refused(tmp_path):
    file = tmp_path / "model.weights.h5"
    model = language_model()
    model.save_weights(file)
    with h5py.File(file, "r+") as opened:
        names = []
        opened.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        del opened[names[0]]
        opened.create_dataset(names[0], (60_000, 5_000), "float32")
    assert file.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"declares 1200000000 bytes, and 0 are stored.*Build the model anew"):
        model.load_weights(file)


def test_weights_with_little_content_and_compression_are_loaded(tmp_path):
    file = tmp_path / "model.weights.h5"
    model = language_model(vocab_size=1000)
    model.save_weights(file)
    with h5py.File(file, "r+") as opened:
        names = []
        opened.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            x = opened[name][()]
            del opened[name]
            given = dict(compression="gzip", compression_opts=9) if x.ndim else {}
            opened.create_dataset(name, data=np.zeros_like(x), **given)
    model.load_weights(file)
    assert not numpy(model.token_embedding.embeddings).any()


def test_a_missing_folder_is_created(tmp_path):
    model = language_model()
    model.save_weights(tmp_path / "a" / "b" / "model.weights.h5")
    model.load_weights(tmp_path / "a" / "b" / "model.weights.h5")
    model.save(tmp_path / "c" / "model.keras")
    keras.models.load_model(tmp_path / "c" / "model.keras")


@pytest.mark.parametrize("alpha", [1e39, 1e300])
def test_an_alpha_beyond_float32_is_refused(tmp_path, alpha):
    model = language_model()
    model.enable_lora(2)
    model.save_lora(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    layers = {path.rpartition("/")[0].rpartition("/")[0]: [2, alpha] for path in tensors}
    metadata = {"format": "keras_jamba.lora.1", "layers": json.dumps(layers)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="finite lora_alpha above 0"):
        language_model().load_lora(tmp_path / "a.safetensors")


def test_a_fully_trained_weight_beyond_float16_is_refused_by_a_model_in_float16(tmp_path):
    model = language_model()
    model.enable_lora(2, also_train=["token_embedding"])
    embeddings = model.token_embedding.embeddings
    embeddings.assign(numpy(embeddings) + 1e5)
    model.save_lora(tmp_path / "a.safetensors")
    half = language_model(dtype="float16")
    before = numpy(half.token_embedding.embeddings)
    with pytest.raises(ValueError, match="must be finite. Received: 'token_embedding/embeddings'"):
        half.load_lora(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(numpy(half.token_embedding.embeddings), before)


def test_a_file_without_adapters_is_refused(tmp_path):
    save_file({}, tmp_path / "a.safetensors", metadata={"format": "keras_jamba.lora.1", "layers": "{}"})
    model = language_model()
    with pytest.raises(ValueError, match="must be a file that save_lora wrote. Received: .*no adapters"):
        model.load_lora(tmp_path / "a.safetensors")
    assert all(v.trainable for v in model.weights if v.path.endswith("kernel"))


@pytest.mark.parametrize("file", [None, 5])
def test_a_path_that_is_none_is_refused(file):
    with pytest.raises(ValueError, match=f"must be the path of a file or folder. Received: {file}"):
        language_model().load_lora(file)


def test_a_file_without_permission_is_not_called_missing(tmp_path, monkeypatch):
    model = language_model()
    model.enable_lora(2)
    model.save_lora(tmp_path / "a.safetensors")

    def forbidden(path, *given):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("keras_jamba.converters._safetensors.open", forbidden, raising=False)
    with pytest.raises(ValueError, match="Received: .*Permission denied"):
        language_model().load_lora(tmp_path / "a.safetensors")


def test_numbers_of_numpy_in_a_generation_config_are_saved(tmp_path):
    model = language_model()
    model.generation_config = {"max_new_tokens": np.int64(4), "top_p": np.float32(0.5), "do_sample": np.bool_(True)}
    model.save_to_preset(tmp_path / "preset")
    found = keras_jamba.JambaCausalLM.from_preset(tmp_path / "preset").generation_config
    assert found == {"max_new_tokens": 4, "top_p": 0.5, "do_sample": True}
    model.generation_config = {"stop_strings": object()}
    with pytest.raises(ValueError, match="generation_config must hold numbers.*Received: <object"):
        model.save_to_preset(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_interrupted_save_of_a_preset_keeps_the_optimizer(tmp_path):
    class Interrupted(type(language_model())):
        """Is interrupted while it sets the optimizer to None."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "optimizer" and value is None and getattr(self, "armed", False):
                raise KeyboardInterrupt

    model = language_model()
    model.compile(keras.optimizers.Adam(1e-3))
    optimizer = model.optimizer
    model.__class__ = Interrupted
    object.__setattr__(model, "armed", True)
    with pytest.raises(KeyboardInterrupt):
        presets._save(model, tmp_path / "model.weights.h5")
    assert model.optimizer is optimizer
