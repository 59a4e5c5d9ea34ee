"""Presets have one format on three backends. Errors are raised before anything is loaded or written."""

import json
import os
import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from checks import full, numpy

import keras_jamba
from keras_jamba import _checksums, _files, presets
from keras_jamba.layers import Router
from keras_jamba.tokenizers import ByteTokenizer

# Written on jax. Attribute and variable names are part of the format, and this folder records them.
GOLDEN = Path(__file__).parent / "golden" / "preset"
TINY = dict(num_classes=3, image_shape=(8, 8, 1), d_model=8, num_layers=1, moe_frequency=0, downsample=2)


@pytest.fixture
def mine(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "mine"))


def edit(folder, **changes):
    metadata = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(metadata | changes))


def test_a_preset_saved_on_jax_gives_its_logits_on_every_backend():
    recorded = np.load(GOLDEN / "images_and_logits.npz")
    model = keras_jamba.DHCJamba.from_preset(GOLDEN)
    np.testing.assert_allclose(numpy(model(recorded["images"])), recorded["logits"], rtol=0, atol=1e-5)


def test_saving_a_loaded_preset_gives_the_same_preset(tmp_path):
    keras_jamba.DHCJamba.from_preset(GOLDEN).save_to_preset(tmp_path / "again")
    written, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", GOLDEN))
    # Arguments that are newer than the preset are written with their defaults.
    assert written["config"] | original["config"] == written["config"]
    assert written["weights"]["variables"] == original["weights"]["variables"]


@pytest.mark.parametrize("text", [False, True])
def test_weights_in_float16_halve_the_file_and_load_rounded(tmp_path, text):
    sizes = dict(d_model=64, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=4)
    make = (lambda **k: keras_jamba.JambaCausalLM(vocab_size=50, **k)) if text else keras_jamba.DHCJamba
    model = make(**sizes)
    model.save_to_preset(tmp_path / "float32")
    model.save_to_preset(tmp_path / "float16", weights_dtype="float16")
    files = [tmp_path / name / "model.weights.h5" for name in ("float16", "float32")]
    assert files[0].stat().st_size < 0.6 * files[1].stat().st_size
    loaded = type(model).from_preset(tmp_path / "float16")
    for before, after in zip(model.weights, loaded.weights, strict=True):
        assert before.path.split("/", 1)[-1] == after.path.split("/", 1)[-1]
        np.testing.assert_array_equal(numpy(after), numpy(before).astype("float16").astype(after.dtype))
    # The loaded model is saved and loaded as it is.
    loaded.save_to_preset(tmp_path / "again", weights_dtype="float16")
    assert (tmp_path / "again" / "model.weights.h5").stat().st_size == files[0].stat().st_size
    for before, after in zip(loaded.weights, type(model).from_preset(tmp_path / "again").weights, strict=True):
        np.testing.assert_array_equal(numpy(after), numpy(before))


