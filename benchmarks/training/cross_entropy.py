"""Time and memory of a training step over a large vocabulary on a CPU, with the loss in chunks and of all logits.

    KERAS_BACKEND=jax python -m benchmarks.training.cross_entropy

KERAS_BACKEND names the backend. The step is `train_on_batch` of a small language model with the default loss and
metric. The peer is the same step with the logits of all tokens, as for any other loss. The script first compares losses
and weights after a step. It then times both in one interleaved run per vocabulary, and measures the peak memory in
separate processes. Prints the rows and writes results/cross_entropy_BACKEND.json.
"""

import argparse
import json

import keras
import numpy as np

import keras_jamba
from benchmarks import measure
from keras_jamba.models import _chunked_loss

BACKEND = keras.backend.backend()
VOCABULARIES, ROWS, TOKENS = (8192, 32000), 4, 512
SIZES = dict(d_model=256, num_layers=2, mamba_ratio=1, num_heads=4)


def step_of(form, vocabulary):
    """Returns the model, and a training step as a function without arguments, for the form "chunks" or "logits"."""
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(vocab_size=vocabulary, **SIZES)
    model.compile(keras.optimizers.SGD(0.1))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (ROWS, TOKENS + 1)).astype("int32")
    # The form is decided while the first step is traced. On PyTorch, it is decided in each step.
    decide = lambda *_: form == "chunks"  # noqa: E731

    def step():
        _chunked_loss._has_many_logits = decide
        return model.train_on_batch(tokens[:, :-1], tokens[:, 1:])

    return model, step


def check(vocabulary):
    """Compares the loss and all weights after a step in both forms."""
    found = []
    for form in ("chunks", "logits"):
        model, step = step_of(form, vocabulary)
        found.append([np.asarray(step()), *(keras.ops.convert_to_numpy(v) for v in model.trainable_variables)])
    for a, e in zip(*found, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="JSON [form, vocabulary]: print only the peak MiB of its step")
    args = parser.parse_args()
    if args.memory:
        print(measure.extra_memory(step_of(*json.loads(args.memory))[1]))
        return
    check(VOCABULARIES[0])
    rows = []
    for vocabulary in VOCABULARIES:
        steps = {form: step_of(form, vocabulary)[1] for form in ("chunks", "logits")}
        seconds = measure.interleaved(steps, args.rounds)
        for form, value in seconds.items():
            mib = measure.memory_in_a_process(__spec__.name, form, vocabulary)
            rows.append({"vocabulary": vocabulary, "form": form, "ms": round(1e3 * value), "MiB": mib})
            print(rows[-1], flush=True)
    sizes = SIZES | {"rows": ROWS, "tokens": TOKENS}
    measure.record(f"cross_entropy_{BACKEND}", {"backend": BACKEND, "sizes": sizes, "rows": rows})


if __name__ == "__main__":
    main()
