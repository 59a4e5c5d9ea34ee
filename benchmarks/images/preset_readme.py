"""README.md of a preset that `benchmarks.images.photos` trained."""

import json

from keras_jamba import presets
from keras_jamba.training import recipes

IMAGES = {
    "cifar10": (
        "Photographs of 32 x 32 pixels in ten classes: CIFAR-10 (Krizhevsky 2009). A third party compressed all images "
        "again, as JPEG 75 with chroma 4:2:0",
        "Published results on CIFAR-10 are not comparable: its images have no JPEG artefacts.",
    ),
    "fashion": ("Grey pictures of clothes, 28 x 28 pixels in ten classes: Fashion-MNIST (Xiao et al. 2017)", ""),
}


def write(folder, document):
    """Writes `folder/README.md`.

    Args:
        folder: the folder of the preset, a Path.
        document: the content of the training's `result.json`.
    """
    given, recipe, machine = (document[name] for name in ("arguments", "recipe", "machine"))
    about, note = IMAGES[given["set"]]
    checksum = json.loads((folder / presets.CONFIG).read_text(encoding="utf-8"))["weights"]["sha256"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("keras", document["backend"], "numpy"))
    lines = [
        f"# {given['model']}",
        "",
        f"{about}. Pixels are floats from 0 to 1; with `pixel_range=(0, 255)` the model takes bytes. {note}".rstrip(),
        "",
        f"- Seed {given['seed']}, {document['parameters']:,} parameters, {document['seconds']:.0f} s on one "
        f"{document['device']} ({versions}).",
        f"- Result of this file: {document['test']['accuracy']} % of the 10,000 test images, which were looked at "
        f"once, after the last epoch. The calibration error is {document['test']['calibration error']} %.",
        f"- Recipe: {recipe['epochs']} epochs over {document['images']:,} images, batches of {recipe['batch_size']}, "
        f"`training.optimizer` with a peak learning rate of {recipe['learning_rate']:g}, warm-up and cosine decay, "
        f"weight decay {recipe['weight_decay']:g}, label smoothing {recipes.CIFAR10.label_smoothing:g}, weights "
        f"averaged with momentum {recipe['ema_momentum']:g}, and `PhotoAugmentation(shift={recipe['shift']:g}, "
        f"erasing={recipe['erasing']:g}, cut_mix={recipe['cut_mix']:g})`, computed in `{recipe['policy']}`. Learning "
        "rates and decay were tried on the last 5,000 training images; `docs/benchmarks/images.md` lists the trials.",
        f"- Weights: float16, sha256 `{checksum}`.",
        "- Made again by the command below. Other devices and versions round otherwise. "
        "`benchmarks/images/data_sets.py` says how to get the images.",
        "",
        "```",
        f"KERAS_BACKEND={document['backend']} python -m benchmarks.images.photos {given['model']} --seed "
        f"{given['seed']} --data DATA --preset OUT",
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
