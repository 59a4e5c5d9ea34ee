"""Mistakes that users make, by the entry point that meets them, and what comes of each.

`python tests/mistakes.py` writes the table of docs/mistakes.md.
"""

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_jamba
from keras_jamba import layers
from keras_jamba.models import JambaBackbone

RIGHT = "the right numbers"
NAN = "NaN, or an error where values can be read"
SIZES = dict(d_model=8, num_layers=2, mamba_ratio=1, moe_frequency=0, num_heads=2, d_ff=8)


class Mistake(NamedTuple):
    """One mistake.

    Attributes:
        entry: the entry point.
        name: what the user does wrong.
        outcome: a pattern that the error matches; RIGHT, where `run` returns what is found and what is right; or NAN,
            where `run` returns what must be NaN.
        run: does it, with a `Subjects`.
    """

    entry: str
    name: str
    outcome: str
    run: Any


class Subjects:
    """The models that mistakes are made with, each made once."""

    @functools.cached_property
    def images(self):
        return self.classifier()

    @functools.cached_property
    def bytes(self):
        model = self.classifier(pixel_range=(0, 255))
        for ours, theirs in zip(model.weights, self.images.weights, strict=True):
            ours.assign(theirs)
        return model

    @functools.cached_property
    def clips(self):
        return self.classifier(image_shape=(4, 8, 8, 1), tokens="frames")

    def classifier(self, **given):
        defaults = dict(num_classes=3, image_shape=(8, 8, 1), downsample=4, stem="patchify")
        model = keras_jamba.DHCJamba(**SIZES | defaults | given)
        model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    @functools.cached_property
    def text(self):
        model = keras_jamba.JambaCausalLM(11, **SIZES)
        model.compile(keras.optimizers.SGD(0.0))
        return model

    def compiled_in(self, dtype, **given):
        model = keras_jamba.JambaCausalLM(11, **SIZES, dtype=dtype)
        model.compile(keras.optimizers.SGD(0.0), **given)
        return model

    @functools.cached_property
    def writer(self):
        model = keras_jamba.JambaCausalLM(259, **SIZES)
        model.tokenizer = keras_jamba.tokenizers.ByteTokenizer()
        return model

    @functools.cached_property
    def reader(self):
        model = keras_jamba.JambaClassifier(11, num_classes=3, **SIZES)
        model.compile(keras.optimizers.SGD(0.0))
        return model

    @functools.cached_property
    def backbone(self):
        return JambaBackbone(**SIZES)

    @functools.cached_property
    def folder(self):
        return Path(tempfile.mkdtemp())

    def preset(self):
        folder = self.folder / "preset"
        if not folder.exists():
            self.images.save_to_preset(folder)
        return folder


def pictures(count=4, shape=(8, 8, 1)):
    return np.random.default_rng(0).random((count, *shape), "float32")


def ids(*shape, high=11):
    return np.random.default_rng(0).integers(0, high, shape or (2, 6)).astype("int32")


LABELS = np.array([0, 1, 2, 0])
IDS = ids()
BAD_ID = np.where(np.arange(6) == 3, 11, IDS)


def numbers(x):
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(x))


def fit(model, x, y=None, **given):
    return model.fit(x, y, verbose=0, shuffle=False, **given).history["loss"][0]


def batches(*given):
    """A generator of batches, as a data pipeline gives them."""
    yield from given


def token_loss(model, x, y, weights):
    """The weighted mean of the cross-entropy of tokens, in float64."""
    logits = numbers(model({"token_ids": x})).astype("float64")
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logits, y[..., None], -1)[..., 0]
    weights = np.broadcast_to(weights, losses.shape)
    return (losses * weights).sum() / weights.sum()


def without(module, function):
    """What `function` does in an environment without a module."""
    hidden = {name: x for name, x in sys.modules.items() if name == module or name.startswith(f"{module}.")}
    for name in hidden:
        del sys.modules[name]
    sys.modules[module] = None
    try:
        return function()
    finally:
        del sys.modules[module]
        sys.modules.update(hidden)


UINT8 = (pictures() * 255).astype("uint8")
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
        "A preset is a built-in name",
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


def short_sequence_loss(s, **given):
    x, y = IDS[:, :-1], IDS[:, 1:]
    return s.text.evaluate(x, y, verbose=0, batch_size=2, return_dict=True, **given)["loss"]


