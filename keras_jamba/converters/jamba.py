"""Checkpoints of Jamba, as AI21 publishes them and Hugging Face's transformers reads them."""

import math

from keras_jamba.converters._fields import check_value, field, flag, integer, number, special_tokens
from keras_jamba.converters._weights import Weight, dense, mamba_mixer

MODEL_TYPE = "jamba"
ARCHITECTURES = {"JambaCausalLM": "JambaForCausalLM", "JambaClassifier": "JambaForSequenceClassification"}
# Constructor argument: field of config.json, and the default of transformers.
_SIZES = {
    "vocab_size": ("vocab_size", 65536),
    "d_model": ("hidden_size", 4096),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "d_ff": ("intermediate_size", 14336),
    "num_experts": ("num_experts", 16),
    "num_experts_per_token": ("num_experts_per_tok", 2),
    "d_state": ("mamba_d_state", 16),
    "d_conv": ("mamba_d_conv", 4),
    "expand": ("mamba_expand", 2),
}
_EXPERTS = ("num_experts", "num_experts_per_token")
_PERIODS = {"attn_layer": (8, 4), "expert_layer": (2, 1)}
# Constructor arguments without a field in config.json, and the only value that Jamba checkpoints imply.
_FIXED = dict(
    use_rope=False,
    normalize_top_k=False,
    use_swiglu=True,
    attention_window=None,
    attention_sinks=0,
    direction="causal",
    mixer="mamba",
    capacity_factor=None,
    router=None,
)


