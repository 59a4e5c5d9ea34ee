"""Generation on a GPU: loading, first call, time per token and reading of prompts, with Hugging Face as the peer.

    KERAS_BACKEND=torch python -m benchmarks.decoding.gpu [--models 3B 446M] [--smoke]

The models are those of `benchmarks.training.chat_adapters` and `benchmarks.training.language_model`, with random
bfloat16 weights that transformers writes. The peer is Hugging Face's Jamba with the kernels of mamba-ssm and
causal-conv1d. The script first compares greedy tokens of a tiny float32 model. Then each contender runs in a process of
its own, one after the other on one card. The time per token is that of 129 new tokens less that of 1, over 128. The
floor is the time to read all weights at the rate of a copy. Prints the rows and writes
results/gpu_generation_BACKEND.json. `--smoke` runs tiny models and records nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import measure

BACKEND = os.environ["KERAS_BACKEND"]
# Rows and tokens of prompts: of the time per token, and of reading alone.
DECODING, READING = ((1, 128), (8, 128), (64, 128)), ((1, 128), (1, 2048), (1, 8192), (8, 2048), (64, 128))
NEW, ROUNDS = 128, 3
WHO = ("keras-jamba", "Hugging Face")


def configs(smoke):
    from benchmarks.training.chat_adapters import REASONING_3B, SMALL
    from benchmarks.training.language_model import LARGE, TINY

    return {"3B": SMALL, "446M": TINY} if smoke else {"3B": REASONING_3B, "446M": LARGE}


def write_model(folder, config, dtype):
    """Writes a checkpoint with random weights, and returns the bytes of its weights."""
    import torch
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = JambaForCausalLM(JambaConfig(**config)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return sum(x.numel() * x.element_size() for x in model.parameters())


class Ours:
    def __init__(self):
        import keras

        import keras_jamba

        keras.ops.convert_to_numpy(keras.ops.ones((2, 2)) @ keras.ops.ones((2, 2)))
        self.library = keras_jamba

    def load(self, folder, dtype):
        self.model = self.library.JambaCausalLM.from_preset(folder, dtype=dtype)

    def generate(self, ids, count):
        return self.model.generate(ids, max_new_tokens=count, stop_token_ids=None, strip_prompt=True, sampler="greedy")

    def peak(self):
        if BACKEND != "jax":
            return _torch_peak()
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30


class Theirs:
    def __init__(self):
        import torch
        from transformers import JambaForCausalLM

        self.kind = JambaForCausalLM
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        torch.ones(2, 2, device=self.device) @ torch.ones(2, 2, device=self.device)

    def load(self, folder, dtype):
        given = dict(dtype=getattr(self.torch, dtype), device_map=self.device, attn_implementation="sdpa")
        self.model = self.kind.from_pretrained(folder, **given)

    def generate(self, ids, count):
        ids = self.torch.as_tensor(ids, dtype=self.torch.int64, device=self.device)
        given = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        found = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), **given)
        return found[:, ids.shape[1] :].cpu().numpy()

    def peak(self):
        return _torch_peak()


CONTENDERS = dict(zip(WHO, (Ours, Theirs), strict=True))


def _torch_peak():
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def seconds(function):
    """Returns the median seconds of a function that waits for its result."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def prompts(rows, tokens, size):
    return np.random.default_rng(0).integers(1, size, (rows, tokens)).astype("int32")


def run_alone(who, folder, size, smoke):
    """Prints the figures of one contender and one model as JSON."""
    contender, found = CONTENDERS[who](), {}
    started = time.perf_counter()
    contender.load(folder, "bfloat16")
    found["load, s"] = time.perf_counter() - started
    new, shrink = (8, 16) if smoke else (NEW, 1)
    for rows, tokens in READING[:2] if smoke else READING:
        ids = prompts(rows, tokens // shrink, size)
        started = time.perf_counter()
        contender.generate(ids, 1)
        found[f"first call {rows} x {tokens}, s"] = time.perf_counter() - started
        found[f"reading {rows} x {tokens}, ms"] = 1e3 * seconds(lambda ids=ids: contender.generate(ids, 1))
    for rows, tokens in DECODING[:2] if smoke else DECODING:
        ids = prompts(rows, tokens // shrink, size)
        started = time.perf_counter()
        contender.generate(ids, new + 1)
        found[f"first generation {rows} x {tokens}, s"] = time.perf_counter() - started
        times = [seconds(lambda ids=ids, count=count: contender.generate(ids, count)) for count in (1, new + 1)]
        found[f"per token {rows} x {tokens}, ms"] = 1e3 * (times[1] - times[0]) / new
    print(json.dumps(found | {"peak GiB": contender.peak()}))


def tokens_alone(who, folder, size):
    """Prints the greedy tokens of one contender and the tiny model as JSON."""
    contender = CONTENDERS[who]()
    contender.load(folder, "float32")
    print(json.dumps([np.asarray(contender.generate(prompts(rows, 40, size), 24)).tolist() for rows in (1, 3)]))


def start(*arguments):
    """Runs this module in a process, and returns the JSON of its last line."""
    # TF32 would decide between near tokens.
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    environment = environment if "--tokens" in arguments else dict(os.environ)
    command = [sys.executable, "-m", "benchmarks.decoding.gpu", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed. Its errors are printed above.")
    return json.loads(done.stdout.splitlines()[-1])


def check(folder):
    """Raises AssertionError if both choose other greedy tokens in a tiny float32 model."""
    from benchmarks.training.language_model import TINY

    write_model(folder, TINY, "float32")
    found = [start("--only", who, "--folder", folder, "--size", TINY["vocab_size"], "--tokens") for who in WHO]
    if found[0] != found[1]:
        raise AssertionError(f"Greedy tokens must be equal. Received: {found[0]} and {found[1]}.")


def copy_rate():
    """Returns the bytes per second of a copy on the device, which reads half of them."""
    import torch

    if not torch.cuda.is_available():
        return float("nan")
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)

    def copied():
        for _ in range(20):
            y.copy_(x)
        torch.cuda.synchronize()

    copied()
    return 20 * 2 * x.numel() / seconds(copied)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("3B", "446M"), default=["3B", "446M"])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=WHO, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", action="store_true", help=argparse.SUPPRESS)
    for name in ("folder", "size"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        given = args.only, args.folder, int(args.size)
        return tokens_alone(*given) if args.tokens else run_alone(*given, args.smoke)
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
    rows, rate = {}, copy_rate()
    for name in args.models:
        config = configs(args.smoke)[name]
        with tempfile.TemporaryDirectory() as folder:
            size = write_model(folder, config, "bfloat16")
            rows[name] = {"bytes": size, "floor, ms": 1e3 * size / rate}
            for who in WHO:
                given = ["--only", who, "--folder", folder, "--size", config["vocab_size"]]
                rows[name][who] = start(*given, *(["--smoke"] if args.smoke else []))
                print(name, who, {key: round(value, 2) for key, value in rows[name][who].items()}, flush=True)
        if not args.smoke:
            # A run that ends early keeps the models before.
            measure.record(f"gpu_generation_{BACKEND}", {"backend": BACKEND, "bytes a second": rate, "models": rows})


if __name__ == "__main__":
    main()
