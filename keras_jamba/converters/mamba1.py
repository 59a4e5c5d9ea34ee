"""Checkpoints of Mamba-1 as Hugging Face's transformers reads them: mixers without feed-forward parts."""

import math

from keras_jamba.converters._fields import check_value, field, integer, special_tokens
from keras_jamba.converters._weights import Weight, mamba_mixer

MODEL_TYPE = "mamba"
ARCHITECTURES = {"JambaCausalLM": "MambaForCausalLM"}
_SIZES = {
    "vocab_size": ("vocab_size", 50280),
    "d_model": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 32),
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
}
_FIXED = dict(mamba_ratio=None, d_ff=0, mixer_rms_norm=False, direction="causal", mixer="mamba")


def arguments(config):
    """Constructor arguments of `JambaCausalLM` from their config.json."""
    ours = {name: integer(config, theirs, default) for name, (theirs, default) in _SIZES.items()}
    check_value(config, "hidden_act", "silu", ("silu", "swish"))
    check_value(config, "quantization_config", None, (None,))
    check_value(config, "intermediate_size", ours["expand"] * ours["d_model"], (ours["expand"] * ours["d_model"],))
    rank = field(config, "time_step_rank", "auto")
    ours["dt_rank"] = math.ceil(ours["d_model"] / 16) if rank == "auto" else integer(config, "time_step_rank", 1)
    return ours | {
        "mamba_ratio": None,
        "d_ff": 0,
        "moe_frequency": 0,
        "mixer_rms_norm": False,
        "conv_bias": bool(field(config, "use_conv_bias", True)),
        "proj_bias": bool(field(config, "use_bias", False)),
        "epsilon": float(field(config, "layer_norm_epsilon", 1e-5)),
        "tie_embeddings": bool(field(config, "tie_word_embeddings", True)),
        **special_tokens(config, pad=0, bos=0, eos=0),
    }


def config(ours):
    """Their config.json of our constructor arguments.

    Raises:
        ValueError: for arguments that it cannot tell.
    """
    for name, value in _FIXED.items():
        check_value(ours, name, value, (value,), theirs="a Mamba of transformers")
    d = ours["d_model"]
    return {other: ours[name] for name, (other, _) in _SIZES.items()} | {
        "model_type": MODEL_TYPE,
        "intermediate_size": ours["expand"] * d,
        "hidden_act": "silu",
        "time_step_rank": ours["dt_rank"] or math.ceil(d / 16),
        "use_conv_bias": ours["conv_bias"],
        "use_bias": ours["proj_bias"],
        "layer_norm_epsilon": ours["epsilon"],
        "tie_word_embeddings": ours["tie_embeddings"],
        **{name: ours[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def weights(ours, pattern):
    """Each weight of a model with these constructor arguments and this block pattern."""
    d = ours["d_model"]
    ours = ours | {"dt_rank": ours["dt_rank"] or math.ceil(d / 16)}
    yield Weight("token_embedding/embeddings", ("backbone.embeddings.weight",), (ours["vocab_size"], d))
    for i in range(len(pattern)):
        path, prefix = f"backbone/block_{i}", f"backbone.layers.{i}."
        yield Weight(f"{path}/mixer_norm/scale", (f"{prefix}norm.weight",), (d,))
        yield from mamba_mixer(f"{path}/mixer", f"{prefix}mixer.", ours)
    yield Weight("backbone/final_norm/scale", ("backbone.norm_f.weight",), (d,))
    if not ours["tie_embeddings"]:
        yield Weight("token_embedding/reverse_embeddings", ("lm_head.weight",), (ours["vocab_size"], d), "transposed")


def unstacked(name, shape):
    return None
