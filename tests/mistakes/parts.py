"""Mistakes with layers, step calls, files and missing extras."""

import keras
import numpy as np

import keras_jamba
from keras_jamba import layers
from mistakes.subjects import SIZES, Mistake, pictures, without


def features(width=8):
    return np.random.default_rng(0).standard_normal((2, 5, width)).astype("float32")


def step_into_a_full_cache(s):
    layer = layers.AttentionLayer(8, num_heads=2)
    return layer.step(features(), layer.init_cache(2, 4))


def merge_without_adapters(s):
    keras_jamba.JambaCausalLM(11, **SIZES).merge_lora()


def quantize_twice(s):
    model = keras_jamba.JambaCausalLM(11, **SIZES)
    model.quantize("int8")
    model.quantize("int8")


def save_a_preset_with_adapters(s):
    model = keras_jamba.JambaCausalLM(11, **SIZES)
    model.enable_lora(2)
    model.save_to_preset(s.folder / "adapted")


def load_a_damaged_preset(s):
    import shutil

    folder = shutil.copytree(s.preset(), s.folder / "damaged")
    file = folder / "model.weights.h5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    keras_jamba.DHCJamba.from_preset(folder)


def load_a_damaged_prompt_state(s):
    file = s.folder / "prompt.npz"
    file.write_bytes(b"nothing")
    keras_jamba.generation.prompt_state.PromptState.load(file)


def save_into_a_folder_with_files(s):
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
    Mistake("AttentionLayer", "more tokens than a cache holds", "a capacity of", step_into_a_full_cache),
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
    Mistake("quantize", "twice", "Received", quantize_twice),
    Mistake("enable_lora", "an unknown target", "targets must be among", lambda s: s.images.enable_lora(2, "conv")),
    Mistake("enable_lora", "rank=0", "rank must be", lambda s: s.images.enable_lora(0)),
    Mistake("merge_lora", "no adapters", "There must be adapters", merge_without_adapters),
    Mistake(
        "load_lora",
        "a file that is not there",
        "Adapters must be a file",
        lambda s: s.images.load_lora(s.folder / "none"),
    ),
    Mistake("save_to_preset", "a folder that holds files", "does not exist or is empty", save_into_a_folder_with_files),
    Mistake("save_to_preset", "adapters", "merge_lora", save_a_preset_with_adapters),
    Mistake("from_preset", "damaged weights", "sha256", load_a_damaged_preset),
    Mistake("PromptState.load", "a damaged file", "must be a file that its save wrote", load_a_damaged_prompt_state),
]


def load_a_tokenizer(s):
    folder = s.folder / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    return keras_jamba.tokenizers.load_tokenizer(folder)


def load_an_image(s):
    folder = s.folder / "pictures"
    (folder / "a").mkdir(parents=True, exist_ok=True)
    (folder / "a" / "one.png").write_bytes(b"")
    return keras_jamba.training.ImageFolder(folder, image_size=(8, 8), batch_size=1)[0]


EXTRAS = [
    Mistake(
        "load_tokenizer",
        "tokenizers not installed",
        r"keras-jamba\[text\]",
        lambda s: without("tokenizers", lambda: load_a_tokenizer(s)),
    ),
    Mistake(
        "ImageFolder",
        "pillow not installed",
        r"keras-jamba\[images\]",
        lambda s: without("PIL", lambda: load_an_image(s)),
    ),
    Mistake(
        "draw_saliency",
        "matplotlib not installed",
        r"keras-jamba\[visualize\]",
        lambda s: without("matplotlib", lambda: keras_jamba.visualize.draw_saliency(s.images, pictures(1))),
    ),
]
