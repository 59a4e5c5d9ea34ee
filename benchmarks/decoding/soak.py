"""A soak of generation on PyTorch with CUDA graphs: equal tokens, bounded memory and a bounded number of graphs.

    KERAS_BACKEND=torch python -m benchmarks.decoding.soak [--generations 2000] [--smoke]

A small float32 model first continues each of 40 prompts with 48 greedy tokens, without graphs. Then it generates a
random number of tokens after random batches of these prompts, and 16 threads generate 20 times each. All tokens must be
the beginnings of the first ones. Prints and records the seconds, the graphs, and the GPU's memory after a tenth and
after all of the generations. `--smoke` runs few generations and records nothing.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

import keras_jamba
from benchmarks import measure

PROMPTS, LONGEST, THREADS, REQUESTS = 40, 48, 16, 20
MODEL = dict(vocab_size=512, d_model=256, num_layers=4, mamba_ratio=3, num_heads=4, num_kv_heads=1, moe_frequency=0)


def make_model():
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(**MODEL, dtype="float32")
    # Untrained models repeat one token. Wide embeddings make the texts differ.
    embeddings = model.token_embedding.embeddings
    embeddings.assign(keras.random.normal(embeddings.shape, seed=1))
    return model


def generate(model, prompts, count):
    rows = model.generate(prompts, max_new_tokens=count, stop_token_ids=None, strip_prompt=True)
    return [np.asarray(row).tolist() for row in rows]


def without_graphs(model, prompts):
    from keras_jamba._backend.torch import _graphed_loop

    plain_steps, _graphed_loop._PLAIN_STEPS = _graphed_loop._PLAIN_STEPS, 10**9
    try:
        return [generate(model, [prompt], LONGEST)[0] for prompt in prompts]
    finally:
        _graphed_loop._PLAIN_STEPS = plain_steps
        vars(model).pop("_decoders")


def memory():
    import torch

    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def wrong_rows(rows, chosen, expected):
    """Returns how many rows are not the beginnings of the expected ones."""
    return sum(row != expected[i][: len(row)] for row, i in zip(rows, chosen, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    total, requests = (20, 1) if args.smoke else (args.generations, REQUESTS)
    model, rng = make_model(), np.random.default_rng(0)
    # One length: padding would change the sums of a batch by a rounding.
    prompts = rng.integers(1, MODEL["vocab_size"], (PROMPTS if not args.smoke else 6, 24)).tolist()
    expected = without_graphs(model, prompts)
    started, used, wrong = time.perf_counter(), [], 0
    for i in range(total):
        chosen = rng.integers(0, len(prompts), int(rng.choice([1, 2, 4, 8])))
        rows = generate(model, [prompts[j] for j in chosen], int(rng.integers(1, LONGEST + 1)))
        wrong += wrong_rows(rows, chosen, expected)
        if i + 1 in (total // 10, total):
            used.append(memory())
    seconds = time.perf_counter() - started

    def run(thread):
        numbers, found = np.random.default_rng(thread), 0
        for _ in range(requests):
            chosen = numbers.integers(0, len(prompts), 1)
            rows = generate(model, [prompts[j] for j in chosen], int(numbers.integers(1, LONGEST + 1)))
            found += wrong_rows(rows, chosen, expected)
        return found

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        wrong += sum(pool.map(run, range(THREADS)))
    from keras_jamba._backend.torch import _graphed_loop

    found = dict(generations=total, seconds=seconds, requests=THREADS * requests)
    found |= {"seconds of threads": time.perf_counter() - started, "graphs": len(_graphed_loop._kept)}
    found |= {"MiB after a tenth": used[0], "MiB after all": used[-1], "MiB after threads": memory()}
    print(found | {"wrong rows": wrong})
    if wrong:
        raise AssertionError(f"Tokens must not depend on other requests. Received: {wrong} rows that differ.")
    if not args.smoke:
        measure.record("soak_torch", {"backend": "torch"} | found)


if __name__ == "__main__":
    main()
