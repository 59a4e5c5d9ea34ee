"""A program of a user. mypy accepts it, and reports an error on each line that names one in a comment."""

from collections.abc import Iterator

import keras
import numpy as np

import keras_jamba
from keras_jamba import estimation, generation, layers, ops, tokenizers, training, visualize


def classify(folder: str) -> list[list[tuple[str, float]]]:
    model = keras_jamba.DHCJamba.from_preset("digits")
    other: keras_jamba.DHCJamba = keras_jamba.DHCJamba(num_classes=3, image_shape=(8, 8, 1), d_model=32, num_layers=2)
    names: tuple[str, ...] | None = other.class_names
    print(names)
    data = training.ImageFolder(folder, image_size=(8, 8), batch_size=32, channels=1, skip_unreadable=True)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(data, epochs=2, callbacks=[training.Checkpoint("saves", data, every=100)])
    model.save_to_preset(folder + "/preset", weights_dtype="float16")
    visualize.saliency(model, np.zeros((2, 8, 8, 1)))
    return model.decode_predictions(model.predict(np.zeros((2, 8, 8, 1))), top=2)


def speak(prompt: str) -> Iterator[str]:
    model = keras_jamba.JambaCausalLM(vocab_size=259, d_model=32, num_layers=2)
    model.tokenizer = tokenizers.ByteTokenizer()
    sampler = keras_jamba.Sampler(temperature=0.8, top_p=0.9, seed=1)
    model.generate(prompt, max_new_tokens=5, sampler=sampler, assistant=generation.PromptLookup(num_tokens=4))
    state: generation.PromptState = model.prefill(prompt)
    state.save("state")
    yield from model.stream(prompt, max_new_tokens=5)


def mix(x: np.ndarray) -> None:
    layer = layers.MambaLayer(32, d_state=16, bidirectional=False)
    y, cache = layer.step(x, layer.init_cache(batch_size=1))
    print(y, cache, ops.implementations()["portable"])
    report: estimation.ModelReport = estimation.model_report(keras_jamba.JambaBackbone(d_model=32, num_layers=2))
    print(report.peak + 1)
    ops.selective_scan(x, x, A=x, B=x, C=x, implementation="reference")


def mistakes(model: keras_jamba.JambaCausalLM) -> None:
    layers.MambaLayer("32")  # expect: arg-type
    keras_jamba.DHCJamba(num_classes="ten")  # expect: arg-type
    keras_jamba.Sampler(temprature=0.5)  # expect: call-arg
    training.Batches((np.zeros(3),))  # expect: call-arg
    model.generate("a", max_new_tokens="5")  # expect: arg-type
    estimation.model_report(model, batch_size="1")  # expect: arg-type
    generation.BeamSampler(num_beams=None)  # expect: arg-type
    tokenizers.load_tokenizer(3)  # expect: arg-type
