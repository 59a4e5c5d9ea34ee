"""The recorded Jamba models of `tests/golden` (transformers 5.23.0), as our backbone with their weights.

The weights' names and shapes are Hugging Face's; linear kernels are transposed to Keras' (in, out).
"""

import json
from pathlib import Path

import keras
import numpy as np
from safetensors.numpy import load_file

import keras_jamba

FOLDER = Path(__file__).parent / "golden"


def read(case):
    """(config, weights, recorded arrays and the truth in float64, recorded gradients) of a case."""
    folder = FOLDER / case
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    truth = {f"truth_{name}": x for name, x in np.load(folder / "truth.npz").items()}
    return config, weights, dict(np.load(folder / "golden.npz")) | truth, dict(np.load(folder / "grads.npz"))


def backbone(config):
    experts = config["num_experts"]
    return keras_jamba.JambaBackbone(
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        mamba_ratio=config["attn_layer_period"] - 1,
        attention_offset=config["attn_layer_offset"],
        moe_frequency=config["expert_layer_period"] if experts > 1 else 0,
        moe_offset=config["expert_layer_offset"] if experts > 1 else None,
        num_experts=experts,
        num_experts_per_token=config["num_experts_per_tok"],
        d_ff=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        use_rope=False,
        d_state=config["mamba_d_state"],
        d_conv=config["mamba_d_conv"],
        expand=config["mamba_expand"],
        dt_rank=config["mamba_dt_rank"],
        conv_bias=config["mamba_conv_bias"],
        proj_bias=config["mamba_proj_bias"],
        normalize_top_k=False,
        balance_coefficient=0.0,
        z_coefficient=0.0,
        epsilon=config["rms_norm_eps"],
    )


def places(model, config):
    """`(variable, name, how)` of every weight of the backbone; `how` turns their array into ours."""
    yield model.final_norm.scale, "model.final_layernorm.weight", np.asarray
    for i, block in enumerate(model.blocks):
        prefix = f"model.layers.{i}."
        yield block.mixer_norm.scale, prefix + "input_layernorm.weight", np.asarray
        yield block.feed_forward_norm.scale, prefix + "pre_ff_layernorm.weight", np.asarray
        mixer, feed_forward = block.mixer, block.feed_forward
        if model.block_pattern[i][0] == "attention":
            for ours, theirs in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
                yield getattr(mixer, ours).kernel, f"{prefix}self_attn.{theirs}_proj.weight", np.transpose
        else:
            yield from _mamba_places(mixer, prefix + "mamba.")
        if model.block_pattern[i][1] == "moe":
            prefix += "feed_forward."
            yield feed_forward.router.kernel, prefix + "router.weight", np.transpose
            yield feed_forward.gate_bank, prefix + "experts.gate", _last_two_swapped
            yield feed_forward.up_bank, prefix + "experts.up", _last_two_swapped
            yield feed_forward.down_bank, prefix + "experts.down_proj", _last_two_swapped
        else:
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield getattr(feed_forward, name).kernel, f"{prefix}feed_forward.{name}.weight", np.transpose


def _mamba_places(mixer, prefix):
    ssm = mixer.ssm
    for dense, name in ((mixer.in_proj, "in_proj"), (mixer.out_proj, "out_proj"), (ssm.x_proj, "x_proj")):
        yield dense.kernel, f"{prefix}{name}.weight", np.transpose
        if dense.use_bias:
            yield dense.bias, f"{prefix}{name}.bias", np.asarray
    yield ssm.dt_proj.kernel, prefix + "dt_proj.weight", np.transpose
    yield ssm.conv_kernel, prefix + "conv1d.weight", lambda w: w[:, 0].T
    if ssm.conv_bias:
        yield ssm.conv_bias_weight, prefix + "conv1d.bias", np.asarray
    yield ssm.dt_bias, prefix + "dt_proj.bias", np.asarray
    yield ssm.A_log, prefix + "A_log", np.asarray
    yield ssm.D, prefix + "D", np.asarray
    for ours, theirs in (("dt_norm", "dt"), ("b_norm", "b"), ("c_norm", "c")):
        yield getattr(ssm, ours).scale, f"{prefix}{theirs}_layernorm.weight", np.asarray


def _last_two_swapped(bank):
    return np.swapaxes(bank, 1, 2)


def stacked(arrays):
    """The same arrays with the experts in banks `(x, out, in)`, whichever way they were stored."""
    arrays = dict(arrays)
    for name in [n for n in arrays if n.endswith("experts.gate_up_proj")]:
        prefix = name.removesuffix("gate_up_proj")
        arrays[prefix + "gate"], arrays[prefix + "up"] = np.split(arrays[name], 2, axis=1)
    for name in [n for n in arrays if ".experts.0.gate_proj" in n]:
        prefix = name.split("0.gate_proj")[0]
        count = sum(n.startswith(prefix) for n in arrays) // 3
        for ours, theirs in (("gate", "gate"), ("up", "up"), ("down_proj", "down")):
            bank = [arrays[f"{prefix}{e}.{theirs}_proj.weight"] for e in range(count)]
            arrays[prefix + ours] = np.stack(bank)
    return arrays


def load(model, config, weights):
    weights = stacked(weights)
    for variable, name, how in places(model, config):
        variable.assign(how(weights[name]))
    embedding = keras.Variable(weights["model.embed_tokens.weight"], name="embedding")
    if config["tie_word_embeddings"]:
        return embedding, embedding
    return embedding, keras.Variable(weights["lm_head.weight"], name="head")