VOCABULARY = "from 0 to vocab_size - 1"
HOLES = np.array([[True, False, True, True, True, True]] * 2)
MESSAGES = [{"role": "user", "content": "hi"}]
TEXT = [
    Mistake("call", "an id out of the vocabulary", VOCABULARY, lambda s: s.text(BAD_ID)),
    Mistake("call", "a negative id", VOCABULARY, lambda s: s.text(IDS - 11)),
    Mistake("call", "ids as floats", "token_ids must be integers", lambda s: s.text(IDS.astype("float32"))),
    Mistake("call", "ids without a batch axis", "token_ids must be integers", lambda s: s.text(IDS[0])),
    Mistake("call", "an unknown input", "The inputs must be token ids", lambda s: s.text({"input_ids": IDS})),
    Mistake("call", "text", "Only input tensors may be passed", lambda s: s.text("hello")),
    Mistake(
        "call",
        "ids and embeddings",
        "The inputs must be token ids",
        lambda s: s.text({"token_ids": IDS, "inputs_embeds": np.zeros((2, 6, 8), "float32")}),
    ),
    Mistake(
        "call",
        "a padding_mask of another shape",
        "mask must have the shape",
        lambda s: s.text({"token_ids": IDS, "padding_mask": np.ones((2, 5), bool)}),
    ),
    Mistake(
        "call",
        "segment_ids as floats",
        "segment_ids must be integers",
        lambda s: s.text({"token_ids": IDS, "segment_ids": np.zeros((2, 6), "float32")}),
    ),
    Mistake(
        "call",
        "a reset_mask of another shape",
        "reset_mask must have the shape",
        lambda s: s.text({"token_ids": IDS, "reset_mask": np.zeros((2,), bool)}),
    ),
    Mistake(
        "call",
        "a state of another model",
        "must be a dict with",
        lambda s: s.text(IDS, initial_state={"block_0": {}}),
    ),
    Mistake(
        "call",
        "padding filled with -100",
        RIGHT,
        lambda s: (
            numbers(s.text({"token_ids": np.where(HOLES, IDS, -100), "padding_mask": HOLES}))[HOLES],
            numbers(s.text({"token_ids": IDS, "padding_mask": HOLES}))[HOLES],
        ),
    ),
    Mistake(
        "call",
        "a mask of zeros and ones",
        RIGHT,
        lambda s: (
            numbers(s.text({"token_ids": IDS, "padding_mask": HOLES.astype("int32")})),
            numbers(s.text({"token_ids": IDS, "padding_mask": HOLES})),
        ),
    ),
    Mistake("predict", "an id out of the vocabulary", VOCABULARY, lambda s: s.text.predict(BAD_ID, verbose=0)),
    Mistake(
        "predict", "ids without a batch axis", "token_ids must be integers", lambda s: s.text.predict(IDS[0], verbose=0)
    ),
    Mistake(
        "predict",
        "ids as unsigned bytes",
        RIGHT,
        lambda s: (s.text.predict(IDS.astype("uint8"), verbose=0), numbers(s.text(IDS))),
    ),
    Mistake(
        "predict",
        "documents whose ids come again",
        RIGHT,
        lambda s: (
            s.text.predict({"token_ids": IDS, "segment_ids": np.array([[0, 0, 1, 1, 0, 0]] * 2)}, verbose=0),
            numbers(s.text({"token_ids": IDS, "segment_ids": np.array([[0, 0, 1, 1, 2, 2]] * 2)})),
        ),
    ),
    Mistake(
        "predict", "a classifier's id out of the vocabulary", VOCABULARY, lambda s: s.reader.predict(BAD_ID, verbose=0)
    ),
    Mistake("fit", "an id out of the vocabulary", VOCABULARY, lambda s: fit(s.text, BAD_ID)),
    Mistake("fit", "a target out of the vocabulary", VOCABULARY, lambda s: fit(s.text, IDS, BAD_ID)),
    Mistake("fit", "text without a tokenizer", "Text needs a tokenizer", lambda s: fit(s.text, ["hello", "you"])),
    Mistake("fit", "rows of one token", "at least two tokens", lambda s: fit(s.text, IDS[:, :1])),
    Mistake("fit", "weights and no targets", "sample_weight", lambda s: fit(s.text, IDS, sample_weight=np.ones(2))),
    Mistake(
        "fit",
        "weights of another shape",
        "sample_weight",
        lambda s: fit(s.text, IDS, IDS, sample_weight=np.ones((2, 3))),
    ),
    Mistake("fit", "a classifier's labels out of range", "labels", lambda s: fit(s.reader, IDS, np.array([0, 3]))),
    Mistake(
        "fit",
        "a later batch with an id out of the vocabulary",
        NAN,
        lambda s: fit(
            s.compiled_in("float32"),
            batches((IDS, IDS), (BAD_ID, IDS)),
            steps_per_epoch=2,
        ),
    ),
    Mistake("evaluate", "an id out of the vocabulary", VOCABULARY, lambda s: s.text.evaluate(BAD_ID, verbose=0)),
    Mistake(
        "evaluate",
        "one weight per row",
        RIGHT,
        lambda s: (
            short_sequence_loss(s, sample_weight=np.array([1.0, 3.0])),
            token_loss(s.text, IDS[:, :-1], IDS[:, 1:], np.array([[1.0], [3.0]])),
        ),
    ),
    Mistake(
        "compile",
        "a loss of probabilities for logits",
        "from_logits=True",
        lambda s: keras_jamba.JambaCausalLM(11, **SIZES).compile("adam", "sparse_categorical_crossentropy"),
    ),
    Mistake(
        "compile",
        "training in pure float16",
        "float16",
        lambda s: fit(s.compiled_in("float16"), IDS, IDS),
    ),
    Mistake("compile", "an unknown sampler", "sampler", lambda s: s.compiled_in("float32", sampler="nucleus")),
    Mistake("generate", "None", "Received: None", lambda s: s.writer.generate(None)),
    Mistake("generate", "no prompts", "Every prompt must have a token", lambda s: s.writer.generate([])),
    Mistake("generate", "text without a tokenizer", "Text needs a tokenizer", lambda s: s.text.generate("hello")),
    Mistake("generate", "temperature=0.7", "Sampler", lambda s: s.writer.generate("a", temperature=0.7)),
    Mistake("generate", "a misspelt option", "Received: .*max_token", lambda s: s.writer.generate("a", max_token=3)),
    Mistake(
        "generate",
        "max_length shorter than a prompt",
        "max_length",
        lambda s: s.writer.generate("abcdef", max_length=3),
    ),
    Mistake(
        "generate", "max_new_tokens=-1", "max_new_tokens must be", lambda s: s.writer.generate("a", max_new_tokens=-1)
    ),
    Mistake("generate", "an id out of the vocabulary", VOCABULARY, lambda s: s.text.generate([1, 11])),
    Mistake("generate", "ids as floats", "must be integers", lambda s: s.text.generate([1.5, 2.5])),
    Mistake(
        "generate",
        "padding in the middle of a row",
        "one side of a row",
        lambda s: s.text.generate({"token_ids": IDS, "padding_mask": HOLES & [True, True, False, True, True, True]}),
    ),
    Mistake(
        "generate", "stop strings without a tokenizer", "tokenizer", lambda s: s.text.generate([1], stop_strings=["."])
    ),
    Mistake("generate", "an unknown sampler", "sampler", lambda s: s.text.generate([1], sampler="nucleus")),
    Mistake("generate", "a conversation without a template", "template", lambda s: s.writer.generate(MESSAGES)),
    Mistake(
        "generate",
        "an assistant that is a name",
        "assistant must be",
        lambda s: s.text.generate([1], assistant="draft"),
    ),
    Mistake(
        "generate",
        "the state of another prompt",
        "must begin with",
        lambda s: s.text.generate([4, 5], state=s.text.prefill([1, 2])),
    ),
    Mistake("stream", "a batch", "one prompt", lambda s: s.text.stream([[1], [2]])),
    Mistake(
        "stream",
        "beams",
        "BeamSampler",
        lambda s: s.text.stream([1], sampler=keras_jamba.generation.BeamSampler(num_beams=2)),
    ),
    Mistake("Sampler", "top_k=0", "top_k must be", lambda s: keras_jamba.Sampler(top_k=0)),
    Mistake("Sampler", "top_p=2", "top_p must be", lambda s: keras_jamba.Sampler(top_p=2)),
    Mistake("tokenizer", "a number", "Received", lambda s: s.writer.tokenizer(3)),
]


