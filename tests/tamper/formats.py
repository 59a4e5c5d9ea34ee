"""The formats that are tampered with: how a good file is written, and what is read of it."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import keras_jamba
from keras_jamba._triton import tuning
from keras_jamba.generation import PromptState, generation_config
from keras_jamba.presets import STATISTICS
from keras_jamba.tokenizers import JambaTokenizer, load_tokenizer
from keras_jamba.training import ImageFolder
from keras_jamba.training.checkpointing import _saves, _snapshots


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        write: `write(folder)` writes a good file.
        read: `read(folder)` returns its numbers and texts, a list.
        sealed: whether a checksum of ours covers it. Other numbers are a failure then.
        ours: whether a function of ours reads it. Errors of another form are a failure then.
    """

    write: Callable
    read: Callable
    sealed: bool = True
    ours: bool = True


def language_model(**changes):
    keras.utils.set_random_seed(0)
    sizes = dict(vocab_size=11, d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, moe_frequency=0)
    return keras_jamba.JambaCausalLM(**sizes | changes)


def arrays_of(variables):
    """Returns the values of variables, except for statistics."""
    kept = [v for v in variables if getattr(v, "path", "").rsplit("/", 1)[-1] not in STATISTICS]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in kept]


def write_preset(folder):
    language_model().save_to_preset(folder / "preset")


def read_preset(folder):
    return arrays_of(keras_jamba.JambaCausalLM.from_preset(folder / "preset").weights)


def write_prompt_state(folder):
    generating_model().prefill([1, 2, 3]).save(folder / "state")


@functools.cache
def generating_model():
    """Returns one model for all calls, because `generate` compiles on PyTorch too."""
    return language_model(bos_token_id=1)


def read_prompt_state(folder):
    model, state = generating_model(), PromptState.load(folder / "state")
    return [model.generate([1, 2, 3, 4], max_new_tokens=3, state=state), *arrays_of(keras.tree.flatten(state.cache))]


def write_adapters(folder):
    model = language_model()
    model.enable_lora(2)
    model.save_lora(folder / "adapters.safetensors")


def read_adapters(folder):
    model = language_model()
    model.load_lora(folder / "adapters.safetensors")
    return arrays_of(model.weights)


def write_save(folder):
    rng = np.random.default_rng(0)
    arrays = [rng.random((4, 3), "float32"), np.array(7, "int64"), rng.random(5).astype("float16")]
    state = {"variables": 2, "processes": 1, "run": 0, "epoch": 3, "step_in_epoch": 2, "stopped": False}
    _snapshots.write(folder, 8, map(_snapshots.as_single_shard, arrays), state)


def read_save(folder):
    step, processes = _saves.last(folder, 1) or (-1, 1)
    places = _saves.folders(folder, processes)
    if (found := _saves.damaged(places, step)) is not None:
        raise ValueError(f"A save must match the sha256 in its state. Received: {found}.")
    arrays, own, state = _saves.read(places, step, 0)
    return [*(x.read() for x in (*arrays, *own)), np.array([state["epoch"], state["step_in_epoch"]])]


def write_plans(folder):
    os.environ["KERAS_HOME"] = str(folder)
    for i, choice in enumerate(([16, 4], [32, 8], [64, 2])):
        tuning._keep(json.dumps(["device", "3.6.0", "scan", i]), choice)


def read_plans(folder):
    os.environ["KERAS_HOME"] = str(folder)
    # A damaged file is as good as none: the kernels are measured again.
    if not (plans := tuning._read()[0]):
        raise ValueError("Received: no plans.")
    return [json.dumps(plans, sort_keys=True)]


