"""Training speed of a Jamba language model on a GPU, with Hugging Face's and the kernels of mamba-ssm as the peer.

    KERAS_BACKEND=torch python -m benchmarks.training.language_model [--batch 4] [--no-peer] [--smoke]

The model has 446 M parameters, 220 M of them active per token: 16 layers of width 768, one in 8 with attention, every
second with 8 experts (2 per token), and a vocabulary of 32 K. Rows have 4 K random tokens. Both losses are the
cross-entropy of the next token plus the balance loss of the routers. Both compute in bfloat16 with float32 weights,
clip gradients, and use AdamW. Neither uses gradient checkpointing. The script first trains tiny float32 models from
equal weights, and their losses must agree.

All contenders run STEPS steps and wait for the last one. Ours are `fit`, also on packed rows with documents of 512
tokens on average, `train_on_batch`, and on PyTorch a plain loop around the same model. The peer has no packing, and
gets the plain rows. On PyTorch all steps are timed in one interleaved run. On JAX the peer runs first, in a separate
process. "peak GiB" is the memory beyond the weights, on JAX of the first step alone. `--smoke` is for a CPU and records
nothing.
Prints a table and writes results/gpu_lm_BACKEND.json.
"""

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from keras_jamba import estimation, training

BACKEND = keras.backend.backend()
POLICY = "mixed_bfloat16"
TOLERANCE = 1e-4
# Steps per call, and tokens per packed document on average.
STEPS, DOCUMENT = 16, 512
LARGE = dict(
    vocab_size=32768,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=16,
    num_attention_heads=12,
    num_key_value_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    attn_layer_period=8,
    attn_layer_offset=4,
    expert_layer_period=2,
    expert_layer_offset=1,
    mamba_d_state=16,
    mamba_d_conv=4,
    mamba_expand=2,
    router_aux_loss_coef=0.001,
    initializer_range=0.02,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
# Larger weights, so that every layer affects the loss.
TINY = LARGE | dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=8, initializer_range=0.1)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2)