def features(width=8):
    return np.random.default_rng(0).standard_normal((2, 5, width)).astype("float32")


def in_a_full_cache(s):
    layer = layers.AttentionLayer(8, num_heads=2)
    return layer.step(features(), layer.init_cache(2, 4))


def nothing_to_merge(s):
    keras_jamba.JambaCausalLM(11, **SIZES).merge_lora()


def twice_quantized(s):
    model = keras_jamba.JambaCausalLM(11, **SIZES)
    model.quantize("int8")
    model.quantize("int8")


def a_preset_with_adapters(s):
    model = keras_jamba.JambaCausalLM(11, **SIZES)
    model.enable_lora(2)
    model.save_to_preset(s.folder / "adapted")


def a_damaged_preset(s):
    import shutil

    folder = shutil.copytree(s.preset(), s.folder / "damaged")
    file = folder / "model.weights.h5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    keras_jamba.DHCJamba.from_preset(folder)


def a_damaged_prompt(s):
    file = s.folder / "prompt.npz"
    file.write_bytes(b"nothing")
    keras_jamba.generation.prompts.PromptState.load(file)


def another_folder(s):
    folder = s.folder / "filled"
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("mine")
    s.images.save_to_preset(folder)


LAYERS = [
    Mistake("MambaLayer", "an input of another width", "Received: shape", lambda s: layers.MambaLayer(8)(features(9))),
    Mistake("JambaBackbone", "an input of another width", "Received: shape", lambda s: s.backbone(features(9))),
    Mistake("JambaBackbone", "an input without a time axis", "Received: shape", lambda s: s.backbone(features()[:, 0])),
    Mistake(
        "JambaBackbone",
        "predict of another width",
        "Received: shape",
        lambda s: s.backbone.predict(features(9), verbose=0),
    ),
    Mistake(
        "AttentionLayer", "heads that do not divide", "must divide", lambda s: layers.AttentionLayer(8, num_heads=3)
    ),
    Mistake("AttentionLayer", "more tokens than a cache holds", "room for", in_a_full_cache),
    Mistake(
        "Bidirectional",
        "a Mamba layer",
        "bidirectional=True",
        lambda s: keras.layers.Bidirectional(layers.MambaLayer(8)),
    ),
    Mistake(
        "MoELayer",
        "more experts per token than experts",
        "Received",
        lambda s: layers.MoELayer(8, num_experts=2, num_experts_per_token=3),
    ),
    Mistake("quantize", "an unknown mode", "mode must be one of", lambda s: s.images.quantize("int3")),
    Mistake("quantize", "twice", "Received", twice_quantized),
    Mistake("enable_lora", "an unknown target", "targets must be among", lambda s: s.images.enable_lora(2, "conv")),
    Mistake("enable_lora", "rank=0", "rank must be", lambda s: s.images.enable_lora(0)),
    Mistake("merge_lora", "no adapters", "There must be adapters", nothing_to_merge),
    Mistake(
        "load_lora",
        "a file that is not there",
        "Adapters must be a file",
        lambda s: s.images.load_lora(s.folder / "none"),
    ),
    Mistake("save_to_preset", "a folder that holds files", "does not exist or is empty", another_folder),
    Mistake("save_to_preset", "adapters", "merge_lora", a_preset_with_adapters),
    Mistake("from_preset", "damaged weights", "sha256", a_damaged_preset),
    Mistake("PromptState.load", "a damaged file", "must be a file that its save wrote", a_damaged_prompt),
]