def arguments(config):
    """Returns constructor arguments of `JambaCausalLM` or `JambaClassifier`, except those of the head."""
    # `num_local_experts` is an older name of `num_experts`.
    config = {"num_experts": config["num_local_experts"]} | config if "num_local_experts" in config else config
    args = {name: integer(config, field_name, default) for name, (field_name, default) in _SIZES.items()}
    kv_heads = field(config, "num_key_value_heads", 8)
    args["num_kv_heads"] = args["num_heads"] if kv_heads is None else integer(config, "num_key_value_heads", 8)
    check_value(config, "hidden_act", "silu", ("silu", "swish"))
    check_value(config, "head_dim", None, (None, args["d_model"] // args["num_heads"]))
    check_value(config, "quantization_config", None, (None,))
    rank = field(config, "mamba_dt_rank", "auto")
    args["dt_rank"] = math.ceil(args["d_model"] / 16) if rank == "auto" else integer(config, "mamba_dt_rank", 1)
    for kind, (period, offset) in _PERIODS.items():
        period, offset = integer(config, f"{kind}_period", period), integer(config, f"{kind}_offset", offset, 0)
        check_value({f"{kind}_offset": offset}, f"{kind}_offset", offset, range(period))
        if kind == "attn_layer":
            args |= {"mamba_ratio": period - 1, "attention_offset": offset}
        elif args["num_experts"] > 1:
            args |= {"moe_frequency": period, "moe_offset": offset}
        else:
            args |= {"moe_frequency": 0, "moe_offset": None, "num_experts_per_token": 1}
    return args | {
        "conv_bias": flag(config, "mamba_conv_bias", True),
        "proj_bias": flag(config, "mamba_proj_bias", False),
        "mixer_rms_norm": flag(config, "mamba_inner_layernorms", True),
        "epsilon": number(config, "rms_norm_eps", 1e-6),
        "balance_coefficient": number(config, "router_aux_loss_coef", 0.001),
        "tie_embeddings": flag(config, "tie_word_embeddings", False),
        **special_tokens(config, pad=0, bos=1, eos=2),
    }


def config(args):
    """Returns the config.json of constructor arguments.

    Raises:
        ValueError: for arguments that a config.json of transformers cannot express.
    """
    for name, value in _FIXED.items():
        check_value(args, name, value, (value,), reader="Jamba in transformers")
    check_value(args, "balance_loss", "switch", ("switch",), reader="Jamba in transformers")
    fields = {other: args[name] for name, (other, _) in _SIZES.items() if name not in ("d_ff", *_EXPERTS)}
    d, layers = args["d_model"], args["num_layers"]
    # A period longer than the model means no attention layers.
    period = layers + 1 if args["mamba_ratio"] is None else args["mamba_ratio"] + 1
    offset = args["attention_offset"]
    return fields | {
        "model_type": MODEL_TYPE,
        "intermediate_size": 4 * d if args["d_ff"] is None else args["d_ff"],
        "num_key_value_heads": args["num_kv_heads"] or args["num_heads"],
        "hidden_act": "silu",
        "mamba_dt_rank": args["dt_rank"] or math.ceil(d / 16),
        "attn_layer_period": period,
        "attn_layer_offset": period - 1 if offset is None else offset,
        **_experts(args),
        "mamba_conv_bias": args["conv_bias"],
        "mamba_proj_bias": args["proj_bias"],
        "mamba_inner_layernorms": args["mixer_rms_norm"],
        "rms_norm_eps": args["epsilon"],
        "router_aux_loss_coef": args["balance_coefficient"],
        "tie_word_embeddings": bool(args.get("tie_embeddings", False)),
        "use_mamba_kernels": False,
        **{name: args[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def _experts(args):
    """Returns the fields for experts. Without experts, it leaves the other fields of the loaded config as they are."""
    if not args["moe_frequency"]:
        return {"num_experts": 1}
    offset = args["moe_offset"]
    return {
        "expert_layer_period": args["moe_frequency"],
        "expert_layer_offset": args["moe_frequency"] - 1 if offset is None else offset,
        **{_SIZES[name][0]: args[name] for name in _EXPERTS},
    }


def weights(args, pattern):
    """Yields the `Weight` mappings of a model with these constructor arguments and this block pattern."""
    d = args["d_model"]
    args = args | {
        "dt_rank": args["dt_rank"] or math.ceil(d / 16),
        "d_ff": 4 * d if args["d_ff"] is None else args["d_ff"],
    }
    yield Weight("token_embedding/embeddings", ("model.embed_tokens.weight",), (args["vocab_size"], d))
    for i, (mixer, feed_forward) in enumerate(pattern):
        path, prefix = f"backbone/block_{i}", f"model.layers.{i}."
        yield Weight(f"{path}/mixer_norm/scale", (f"{prefix}input_layernorm.weight",), (d,))
        if mixer == "attention":
            yield from _attention(f"{path}/mixer", f"{prefix}self_attn.", args)
        else:
            yield from mamba_mixer(f"{path}/mixer", f"{prefix}mamba.", args)
        yield Weight(f"{path}/feed_forward_norm/scale", (f"{prefix}pre_ff_layernorm.weight",), (d,))
        yield from _feed_forward(f"{path}/feed_forward", f"{prefix}feed_forward.", args, feed_forward)
    yield Weight("backbone/final_norm/scale", ("model.final_layernorm.weight",), (d,))
    if "num_classes" in args:
        yield from dense("head", "score", d, args["num_classes"])
    elif not args["tie_embeddings"]:
        yield Weight("token_embedding/reverse_embeddings", ("lm_head.weight",), (args["vocab_size"], d), "transposed")


def _attention(path, prefix, args):
    d, h, g = args["d_model"], args["num_heads"], args["num_kv_heads"] or args["num_heads"]
    for name, other, size in (("q", "q", d), ("k", "k", g * (d // h)), ("v", "v", g * (d // h)), ("out", "o", d)):
        yield from dense(f"{path}/{name}_proj", f"{prefix}{other}_proj", d, size)


def _feed_forward(path, prefix, args, kind):
    d, f, x = args["d_model"], args["d_ff"], args["num_experts"]
    sizes = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    if kind == "dense":
        for name, size in sizes.items():
            yield from dense(f"{path}/{name}_proj", f"{prefix}{name}_proj", *size)
        return
    yield Weight(f"{path}/router/kernel", (f"{prefix}router.weight",), (x, d), "transposed")
    for name, (inputs, outputs) in sizes.items():
        names = tuple(f"{prefix}experts.{e}.{name}_proj.weight" for e in range(x))
        yield Weight(f"{path}/{name}_bank", names, (outputs, inputs), "transposed")


def unstacked(name, shape):
    """Returns `{name: index}` of the experts in a stacked tensor, or None for any other tensor.

    transformers 5 stacks experts in memory: `experts.gate_up_proj` is `(x, 2 f, d)` with the gate first, and
    `experts.down_proj` is `(x, d, f)`.
    """
    prefix, _, last = name.rpartition(".")
    # A tensor with an empty axis may claim any number of experts.
    if not prefix.endswith(".experts") or len(shape) != 3 or 0 in shape:
        return None
    if last == "down_proj":
        return {f"{prefix}.{e}.down_proj.weight": (e,) for e in range(shape[0])}
    if last == "gate_up_proj":
        half = shape[1] // 2
        parts = {"gate": slice(0, half), "up": slice(half, shape[1])}
        return {f"{prefix}.{e}.{n}_proj.weight": (e, part) for e in range(shape[0]) for n, part in parts.items()}
    return None
