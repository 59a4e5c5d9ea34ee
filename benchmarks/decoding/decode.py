"""Speed of greedy decoding, with Hugging Face's Jamba and the same weights as the peer.

    KERAS_BACKEND=jax python -m benchmarks.decoding.decode

The script saves a random Jamba of transformers (8 layers, d 256, 8 experts, 2 per token, 32 M parameters) and loads it.
Both must choose the same tokens. It then times 64 new tokens at batch 1 and 8 in one interleaved run, including the
prefill of 16 tokens. Last, it measures the time per token after 1 K, 8 K and 64 K tokens of context, for this model and
for one with Mamba layers alone, and the time in which all cores read the keys and values of so many tokens. Prints
tables and writes results/decode_BACKEND.json.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import torch
from transformers import JambaConfig, JambaForCausalLM

import keras_jamba
from benchmarks import measure

CONFIG = dict(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    use_mamba_kernels=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
PROMPT, NEW = 16, 64
CONTEXTS = (1024, 8192, 65536)


def model_pair(folder):
    """Returns the peer and ours with the same weights, which it saves to `folder`."""
    torch.manual_seed(0)
    theirs = JambaForCausalLM(JambaConfig(**CONFIG, initializer_range=0.06)).eval()
    theirs.save_pretrained(folder)
    return theirs, keras_jamba.JambaCausalLM.from_preset(folder)


def generators(theirs, ours, batch):
    """Returns two functions without arguments that return the new tokens `(b, NEW)`."""
    ids = np.random.default_rng(batch).integers(3, CONFIG["vocab_size"], (batch, PROMPT))
    given = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    tensor = torch.as_tensor(ids)

    def reference():
        with torch.inference_mode():
            return theirs.generate(tensor, attention_mask=torch.ones_like(tensor), **given)[:, PROMPT:].numpy()

    return reference, lambda: ours.generate(ids, max_new_tokens=NEW, stop_token_ids=None, strip_prompt=True)


def speeds(theirs, ours, batches, rounds):
    functions = {}
    for batch in batches:
        reference, mine = generators(theirs, ours, batch)
        if not np.array_equal(reference(), mine()):
            raise AssertionError(f"batch {batch}: the tokens differ from those of transformers.")
        functions |= {("Hugging Face", batch): reference, ("keras-jamba", batch): mine}
    seconds = measure.interleaved(functions, rounds)
    return {key: key[1] * NEW / seconds[key] for key in functions}


def milliseconds_per_token(model, contexts, tokens=32):
    """Returns milliseconds per token by context, from the difference of two generations from one state."""
    found = {}
    for context in contexts:
        prompt = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], context).tolist()
        state = model.prefill(prompt)
        run = functools.partial(model.generate, prompt, stop_token_ids=None, state=state)
        times = {}
        for count in (1, 1 + tokens):
            run(max_new_tokens=count)
            times[count] = []
        for _ in range(5):
            for count in times:
                started = time.perf_counter()
                run(max_new_tokens=count)
                times[count].append(time.perf_counter() - started)
        medians = [float(np.median(times[count])) for count in (1, 1 + tokens)]
        found[context] = 1000 * (medians[1] - medians[0]) / tokens
    return found


def milliseconds_to_read(contexts, rounds=20):
    """Returns milliseconds by context: the sum of an attention layer's keys and values, with PyTorch's threads."""
    width = 2 * CONFIG["num_key_value_heads"] * CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    functions = {context: torch.randn(context * width).sum for context in contexts}
    return {context: 1000 * seconds for context, seconds in measure.interleaved(functions, rounds).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = model_pair(Path(folder) / "jamba")
    rates = speeds(theirs, ours, args.batches, args.rounds)
    rows = [
        {
            "batch": batch,
            "Hugging Face": f"{rates['Hugging Face', batch]:.0f}",
            "keras-jamba": f"{rates['keras-jamba', batch]:.0f}",
            "ratio": f"{rates['keras-jamba', batch] / rates['Hugging Face', batch]:.1f}",
        }
        for batch in args.batches
    ]
    print(f"tokens a second\n\n{measure.table(rows, list(rows[0]))}")
    arguments = {k: v for k, v in ours.get_config().items() if k not in ("name", "mamba_ratio", "attention_offset")}
    models = {"Jamba": ours, "Mamba layers alone": keras_jamba.JambaCausalLM(**arguments, mamba_ratio=None)}
    long = [{"model": name} | milliseconds_per_token(model, args.contexts) for name, model in models.items()]
    long.append({"model": "reading keys and values"} | milliseconds_to_read(args.contexts))
    if args.contexts:
        rows = [{str(k): v if isinstance(v, str) else f"{v:.2f}" for k, v in row.items()} for row in long]
        print(f"\nmilliseconds a token after so many tokens\n\n{measure.table(rows, list(rows[0]))}")
    results = {f"{name}, batch {batch}": round(rate, 1) for (name, batch), rate in rates.items()}
    measure.record(
        f"decode_{keras.backend.backend()}",
        {"rounds": args.rounds, "parameters": ours.count_params(), "tokens a second": results, "contexts": long},
    )


if __name__ == "__main__":
    main()