def test_weights_beyond_float16_are_refused_and_nothing_is_written(tmp_path):
    model = keras_jamba.DHCJamba(**TINY)
    model.head.kernel.assign(model.head.kernel * 0 + 1e5)
    with pytest.raises(
        ValueError,
        match="must hold all weights. Received: weights_dtype='float16', and '.*head/kernel' with numbers up to 1e.05",
    ):
        model.save_to_preset(tmp_path / "new", weights_dtype="float16")
    with pytest.raises(
        ValueError, match="weights_dtype must be 'float16', 'float32' or None.*Received: weights_dtype='bfloat16'"
    ):
        model.save_to_preset(tmp_path / "new", weights_dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def kinds_of_numbers(file):
    """Returns the names of the dtypes in an HDF5 file."""
    found = []
    with h5py.File(file) as opened:
        opened.visititems(lambda _, x: found.append(str(x.dtype)) if isinstance(x, h5py.Dataset) else None)
    return set(found)


def test_weights_of_bfloat16_models_are_written_in_the_given_dtype(tmp_path):
    model = keras_jamba.DHCJamba(**TINY, dtype="bfloat16")
    images = np.random.default_rng(0).random((2, 8, 8, 1), "float32")
    for dtype in ("float16", "float32"):
        model.save_to_preset(tmp_path / dtype, weights_dtype=dtype)
        assert kinds_of_numbers(tmp_path / dtype / "model.weights.h5") - {"int32", "uint32", "int64"} == {dtype}
        loaded = keras_jamba.DHCJamba.from_preset(tmp_path / dtype, dtype="bfloat16")
        np.testing.assert_allclose(numpy(loaded(images)), numpy(model(images)), rtol=0.02, atol=0.02)


def test_statistics_that_are_not_finite_do_not_keep_a_model_from_being_written(tmp_path):
    model = keras_jamba.DHCJamba(**TINY | dict(moe_frequency=1, num_experts=2, num_heads=2))
    (usage,) = (v for v in model.weights if v.path.endswith("usage"))
    usage.assign(usage * np.nan)
    for dtype in (None, "float16", "float32"):
        model.save_to_preset(tmp_path / str(dtype), weights_dtype=dtype)
        keras_jamba.DHCJamba.from_preset(tmp_path / str(dtype))


@pytest.mark.parametrize("changes", [dict(image_shape=(8, 8, 3)), dict(stem="patchify"), dict(d_model=16)])
def test_an_override_that_changes_a_stored_shape_names_load_weights(mine, changes):
    with pytest.raises(ValueError, match="pass load_weights=False"):
        keras_jamba.DHCJamba.from_preset(mine, **changes)
    keras_jamba.DHCJamba.from_preset(mine, load_weights=False, **changes)


@full("jax", "tensorflow")
def test_a_preset_of_a_trained_model_omits_the_optimizer(tmp_path):
    model = keras_jamba.DHCJamba(**TINY)
    model.save_to_preset(tmp_path / "new")
    model.compile("adam", "mse")
    images, targets = np.ones((2, 8, 8, 1), "float32"), np.ones((2, 3), "float32")
    model.fit(images, targets, verbose=0)
    model.save_to_preset(tmp_path / "trained")
    sizes = [(tmp_path / name / "model.weights.h5").stat().st_size for name in ("new", "trained")]
    assert sizes[1] < 1.2 * sizes[0]
    loaded = keras_jamba.DHCJamba.from_preset(tmp_path / "trained")
    np.testing.assert_array_equal(numpy(loaded(images)), numpy(model(images)))
    model.fit(images, targets, verbose=0)
    assert int(numpy(model.optimizer.iterations.value)) == 2


def test_overrides_that_change_no_weight_keep_the_weights():
    recorded = np.load(GOLDEN / "images_and_logits.npz")
    model = keras_jamba.DHCJamba.from_preset(GOLDEN, dropout=0.3, z_coefficient=0.0)
    np.testing.assert_allclose(numpy(model(recorded["images"])), recorded["logits"], rtol=0, atol=1e-5)
    first, second = (numpy(model(recorded["images"], training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 0


@full("jax")
def test_loading_leaves_the_callers_random_seed_unchanged():
    def drawn(seed):
        keras.utils.set_random_seed(seed)
        model = keras_jamba.DHCJamba.from_preset(GOLDEN, dropout=0.5)
        return numpy(model(np.ones((1, 8, 8, 1), "float32"), training=True))

    assert np.abs(drawn(1) - drawn(2)).max() > 0


def test_a_preset_without_weights_warns_once(mine, caplog):
    edit(mine, weights=None)
    keras_jamba.DHCJamba.from_preset(mine)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"The preset {str(mine)!r} has no weights: the model starts from random ones."
    ]


def test_sizes_of_a_trained_preset_are_free_without_its_weights():
    changes = dict(image_shape=(16, 16, 1), downsample=4, stem="patchify", tokens="grid", num_classes=3)
    with pytest.raises(ValueError, match="weights of a preset must fit the model.*load_weights=False"):
        keras_jamba.DHCJamba.from_preset("small", **changes)
    free = keras_jamba.DHCJamba.from_preset("small", load_weights=False, **changes)
    assert free.predict(np.zeros((1, 16, 16, 1), "float32"), verbose=0).shape == (1, 3)
    assert free.get_config()["d_model"] == presets.read("small")[0]["config"]["d_model"]
    with pytest.raises(ValueError, match="weights of a preset must fit the model.*load_weights=False"):
        keras_jamba.DHCJamba.from_preset("small", stem="conv")


def test_a_preset_with_weights_can_start_from_random_ones(mine, caplog):
    (mine / "model.weights.h5").unlink()
    keras_jamba.DHCJamba.from_preset(mine, load_weights=False)
    assert not caplog.records
    with pytest.raises(ValueError, match="Received: .*no such file.*load_weights=False"):
        keras_jamba.DHCJamba.from_preset(mine)


@pytest.mark.parametrize("weights", [{}, False, [], "abc", {"sha256": "0"}, {"variables": {}}, {"sha256": 1}])
def test_invalid_metadata_of_weights_is_refused(mine, weights):
    edit(mine, weights=weights)
    with pytest.raises(ValueError, match="must be JSON with format=2.*Received: .*config.json"):
        keras_jamba.DHCJamba.from_preset(mine)


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # Keras warns before the error
def test_weights_of_another_body_are_refused_for_a_new_head(mine, tmp_path):
    other = keras_jamba.DHCJamba(**TINY | {"d_model": 4, "num_heads": 2})
    other.save_to_preset(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.weights.h5", mine)
    weights = json.loads((mine / "config.json").read_text())["weights"]
    written = json.loads((tmp_path / "other" / "config.json").read_text())["weights"]
    edit(mine, weights=weights | {"sha256": written["sha256"]})
    with pytest.raises(ValueError, match="could not be loaded|mismatch"):
        keras_jamba.DHCJamba.from_preset(mine, num_classes=5)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "config": {}}', "not json"])
def test_a_damaged_config_is_named(mine, text):
    (mine / "config.json").write_text(text)
    with pytest.raises(ValueError, match="must be JSON with format=2.*Received: .*config.json"):
        keras_jamba.DHCJamba.from_preset(mine)


def test_a_changed_config_is_refused(mine, tmp_path):
    keras_jamba.DHCJamba.from_preset(mine).save_to_preset(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())["config"]
    edit(tmp_path / "new", config=config | {"epsilon": 1e-3})
    with pytest.raises(ValueError, match="does not match its checksum. Copy the preset again"):
        keras_jamba.DHCJamba.from_preset(tmp_path / "new")
    # The same values match, in any formatting.
    edit(tmp_path / "new", config=config)
    keras_jamba.DHCJamba.from_preset(tmp_path / "new")


def test_a_preset_without_a_checksum_loads_with_one_warning(mine, caplog):
    keras_jamba.DHCJamba.from_preset(mine)
    assert [record.getMessage() for record in caplog.records if "without a checksum" in record.getMessage()]
    caplog.clear()
    keras_jamba.DHCJamba.from_preset("digits")
    assert not caplog.records


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 3000},
        {"d_model": 8192},
        {"d_ff": 10**9},
        {"num_layers": 10**12},
        {"num_layers": 2, "moe_frequency": 2, "num_experts": 10**9},
        {"stem": "patchify", "downsample": 10**6},
        {"stem": "residual", "stem_blocks": 10**6},
    ],
)
def test_sizes_beyond_the_stored_weights_are_refused_before_a_model_is_built(mine, monkeypatch, sizes):
    config = json.loads((mine / "config.json").read_text())["config"]
    edit(mine, config=config | sizes)
    monkeypatch.setattr(keras_jamba.DHCJamba, "__init__", lambda *args, **kwargs: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match="must fit its stored weights. Received: .*mine' with .* weights"):
        keras_jamba.DHCJamba.from_preset(mine)


