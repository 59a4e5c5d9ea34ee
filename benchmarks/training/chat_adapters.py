"""Speed and memory of low-rank adapters on chats, on a GPU, with Hugging Face and PEFT as the peer.

    KERAS_BACKEND=torch python -m benchmarks.training.chat_adapters [--batch 4] [--smoke]

The model has the shape of AI21-Jamba-Reasoning-3B, 3.0 B parameters, with random bfloat16 weights. Adapters of rank 16
stand beside the projections of attention and of the feed-forward parts, and those into and out of the Mamba layers.
Both train with gradient checkpointing and AdamW, on the loss of the assistants' tokens alone. Our rows of 4,096 tokens
are those of `training.PackedConversations`. The peer has no packing: it gets the same rows as single documents.

The script first compares both losses of a tiny float32 model with equal weights. Then it alternates processes with one
contender each. They report tokens per second and the peak GiB of the device. Prints both, and writes
results/gpu_chat_adapters_BACKEND.json. `--smoke` is for a CPU and records nothing.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from benchmarks.training.language_model import LARGE, TINY, fitting, without_tf32, write_config
from keras_jamba import _backend, training

BACKEND = keras.backend.backend()
RANK, STEPS = 16, 8
REASONING_3B = LARGE | dict(
    vocab_size=65536,
    hidden_size=2560,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=1,
    num_experts=1,
    num_experts_per_tok=1,
    attn_layer_period=14,
    attn_layer_offset=6,
    mamba_dt_rank=160,
    tie_word_embeddings=True,
    router_aux_loss_coef=0.0,
)
SMALL = TINY | dict(num_experts=1, num_experts_per_tok=1, router_aux_loss_coef=0.0)
# The peer's names of the matrices that get adapters.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)


def byte_tokenizer(folder):
    """Returns a `JambaTokenizer` with one token per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {text: i for i, text in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.add_special_tokens(["<end>"])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(Path(folder, "tokenizer.json")))
    return keras_jamba.tokenizers.JambaTokenizer(folder)


