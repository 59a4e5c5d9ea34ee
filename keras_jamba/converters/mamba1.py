"""Checkpoints of Mamba-1, as Hugging Face's transformers reads them: mixers without feed-forward layers."""

import math

from keras_jamba.converters._fields import check_value, field, flag, integer, number, special_tokens
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
    """Returns constructor arguments of `JambaCausalLM` from a config.json."""
    args = {name: integer(config, field_name, default) for name, (field_name, default) in _SIZES.items()}
    check_value(config, "hidden_act", "silu", ("silu", "swish"))
    check_value(config, "quantization_config", None, (None,))
    check_value(config, "intermediate_size", args["expand"] * args["d_model"], (args["expand"] * args["d_model"],))
    rank = field(config, "time_step_rank", "auto")
    args["dt_rank"] = math.ceil(args["d_model"] / 16) if rank == "auto" else integer(config, "time_step_rank", 1)
    return args | {
        "mamba_ratio": None,
        "d_ff": 0,
        "moe_frequency": 0,
        "mixer_rms_norm": False,
        "conv_bias": flag(config, "use_conv_bias", True),
        "proj_bias": flag(config, "use_bias", False),
        "epsilon": number(config, "layer_norm_epsilon", 1e-5),
        "tie_embeddings": flag(config, "tie_word_embeddings", True),
        **special_tokens(config, pad=0, bos=0, eos=0),
    }


def config(args):
    """Returns the config.json of constructor arguments.

    Raises:
        ValueError: for arguments that a config.json of transformers cannot express.
    """
    for name, value in _FIXED.items():
        check_value(args, name, value, (value,), reader="Mamba in transformers")
    d = args["d_model"]
    return {other: args[name] for name, (other, _) in _SIZES.items()} | {
        "model_type": MODEL_TYPE,
        "intermediate_size": args["expand"] * d,
        "hidden_act": "silu",
        "time_step_rank": args["dt_rank"] or math.ceil(d / 16),
        "use_conv_bias": args["conv_bias"],
        "use_bias": args["proj_bias"],
        "layer_norm_epsilon": args["epsilon"],
        "tie_word_embeddings": args["tie_embeddings"],
        **{name: args[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def weights(args, pattern):
    """Yields the `Weight` mappings of a model with these constructor arguments and this block pattern."""
    d = args["d_model"]
    args = args | {"dt_rank": args["dt_rank"] or math.ceil(d / 16)}
    yield Weight("token_embedding/embeddings", ("backbone.embeddings.weight",), (args["vocab_size"], d))
    for i in range(len(pattern)):
        path, prefix = f"backbone/block_{i}", f"backbone.layers.{i}."
        yield Weight(f"{path}/mixer_norm/scale", (f"{prefix}norm.weight",), (d,))
        yield from mamba_mixer(f"{path}/mixer", f"{prefix}mixer.", args)
    yield Weight("backbone/final_norm/scale", ("backbone.norm_f.weight",), (d,))
    if not args["tie_embeddings"]:
        yield Weight("token_embedding/reverse_embeddings", ("lm_head.weight",), (args["vocab_size"], d), "transposed")


def unstacked(name, shape):
    return None
