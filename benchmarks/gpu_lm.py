"""Tokens a second of training a Jamba language model on a GPU, beside Hugging Face's with the kernels of mamba-ssm.

    KERAS_BACKEND=torch python benchmarks/gpu_lm.py [--batch 4] [--smoke]

446 M parameters, of which a token goes through 220 M: 16 layers of width 768, one in 8 with attention, every second
with 8 experts of which 2, and 32 K words; rows of 4 K random tokens. The loss of both is the cross-entropy of the next
token and the balance loss of the routers; both compute in bfloat16 with float32 weights, clip, and take AdamW;
neither checkpoints. First both descend from the same weights of a tiny model in float32, and their losses must agree.

Ours is `train_on_batch`, and on PyTorch a plain loop around the same model too. On PyTorch all are timed in one
interleaved run; on JAX the peer runs before, in a process of its own. `--smoke` is for a CPU and records nothing.
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
import measure
import numpy as np

import keras_jamba
from keras_jamba import estimation, training

BACKEND = keras.backend.backend()
POLICY = "mixed_bfloat16"
TOLERANCE = 1e-4
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
# Louder weights, so that every part has a say in the loss.
TINY = LARGE | dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=8, initializer_range=0.1)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2)


def write(folder, config, batch, length):
    """What ours and the peer read."""
    folder.mkdir()
    kind = {"model_type": "jamba", "architectures": ["JambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(kind | config), encoding="utf-8")
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (batch, length + 1), "int32")
    np.save(folder / "tokens.npy", tokens)


def batch_of(folder):
    tokens = np.load(folder / "tokens.npy")
    return {"token_ids": tokens[:, :-1]}, tokens[:, 1:]


def descent(folder, rate, steps):
    """What the peer's `descent` returns, from the weights that it has written."""
    model = keras_jamba.JambaCausalLM.from_preset(folder, dtype="float32")
    model.compile(keras.optimizers.SGD(rate), weighted_metrics=None)
    with without_tf32():
        return [model.train_on_batch(*batch_of(folder), return_dict=True)["loss"] for _ in range(steps)]


def without_tf32():
    """JAX takes TF32 for float32 on a GPU unless it is told otherwise, PyTorch does not."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def steps_of(model, folder):
    """`{name: a function without arguments that takes a step and returns the loss}`."""
    inputs, targets = batch_of(folder)
    model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    steps = {"keras-jamba": lambda: model.train_on_batch(inputs, targets, return_dict=True)["loss"]}
    return steps | ({"keras-jamba, plain loop": plain_loop(model, inputs, targets)} if BACKEND == "torch" else {})


def plain_loop(model, inputs, targets):
    """PyTorch's own loss and optimizer around the model."""
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
        return loss.item()

    return step


def peer(folder, rounds):
    """What `lm_peers.prepared` returns; where it runs in a process of its own, measured already."""
    if importlib.util.find_spec("transformers") is None:
        return {"missing": "transformers"}, {}
    if BACKEND == "torch":
        import lm_peers

        return lm_peers.prepared(folder)
    script = Path(__file__).with_name("lm_peers.py")
    done = subprocess.run([sys.executable, script, folder, str(rounds)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed, see above.")
    return json.loads(done.stdout.splitlines()[-1]), {}


def check(folder, theirs):
    """Losses of both tiny models; raises where they differ."""
    ours = descent(folder, theirs["rate"], len(theirs["losses"]))
    print(f"losses of a tiny model: {ours}, Hugging Face's: {theirs['losses']}", flush=True)
    if not np.allclose(ours, theirs["losses"], rtol=TOLERANCE, atol=0):
        raise AssertionError(f"The losses differ by more than {TOLERANCE}.")
    return {"keras-jamba": ours, "Hugging Face": theirs["losses"], "relative tolerance": TOLERANCE}


def those_that_fit(steps):
    """Those for which the memory is enough, after a step of each."""
    fit = {}
    for name, step in steps.items():
        try:
            print(f"{name}: loss {step():.3f}", flush=True)
            fit[name] = step
        except Exception as error:
            if not keras_jamba._backend.device.is_out_of_memory(error):
                raise
            print(f"{name}: out of memory", flush=True)
    return fit


def peak_flops():
    """Of one device in bfloat16, or None where the table of devices does not have it."""
    try:
        return training.Utilisation(1, "bfloat16").peak
    except ValueError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds = 2, 32, 1
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write(folder / "tiny", TINY, batch=2, length=32 if args.smoke else 200)
        write(folder / "large", TINY if args.smoke else LARGE, args.batch, args.length)
        theirs, steps = peer(folder, args.rounds)
        if "missing" in theirs:
            print(f"Hugging Face: missing, {theirs['missing']}", flush=True)
        checked = check(folder / "tiny", theirs["descent"]) if "descent" in theirs else None
        model = keras_jamba.JambaCausalLM.from_preset(folder / "large", load_weights=False, dtype=POLICY)
        steps |= steps_of(model, folder / "large")
    report = estimation.model_report(model, batch_size=args.batch, context=args.length, dtype=POLICY)
    if theirs.get("parameters", report.parameters) != report.parameters:
        raise AssertionError(f"{report.parameters} parameters, and {theirs['parameters']} of Hugging Face's.")
    tokens, peak = args.batch * args.length, peak_flops()
    print(f"{report.parameters / 1e6:.1f} M parameters, {report.active_parameters / 1e6:.1f} M of them active")
    print(
        f"{report.flops_per_step / 1e12:.4g} TFLOP a step of {tokens} tokens, scan and whole attention included; "
        f"6 x active x tokens is {6 * report.active_parameters * tokens / 1e12:.4g}",
        flush=True,
    )
    steps = those_that_fit(steps)
    seconds = {name: theirs["seconds"] for name in ("Hugging Face",) if "seconds" in theirs}
    seconds |= measure.interleaved(steps, args.rounds)
    found = {
        name: {
            "milliseconds a step": round(1000 * value, 2),
            "tokens a second": round(tokens / value),
            "model FLOPs utilisation": round(report.flops_per_step / value / peak, 4) if peak else "",
        }
        for name, value in seconds.items()
    }
    rows = [{"": name} | row for name, row in found.items()]
    print(measure.table(rows, list(rows[0])))
    if args.smoke:
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
        "losses of a tiny model": checked,
        "training": found,
    }
    measure.record(f"gpu_lm_{BACKEND}", results)


if __name__ == "__main__":
    main()
