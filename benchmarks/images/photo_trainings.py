"""Settings of the trainings of `benchmarks.images.photos`, per model. Other models have those of "small"."""

RECIPE = dict(epochs=int, batch_size=int, learning_rate=float, weight_decay=float, ema_momentum=float)
AUGMENTATION = ("shift", "erasing", "cut_mix")
_COMMON = dict(
    set="cifar10",
    epochs=110,
    batch_size=512,
    learning_rate=4e-3,
    weight_decay=0.1,
    ema_momentum=0.999,
    shift=1 / 8,
    erasing=0.25,
    cut_mix=0.5,
    policy="mixed_bfloat16",
)
TRAININGS = {
    "small": _COMMON,
    "medium": _COMMON | dict(learning_rate=3e-3),
    "large": _COMMON | dict(epochs=130, learning_rate=2e-3),
    "fashion": _COMMON | dict(set="fashion", epochs=60),
}


def training_of(model):
    """Returns the settings of a model."""
    return TRAININGS.get(model, TRAININGS["small"])