def write_config(folder, config):
    """Makes a folder with config.json, which ours and the peer read."""
    folder.mkdir()
    kind = {"model_type": "jamba", "architectures": ["JambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(kind | config), encoding="utf-8")


def write_model_folder(folder, config, batch, length):
    """Writes config.json and tokens.npy, which ours and the peer read."""
    write_config(folder, config)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (batch, length + 1), "int32")
    np.save(folder / "tokens.npy", tokens)


def load_batch(folder):
    """Returns inputs and targets of the tokens in `folder`."""
    tokens = np.load(folder / "tokens.npy")
    return {"token_ids": tokens[:, :-1]}, tokens[:, 1:]


def descent(folder, rate, steps):
    """Returns the losses of gradient descent, like the peer's `descent`, from the weights that the peer wrote."""
    model = keras_jamba.JambaCausalLM.from_preset(folder, dtype="float32")
    model.compile(keras.optimizers.SGD(rate), weighted_metrics=None)
    with without_tf32():
        return [model.train_on_batch(*load_batch(folder), return_dict=True)["loss"] for _ in range(steps)]


def without_tf32():
    """Returns a context without TF32, which JAX uses for float32 on a GPU by default and PyTorch does not."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def step_functions(model, folder):
    """Returns `{name: function}`: each function runs STEPS steps without arguments and returns the last loss."""
    inputs, targets = load_batch(folder)
    model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    begins = np.random.default_rng(0).random(targets.shape) < 1 / DOCUMENT
    packed = inputs | {"segment_ids": np.cumsum(begins, axis=1).astype("int32")}

    def train_on_batch():
        losses = [model.train_on_batch(inputs, targets, return_dict=True)["loss"] for _ in range(STEPS)]
        return float(losses[-1])

    steps = {
        "keras-jamba": fitting(model, inputs, targets),
        "keras-jamba, packed": fitting(model, packed, targets),
        "keras-jamba, train_on_batch": train_on_batch,
    }
    return steps | ({"keras-jamba, plain loop": plain_loop(model, inputs, targets)} if BACKEND == "torch" else {})


def fitting(model, inputs, targets, weights=None, steps=STEPS):
    """Returns a function that runs steps of `fit` on one batch and returns the mean loss."""
    repeated = lambda x: None if x is None else np.concatenate([x] * steps)  # noqa: E731
    given = dict(sample_weight=repeated(weights), batch_size=len(targets), shuffle=False, verbose=0)
    inputs, targets = {name: repeated(x) for name, x in inputs.items()}, repeated(targets)
    return lambda: model.fit(inputs, targets, **given).history["loss"][0]


def plain_loop(model, inputs, targets):
    """Returns STEPS steps with PyTorch's own loss and optimizer around the model."""
    import torch

    weights = [variable.value for variable in model.trainable_variables]
    optimizer = torch.optim.AdamW(weights, 1e-4, weight_decay=0.1, fused=True)
    inputs = {name: torch.as_tensor(x, device=weights[0].device) for name, x in inputs.items()}
    targets = torch.as_tensor(targets, dtype=torch.int64, device=weights[0].device).flatten()

    def step():
        logits = model(inputs, training=True)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets) + sum(model.losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return lambda: [step() for _ in range(STEPS)][-1].item()


def peer_steps(folder, rounds):
    """Returns the facts and steps of `language_model_peers.prepared`.

    On JAX the peer runs in a separate process: the facts then include its seconds, and there are no steps.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"missing": "transformers"}, {}
    if BACKEND == "torch":
        from benchmarks.training import language_model_peers

        return language_model_peers.prepared(folder)
    module = "benchmarks.training.language_model_peers"
    done = subprocess.run([sys.executable, "-m", module, folder, str(rounds)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} failed. Its errors are printed above.")
    return json.loads(done.stdout.splitlines()[-1]), {}


def check(folder, theirs):
    """Returns the losses of both tiny models. Raises AssertionError if they differ."""
    ours = descent(folder, theirs["rate"], len(theirs["losses"]))
    print(f"losses of a tiny model: {ours}, Hugging Face's: {theirs['losses']}", flush=True)
    if not np.allclose(ours, theirs["losses"], rtol=TOLERANCE, atol=0):
        raise AssertionError(f"The losses must agree within {TOLERANCE}. Received: {ours} and {theirs['losses']}.")
    return {"keras-jamba": ours, "Hugging Face": theirs["losses"], "relative tolerance": TOLERANCE}


def steps_within_memory(steps):
    """Runs each function once. Returns those that do not run out of memory, and the peak GiB of each.

    On JAX, only of the first one: the peak is that of the process.
    """
    fitting, peaks = {}, {}
    for name, step in steps.items():
        try:
            losses = []
            peaks[name] = measure.extra_device_memory(lambda step=step, losses=losses: losses.append(step()))
            print(f"{name}: loss {losses[0]:.3f}", flush=True)
            if fitting and BACKEND == "jax":
                peaks[name] = None
            fitting[name] = step
        except Exception as error:
            if not keras_jamba._backend.device.is_out_of_memory(error):
                raise
            print(f"{name}: out of memory", flush=True)
    return fitting, peaks


def peak_flops():
    """Returns the peak FLOPs of one device in bfloat16, or None for an unknown device."""
    try:
        return training.Utilisation(1, "bfloat16").peak
    except ValueError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="time our steps only, and record nothing")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds = 2, 32, 1
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_model_folder(folder / "tiny", TINY, batch=2, length=32 if args.smoke else 200)
        write_model_folder(folder / "large", TINY if args.smoke else LARGE, args.batch, args.length)
        theirs, steps = ({"missing": "--no-peer"}, {}) if args.no_peer else peer_steps(folder, args.rounds)
        if "missing" in theirs:
            print(f"Hugging Face: missing, {theirs['missing']}", flush=True)
        losses = check(folder / "tiny", theirs["descent"]) if "descent" in theirs else None
        model = keras_jamba.JambaCausalLM.from_preset(folder / "large", load_weights=False, dtype=POLICY)
        steps |= step_functions(model, folder / "large")
    report = estimation.model_report(model, batch_size=args.batch, context=args.length, dtype=POLICY)
    if theirs.get("parameters", report.parameters) != report.parameters:
        count = theirs["parameters"]
        raise AssertionError(f"Hugging Face's model must have {report.parameters} parameters. Received: {count}.")
    tokens, peak = args.batch * args.length, peak_flops()
    print(f"{report.parameters / 1e6:.1f} M parameters, {report.active_parameters / 1e6:.1f} M of them active")
    print(
        f"{report.flops_per_step / 1e12:.4g} TFLOP per step of {tokens} tokens, with the scan and full attention; "
        f"6 x active x tokens is {6 * report.active_parameters * tokens / 1e12:.4g}",
        flush=True,
    )
    steps, peaks = steps_within_memory(steps)
    seconds = {name: theirs["seconds"] for name in ("Hugging Face",) if "seconds" in theirs}
    peaks |= {name: theirs["peak"] for name in ("Hugging Face",) if "peak" in theirs}
    seconds |= {name: value / STEPS for name, value in measure.interleaved(steps, args.rounds).items()}
    figures = {
        name: {
            "milliseconds a step": round(1000 * value, 2),
            "tokens a second": round(tokens / value),
            "model FLOPs utilisation": round(report.flops_per_step / value / peak, 4) if peak else "",
            "peak GiB": None if peaks[name] is None else round(peaks[name], 2),
        }
        for name, value in seconds.items()
    }
    rows = [{"": name} | row for name, row in figures.items()]
    print(measure.table(rows, list(rows[0])))
    if args.smoke or args.no_peer:
        return
    results = {
        "device": keras_jamba._backend.device.device_name(),
        "scan": next(name for name, refused in keras_jamba.ops.implementations().items() if refused is None),
        "policy": POLICY,
        "batch": args.batch,
        "length": args.length,
        "rounds": args.rounds,
        "parameters": report.parameters,
        "active parameters": report.active_parameters,
        "FLOPs a step": report.flops_per_step,
        "losses of a tiny model": losses,
        "training": figures,
    }
    measure.record(f"gpu_lm_{BACKEND}", results)


if __name__ == "__main__":
    main()
