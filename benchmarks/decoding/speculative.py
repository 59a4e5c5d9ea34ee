"""Speed of speculative decoding at batch 1, with plain decoding as the peer.

    KERAS_BACKEND=jax python -m benchmarks.decoding.speculative

A Jamba (8 layers, six Mamba and two attention, d 128, 4 experts, 2 per token, 2.3 M parameters) and a draft model of
two layers train on logs for a fixed time. The logs are bytes: lines of a dozen kinds with names per document, where
passages of a few lines repeat. The model then continues unseen documents: plainly, with `PromptLookup` and with
`DraftModel`, greedily and with sampling. All must generate the same tokens. They are then timed in one interleaved run,
including the prefill. Prints tables and writes results/speculative_BACKEND.json.
"""

import argparse
import os
import time

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from keras_jamba.generation import DraftModel, PromptLookup

NAMES = "anna boris chen dara emil fatima goran hana ivan jana karim lena milo nora otto petra".split()
HOSTS = [f"{place}-{i}" for place in ("north", "south", "lab", "edge") for i in range(1, 9)]
FILES = [f"{name}.{kind}" for name in ("report", "notes", "index", "draft", "plan", "sums") for kind in ("txt", "csv")]
LINES = (
    "{user} logged in at {host}",
    "{user} logged out of {host}",
    "{user} read {file} on {host}",
    "{user} wrote {file} on {host}, {size} bytes",
    "{user} removed {file} from {host}",
    "{host} was restarted by {user}",
    "{host} has {size} bytes left",
    "backup of {file} from {host} is done",
    "backup of {file} from {host} failed, {user} was told",
    "{user} gave {file} to {other}",
    "{other} asked {user} for {file}",
    "no answer from {host} since {size} seconds",
)
PROMPT, NEW, LENGTH, VOCABULARY = 192, 128, 320, 128
LARGE = dict(d_model=128, num_layers=8, mamba_ratio=3, num_heads=4, num_experts=4, num_experts_per_token=2, d_ff=192)
SMALL = dict(d_model=48, num_layers=2, mamba_ratio=1, num_heads=4, moe_frequency=0, d_ff=96)
SAMPLER = dict(temperature=1.0, seed=0)


def document(rng, length):
    """Returns the bytes of a log: new passages of two to four lines, and as often repetitions of earlier ones."""
    pick = lambda values: values[rng.integers(len(values))]  # noqa: E731
    people, hosts, files = (rng.choice(values, 3, replace=False) for values in (NAMES, HOSTS, FILES))
    passages, text = [], ""
    while len(text) < length:
        if passages and rng.random() < 0.5:
            text += pick(passages)
            continue
        lines = []
        for _ in range(rng.integers(2, 5)):
            user, other = rng.permutation(people)[:2]
            given = dict(user=user, other=other, host=pick(hosts), file=pick(files), size=rng.integers(10, 1000))
            lines.append(pick(LINES).format(**given) + "\n")
        passages.append("".join(lines))
        text += passages[-1]
    return np.frombuffer(text[:length].encode(), "uint8").astype("int32")


class TimeLimit(keras.callbacks.Callback):
    """Ends a training after `seconds`, without the first step, which compiles."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.steps, self.end = seconds, 0, None

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        self.end = self.end or time.perf_counter() + self.seconds
        if time.perf_counter() > self.end:
            self.model.stop_training = True


def trained(options, seconds, learning_rate):
    """Returns `(model, figures of its training)`."""
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(VOCABULARY, **options)
    model.compile(keras.optimizers.Adam(learning_rate, clipnorm=1.0))
    rng, time_limit = np.random.default_rng(0), TimeLimit(seconds)
    while not model.stop_training:
        rows = np.stack([document(rng, LENGTH + 1) for _ in range(64)])
        history = model.fit(rows, batch_size=8, verbose=0, callbacks=[time_limit])
    loss = history.history["loss"][-1]
    figures = {"parameters": model.count_params(), "seconds": seconds, "steps": time_limit.steps}
    return model, figures | {"last loss": round(float(loss), 3)}


def decoders(model, assistants, prompts, given):
    """Returns `{name: function}`, where each function continues all prompts one by one, and their statistics."""
    totals = {name: {} for name in assistants}

    def run(name):
        outputs, total = [], dict.fromkeys(("rounds", "proposed", "accepted"), 0)
        for prompt in prompts:
            outputs.append(model.generate(prompt, max_new_tokens=NEW, assistant=assistants[name], **given))
            for key in total if assistants[name] else ():
                total[key] += assistants[name].statistics[key]
        totals[name] = total
        return outputs

    return {name: lambda name=name: run(name) for name in assistants}, totals


def compare(model, assistants, prompts, rounds, **given):
    functions, totals = decoders(model, assistants, prompts, dict(given, stop_token_ids=None))
    plain = functions["plain"]()
    for name, function in functions.items():
        if not all(np.array_equal(a, b) for a, b in zip(plain, function(), strict=True)):
            raise AssertionError(f"{name}: the tokens differ from those of plain decoding.")
    seconds = measure.interleaved(functions, rounds)
    count, rows = NEW * len(prompts), []
    for name, total in totals.items():
        row = {"decoding": name, "tokens a second": round(count / seconds[name], 1)}
        if assistants[name]:
            row["times plain"] = round(seconds["plain"] / seconds[name], 2)
            row["accepted"] = round(total["accepted"] / max(total["proposed"], 1), 3)
            row["tokens a round"] = round((count - len(prompts)) / total["rounds"], 2)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs=2, default=[80, 25], help="seconds of training, for both models")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--num-tokens", type=int, nargs=2, default=[8, 4], help="proposed tokens of PromptLookup and of DraftModel"
    )
    args = parser.parse_args()
    model, large = trained(LARGE, args.seconds[0], 2e-3)
    small_model, small = trained(SMALL, args.seconds[1], 4e-3)
    prompts = [document(np.random.default_rng(1000 + i), PROMPT).tolist() for i in range(args.prompts)]
    print(bytes(model.generate(prompts[0], max_new_tokens=NEW, stop_token_ids=None).tolist()).decode())
    assistants = {
        "plain": None,
        "PromptLookup": PromptLookup(args.num_tokens[0]),
        "DraftModel": DraftModel(small_model, args.num_tokens[1]),
    }
    results = {}
    for name, given in {"greedy": {}, "sampled": dict(sampler=keras_jamba.Sampler(**SAMPLER))}.items():
        results[name] = compare(model, assistants, prompts, args.rounds, **given)
        print(f"\n{name}\n\n{measure.table(results[name], list(results[name][-1]))}")
    measure.record(
        f"speculative_{keras.backend.backend()}",
        # The speed of a shared machine varies with its load. The ratios hold.
        {"rounds": args.rounds, "load": os.getloadavg()[0], "model": large, "draft": small, **results},
    )


if __name__ == "__main__":
    main()