def chats(batch, length, folder):
    """Returns `(inputs, targets, weights)` of one batch of packed conversations of random letters."""
    rng = np.random.default_rng(0)
    text = lambda: "".join(chr(97 + n) for n in rng.integers(0, 26, rng.integers(20, 300)))  # noqa: E731
    roles = ("user", "assistant")
    talk = lambda: [{"role": roles[i % 2], "content": text()} for i in range(2 * rng.integers(1, 4))]  # noqa: E731
    talks = [talk() for _ in range(1 + batch * length // 300)]
    packed = training.PackedConversations(talks, byte_tokenizer(folder), length, batch, chat_template=TEMPLATE)
    return packed.batch(0)


def our_model(folder, dtype, **given):
    model = keras_jamba.JambaCausalLM.from_preset(folder, dtype=dtype, gradient_checkpointing=True, **given)
    model.enable_lora(RANK, ["attention", "mamba.in_proj", "mamba.out_proj", "feed_forward"])
    return model


def peer_model(folder, dtype):
    """Returns Hugging Face's model with adapters and gradient checkpointing; writes its weights in float32."""
    import peft
    import torch
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = JambaForCausalLM(JambaConfig.from_pretrained(folder, attn_implementation="sdpa")).to(dtype)
    if dtype == torch.float32:
        model.save_pretrained(folder)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    return model.train(), device


def peer_loss(model, inputs, targets, weights, device):
    import torch

    labels = torch.as_tensor(np.where(weights > 0, targets, -100), dtype=torch.int64, device=device)
    ids = torch.as_tensor(inputs["token_ids"], dtype=torch.int64, device=device)
    return model(ids, labels=labels, shift_labels=labels, use_cache=False).loss


def check(folder):
    """Returns the losses of both tiny models on one row as a single document.

    Raises AssertionError if they differ, or train different numbers of weights.
    """
    import torch

    write_config(folder / "tiny", SMALL | dict(vocab_size=512))
    inputs, targets, weights = chats(1, 512, folder)
    plain = {"token_ids": inputs["token_ids"]}
    peer, device = peer_model(folder / "tiny", torch.float32)
    theirs = peer_loss(peer, plain, targets, weights, device).item()
    model = our_model(folder / "tiny", "float32")
    counts = model.count_params(), sum(weight.numel() for weight in peer.parameters())
    trained = sum(math.prod(v.shape) for v in model.trainable_variables), peer.num_parameters(only_trainable=True)
    if counts[0] != counts[1] or trained[0] != trained[1]:
        raise AssertionError(f"Both must have and train as many weights. Received: {counts} and {trained}.")
    model.compile(weighted_metrics=None)
    with without_tf32():
        ours = float(model.test_on_batch(plain, targets, weights, return_dict=True)["loss"])
    print(f"losses of a tiny model: {ours}, Hugging Face's: {theirs}", flush=True)
    if not np.isclose(ours, theirs, rtol=1e-4, atol=0):
        raise AssertionError(f"The losses must agree within 1e-4. Received: {ours} and {theirs}.")
    return {"keras-jamba": ours, "Hugging Face": theirs}


def our_steps(config, batch, folder):
    """Returns a function that runs STEPS steps of `fit` and returns the loss."""
    write_config(folder / "model", config)
    model = our_model(folder / "model", "bfloat16", load_weights=False)
    model.compile(training.optimizer(model, steps=10000), weighted_metrics=None)
    return fitting(model, *batch, steps=STEPS)


def peer_steps(config, batch, folder):
    """Returns a function that runs STEPS steps of the peer and returns the last loss."""
    import torch

    write_config(folder / "model", config)
    model, device = peer_model(folder / "model", torch.bfloat16)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-4, fused=device == "cuda")

    def step():
        loss = peer_loss(model, *batch, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return lambda: [step() for _ in range(STEPS)][-1].item()


CONTENDERS = {"keras-jamba": our_steps, "Hugging Face and PEFT": peer_steps}


def run_alone(name, args):
    """Prints loss, seconds per step and peak GiB of one contender as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        batch = chats(args.batch, args.length, folder)
        steps = CONTENDERS[name](SMALL | dict(vocab_size=512) if args.smoke else REASONING_3B, batch, folder)
        found = {"loss": steps(), "answers": round(float(np.mean(batch[2] > 0)), 3)}
        times = []
        for _ in range(args.rounds):
            started = time.perf_counter()
            steps()
            times.append((time.perf_counter() - started) / STEPS)
        print(json.dumps(found | {"seconds": statistics.median(times), "peak GiB": _peak(name)}))


def _peak(name):
    """Returns the peak GiB that the process has allocated on the GPU, with the weights."""
    if BACKEND == "jax" and name == "keras-jamba":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--only", choices=CONTENDERS, help="run one contender and print its figures")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds, args.pairs = 1, 512, 1, 1
    if args.only:
        return run_alone(args.only, args)
    with tempfile.TemporaryDirectory() as folder:
        losses = check(Path(folder))
    module, own = "benchmarks.training.chat_adapters", [x for x in sys.argv[1:] if x != "--only"]
    runs = {name: [] for name in CONTENDERS}
    for _ in range(args.pairs):
        for name in CONTENDERS:
            command = [sys.executable, "-m", module, *own, "--only", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed. Its errors are printed above.")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, runs[name][-1], flush=True)
    rows = []
    for name, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        row = {"": name, "milliseconds a step": round(1e3 * seconds, 1)}
        row |= {"tokens a second": round(args.batch * args.length / seconds)}
        rows.append(row | {"peak GiB": round(max(run["peak GiB"] for run in found), 2)})
    print(measure.table(rows, list(rows[0])))
    if not args.smoke:
        results = {"device": _backend.device.device_name(), "batch": args.batch, "length": args.length, "rank": RANK}
        results |= {"losses of a tiny model": losses, "runs": runs, "training": rows}
        measure.record(f"gpu_chat_adapters_{BACKEND}", results)


if __name__ == "__main__":
    main()
