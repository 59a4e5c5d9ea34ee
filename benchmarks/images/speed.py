"""Speed and accuracy on digits: DHCJamba, with a ViT and a ResNet of equal size as peers.

    KERAS_BACKEND=jax python -m benchmarks.images.speed

Measures images per second of `fit`, one epoch over fixed arrays without augmentation, and of `predict`, all in one
interleaved run. Then measures the accuracy on the second half of the digits after `recipes.DIGITS` on the first half.
The recipe was chosen for DHCJamba. DHCJamba has 16 tokens of 2 x 2 pixels and two layers; the ViT has 16 tokens and
four layers. Prints a table and writes results/image_speed_BACKEND.json.
"""

import argparse
import functools
import statistics
import sys
from dataclasses import replace

import keras
import numpy as np

from benchmarks import measure
from benchmarks.images import quality_digits as digits
from benchmarks.images.digits_models import IMAGE, jamba
from benchmarks.images.peers import resnet, vit, width_of_equal_size
from keras_jamba.training import recipes
from keras_jamba.training.data.augmentation import one_hot

PEERS = {
    "ViT": (functools.partial(vit, patch=2, depth=4, heads=4), range(16, 129, 4)),
    "ResNet": (resnet, range(4, 33)),
}


def model_functions():
    """Returns `{name: function}`: each function returns an untrained model."""
    parameters = jamba()().count_params()
    made = {"DHCJamba": jamba()}
    for name, (make, widths) in PEERS.items():
        made[name] = functools.partial(make, width_of_equal_size(make, widths, IMAGE, parameters), IMAGE)
    return made


def check(name, model, images):
    logits = model.predict(images, verbose=0)
    if logits.shape != (len(images), 10) or not np.isfinite(logits).all():
        raise AssertionError(
            f"{name}: logits must be finite and of shape {len(images), 10}. Received: shape {logits.shape}."
        )


def speeds(make, batch_size, rounds):
    """Returns images per second, `{name: {"fit": number, "predict": number}}`."""
    recipe = replace(recipes.DIGITS, batch_size=batch_size)
    images, labels, *_ = digits.split("D2", 0)
    count = len(images) // batch_size * batch_size  # full batches only, as in the recipe
    images, labels = images[:count], one_hot(labels[:count], 10)
    given = dict(batch_size=batch_size, verbose=0)
    models, functions = {name: made() for name, made in make.items()}, {}
    for name, model in models.items():
        check(name, model, images)
        recipe.compile(model, (rounds + 1) * (count // batch_size))
        functions[name, "fit"] = functools.partial(model.fit, images, labels, **given)
        functions[name, "predict"] = functools.partial(model.predict, images, **given)
    seconds = measure.interleaved(functions, rounds)
    for name, model in models.items():
        check(f"{name} after training", model, images)
    return {name: {kind: round(count / seconds[name, kind], 1) for kind in ("fit", "predict")} for name in models}


def accuracies(make, seeds, epochs):
    """Returns accuracies in percent on the second half and seconds of training per seed, `{name: {...}}`."""
    images, labels, *test = digits.split("D2", 0)
    recipe = digits.recipe_of("D2", epochs)
    results = {}
    for name, made in make.items():
        result = results[name] = {"accuracy": [], "seconds": []}
        for _, model, seconds in digits.trained(made, recipe, [(images, labels)] * len(seeds), seeds):
            result["accuracy"].append(round(digits.accuracy(model, *test)[0], 2))
            result["seconds"].append(round(seconds, 1))
        print(name, result, file=sys.stderr, flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--batch-size", type=int, default=recipes.DIGITS.batch_size, help="batch size of the timed calls"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--epochs", type=int, default=recipes.DIGITS.epochs, help="epochs of training before the accuracy is measured"
    )
    args = parser.parse_args()
    make = model_functions()
    parameters = {name: made().count_params() for name, made in make.items()}
    rates = speeds(make, args.batch_size, args.rounds)
    trained = accuracies(make, args.seeds, args.epochs)
    models = {
        name: {"parameters": parameters[name], "images per second": rates[name], **trained[name]} for name in make
    }
    rows = [
        {
            "model": name,
            "parameters": f"{parameters[name]:,}",
            **{f"{kind}, images/s": f"{rate:,.0f}" for kind, rate in rates[name].items()},
            "accuracy": f"{statistics.mean(trained[name]['accuracy']):.2f}",
        }
        for name in make
    ]
    print(measure.table(rows, list(rows[0])))
    measure.record(f"image_speed_{keras.backend.backend()}", {**vars(args), "models": models})


if __name__ == "__main__":
    main()
