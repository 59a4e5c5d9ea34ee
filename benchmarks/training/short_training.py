"""Inference statistics of batch norm after short trainings: rules for moving statistics, calibration, other norms.

    KERAS_BACKEND=jax python -m benchmarks.training.short_training --tier cpu
    KERAS_BACKEND=jax python -m benchmarks.training.short_training --tier gpu --seeds 10 --output DIR

Training uses the statistics of its batch, so the rule for the moving statistics does not change the weights. One
training therefore serves all rules: it records the statistics of every batch, and each rule is replayed on them in
float64. The reference is calibration: the exact statistics of all training images under the final weights. A recipe's
average of the weights does not change the training either. Norms without statistics are trained separately.

The script first checks the replay against the statistics of real layers. It prints tables and writes
short_training_BACKEND_TIER.json and short_training_times_BACKEND_TIER.json. `--data` names an .npz with `images`
(0 to 16) and `target`, for a machine without scikit-learn.
"""

import argparse
import functools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_jamba
from benchmarks import measure
from benchmarks.images.sizes import untrained
from benchmarks.training.short_training_norms import LAYERS, NORMS, norms
from keras_jamba import _backend
from keras_jamba.training import recipes

IMAGE = dict(image_shape=(8, 8, 1), downsample=2)
EPOCHS = (1, 2, 3, 5)


# The share of batch n (from 0) in the moving statistics, for a momentum m.
RULE_KINDS = {
    # Keras' rule. It averages the initial values, mean 0 and variance 1, with those of the batches.
    "constant": lambda m: lambda n: 1 - m,
    # The first batch replaces the initial values. No variable is needed.
    "first": lambda m: lambda n: 1.0 if n == 0 else 1 - m,
    # The following rules need a counter variable. This one is the mean of all batches while they are few.
    "count": lambda m: lambda n: max(1 - m, 1 / (n + 1)),
    # Adam's bias correction.
    "debiased": lambda m: lambda n: (1 - m) / (1 - m ** (n + 1)),
    # `num_updates` of TensorFlow's ExponentialMovingAverage; the average reaches over a ninth of the batches so far.
    "ninth": lambda m: lambda n: max(1 - m, 9 / (9 + n)),
}
RULES = {f"{kind} {m}": RULE_KINDS[kind](m) for kind in RULE_KINDS for m in (0.8, 0.9, 0.95)}
RULES["constant 0.99"] = RULE_KINDS["constant"](0.99)
KERAS_RULE, PACKAGE_RULE = "constant 0.9", "first 0.8"


def replayed(rule, batches, start):
    """Returns the moving statistics of a rule from those of the batches, in float64."""
    value = np.asarray(start, "float64")
    for n, batch in enumerate(batches):
        value = value + rule(n) * (batch.astype("float64") - value)
    return value


def model(name, norm=None, **changes):
    with norms(norm):
        if name == "small":
            return untrained("small", **IMAGE | changes)
        return keras_jamba.DHCJamba.from_preset(name, load_weights=False, **IMAGE | changes)


class Recorder(keras.callbacks.Callback):
    """Keeps the statistics of every batch, averages of the weights, and the results of `evaluate` per epoch."""

    def __init__(self, norms, evaluate=None, epochs=(), averages=None):
        super().__init__()
        self.norms, self.evaluate, self.epochs, self.rules = norms, evaluate, epochs, averages or {}
        self.batches, self.steps, self.evaluations, self.averages = [[] for _ in range(2 * len(norms))], 0, {}, {}

    def on_train_batch_end(self, batch, logs=None):
        model, n = self.model, self.steps  # on JAX, reading `self.model` updates the variables
        self.steps += 1
        for kept, variable in zip(self.batches, _statistics(self.norms), strict=True):
            kept.append(np.array(ops.convert_to_numpy(variable)))
        if self.rules:
            weights = [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]
        for name, rule in self.rules.items():
            before = self.averages.get(name, weights)
            self.averages[name] = [a + rule(n) * (w - a) for a, w in zip(before, weights, strict=True)]

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.epochs:
            self.evaluations[epoch + 1] = {"fit": logs["accuracy"], **self.evaluate(self)}


