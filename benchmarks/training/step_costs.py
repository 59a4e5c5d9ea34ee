"""The largest costs of a training step of a language model on a GPU, each beside its floor.

    KERAS_BACKEND=torch python -m benchmarks.training.step_costs [--shape 446M 3B]

The shapes are those of `benchmarks.training.language_model` and `benchmarks.training.chat_adapters`. All weights of
both are trained. A profile of the steps of `fit` gives the time of each kernel, and the kernels are summed by part of
the step. The floor of a part is its operations at the peak rate of the device, or its bytes at the rate of a copy. The
bytes count each input and output of a part once. For the scan, its exponentials may count instead. A part without a
floor could be fused into others. Prints the parts and the longest kernels, and writes
results/gpu_step_costs_BACKEND.json.
"""

import argparse
import re

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.device_time import busy_milliseconds
from benchmarks.training.chat_adapters import REASONING_3B
from benchmarks.training.language_model import LARGE, POLICY, fitting, peak_flops
from keras_jamba import training
from keras_jamba.converters import jamba

BACKEND = keras.backend.backend()
STEPS, TOKENS = 8, 4096
# The model, and the rows of TOKENS tokens per step.
SHAPES = {"446M": (LARGE, 4), "3B": (REASONING_3B, 2)}
# Titles of the parts, and patterns of their kernels. The first match counts.
PARTS = {
    "selective scan": r"^scan_",
    "attention": r"sdpa|flash|fmha|^attention_|^token_damage",
    "products of the experts": r"GroupProblemShape|^rows_product|^first_product|^bank_gradient",
    "other matrix products": r"nvjet|gemm|cublas|cutlass",
    "cross-entropy": r"^cross_entropy",
    "activations": r"^activation|silu",
    "convolution": r"^convolution_",
    "norms": r"^norm_",
    "optimizer and clipping": r"multi_tensor_apply",
    "routing and moving of tokens": r"sort|topk|TopK|^combination|gather|Gather|DeviceScan",
    "copies and casts": r"copy|Copy|Cat|^[Mm]em|concatenate|slice|convert|transpose",
    "fusions of the compiler": r"fusion|^wrapped",
    "other operations": r"",
}


def part_of(kernel):
    """Returns the title of the part of the step that a kernel belongs to."""
    return next(title for title, pattern in PARTS.items() if re.search(pattern, kernel))


def floors(config, rows, parameters, rates):
    """Returns `{part: milliseconds}` of the parts with a floor.

    Args:
        config: the model in the names of transformers.
        rows: rows of TOKENS tokens per step.
        parameters: the number of trained weights, in float32.
        rates: FLOPs, bytes and exponentials per second, see `device_rates`.
    """
    s, d, f, layers = rows * TOKENS, config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    e, n, heads = config["mamba_expand"] * d, config["mamba_d_state"], config["num_attention_heads"]
    r, kv = config.get("mamba_dt_rank", -(-d // 16)), d // heads * config["num_key_value_heads"]
    period = lambda name: len(range(config[f"{name}_layer_offset"], layers, config[f"{name}_layer_period"]))  # noqa: E731
    attention = period("attn")
    mamba, experts = layers - attention, period("expert") if config["num_experts"] > 1 else 0
    hidden = (layers - experts) * f * s, experts * f * s * config["num_experts_per_tok"]
    mixers = mamba * (3 * d * e + e * (2 * r + 2 * n)) + attention * 2 * d * (d + kv)
    operations = {
        # Multiplications and additions, forward and both gradients.
        "other matrix products": 6 * (s * (mixers + d * config["vocab_size"]) + 3 * d * hidden[0]),
        "products of the experts": 6 * 3 * d * hidden[1],
        # Half of the pairs, of which the gradient takes five products and the forward pass two.
        "attention": 7 * s * TOKENS * d * attention,
    }
    # Numbers in bfloat16: inputs and outputs, forward and gradient.
    numbers = {
        "selective scan": mamba * s * (11 * e + 6 * n),
        "convolution": mamba * s * 5 * e,
        "activations": 8 * sum(hidden),
        "norms": s * 5 * (d * (2 * layers + 1) + mamba * (r + 2 * n)),
        "cross-entropy": 3 * s * config["vocab_size"],
    }
    found = {part: 1e3 * count / rates["FLOPs"] for part, count in operations.items() if count}
    found |= {part: 2e3 * count / rates["bytes"] for part, count in numbers.items()}
    # The decay of each channel and state, forward and again in the gradient.
    exponentials = 1e3 * 2 * mamba * s * e * n / rates["exponentials"]
    found["selective scan"] = max(found["selective scan"], exponentials)
    # Weight, gradient and two moments, of which three are written; the gradient once more for its norm.
    found["optimizer and clipping"] = 1e3 * 32 * parameters / rates["bytes"]
    return found


def device_rates():
    """Returns FLOPs in bfloat16, bytes and exponentials per second of this GPU."""
    from benchmarks.scan.gpu import rates

    return rates() | {"FLOPs": peak_flops()}


def steps_of(config, rows):
    """Returns STEPS training steps as a function without arguments, and the number of weights."""
    keras.utils.set_random_seed(0)
    arguments = jamba.arguments({"model_type": "jamba", "architectures": ["JambaForCausalLM"]} | config)
    model = keras_jamba.JambaCausalLM(**arguments, dtype=POLICY)
    model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (rows, TOKENS + 1), "int32")
    return fitting(model, {"token_ids": ids[:, :-1]}, ids[:, 1:], steps=STEPS), model.count_params()


def costs(name, rates):
    """Returns the record of a shape."""
    config, rows = SHAPES[name]
    steps, parameters = steps_of(config, rows)
    for _ in range(2):
        loss = steps()
    if not np.isfinite(loss):
        raise AssertionError(f"The loss must be finite. Received: {loss}.")
    seconds = measure.interleaved({name: steps}, 3)[name] / STEPS
    busy, kernels = busy_milliseconds(steps, STEPS, longest=10_000)
    parts = dict.fromkeys(PARTS, 0.0)
    for kernel, milliseconds, _ in kernels:
        parts[part_of(kernel)] += milliseconds
    least = floors(config, rows, parameters, rates)
    return {
        "rows": rows,
        "tokens": TOKENS,
        "parameters": parameters,
        "milliseconds a step": round(1e3 * seconds, 2),
        "device milliseconds": round(busy, 2),
        "kernels": round(sum(calls for *_, calls in kernels)),
        "parts": [
            {"part": part, "ms": round(ms, 3), "floor": round(least[part], 3) if part in least else None}
            for part, ms in sorted(parts.items(), key=lambda each: -each[1])
            if ms
        ],
        "longest kernels": [[kernel[:100], round(ms, 3), round(calls, 1)] for kernel, ms, calls in kernels[:20]],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    if peak_flops() is None:
        parser.error("the peak rate of this device is unknown. Run on a GPU that training.Utilisation knows.")
    rates, found = device_rates(), {}
    for name in args.shape:
        found[name] = costs(name, rates)
        print(name, {key: x for key, x in found[name].items() if key not in ("parts", "longest kernels")}, flush=True)
        rows = [{key: str(x) for key, x in row.items()} for row in found[name]["parts"]]
        print(measure.table(rows, list(rows[0])))
        print(*found[name]["longest kernels"], sep="\n", flush=True)
    measure.record(f"gpu_step_costs_{BACKEND}", {"backend": BACKEND, "rates": rates, "shapes": found})


if __name__ == "__main__":
    main()
