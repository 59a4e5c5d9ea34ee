"""Trains a small Jamba on bytes of local text and generates text with it.

The script also trains two models of about as many parameters in the same way: one of attention layers only, one of
Mamba layers only. gzip and xz compress the same test text. There is no download.

    python examples/text_generation.py [--minutes 5] [--prompt "The "]

Writes to --output: model/ (a preset for `JambaCausalLM.from_preset`), bits_per_byte.png, results.json.
"""

import argparse
import gzip
import json
import lzma
import math
import shutil
import time
from pathlib import Path

import keras
import matplotlib
import numpy as np
from text_corpus import documents

import keras_jamba
from keras_jamba.tokenizers import ByteTokenizer
from keras_jamba.training import JambaAdamW, PackedText

matplotlib.use("Agg")

LENGTH, BATCH = 128, 16
BODY = dict(d_model=64, num_layers=4, num_heads=4, num_experts=4, d_ff=128)
# Attention alone requires RoPE to know positions.
KINDS = {
    "Jamba": dict(mamba_ratio=3, attention_offset=2, moe_frequency=2),
    "attention": dict(mamba_ratio=0, moe_frequency=0, use_rope=True),
    "Mamba": dict(mamba_ratio=None, moe_frequency=0),
}
PEAK, WARMUP = 5e-3, 0.1


def build(kind, parameters=None, **smaller):
    """Returns a model of a kind. With `parameters`, d_ff is chosen to give about that many parameters."""
    options = BODY | KINDS[kind] | smaller
    make = lambda **changed: keras_jamba.JambaCausalLM(  # noqa: E731
        vocab_size=ByteTokenizer.vocab_size,
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
        pad_token_id=ByteTokenizer.pad_token_id,
        **options | changed,
    )
    model = make()
    if parameters is not None:
        # Each layer has three matrices of d x d_ff.
        missing = (parameters - model.count_params()) / (3 * options["d_model"] * options["num_layers"])
        model = make(d_ff=max(8, options["d_ff"] + round(missing)))
    model.tokenizer = ByteTokenizer()
    return model


def rows(texts, seed=0, shuffle=True):
    """Returns packed rows of the texts as bytes. Each text ends with the end-of-sequence token."""
    tokenizer = ByteTokenizer()
    ids = [np.array(tokenizer.encode(text), "int32") for text in texts]
    return PackedText(ids, LENGTH, BATCH, seed=seed, shuffle=shuffle, eos_id=tokenizer.eos_token_id)


class Clock(keras.callbacks.Callback):
    """Callback that schedules the learning rate over a number of seconds, ends the training and shows progress."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.started, self.steps = seconds, None, 0
        self.bar = keras.utils.Progbar(seconds, unit_name="second", stateful_metrics=["loss"])

    def done(self):
        """Returns the elapsed share of the time. The first step, which compiles, does not count."""
        return 0.0 if self.started is None else (time.perf_counter() - self.started) / self.seconds

    def on_epoch_begin(self, epoch, logs=None):
        rising, falling = self.done() / WARMUP, 0.5 * (1 + math.cos(math.pi * min(1.0, self.done())))
        self.model.optimizer.learning_rate = PEAK * max(0.01, min(rising, falling))

    def on_train_batch_end(self, batch, logs=None):
        self.started = self.started or time.perf_counter()
        self.steps += 1

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = self.done() >= 1
        self.bar.update(min(self.seconds, int(self.done() * self.seconds)), [("loss", logs["loss"])])


def train(model, text, seconds):
    """Trains the model for `seconds` and returns the number of steps."""
    clock = Clock(seconds)
    model.compile(JambaAdamW(PEAK, weight_decay=0.05))
    # Every backend lets a callback set the learning rate between epochs, so epochs are short.
    steps = min(16, text.steps_per_epoch)
    model.fit(text, epochs=100_000, steps_per_epoch=steps, callbacks=[clock], verbose=0)
    return clock.steps


def bits_per_byte(model, text, size):
    """Returns the bits per byte of a text of `size` bytes in packed rows. The ends of documents count."""
    nats = 0.0
    for step in range(text.steps_per_epoch):
        inputs, targets, weight = text.batch(step)
        logits = model.predict_on_batch(inputs).astype("float64")
        highest = logits.max(-1, keepdims=True)
        normaliser = highest[..., 0] + np.log(np.exp(logits - highest).sum(-1))
        chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats += ((normaliser - chosen) * weight).sum()
    return nats / math.log(2) / size


def compressed(train_text, test_text, compress):
    """Returns the bits per byte of the compressed test text, alone and after the training text."""
    alone, before = len(compress(test_text)), len(compress(train_text))
    return 8 * alone / len(test_text), 8 * (len(compress(train_text + test_text)) - before) / len(test_text)


def draw(figures, file):
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    bars = axis.barh(list(figures), list(figures.values()), color=["C0", *["C7"] * (len(figures) - 1)])
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlabel="bits per byte of the test text (less is better)", xlim=(0, 1.12 * max(figures.values())))
    axis.invert_yaxis()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="approximate time of the complete run")
    parser.add_argument("--prompt", default="Return the ")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/text_generation"))
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that all of it runs")
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    smaller = dict(d_model=16, num_layers=1, d_ff=16, num_heads=2) if args.smoke else {}
    train_texts, test_texts = documents(60_000 if args.smoke else 1_500_000)
    train_text, test_text = ("\n".join(texts).encode() for texts in (train_texts, test_texts))
    print(f"{len(train_text):,} bytes of training text, {len(test_text):,} bytes of test text")
    text, test = rows(train_texts, args.seed), rows(test_texts, shuffle=False)

    figures, record, model = {}, {"backend": keras.backend.backend(), "seed": args.seed}, None
    for kind in KINDS:
        candidate = build(kind, model and model.count_params(), **smaller)
        model = model or candidate
        print(f"{kind}: {candidate.count_params():,} parameters")
        # 30 % of the time remains for compilation, the test and the generated text.
        steps = train(candidate, text, 1 if args.smoke else max(5, round(args.minutes * 60 * 0.7 / len(KINDS))))
        figures[kind] = bits_per_byte(candidate, test, len(test_text))
        record[kind] = {
            "parameters": candidate.count_params(),
            "steps": steps,
            "bits_per_byte": round(figures[kind], 3),
        }
    for name, compress in {"xz": lzma.compress, "gzip": gzip.compress}.items():
        figures[name], figures[f"{name}, behind the training text"] = compressed(train_text, test_text, compress)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:>{width}}  {value:5.2f} bits per byte")

    args.output.mkdir(parents=True, exist_ok=True)
    draw(figures, args.output / "bits_per_byte.png")
    shutil.rmtree(args.output / "model", ignore_errors=True)
    model.save_to_preset(args.output / "model")
    model.compile(sampler=keras_jamba.Sampler(temperature=0.8, top_p=0.95, seed=args.seed))
    print(f"\n{args.prompt}", end="", flush=True)
    for piece in model.stream(args.prompt, max_new_tokens=20 if args.smoke else 300):
        print(piece, end="", flush=True)
    record["other"] = {name: round(value, 3) for name, value in figures.items() if name not in KINDS}
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n\nmodel/, bits_per_byte.png and results.json are in {args.output}")


if __name__ == "__main__":
    main()