def _statistics(norms):
    return [v for norm in norms for v in (norm.moving_mean, norm.moving_variance)]


def _start(norms):
    return [start for _ in norms for start in (0.0, 1.0)]


def calibrated(encoder, images):
    """Assigns the exact statistics of all images to the norms, layer by layer."""
    x = ops.convert_to_tensor(images)
    for convolution, norm in zip(encoder.convolutions, encoder.norms, strict=True):
        x = convolution(x)
        values = np.asarray(ops.convert_to_numpy(x), "float64")
        norm.moving_mean.assign(values.mean(axis=(0, 1, 2)).astype("float32"))
        norm.moving_variance.assign(values.var(axis=(0, 1, 2)).astype("float32"))
        x = ops.silu(norm(x, training=False))


def accuracy(model, images, labels):
    logits = model.predict(images, batch_size=len(images), verbose=0)
    return float((logits.argmax(-1) == labels).mean())


def rule_accuracies(model, data, recorder):
    """Returns `{rule: [training accuracy, test accuracy]}`, including "calibrated"."""
    images, labels, test_images, test_labels = data
    both, middle = np.concatenate([images, test_images]), len(images)
    original_values = [ops.convert_to_numpy(v).copy() for v in _statistics(recorder.norms)]
    found = {}

    def accuracies():
        hits = model.predict(both, batch_size=len(both), verbose=0).argmax(-1)
        return [
            float((hits[part] == y).mean()) for part, y in ((slice(middle), labels), (slice(middle, None), test_labels))
        ]

    for name, rule in RULES.items():
        starts = _start(recorder.norms)
        for variable, batches, start in zip(_statistics(recorder.norms), recorder.batches, starts, strict=True):
            variable.assign(replayed(rule, batches, np.full(variable.shape, start)).astype("float32"))
        found[name] = accuracies()
    calibrated(model.encoder, images)
    found["calibrated"] = accuracies()
    for variable, value in zip(_statistics(recorder.norms), original_values, strict=True):
        variable.assign(value)
    return found


class Trainings:
    """Trainings from several seeds with one model, which is compiled once."""

    def __init__(self, make, compile=None):
        self.make, self.model = make, make()
        (compile or _with_adam)(self.model)
        self.model.optimizer.build(self.model.trainable_variables)
        self.optimizer = [ops.convert_to_numpy(v).copy() for v in self.model.optimizer.variables]

    def start(self, seed):
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make().get_weights())
        for variable, value in zip(self.model.optimizer.variables, self.optimizer, strict=True):
            variable.assign(value)
        return self.model


def _with_adam(model):
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])


def recording(model):
    for norm in model.encoder.norms:
        norm.momentum = 0.0  # the moving statistics then equal those of the last batch
    return model


@functools.cache
def digits(file):
    if file is None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images, labels = data.images, data.target
    else:
        data = np.load(file)
        images, labels = data["images"], data["target"]
    x, y = (images / 16).astype("float32")[..., None], np.asarray(labels)
    return x[:898], y[:898], x[898:], y[898:]


def three_classes(file, seed):
    """Returns 96 training images of three classes, and the test images of these classes."""
    x, y, x_test, y_test = digits(file)
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(y < 3))[:96]
    return x[chosen], y[chosen], x_test[y_test < 3], y_test[y_test < 3]


def check(file):
    """Checks that the replay equals the statistics of real layers."""
    x, y, *_ = digits(file)
    ends = {}
    for name in ("recorded", "constant", "package"):
        keras.utils.set_random_seed(0)
        made = model("digits", LAYERS["constant"] if name != "package" else None)
        recorder = Recorder(made.encoder.norms)
        _with_adam(recording(made) if name == "recorded" else made)
        made.fit(x[:160], y[:160], batch_size=32, verbose=0, shuffle=False, callbacks=[recorder])
        ends[name] = [ops.convert_to_numpy(v) for v in _statistics(made.encoder.norms)]
        if name == "recorded":
            batches, starts = recorder.batches, _start(made.encoder.norms)
    for name, rule in (("constant", KERAS_RULE), ("package", PACKAGE_RULE)):
        for found, kept, start in zip(ends[name], batches, starts, strict=True):
            expected = replayed(RULES[rule], kept, np.full(found.shape, start))
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5, err_msg=f"{name}: {rule}")
    return "replay agrees with the layers"


