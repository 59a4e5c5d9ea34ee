"""The writers of all formats, with numbers that tell one save from another.

Each function of `WRITERS` takes a folder and returns `(write, read)`. `write(k)` writes save number k into the folder.
`read()` returns the arrays of the save that is there, or None without one.
"""

import json
import os
import shutil
from pathlib import Path

import keras
import numpy as np

import keras_jamba
from keras_jamba import training
from keras_jamba._triton import tuning
from keras_jamba.generation import PromptState

SIZES = dict(d_model=32, num_layers=2, mamba_ratio=1, num_heads=2, moe_frequency=0, dt_rank=2)


def language_model(adapted=False):
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(vocab_size=260, **SIZES)
    model.tokenizer = keras_jamba.tokenizers.ByteTokenizer()
    if adapted:
        model.enable_lora(8)
    return model


def arrays_of(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def changing(model):
    """Returns a function of k that assigns weights of save number k."""
    start = arrays_of(model.trainable_variables)

    def change(k):
        for variable, values in zip(model.trainable_variables, start, strict=True):
            variable.assign(values + k / 64)

    return change


def of_model(model, place, save, load):
    """Returns `(write, read)` of a model that `save` writes to `place`, and `load` reads as a model."""
    change = changing(model)

    def write(k):
        change(k)
        save(place)

    return write, lambda: arrays_of(load(place).weights) if place.exists() else None


def preset(folder):
    model, place = language_model(), folder / "preset"
    return of_model(model, place, model.save_to_preset, type(model).from_preset)


def transformers_checkpoint(folder):
    model, place = language_model(), folder / "exported"
    export = lambda place: model.export_to_transformers(place, max_shard_bytes=30_000)  # noqa: E731
    return of_model(model, place, export, type(model).from_preset)


def peft_adapters(folder):
    model, place = language_model(adapted=True), folder / "peft"
    return of_model(model, place, model.export_lora_to_peft, _with_adapters)


def adapters(folder):
    model = language_model(adapted=True)
    return of_model(model, folder / "adapters.safetensors", model.save_lora, _with_adapters)


def _with_adapters(file):
    model = language_model()
    model.load_lora(file)
    return model


def keras_file(folder):
    model = language_model()
    return of_model(model, folder / "model.keras", model.save, keras.saving.load_model)


def weights_file(folder):
    model, other = language_model(), language_model()

    def load(file):
        other.load_weights(file)
        return other

    return of_model(model, folder / "model.weights.h5", model.save_weights, load)


def prompt_state(folder):
    model, place = language_model(), folder / "state"
    change, prompt = changing(model), list(range(60))

    def write(k):
        change(k)
        model.prefill(prompt).save(place)

    def read():
        state = PromptState.load(place)
        return arrays_of([*keras.tree.flatten(state.cache), state.logits])

    return write, lambda: read() if place.exists() else None


def checkpoint(folder):
    """Saves of a training that has taken k + 1 steps."""
    data = training.Batches((np.zeros((1000, 4), "int32"),), batch_size=1)

    def begun():
        model = language_model()
        model.compile(keras.optimizers.SGD())
        found = training.Checkpoint(folder / "saves", data, every=1)
        found.set_model(model)
        found.set_params({"epochs": 1})
        return model, found

    (model, saving), (other, loading) = begun(), begun()
    change = changing(model)
    saving.on_train_begin()
    saving.on_epoch_begin(0)
    data[0]  # as `fit` does: `Checkpoint` refuses steps that read none of its data

    def write(k):
        change(k)
        saving.on_train_batch_end(k)

    def read():
        if not (folder / "saves").exists():
            return None
        loading.on_train_begin()
        return arrays_of(other.weights)

    return write, read


def plans(folder):
    os.environ["KERAS_HOME"] = str(folder)
    file = Path(folder) / "keras_jamba" / "tuning.json"

    def read():
        json.loads(file.read_text())  # a damaged file would be read as an empty one
        return [np.array(tuning._read()[0]["a key"])]

    return lambda k: tuning._keep("a key", [k, *range(300)]), lambda: read() if file.exists() else None


WRITERS = {
    "preset": preset,
    "checkpoint": checkpoint,
    "prompt state": prompt_state,
    "adapters": adapters,
    "checkpoint of transformers": transformers_checkpoint,
    "adapters of PEFT": peft_adapters,
    "keras file": keras_file,
    "weights file": weights_file,
    "tuning plans": plans,
}
# An unwritable file of plans is no error.
SILENT = {"tuning plans"}
# These writers refuse a folder with an earlier save.
NEW_FOLDER = {"preset", "checkpoint of transformers", "adapters of PEFT"}


def make_way(name, folder):
    """Removes the earlier save of a writer that needs a new folder."""
    for place in folder.iterdir() if name in NEW_FOLDER else ():
        if not place.name.startswith("."):
            shutil.rmtree(place)


def equal(found, expected):
    if found is None or expected is None:
        return found is expected
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def leftovers(folder):
    """Returns the names of unfinished files and folders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))