@pytest.fixture
def of_texts(tmp_path):
    """A preset with a tokenizer and a generation config."""
    model = keras_jamba.JambaCausalLM(vocab_size=300, d_model=8, num_layers=1, moe_frequency=0, dt_rank=1)
    model.tokenizer, model.generation_config = ByteTokenizer(), {"max_new_tokens": 3}
    model.save_to_preset(tmp_path / "texts")
    return tmp_path / "texts"


@pytest.mark.parametrize("name", ["byte_tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("problem", ["changed", "missing"])
def test_a_changed_or_missing_file_beside_the_weights_is_refused(of_texts, name, problem):
    (of_texts / name).unlink()
    if problem == "changed":
        (of_texts / name).write_text("{}")
    with pytest.raises(ValueError, match=f"must be as they were written. Received: .*{name}', which .* {problem}"):
        keras_jamba.JambaCausalLM.from_preset(of_texts)


@pytest.mark.parametrize("name", ["/dev/zero", "../other", "pipe"])
def test_a_manifest_that_names_a_file_elsewhere_or_a_pipe_is_refused_unread(of_texts, name):
    os.mkfifo(of_texts / "pipe")
    metadata = json.loads((of_texts / "config.json").read_text())
    metadata["files"] |= {name: "0" * 64}
    (of_texts / "config.json").write_text(json.dumps(_checksums.sealed(metadata)))
    with pytest.raises(ValueError, match="Received"):
        keras_jamba.JambaCausalLM.from_preset(of_texts)


def test_a_preset_without_a_list_of_its_files_loads(of_texts):
    metadata = json.loads((of_texts / "config.json").read_text())
    del metadata["files"]
    (of_texts / "config.json").write_text(json.dumps(_checksums.sealed(metadata)))
    assert keras_jamba.JambaCausalLM.from_preset(of_texts).generation_config == {"max_new_tokens": 3}


@pytest.mark.parametrize("preset", [None, 5, b"digits"])
def test_a_preset_that_is_no_path_is_refused(preset):
    with pytest.raises(ValueError, match="must be a built-in name"):
        keras_jamba.DHCJamba.from_preset(preset)


def test_a_preset_without_permission_is_named(mine, monkeypatch):
    def forbidden(path, *given):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_files, "open", forbidden, raising=False)
    with pytest.raises(PermissionError, match="must be readable. .*Make it readable: '.*config.json'"):
        keras_jamba.DHCJamba.from_preset(mine)


def test_the_second_of_two_processes_is_refused_its_preset(tmp_path):
    with (
        pytest.raises(ValueError, match="does not exist or is empty"),
        presets.preset_folder(tmp_path / "new") as staged,
    ):
        (staged / "file").write_text("second")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text("first")
    assert (tmp_path / "new" / "file").read_text() == "first"


def test_a_config_that_is_nested_too_deeply_for_its_checksum_is_refused(of_texts):
    text = json.dumps(json.loads((of_texts / "config.json").read_text()) | {"more": None})
    for depth in range(700, 1000, 3):
        nested = text.replace('"more": null', '"more": ' + "[" * depth + "]" * depth)
        (of_texts / "config.json").write_text(nested)
        with pytest.raises(ValueError, match="Received"):
            presets.read(of_texts)


@pytest.mark.parametrize(
    "router",
    [
        {"class_name": "Dense", "registered_name": "Dense", "module": "keras.layers", "config": {"units": 2}},
        {"class_name": "system", "registered_name": "system", "module": "os", "config": {"command": "true"}},
        {"class_name": "Router", "registered_name": "keras_jamba>Router", "config": {"num_experts": "many"}},
        {"class_name": "Router", "registered_name": "keras_jamba>Router", "config": []},
        {
            "class_name": "__numpy__",
            "registered_name": "keras_jamba>Router",
            "config": {"value": [1], "dtype": "int32"},
        },
        "Router",
    ],
)
def test_only_routers_are_built_from_a_config(mine, router):
    config = json.loads((mine / "config.json").read_text())["config"]
    edit(mine, config=config | {"moe_frequency": 1, "moe_offset": 0, "num_experts": 2, "router": router})
    with pytest.raises(ValueError, match="Received: "):
        keras_jamba.DHCJamba.from_preset(mine, load_weights=False)


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, monkeypatch):
    model = keras_jamba.DHCJamba(**TINY)
    weight = model.backbone.final_norm.scale
    weight.assign(np.where(np.arange(weight.shape[0]) == 2, np.nan, numpy(weight)))
    with pytest.raises(ValueError, match="Weights must be finite numbers. Received: .*final_norm/scale"):
        model.save_to_preset(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    # Earlier versions wrote such presets.
    monkeypatch.setattr(presets, "check_finite", lambda model, source: None)
    model.save_to_preset(tmp_path / "new")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Weights must be finite numbers. Received: .*final_norm/scale"):
        keras_jamba.DHCJamba.from_preset(tmp_path / "new")


@pytest.mark.parametrize(
    "options",
    [
        dict(mamba_ratio=0, d_ff=1, expand=1000),
        dict(mamba_ratio=None, d_ff=0, moe_frequency=0, mixer="gated_conv", d_state=10**6),
        dict(mamba_ratio=None, moe_frequency=1, moe_offset=0, use_swiglu=False, router=Router(2, 1), num_experts=10**6),
        dict(quantization="int4", d_model=128),
    ],
    ids=["attention", "gated convolution", "router", "int4"],
)
def test_every_legal_preset_fits_its_own_weights(tmp_path, options):
    sizes = dict(vocab_size=8, d_model=16, num_layers=1, num_heads=2)
    model = keras_jamba.JambaCausalLM(**sizes | options)
    model.save_to_preset(tmp_path / "new")
    loaded = keras_jamba.JambaCausalLM.from_preset(tmp_path / "new")
    np.testing.assert_array_equal(numpy(loaded(np.array([[1, 2]]))), numpy(model(np.array([[1, 2]]))))


def test_a_preset_of_another_class_is_named(mine):
    edit(mine, class_name="JambaCausalLM")
    with pytest.raises(ValueError, match="Received: .*JambaCausalLM, loaded by DHCJamba"):
        keras_jamba.DHCJamba.from_preset(mine)


def test_an_unknown_override_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="num_layers.*Received.*'num_layer'"):
        keras_jamba.DHCJamba.from_preset("small", num_layer=3)


def test_an_existing_preset_is_not_overwritten(mine):
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    model = keras_jamba.DHCJamba(**TINY)
    with pytest.raises(ValueError, match="does not exist or is empty. Received"):
        model.save_to_preset(mine)
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before


def test_a_failed_write_leaves_no_files(tmp_path, monkeypatch):
    model = keras_jamba.DHCJamba(**TINY)

    def full(file):
        raise OSError("no space left on device")

    monkeypatch.setattr(presets, "_sha256", full)
    with pytest.raises(OSError, match="no space"):
        model.save_to_preset(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
