"""Mistakes with images, clips and their labels."""

import numpy as np

import keras_jamba
from mistakes.subjects import LABELS, NAN, RIGHT, UINT8, Mistake, batches, fit, numbers, pictures

RANGE = r"pixel_range"
SHAPE = r"images must be one tensor of shape"
IMAGES = [
    Mistake("call", "integer images, range (0, 1)", RANGE, lambda s: s.images(UINT8)),
    Mistake("call", "float images of 0 to 255, range (0, 1)", RANGE, lambda s: s.images(UINT8.astype("float32"))),
    Mistake("call", "images with NaN", RANGE, lambda s: s.images(pictures() * np.nan)),
    Mistake("call", "images of another size", SHAPE, lambda s: s.images(pictures(4, (12, 12, 1)))),
    Mistake("call", "images without a channel axis", SHAPE, lambda s: s.images(pictures(4, (8, 8)))),
    Mistake("call", "one image without a batch axis", SHAPE, lambda s: s.images(pictures()[0])),
    Mistake("call", "channels first", SHAPE, lambda s: s.images(pictures(4, (1, 8, 8)))),
    Mistake("call", "a clip for a model of images", SHAPE, lambda s: s.images(pictures(2, (4, 8, 8, 1)))),
    Mistake("call", "an image for a model of clips", SHAPE, lambda s: s.clips(pictures())),
    Mistake("predict", "integer images, range (0, 1)", RANGE, lambda s: s.images.predict(UINT8, verbose=0)),
    Mistake("predict", "float images of 0 to 255", RANGE, lambda s: s.images.predict(UINT8 * 1.0, verbose=0)),
    Mistake(
        "predict", "images of another size", SHAPE, lambda s: s.images.predict(pictures(4, (12, 12, 1)), verbose=0)
    ),
    Mistake("predict", "clips of another size", SHAPE, lambda s: s.clips.predict(pictures(2, (4, 9, 9, 1)), verbose=0)),
    Mistake("predict", "no images", r"at least one", lambda s: s.images.predict(pictures(0), verbose=0)),
    Mistake(
        "predict",
        "a generator of integer images",
        RANGE,
        lambda s: s.images.predict(batches((UINT8[:2],), (UINT8[2:],)), verbose=0),
    ),
    Mistake(
        "predict",
        "integer images, range (0, 255)",
        RIGHT,
        lambda s: (s.bytes.predict(UINT8, verbose=0), numbers(s.images(UINT8 / np.float32(255)))),
    ),
    Mistake(
        "predict",
        "images in float64",
        RIGHT,
        lambda s: (s.images.predict(pictures().astype("float64"), verbose=0), numbers(s.images(pictures()))),
    ),
    Mistake("evaluate", "integer images, range (0, 1)", RANGE, lambda s: s.images.evaluate(UINT8, LABELS, verbose=0)),
    Mistake("evaluate", "float images of 0 to 255", RANGE, lambda s: s.images.evaluate(UINT8 * 1.0, LABELS, verbose=0)),
    Mistake(
        "evaluate", "labels out of range", "labels", lambda s: s.images.evaluate(pictures(), LABELS + 1, verbose=0)
    ),
    Mistake("fit", "integer images, range (0, 1)", RANGE, lambda s: fit(s.images, UINT8, LABELS)),
    Mistake("fit", "float images of 0 to 255", RANGE, lambda s: fit(s.images, UINT8 * 1.0, LABELS)),
    Mistake("fit", "images of another size", SHAPE, lambda s: fit(s.images, pictures(4, (12, 12, 1)), LABELS)),
    Mistake("fit", "labels from 1 on", "labels", lambda s: fit(s.images, pictures(), LABELS + 1)),
    Mistake("fit", "negative labels", "labels", lambda s: fit(s.images, pictures(), LABELS - 1)),
    Mistake(
        "fit", "one-hot labels for a sparse loss", "labels", lambda s: fit(s.images, pictures(), np.eye(3)[LABELS])
    ),
    Mistake("fit", "labels with fractions", "labels", lambda s: fit(s.images, pictures(), LABELS + 0.5)),
    Mistake(
        "fit", "fewer labels than images", "same number of samples", lambda s: fit(s.images, pictures(), LABELS[:3])
    ),
    Mistake("fit", "no images", "at least one", lambda s: fit(s.images, pictures(0), LABELS[:0])),
    Mistake(
        "fit",
        "integer images for validation",
        RANGE,
        lambda s: fit(s.images, pictures(), LABELS, validation_data=(UINT8, LABELS)),
    ),
    Mistake(
        "fit",
        "a label out of range in a later batch",
        NAN,
        lambda s: fit(s.classifier(), batches((pictures(), LABELS), (pictures(), LABELS + 1)), steps_per_epoch=2),
    ),
    Mistake("train_on_batch", "integer images", RANGE, lambda s: s.images.train_on_batch(UINT8, LABELS)),
    Mistake("predict_on_batch", "integer images", RANGE, lambda s: s.images.predict_on_batch(UINT8)),
    Mistake(
        "compile",
        "a loss of probabilities for logits",
        "from_logits=True",
        lambda s: s.classifier().compile("adam", "sparse_categorical_crossentropy"),
    ),
    Mistake(
        "DHCJamba", "image_shape with channels first", "image_shape", lambda s: s.classifier(image_shape=(3, 32, 32))
    ),
    Mistake(
        "DHCJamba", "image_shape of a clip", "image_shape must be", lambda s: s.classifier(image_shape=(4, 8, 8, 1))
    ),
    Mistake("DHCJamba", "pixel_range=(0, 256)", RANGE, lambda s: s.classifier(pixel_range=(0, 256))),
    Mistake("DHCJamba", "class_names of another number", "class_names", lambda s: s.classifier(class_names=["a", "b"])),
    Mistake("DHCJamba", "a class name twice", "class_names", lambda s: s.classifier(class_names=["a", "b", "a"])),
    Mistake("DHCJamba", "num_classes=0", "num_classes must be", lambda s: s.classifier(num_classes=0)),
    Mistake("DHCJamba", "a misspelt argument", "constructor argument must be", lambda s: s.classifier(d_modell=8)),
    Mistake("DHCJamba", "an unknown stem", "stem must be one of", lambda s: s.classifier(stem="vgg")),
    Mistake(
        "DHCJamba", "downsample=3 with a conv stem", "power of two", lambda s: s.classifier(stem="conv", downsample=3)
    ),
    Mistake(
        "DHCJamba",
        "widths as NumPy integers",
        RIGHT,
        lambda s: (
            [type(v) for v in s.classifier(d_model=np.int64(8), num_classes=np.int32(3)).get_config().values()],
            [type(v) for v in s.classifier().get_config().values()],
        ),
    ),
    Mistake(
        "decode_predictions",
        "logits of other classes",
        "logits",
        lambda s: s.images.decode_predictions(np.ones((1, 5))),
    ),
    Mistake(
        "decode_predictions", "top=0", "top must be", lambda s: s.images.decode_predictions(np.ones((1, 3)), top=0)
    ),
    Mistake("step", "a model of images", "causal model of clips", lambda s: s.images.step(pictures(), {})),
    Mistake(
        "step",
        "a frame of another size",
        SHAPE,
        lambda s: s.clips.step(pictures(1, (9, 9, 1)), s.clips.init_cache(1, 4)),
    ),
    Mistake("step", "no cache", "cache must be a dict", lambda s: s.clips.step(pictures(1), None)),
    Mistake(
        "step",
        "a cache of another batch",
        "Received: shape",
        lambda s: s.clips.step(pictures(2), s.clips.init_cache(1, 4)),
    ),
    Mistake("init_cache", "max_frames left out", "max_frames must be", lambda s: s.clips.init_cache(1)),
    Mistake(
        "from_preset",
        "an unknown name",
        "A preset must be a built-in name",
        lambda s: keras_jamba.DHCJamba.from_preset("tiny"),
    ),
    Mistake(
        "from_preset",
        "an override of a stored size",
        "load_weights=False",
        lambda s: keras_jamba.DHCJamba.from_preset("digits", d_model=32),
    ),
    Mistake(
        "from_preset",
        "another class",
        "of the class that loads it",
        lambda s: keras_jamba.JambaCausalLM.from_preset(s.preset()),
    ),
]