def write_tokenizer(folder):
    """Writes the files of a tokenizer of bytes, with a chat template, as transformers writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    library = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate([*specials, *alphabet])}, merges=[]))
    library.add_special_tokens(specials)
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": {"content": "<pad>", "lstrip": False}}
    config = special | {"clean_up_tokenization_spaces": True, "model_max_length": 64, "tokenizer_class": "PreTrained"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "config.json").write_text(json.dumps({"model_type": "jamba"}))
    template = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] * 2 }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def existing(tokenizer):
    """Returns a tokenizer; raises ValueError for None, which a folder without tokenizer.json gives."""
    if tokenizer is None:
        raise ValueError("Received: no tokenizer.")
    return tokenizer


def read_tokenizer(folder):
    tokenizer = existing(load_tokenizer(folder))
    ids = tokenizer.encode("a naïve text , isn't it 123")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "7 times 6?"}])
    return [np.array(ids), tokenizer.decode(ids), chat, tokenizer.vocab_size]


def write_generation_config(folder):
    config = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "eos_token_id": [2, 3]}
    config |= {"pad_token_id": 0, "repetition_penalty": 1.1, "max_length": 20, "num_beams": 1, "stop_strings": None}
    (folder / "generation_config.json").write_text(json.dumps(config | {"transformers_version": "5.23.0"}))


def read_generation_config(folder):
    model = generating_model()
    model.generation_config = generation_config.read(folder)
    keras.utils.set_random_seed(0)
    try:
        return [np.array(model.generate([1, 2, 3], max_new_tokens=3))]
    finally:
        model.generation_config = None


def write_checkpoint(folder):
    model = language_model(vocab_size=300, moe_frequency=2, num_experts=2, num_experts_per_token=2, d_state=4)
    write_tokenizer(folder)
    model.tokenizer = JambaTokenizer(folder)
    model.generation_config = {"do_sample": False, "eos_token_id": 2, "max_length": 20}
    for file in [*folder.iterdir()]:
        file.unlink()
    model.export_to_transformers(folder / "checkpoint", max_shard_bytes=8000)


def read_checkpoint(folder):
    model = keras_jamba.JambaCausalLM.from_preset(folder / "checkpoint")
    sampler = generation_config.sampler_of_config(model.generation_config or {})
    return [*arrays_of(model.weights), *existing(model.tokenizer).encode("a text"), str(vars(sampler))]


def write_peft(folder):
    model = language_model(d_ff=16)
    model.enable_lora(2, targets=("mamba.in_proj", "attention"))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    model.export_lora_to_peft(folder / "peft")


def read_peft(folder):
    model = language_model(d_ff=16)
    model.load_lora(folder / "peft")
    return arrays_of(model.weights)


def write_archive(folder):
    model = language_model()
    model.tokenizer = keras_jamba.tokenizers.ByteTokenizer()
    model.generation_config = {"do_sample": False, "max_length": 20}
    model.compile(keras.optimizers.Adam(1e-3), sampler="greedy")
    model.optimizer.build(model.trainable_variables)
    model.save(folder / "model.keras")


def read_archive(folder):
    return arrays_of(keras.saving.load_model(folder / "model.keras").weights)


def write_weights(folder):
    language_model().save_weights(folder / "model.weights.h5")


def read_weights(folder):
    model = language_model()
    model.load_weights(folder / "model.weights.h5")
    return arrays_of(model.weights)


def write_pictures(folder):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i, suffix in enumerate(("png", "jpg", "bmp")):
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), "uint8")).save(folder / name / f"{i}.{suffix}")


def read_pictures(folder):
    batches = ImageFolder(folder, (8, 8), batch_size=2, shuffle=False, drop_last=False)
    return [np.asarray(x) for i in range(len(batches)) for x in batches[i]]


FORMATS = {
    "preset": Format(write_preset, read_preset),
    "prompt state": Format(write_prompt_state, read_prompt_state),
    "adapters": Format(write_adapters, read_adapters),
    "save": Format(write_save, read_save),
    "plans": Format(write_plans, read_plans),
    "tokenizer": Format(write_tokenizer, read_tokenizer, sealed=False),
    "generation config": Format(write_generation_config, read_generation_config, sealed=False),
    "checkpoint": Format(write_checkpoint, read_checkpoint, sealed=False),
    "peft": Format(write_peft, read_peft, sealed=False),
    "weights": Format(write_weights, read_weights, sealed=False),
    "archive": Format(write_archive, read_archive, sealed=False, ours=False),
    "pictures": Format(write_pictures, read_pictures, sealed=False),
}
