"""Errors name the defect of a checkpoint before anything is loaded."""

import fnmatch
import json
import shutil
import struct

import golden_jamba
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import keras_jamba
from keras_jamba.models import jamba_causal_lm

MODEL = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(golden_jamba.FOLDER / "dense", tmp_path / "dense")
    return tmp_path / "dense"


def load(folder):
    return keras_jamba.JambaCausalLM.from_preset(folder)


def rewritten(folder, change):
    tensors = load_file(folder / MODEL)
    change(tensors)
    save_file(tensors, folder / MODEL)


def configured(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


@pytest.fixture
def nothing_is_built(monkeypatch):
    def built(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(jamba_causal_lm.JambaCausalLM, "__init__", built)


def test_a_truncated_file_is_named(folder, nothing_is_built):
    data = (folder / MODEL).read_bytes()
    for size in (0, 5, 200, len(data) - 1):
        (folder / MODEL).write_bytes(data[:size])
        with pytest.raises(ValueError, match="complete safetensors files. Received: .*model.safetensors"):
            load(folder)


def test_a_header_with_false_sizes_is_refused(folder, nothing_is_built):
    header, rest = header_of((folder / MODEL).read_bytes())
    name = "model.final_layernorm.weight"
    for entry in (
        header[name] | {"shape": [10**9]},
        header[name] | {"data_offsets": [0, 10**12]},
        header[name] | {"data_offsets": [8, 4]},
        header[name] | {"dtype": "F99"},
    ):
        (folder / MODEL).write_bytes(with_header(header | {name: entry}, rest))
        with pytest.raises(ValueError, match="complete safetensors files"):
            load(folder)
    (folder / MODEL).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="complete safetensors files"):
        load(folder)


def test_a_config_with_false_sizes_allocates_nothing(folder, nothing_is_built):
    configured(folder, hidden_size=2**30)
    with pytest.raises(ValueError, match="model.embed_tokens.weight has the shape .*, not"):
        load(folder)


@pytest.mark.parametrize("fields", [dict(num_hidden_layers=10**9), dict(num_experts=10**9)])
def test_a_config_with_false_counts_builds_no_list_of_tensors(folder, nothing_is_built, fields):
    configured(folder, **fields)
    with pytest.raises(ValueError, match="a tensor for each layer and each expert at least"):
        load(folder)


def test_empty_stacked_experts_build_no_list_of_experts(folder, nothing_is_built):
    header, rest = header_of((folder / MODEL).read_bytes())
    place = [len(rest), len(rest)]
    header["model.layers.0.feed_forward.experts.down_proj"] = {
        "dtype": "F32", "shape": [10**9, 0, 8], "data_offsets": place,
    }  # fmt: skip
    (folder / MODEL).write_bytes(with_header(header, rest))
    with pytest.raises(ValueError, match="experts.down_proj is unexpected"):
        load(folder)


@pytest.mark.parametrize("options", [dict(mixer="gated_conv"), dict(use_swiglu=False)])
def test_options_that_change_the_weights_are_refused(folder, options):
    with pytest.raises(ValueError, match="must be those of its checkpoint. Received: .*, without .* and with"):
        keras_jamba.JambaCausalLM.from_preset(folder, **options)
    with pytest.raises(ValueError, match=r"without .*backward_ssm"):
        keras_jamba.JambaClassifier.from_preset(folder, direction="bidirectional")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update(extra=np.zeros(3, "float32")), "extra is unexpected"),
        (lambda t: t.update({"model.layers.0.mamba.D": np.zeros(3, "float32")}), r"mamba.D has the shape \(3,\), not"),
    ],
)
def test_a_tensor_that_is_missing_unexpected_or_misshapen_is_named(folder, nothing_is_built, change, message):
    rewritten(folder, change)
    with pytest.raises(ValueError, match=f"tensors of a checkpoint must be those.*{message}"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(folder, value):
    rewritten(folder, lambda t: t["model.layers.0.mamba.A_log"].__setitem__((0, 0), value))
    with pytest.raises(ValueError, match="Weights must be finite.*model.layers.0.mamba.A_log"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "other/model.safetensors", "model.bin", 3, ".."]
)
def test_an_index_that_names_files_elsewhere_is_refused(folder, nothing_is_built, name):
    shutil.copy(folder / MODEL, folder.parent)
    names = dict.fromkeys(load_file(folder / MODEL), name)
    (folder / f"{MODEL}.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="must name safetensors files beside it"):
        load(folder)


def test_an_index_and_its_shards_must_agree(folder, nothing_is_built):
    names = dict.fromkeys(load_file(folder / MODEL), MODEL)
    index = folder / f"{MODEL}.index.json"
    index.write_text(json.dumps({"weight_map": names | {"another": MODEL}}))
    with pytest.raises(ValueError, match="A shard must hold the tensors.*another"):
        load(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "gone.safetensors")}))
    with pytest.raises(ValueError, match="gone.safetensors"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json"):
        load(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="llama"), "model_type='llama'"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(attn_layer_offset=9), "attn_layer_offset=9"),
        (dict(num_hidden_layers="8"), "num_hidden_layers in config.json must be an integer.*'8'"),
        (dict(quantization_config={"bits": 4}), "quantization_config="),
        (dict(head_dim=5), "head_dim=5"),
    ],
)
def test_an_unsupported_config_is_named(folder, nothing_is_built, fields, message):
    configured(folder, **fields)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        *({"mamba_conv_bias": x} for x in ("false", [], 2)),
        *({"tie_word_embeddings": x} for x in ("true", {})),
        *({"pad_token_id": x} for x in ("x", [0], 1.5, True)),
        *({"eos_token_id": x} for x in ("x", [1, "x"], {})),
        *({"rms_norm_eps": x} for x in ("x", None, [], float("inf"), 10**400)),
        *({"router_aux_loss_coef": x} for x in ("x", {}, float("nan"))),
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_a_field_of_a_wrong_type_is_named_with_its_file(folder, nothing_is_built, fields):
    configured(folder, **fields)
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} in config.json must be .*Received: .*Check the file"):
        load(folder)


