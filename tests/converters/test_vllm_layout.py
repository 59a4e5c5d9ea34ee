"""Exports have the names and shapes that vLLM's Jamba loads.

The rules are those of `vllm/model_executor/models/jamba.py` of September 2025, written anew: vLLM needs a GPU.
"""

import json
import re

import golden_jamba
import numpy as np
import pytest
import tokenizers
from checks import numpy, once
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import keras_jamba
from keras_jamba.tokenizers import load_tokenizer

# The checkpoint is the same on all backends.
pytestmark = once
# Parts of a parameter of vLLM, by the name of the checkpoint.
STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
STACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def parameters(config):
    """Returns `{name: shape}` of vLLM's parameters on one GPU, where experts are stacked."""
    d, f, e = config.hidden_size, config.intermediate_size, config.mamba_expand * config.hidden_size
    n, r, w, x = config.mamba_d_state, config.mamba_dt_rank, config.mamba_d_conv, config.num_experts
    kv = d // config.num_attention_heads * config.num_key_value_heads
    found = {"model.embed_tokens.weight": (config.vocab_size, d), "lm_head.weight": (config.vocab_size, d)}
    found["model.final_layernorm.weight"] = (d,)
    for i, kind in enumerate(config.layers_block_type):
        layer = f"model.layers.{i}."
        found |= {f"{layer}input_layernorm.weight": (d,), f"{layer}pre_ff_layernorm.weight": (d,)}
        if kind == "attention":
            found |= {f"{layer}qkv_proj.weight": (d + 2 * kv, d), f"{layer}o_proj.weight": (d, d)}
        else:
            shapes = {"in_proj.weight": (2 * e, d), "out_proj.weight": (d, e), "x_proj.weight": (r + 2 * n, e)}
            shapes |= {"dt_proj.weight": (e, r), "dt_proj.bias": (e,), "A": (e, n), "D": (e,)}
            shapes |= {"conv1d.weight": (e, 1, w)} | ({"conv1d.bias": (e,)} if config.mamba_conv_bias else {})
            shapes |= {f"{name}_layernorm.weight": (size,) for name, size in (("dt", r), ("b", n), ("c", n))}
            if config.mamba_proj_bias:
                shapes |= {"in_proj.bias": (2 * e,), "out_proj.bias": (d,)}
            found |= {f"{layer}mamba.{name}": shape for name, shape in shapes.items()}
        if config.layers_num_experts[i] > 1:
            found[f"{layer}feed_forward.router.weight"] = (x, d)
            found[f"{layer}feed_forward.experts.w13_weight"] = (x, 2 * f, d)
            found[f"{layer}feed_forward.experts.w2_weight"] = (x, d, f)
        else:
            found[f"{layer}feed_forward.gate_up_proj.weight"] = (2 * f, d)
            found[f"{layer}feed_forward.down_proj.weight"] = (d, f)
    return found


def placed(name):
    """Returns the parameter of a tensor of the checkpoint, and the index of its expert or None."""
    name = name.replace(".self_attn.", ".").replace(".A_log", ".A")
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if expert:
        return f"{expert[1]}.{'w2' if expert[3] == 'down' else 'w13'}_weight", int(expert[2])
    stem = name.split(".")[-2]
    return name.replace(f".{stem}.", f".{STACKED[stem]}.") if stem in STACKED else name, None


def loaded(tensors, config):
    """Returns the number of rows that each parameter of vLLM gets, after checking the other sizes."""
    expected = parameters(config)
    rows = dict.fromkeys(expected, 0)
    for name, x in tensors.items():
        target, expert = placed(name)
        assert target in expected, f"vLLM has no place for {name}"
        shape = expected[target]
        rows[target] += len(x)
        assert x.shape[1:] == (shape[1:] if expert is None else shape[2:]), name
        assert expert is None or expert < shape[0]
    return rows, expected


def tensors_of(folder):
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("case", ["dense", "moe", "gqa_leftpad", "proj_bias", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20000])
def test_every_parameter_of_vllm_is_filled_once(tmp_path, case, max_shard_bytes):
    if case == "tied":
        sizes = dict(d_model=16, num_layers=4, mamba_ratio=3, num_heads=2, num_experts=4)
        model = keras_jamba.JambaCausalLM(50, **sizes, tie_embeddings=True)
    else:
        model = keras_jamba.JambaCausalLM.from_preset(golden_jamba.FOLDER / case)
    folder = tmp_path / "export"
    model.export_to_transformers(folder, max_shard_bytes=max_shard_bytes, include_tied_head=True)
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["JambaForCausalLM"]
    rows, expected = loaded(tensors_of(folder), config)
    for name, shape in expected.items():
        assert rows[name] == (shape[0] if len(shape) < 3 or "conv1d" in name else shape[0] * shape[1]), name


def test_a_copy_of_a_tied_head_is_written_on_request_and_read_back(tmp_path):
    model = keras_jamba.JambaCausalLM(50, d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, tie_embeddings=True)
    model.export_to_transformers(tmp_path / "plain")
    model.export_to_transformers(tmp_path / "copy", include_tied_head=True)
    plain, copy = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "copy")
    assert copy.keys() - plain.keys() == {"lm_head.weight"}
    np.testing.assert_array_equal(copy["lm_head.weight"], copy["model.embed_tokens.weight"])
    again = keras_jamba.JambaCausalLM.from_preset(tmp_path / "copy")
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))


def test_the_files_beside_the_weights_are_those_that_vllm_reads(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    model = keras_jamba.JambaCausalLM(64, d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, eos_token_id=2)
    model.tokenizer = load_tokenizer(source)
    model.generation_config = {"eos_token_id": [2], "temperature": 0.7, "do_sample": True}
    model.export_to_transformers(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    needed = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size dtype "
        "rms_norm_eps hidden_act mamba_d_state mamba_d_conv mamba_expand mamba_dt_rank mamba_conv_bias mamba_proj_bias "
        "num_experts num_experts_per_tok attn_layer_period attn_layer_offset expert_layer_period expert_layer_offset"
    )
    assert set(needed.split()) <= config.keys()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer("a b")["input_ids"] == model.tokenizer.encode("a b")
    assert GenerationConfig.from_pretrained(tmp_path / "export").temperature == 0.7
