"""Random Jamba models exchanged with transformers give the same logits in both libraries."""

import keras
import numpy as np
import pytest
import torch
from checks import full, jitted, numpy
from transformers import JambaConfig, JambaForCausalLM, JambaForSequenceClassification, MambaConfig, MambaForCausalLM

import keras_jamba

pytestmark = full()
TINY = dict(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    attn_layer_period=3,
    attn_layer_offset=1,
    num_experts=4,
    mamba_d_state=4,
    use_mamba_kernels=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CASES = {
    "odd widths, one kv head, top 3 of 5": dict(
        hidden_size=20, intermediate_size=13, num_key_value_heads=1, num_experts=5, num_experts_per_tok=3
    ),
    "tied, top 1, no bias of the convolution": dict(
        tie_word_embeddings=True, num_experts_per_tok=1, mamba_conv_bias=False, expert_layer_offset=0
    ),
    "projection biases, wide kernel, no experts": dict(
        mamba_proj_bias=True, mamba_d_conv=5, num_experts=1, mamba_dt_rank=3, mamba_expand=3
    ),
    "several stops, experts in one layer of three": dict(
        expert_layer_period=3, expert_layer_offset=2, eos_token_id=[2, 5], rms_norm_eps=1e-5
    ),
}
IDS = np.random.default_rng(0).integers(3, 31, (2, 9))


def drawn(model):
    """Returns the model with random weights that reveal mistakes; many initial weights share one value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.eval()


def theirs(model, ids, **given):
    model.eval()
    # Other expert implementations of transformers require widths that are multiples of four.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        # With a cache, transformers requires an attention layer.
        return model(torch.as_tensor(ids), use_cache=False, **given).logits.numpy()


# Sharding does not depend on model sizes, so these cases suffice. Tied weights are stored once.
SHARDED = [case for case in CASES if "tied" in case or "odd" in case]


@pytest.mark.parametrize(
    "case, max_shard_size", [*((case, "5GB") for case in CASES), *((case, "8KB") for case in SHARDED)]
)
def test_a_jamba_of_transformers_keeps_its_logits_in_both_directions(tmp_path, case, max_shard_size):
    other = drawn(JambaForCausalLM(JambaConfig(**TINY | CASES[case])))
    other.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    expected = theirs(other, IDS)
    ours = keras_jamba.JambaCausalLM.from_preset(tmp_path / "theirs")
    np.testing.assert_allclose(numpy(jitted(ours)(IDS)), expected, rtol=0, atol=1e-4)
    shards = 10**9 if max_shard_size == "5GB" else 8000
    ours.export_to_transformers(tmp_path / "ours", max_shard_bytes=shards)
    back = JambaForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(theirs(back, IDS), expected)
    for name, value in JambaConfig.from_pretrained(tmp_path / "theirs").to_dict().items():
        if name not in ("transformers_version", "_name_or_path", "use_mamba_kernels"):
            assert str(getattr(back.config, name)).removeprefix("torch.") == str(value), name


def test_greedy_tokens_equal_those_of_transformers(tmp_path):
    other = drawn(JambaForCausalLM(JambaConfig(**TINY | CASES["several stops, experts in one layer of three"])))
    other.save_pretrained(tmp_path / "theirs")
    ours = keras_jamba.JambaCausalLM.from_preset(tmp_path / "theirs")
    prompts = [IDS[0, :3].tolist(), IDS[1].tolist(), [7]]
    found = ours.generate(prompts, max_new_tokens=10)
    other.set_experts_implementation("eager")
    for prompt, row in zip(prompts, found, strict=True):
        expected = other.generate(torch.as_tensor([prompt]), max_new_tokens=10, do_sample=False)[0]
        np.testing.assert_array_equal(row, expected.numpy())


def test_stacked_experts_of_version_five_are_read(tmp_path):
    other = drawn(JambaForCausalLM(JambaConfig(**TINY)))
    other.save_pretrained(tmp_path / "stacked", save_original_format=False)
    ours = keras_jamba.JambaCausalLM.from_preset(tmp_path / "stacked")
    np.testing.assert_allclose(numpy(jitted(ours)(IDS)), theirs(other, IDS), rtol=0, atol=1e-4)


def test_weights_in_bfloat16_are_unchanged(tmp_path):
    other = drawn(JambaForCausalLM(JambaConfig(**TINY))).to(torch.bfloat16)
    other.save_pretrained(tmp_path / "low")
    ours = keras_jamba.JambaCausalLM.from_preset(tmp_path / "low", dtype="bfloat16")
    ours.export_to_transformers(tmp_path / "again")
    back = JambaForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(other.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_classifier_keeps_its_logits_and_accepts_a_new_head(tmp_path, caplog):
    config = JambaConfig(**TINY, num_labels=3)
    other = drawn(JambaForSequenceClassification(config))
    other.save_pretrained(tmp_path / "theirs")
    expected = theirs(other, IDS)
    ours = keras_jamba.JambaClassifier.from_preset(tmp_path / "theirs")
    np.testing.assert_allclose(numpy(jitted(ours)(IDS)), expected, rtol=0, atol=1e-4)
    ours.export_to_transformers(tmp_path / "ours")
    back = JambaForSequenceClassification.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(theirs(back, IDS), expected)
    five = keras_jamba.JambaClassifier.from_preset(tmp_path / "theirs", num_classes=5)
    assert numpy(jitted(five)(IDS)).shape == (2, 5) and "no head for this task" in caplog.text
    np.testing.assert_array_equal(numpy(five.token_embedding.embeddings), numpy(ours.token_embedding.embeddings))


def test_a_mamba_of_transformers_keeps_its_logits_in_both_directions(tmp_path):
    config = MambaConfig(vocab_size=31, hidden_size=24, num_hidden_layers=2, state_size=4, use_bias=True)
    other = drawn(MambaForCausalLM(config))
    other.save_pretrained(tmp_path / "theirs")
    expected = theirs(other, IDS)
    ours = keras_jamba.JambaCausalLM.from_preset(tmp_path / "theirs")
    np.testing.assert_allclose(numpy(jitted(ours)(IDS)), expected, rtol=0, atol=1e-4)
    ours.export_to_transformers(tmp_path / "ours")
    np.testing.assert_array_equal(theirs(MambaForCausalLM.from_pretrained(tmp_path / "ours"), IDS), expected)


def test_transformers_reads_a_new_model(tmp_path):
    keras.utils.set_random_seed(1)
    ours = keras_jamba.JambaCausalLM(19, d_model=16, num_layers=4, mamba_ratio=None, num_heads=2, num_experts=3)
    ours.export_to_transformers(tmp_path / "ours")
    ids = IDS % 19
    other = JambaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(other, ids), numpy(jitted(ours)(ids)), rtol=0, atol=1e-4)