def short_trainings(args):
    """Evaluates all rules after epochs 1, 2, 3 and 5 on digits, and after 1 and 3 on 96 images."""
    found = []
    for name in ("small", "digits"):
        trainings = Trainings(lambda name=name: recording(model(name)))
        for seed in range(args.seeds):
            found += _train_and_evaluate(trainings, f"{name}, digits", digits(args.data), EPOCHS, seed)
        for seed in range(args.seeds):
            data = three_classes(args.data, seed)
            found += _train_and_evaluate(trainings, f"{name}, 96 images of three classes", data, (1, 3), seed)
    return found


def other_norms(args):
    """Runs the same trainings on digits with norms that have no statistics."""
    found = []
    for norm, make in NORMS.items():
        for name in ("small", "digits"):
            trainings = Trainings(lambda name=name, make=make: model(name, make))
            for seed in range(args.seeds):
                found += _train_and_evaluate(trainings, f"{name}, digits", digits(args.data), EPOCHS, seed, norm)
    return found


def _train_and_evaluate(trainings, what, data, epochs, seed, norm=None):
    made = trainings.start(seed)
    if norm is None:
        recorder = Recorder(made.encoder.norms, functools.partial(rule_accuracies, made, data), epochs)
    else:
        recorder = Recorder([], lambda _: {norm: [accuracy(made, *data[:2]), accuracy(made, *data[2:])]}, epochs)
    made.fit(*data[:2], batch_size=32, epochs=max(epochs), verbose=0, callbacks=[recorder])
    rows = [dict(what=what, seed=seed, epochs=epoch, right=found) for epoch, found in recorder.evaluations.items()]
    for row in rows:
        _print_row(row, norm)
    return rows


def _print_row(row, norm):
    names = ("fit", KERAS_RULE, PACKAGE_RULE, "calibrated", norm)
    printed = {name: row["right"][name] for name in names if name in row["right"]}
    print(row["what"], row["seed"], row["epochs"], printed, flush=True)


# Averages of the weights. Keras' average starts from the weights after the first step.
AVERAGES = {
    "none": lambda m: lambda n: 1.0,
    "Keras'": RULE_KINDS["first"],
    "count": RULE_KINDS["count"],
    "ninth": RULE_KINDS["ninth"],
}


def recipe_trainings(args):
    """Evaluates the digits recipe, shortened and complete: rules for statistics, by rules for averaged weights."""
    found = []
    complete = max(args.recipes)
    for epochs, momentum in args.recipes:
        recipe = replace(recipes.DIGITS, epochs=epochs, ema_momentum=momentum)
        for norm, make in {None: None, **(NORMS if (epochs, momentum) == complete else {})}.items():
            for seed in range(args.recipe_seeds):
                found += _train_recipe(args, recipe, norm, make, seed)
    return found


def _train_recipe(args, recipe, norm, make, seed):
    data = digits(args.data)
    keras.utils.set_random_seed(seed)
    made = model("digits", make)
    rules = {name: rule(recipe.ema_momentum) for name, rule in AVERAGES.items()}
    recorder = Recorder(recording(made).encoder.norms if norm is None else [], averages=rules)
    started = time.perf_counter()
    recipe.fit(made, *data[:2], seed=seed, verbose=0, callbacks=[recorder])
    seconds = round(time.perf_counter() - started, 1)
    rows = []
    for average, weights in recorder.averages.items():
        for variable, value in zip(made.trainable_variables, weights, strict=True):
            variable.assign(value)
        if norm is None:
            found = rule_accuracies(made, data, recorder)
        else:
            found = {norm: [accuracy(made, *data[:2]), accuracy(made, *data[2:])]}
        what = f"recipe, average of weights: {average}, {recipe.ema_momentum}"
        rows.append(dict(what=what, seed=seed, epochs=recipe.epochs, right=found, seconds=seconds))
        _print_row(rows[-1], norm)
    return rows


