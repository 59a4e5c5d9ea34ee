"""Adapters exchanged with PEFT give the same logits in both libraries."""

import json
import shutil

import numpy as np
import pytest
import torch
from checks import full, numpy
from golden_jamba import FOLDER
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import JambaForCausalLM, JambaForSequenceClassification

import keras_jamba

# PEFT uses a deprecated name of transformers.
pytestmark = [full(), pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]
IDS = np.random.default_rng(0).integers(3, 31, (2, 9))
# Without merging, transformers multiplies by dt_proj's weight and ignores its adapter.
UNMERGED = ["attention", "mamba.in_proj", "mamba.x_proj", "mamba.out_proj"]


def with_adapters(case, kind=keras_jamba.JambaCausalLM, **given):
    """Returns a golden model with random values in its adapters and other trainable weights."""
    model = kind.from_preset(FOLDER / case)
    model.enable_lora(3, lora_alpha=6, **given)
    rng = np.random.default_rng(1)
    for variable in model.trainable_weights:
        variable.assign(0.2 * rng.standard_normal(variable.shape))
    return model


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize(("targets", "merged"), [(UNMERGED, False), (None, True)])
def test_peft_reads_our_adapters(targets, merged, tmp_path):
    model = with_adapters("proj_bias", targets=targets)
    model.export_lora_to_peft(tmp_path / "adapters")
    base = JambaForCausalLM.from_pretrained(FOLDER / "proj_bias")
    before = theirs(base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters")
    actual = theirs(adapted.merge_and_unload() if merged else adapted)
    assert np.abs(actual - before).max() > 0.1
    np.testing.assert_allclose(actual, numpy(model(IDS)), atol=1e-4)


def test_we_read_what_peft_wrote(tmp_path):
    torch.manual_seed(0)
    base = JambaForCausalLM.from_pretrained(FOLDER / "dense")
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "in_proj", "dt_proj", "down_proj"])
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path)
    model = keras_jamba.JambaCausalLM.from_preset(FOLDER / "dense")
    before = numpy(model(IDS))
    model.load_lora(tmp_path)
    assert np.abs(numpy(model(IDS)) - before).max() > 0.1
    np.testing.assert_allclose(numpy(model(IDS)), theirs(adapted.merge_and_unload()), atol=1e-4)


def test_fully_trained_layers_are_exported_with_the_adapters(tmp_path):
    model = with_adapters("seqcls", keras_jamba.JambaClassifier, targets="mamba.in_proj", also_train="head")
    model.export_lora_to_peft(tmp_path / "adapters")
    base = JambaForSequenceClassification.from_pretrained(FOLDER / "seqcls")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters")
    np.testing.assert_allclose(theirs(adapted), numpy(model(IDS)), atol=1e-4)
    again = keras_jamba.JambaClassifier.from_preset(FOLDER / "seqcls")
    again.load_lora(tmp_path / "adapters")
    np.testing.assert_array_equal(numpy(again(IDS)), numpy(model(IDS)))


def test_adapters_of_experts_are_not_exported_to_peft(tmp_path):
    model = with_adapters("gqa_leftpad", targets="experts")
    with pytest.raises(ValueError, match="no place for adapters of experts"):
        model.export_lora_to_peft(tmp_path / "adapters")
    assert not list(tmp_path.iterdir())


def test_single_trained_parameters_are_not_exported_to_peft(tmp_path):
    with pytest.raises(ValueError, match="PEFT trains complete modules"):
        with_adapters("dense", targets="attention", also_train="block_0").export_lora_to_peft(tmp_path / "adapters")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(use_dora=True), "must be plain LoRA"),
        (dict(r="many"), "must hold adapter_config.json"),
        (dict(r=4), "Adapters must fit the layers"),
    ],
)
def test_an_unsupported_adapter_is_refused_and_changes_nothing(change, message, tmp_path):
    with_adapters("dense").export_lora_to_peft(tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = keras_jamba.JambaCausalLM.from_preset(FOLDER / "dense")
    with pytest.raises(ValueError, match=message):
        model.load_lora(tmp_path / "adapters")
    assert not [v for v in model.weights if "_lora_" in v.path]


def test_adapters_beside_a_checkpoint_are_named(tmp_path, caplog):
    model = with_adapters("proj_bias", targets=UNMERGED)
    model.export_lora_to_peft(tmp_path / "adapters")
    JambaForCausalLM.from_pretrained(FOLDER / "proj_bias").save_pretrained(tmp_path / "all")
    before = theirs(JambaForCausalLM.from_pretrained(tmp_path / "all"))
    for file in (tmp_path / "adapters").iterdir():
        shutil.copy(file, tmp_path / "all")
    loaded = keras_jamba.JambaCausalLM.from_preset(tmp_path / "all")
    assert "has adapters beside it, adapter_config.json, which transformers loads with it" in caplog.text
    np.testing.assert_allclose(numpy(loaded(IDS)), before, atol=1e-4)
    loaded.load_lora(tmp_path / "all")
    np.testing.assert_allclose(numpy(loaded(IDS)), numpy(model(IDS)), atol=1e-4)
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "all")
    (tmp_path / "all" / "adapter_config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(theirs(JambaForCausalLM.from_pretrained(tmp_path / "all")), numpy(model(IDS)), atol=1e-4)