def test_a_folder_without_weights_or_config_is_named(folder, nothing_is_built):
    (folder / MODEL).unlink()
    with pytest.raises(ValueError, match="must hold model.safetensors"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json with one JSON object"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="or a folder with a config.json"):
        load(folder)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(folder, nothing_is_built):
    configured(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="the head must be the embedding"):
        load(folder)


@pytest.mark.parametrize(
    "options", [dict(use_rope=True), dict(normalize_top_k=True), dict(attention_window=3), dict(use_swiglu=False)]
)
def test_options_that_transformers_lacks_are_not_exported(tmp_path, options):
    model = keras_jamba.JambaCausalLM(11, d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=2, **options)
    with pytest.raises(ValueError, match="Jamba in transformers supports only"):
        model.export_to_transformers(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_handle_must_name_owner_and_model():
    for handle in ("hf://jamba", "hf://a/b/c", "hf:///b"):
        with pytest.raises(ValueError, match="hf://owner/name"):
            load(handle)


def test_a_handle_downloads_and_loads_only_the_needed_files(folder, monkeypatch):
    import huggingface_hub

    requests = {}

    def download(name, revision=None, allow_patterns=None):
        requests.update(name=name, revision=revision, allow_patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load("hf://owner/name@v2")
    assert requests["name"] == "owner/name" and requests["revision"] == "v2"
    # The patterns include the files of save_to_preset, but no pickles and no weights of other libraries.
    wanted = {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.weights.h5"}
    for file in (*wanted, "pytorch_model.bin", "tf_model.h5"):
        assert any(fnmatch.fnmatch(file, pattern) for pattern in requests["allow_patterns"]) == (file in wanted)
    assert model.count_params() == load(folder).count_params()


def test_a_new_head_has_new_labels(tmp_path):
    folder = golden_jamba.FOLDER / "seqcls"
    known = json.loads((folder / "config.json").read_text()).get("id2label") or {}
    classes = len(known) + 2
    keras_jamba.JambaClassifier.from_preset(folder, num_classes=classes).export_to_transformers(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["id2label"]) == classes == len(config["label2id"])
    assert load_file(tmp_path / "out" / MODEL)["score.weight"].shape[0] == classes