def times(args):
    """Returns seconds per step of `fit` for each layer and for a calibration, and their ratios to Keras' layer."""
    x, y, *_ = digits(args.data)
    x, y = x[:896], y[:896]
    steps = len(x) // 32
    fits = {}
    for name, make in LAYERS.items():
        keras.utils.set_random_seed(0)
        made = model("digits", make)
        _with_adam(made)
        fits[name] = functools.partial(made.fit, x, y, batch_size=32, verbose=0)
        if name == "package":
            fits["calibration alone"] = functools.partial(calibrated, made.encoder, x)
    for fit in fits.values():
        fit()
    seconds = {name: [] for name in fits}
    for round_index in range(args.rounds):
        # The order rotates, so that each layer has each place equally often.
        names = [*fits][round_index % len(fits) :] + [*fits][: round_index % len(fits)]
        for name in names:
            started = time.perf_counter()
            fits[name]()
            seconds[name].append((time.perf_counter() - started) / steps)
    return {name: _time(each, seconds["constant"]) for name, each in seconds.items()}


def _time(seconds, reference_seconds):
    """Returns the median seconds, and the median ratio to the same round of the reference with its 95 % interval."""
    ratios = np.divide(seconds, reference_seconds)
    samples = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[samples], axis=1), (0.025, 0.975))
    interval = [round(float(low), 3), round(float(high), 3)]
    return {"seconds": statistics.median(seconds), "ratio": round(float(np.median(ratios)), 3), "interval": interval}


def summary(found):
    """Returns table rows: mean accuracies, and the mean and worst gap to calibration on the training images."""
    groups = {}
    for row in found:
        groups.setdefault((row["what"], row["epochs"]), []).append(row)
    lines = []
    for (what, epochs), rows in groups.items():
        for rule in rows[0]["right"]:
            if rule == "fit":
                continue
            evaluations = [row["right"] for row in rows if rule in row["right"]]
            line = {"training": what, "epochs": epochs, "statistics": rule, "seeds": len(evaluations)}
            train, test = ([100 * each[rule][i] for each in evaluations] for i in (0, 1))
            line |= {"train": f"{statistics.mean(train):.1f}", "test": f"{statistics.mean(test):.2f}"}
            if "calibrated" in evaluations[0]:
                gaps = [100 * abs(each["calibrated"][0] - each[rule][0]) for each in evaluations]
                line |= {"gap": f"{statistics.mean(gaps):.2f}", "worst gap": f"{max(gaps):.2f}"}
            if "fit" in evaluations[0]:
                line["least above fit"] = f"{min(100 * (e[rule][0] - e['fit']) for e in evaluations):+.1f}"
            lines.append(line)
    return lines


PARTS = {"short": short_trainings, "other norms": other_norms, "full": recipe_trainings}
TIERS = {
    "cpu": dict(seeds=3, recipe_seeds=2, recipes=((2, 0.98), (5, 0.98), (5, 0.9995), (20, 0.98)), rounds=40),
    "gpu": dict(seeds=10, recipe_seeds=10, recipes=((2, 0.98), (5, 0.98), (5, 0.9995), (60, 0.98)), rounds=50),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=TIERS, default="cpu")
    parser.add_argument("--seeds", type=int, help="number of seeds of all trainings")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "times"), default=(*PARTS, "times"))
    parser.add_argument("--data", help=".npz file with images and target")
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    seeds = {} if args.seeds is None else dict(seeds=args.seeds, recipe_seeds=args.seeds)
    vars(args).update(TIERS[args.tier] | seeds)
    measure.RESULTS = args.output
    backend = keras.backend.backend()
    print(check(args.data), flush=True)
    found = {part: PARTS[part](args) for part in args.parts if part in PARTS}
    if found:
        lines = [line for part in found.values() for line in summary(part)]
        columns = ["training", "epochs", "statistics", "seeds", "train", "test", "gap", "worst gap", "least above fit"]
        print(measure.table(lines, columns))
        results = {"device": _backend.device.device_name(), "summary": lines, "trainings": found}
        measure.record(f"short_training_{backend}_{args.tier}", results)
    if "times" in args.parts:
        found = times(args)
        print(json.dumps(found, indent=1))
        results = {"device": _backend.device.device_name(), "seconds per step of fit": found}
        measure.record(f"short_training_times_{backend}_{args.tier}", results)


if __name__ == "__main__":
    main()
