"""Trains DHCJamba on clips whose class depends on the order of frames, and classifies a clip frame by frame.

Three tasks (video_tasks.py): the direction in which a digit moves; the order in which three digits flash; whether
the first and the last digit of a clip are of one class. There is no download.

    python examples/video_classification.py [--task direction|order|match]

Writes to --output: model/ (a preset for `DHCJamba.from_preset`), stream.png, results.json.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import keras
import matplotlib
import numpy as np
from video_tasks import CLASS_NAMES, CONTROLS, TASKS, generator

import keras_jamba
from keras_jamba.training import RandomAffine, Recipe

matplotlib.use("Agg")

TEST_CLIPS = 2000
BODY = dict(tokens="frames", d_model=32, num_layers=2, mamba_ratio=1, moe_frequency=0, readout="last")


def slightly_moved(num_classes):
    """Returns the layers of an augmentation."""
    return [RandomAffine(rotation=15.0, shear=0.1, dtype="float32")]


# Per task: arguments of the model, and training stages `(frames, clips, recipe)`.
SETTINGS = {
    "direction": (
        BODY | dict(stem="patchify", downsample=4),
        [(8, 8192, Recipe(epochs=3, batch_size=64, learning_rate=3e-3, ema_momentum=0.98))],
    ),
    "order": (
        BODY | dict(downsample=2),
        [(12, 8192, Recipe(epochs=3, batch_size=64, learning_rate=3e-3, ema_momentum=0.98))],
    ),
    "match": (
        # Attention without positions finds the first frame at any distance.
        BODY | dict(downsample=2, use_rope=False, d_model=48, attention_offset=0),
        [
            # Training on 16 frames from the start does not find the comparison.
            (3, 16384, Recipe(12, 64, 3e-3, ema_momentum=0.99, augmentation=slightly_moved)),
            (16, 8192, Recipe(3, 64, 2e-3, ema_momentum=0.99, augmentation=slightly_moved)),
        ],
    ),
}


def train(name, seed=0, salt=0, control=None, share=1.0, smoke=False, verbose=0, **changes):
    """Returns a model trained on a task.

    Args:
        name: the task, a key of `TASKS`.
        seed: decides weights, clips and order.
        salt: draws other clips and weights.
        control: None, or a key of `CONTROLS`, which changes the training clips.
        share: the number of training clips as a multiple of the usual number.
        smoke: True for one epoch of 128 clips per stage.
        verbose: as in `fit`.
        **changes: other arguments of the model.
    """
    task, (options, stages) = TASKS[name], SETTINGS[name]
    keras.utils.set_random_seed(seed + 1000 * salt)
    sizes = dict(num_classes=task.classes, image_shape=(None, *task.size, 1), class_names=CLASS_NAMES[name])
    model = keras_jamba.DHCJamba(**sizes, **options | changes)
    for frames, count, recipe in stages:
        count = int(count * share) // task.multiple * task.multiple
        if smoke:
            count, recipe = 128, replace(recipe, epochs=1, augmentation=None)
        clips, labels = task.clips("train", count, seed, salt, frames)
        if control:
            clips = CONTROLS[control](clips, generator(control, "train", seed, salt))
        recipe.fit(model, clips, labels, seed=seed + 1000 * salt, verbose=verbose)
    return model


def accuracy(model, name, seed=0, salt=0, control=None, frames=None, split="test", count=TEST_CLIPS):
    """Returns the percentage of new clips of other digits that the model classifies correctly."""
    clips, labels = TASKS[name].clips(split, count, seed, salt, frames)
    if control:
        clips = CONTROLS[control](clips, generator(control, split, seed, salt))
    return 100 * float((model.predict(clips, verbose=0).argmax(-1) == labels).mean())


def streamed(model, clip):
    """Returns the probabilities `(T, classes)` after each frame of one clip `(T, h, w, 1)`."""
    cache = model.init_cache(1, max_frames=len(clip))
    probabilities = []
    for frame in clip:
        logits, cache = model.step(frame[None], cache)
        probabilities.append(keras.ops.convert_to_numpy(keras.ops.stop_gradient(keras.ops.softmax(logits)))[0])
    return np.stack(probabilities)


def draw_stream(clip, label, probabilities, file):
    """Draws the frames of a clip, and the class probabilities after each frame."""
    from matplotlib import pyplot as plt

    frames, classes = probabilities.shape
    figure = plt.figure(figsize=(1.1 * frames + 1, 4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 2))
    for axis, frame in zip(np.atleast_1d(upper.subplots(1, frames)), clip, strict=True):
        axis.imshow(frame[..., 0], cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    axis = lower.subplots()
    for i in range(classes):
        axis.plot(range(1, frames + 1), probabilities[:, i], lw=3 if i == label else 1, label=f"{i}")
    axis.set(xlabel="frames seen", ylabel="probability", ylim=(-0.02, 1.02), xticks=range(1, frames + 1))
    axis.legend(title=f"class (true: {label})", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=tuple(TASKS), default="direction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--salt", type=int, default=0, help="draws other clips")
    parser.add_argument("--output", type=Path, default=Path("runs/video_classification"))
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that all of it runs")
    args = parser.parse_args()
    task = TASKS[args.task]
    count = 200 if args.smoke else TEST_CLIPS
    started = time.perf_counter()
    model = train(args.task, args.seed, args.salt, smoke=args.smoke, verbose=2)
    seconds = time.perf_counter() - started
    args.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.output / "model", ignore_errors=True)
    model.save_to_preset(args.output / "model")

    lengths = (16, 32, 64) if args.task == "match" else (task.frames,)
    right = {f"{T} frames": accuracy(model, args.task, args.seed, args.salt, frames=T, count=count) for T in lengths}
    right |= {
        f"frames {control}": accuracy(model, args.task, args.seed, args.salt, control, count=count)
        for control in task.ceilings
    }
    for name, value in right.items():
        print(f"{name:>16}  {value:6.2f} % of {count} new clips of other digits right")
    clips, labels = task.clips("test", task.multiple, args.seed, args.salt)
    probabilities = streamed(model, clips[0])
    draw_stream(clips[0], labels[0], probabilities, args.output / "stream.png")
    complete = keras.ops.softmax(model.predict(clips[:1], verbose=0))
    difference = np.abs(keras.ops.convert_to_numpy(complete)[0] - probabilities[-1]).max()
    print(f"After the last frame of a stream the probabilities are those of the complete clip to {difference:.0e}.")
    record = {"task": args.task, "seed": args.seed, "salt": args.salt, "backend": keras.backend.backend()}
    record |= {"seconds": round(seconds, 1), "parameters": model.count_params(), "test_accuracy": right}
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{seconds:.0f} s of training. model/, stream.png and results.json are in {args.output}")


if __name__ == "__main__":
    main()