def a_tokenizer(s):
    folder = s.folder / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    return keras_jamba.tokenizers.load_tokenizer(folder)


def one_picture(s):
    folder = s.folder / "pictures"
    (folder / "a").mkdir(parents=True, exist_ok=True)
    (folder / "a" / "one.png").write_bytes(b"")
    return keras_jamba.training.ImageFolder(folder, image_size=(8, 8), batch_size=1)[0]


EXTRAS = [
    Mistake(
        "load_tokenizer",
        "tokenizers not installed",
        r"keras-jamba\[text\]",
        lambda s: without("tokenizers", lambda: a_tokenizer(s)),
    ),
    Mistake(
        "ImageFolder",
        "pillow not installed",
        r"keras-jamba\[images\]",
        lambda s: without("PIL", lambda: one_picture(s)),
    ),
    Mistake(
        "draw_saliency",
        "matplotlib not installed",
        r"keras-jamba\[visualize\]",
        lambda s: without("matplotlib", lambda: keras_jamba.visualize.draw_saliency(s.images, pictures(1))),
    ),
]

MISTAKES = IMAGES + TEXT + LAYERS + EXTRAS


def table():
    """The table of docs/mistakes.md."""
    outcome = lambda m: m.outcome if m.outcome in (RIGHT, NAN) else "an error"  # noqa: E731
    rows = [f"| `{m.entry}` | {m.name} | {outcome(m)} |" for m in MISTAKES]
    return "\n".join(["| entry point | mistake | outcome |", "| --- | --- | --- |", *rows, ""])


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs" / "mistakes.md"
    page.write_text(page.read_text().split("| entry point")[0] + table())
