"""Writes the missing fixtures of `tests/fixtures`. Existing fixtures are never written again.

    python tests/write_fixtures.py [NAME ...]

Run it when a format gets a new number, or for a new kind of file: add a row with a new name, and keep the old rows
and their files. NAME is a row of FIXTURES, or `presets`; without names, the program writes all fixtures. Each row names
the backend of its fixture: the program starts itself again on that backend. It uses the public API only.

The program records the numbers of a model before it saves the model.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401, the presets' numbers depend on the tests' XLA flags
import fixture_models as made
import fixture_trainings as trainings
import keras
import numpy as np
from checks import numpy
from fixture_models import FORMATS, PRESETS, described, logits, write_numbers, written
from sklearn.datasets import load_digits

import keras_jamba
from keras_jamba import training
from keras_jamba.tokenizers import ByteTokenizer, load_tokenizer, save_tokenizer

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from video_tasks import TASKS  # noqa: E402

BACKEND = keras.backend.backend()
HERE = "--here"
TRAINED = ("digits", "video_direction", "video_order", "video_match", "small", "medium", "large", "fashion")
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def outputs(model, inputs, statistics=True, **more):
    # Called before the weights are read: a call changes the experts' statistics on some backends.
    found = logits(model, inputs)
    return {"weights": described(model, statistics), "logits": found} | more


# Presets


def preset_of_images(folder):
    model = made.image_classifier()
    write_numbers(folder / "numbers.json", outputs(model, made.IMAGES))
    model.save_to_preset(folder / "preset")


def preset_of_clips(folder):
    model = made.clip_classifier()
    write_numbers(folder / "numbers.json", outputs(model, made.CLIPS))
    model.save_to_preset(folder / "preset")


def preset_of_language(folder):
    model = made.language_model()
    model.tokenizer = ByteTokenizer(add_bos=False)
    model.generation_config = {"do_sample": False, "eos_token_id": 2, "max_new_tokens": 5}
    write_numbers(folder / "numbers.json", outputs(model, made.IDS, tokens=written(model)))
    model.save_to_preset(folder / "preset")


def preset_of_texts(folder):
    model = made.text_classifier()
    model.tokenizer = load_tokenizer(FORMATS / "tokenizers" / "jamba")
    write_numbers(folder / "numbers.json", outputs(model, made.IDS))
    model.save_to_preset(folder / "preset")


# Keras' own files


def keras_of_images(folder):
    """Writes a classifier that is trained for one step."""
    model = made.compiled(made.byte_classifier())
    model.fit(made.BYTES, made.LABELS, batch_size=4, verbose=0)
    found = outputs(model, made.BYTES, optimizer=made.slots(model))
    model.save(folder / "model.keras")
    # The loaded model must repeat this step.
    monitor = training.Monitor(made.probes(), csv=folder / "log.csv")
    model.fit(made.BYTES, made.LABELS, batch_size=4, verbose=0, callbacks=[monitor])
    write_numbers(folder / "numbers.json", found)


def keras_of_language(folder):
    """Writes a quantized model with adapters, frozen layers and all other content of a Keras file."""
    model = made.language_model(drop_path=0.1, dropout=0.1)
    model.quantize("int8")
    model.enable_lora(2, lora_alpha=4, also_train="mixer_norm")
    made.adapted(model)
    model.tokenizer = ByteTokenizer()
    model.generation_config = {"max_new_tokens": 6}
    model.compile(keras.optimizers.Adam(1e-3), sampler=keras_jamba.Sampler(top_k=5, seed=3), jit_compile=False)
    model.fit(made.IDS, batch_size=2, verbose=0)
    trained = sorted(v.path.removeprefix(f"{model.name}/") for v in model.trainable_variables)
    found = dict(tokens=written(model), seeds=made.seeds(model), optimizer=made.slots(model), trained=trained)
    found = outputs(model, made.IDS, **found)
    write_numbers(folder / "numbers.json", found)
    model.save(folder / "model.keras")


def keras_of_layers(folder):
    model = made.own_model()
    found = dict(logits=logits(model, made.CLIPS), seeds=made.seeds(model))
    write_numbers(folder / "numbers.json", found | {"weights": made.in_order(model)})
    model.save(folder / "model.keras")


def weights_in(mode):
    def write(folder):
        model = made.language_model(**made.QUANTIZED[mode])
        model.quantize(mode)
        write_numbers(folder / "numbers.json", outputs(model, made.IDS))
        model.save_weights(folder / "model.weights.h5")

    return write


# Adapters


def adapters(folder):
    model = made.language_model()
    model.enable_lora(2, ["attention", "mamba", "experts"], lora_alpha=4, also_train="mixer_norm")
    made.adapted(model)
    write_numbers(folder / "numbers.json", outputs(model, made.IDS, statistics=False))
    model.save_lora(folder / "adapters.safetensors")


def adapters_of_images(folder):
    model = made.image_classifier()
    model.enable_lora(2, also_train="head")
    made.adapted(model)
    write_numbers(folder / "numbers.json", outputs(model, made.IMAGES, statistics=False))
    model.save_lora(folder / "adapters.safetensors")


def adapters_of_peft(folder):
    model = made.language_model()
    model.enable_lora(2, lora_alpha=4, also_train="final_norm")
    made.adapted(model)
    write_numbers(folder / "numbers.json", outputs(model, made.IDS, statistics=False))
    model.export_lora_to_peft(folder / "adapters")


# Checkpoints of transformers


def exported(make, tokenizer=None, **given):
    def write(folder):
        model = make()
        model.tokenizer = None if tokenizer is None else load_tokenizer(FORMATS / "tokenizers" / tokenizer)
        if given.get("dtype") == "bfloat16":
            for variable in model.weights:
                variable.assign(numpy(variable.value).astype("bfloat16").astype("float32"))
        write_numbers(folder / "numbers.json", outputs(model, made.IDS, statistics=False))
        model.export_to_transformers(folder / "checkpoint", **given)

    return write


# Trainings


def save_of_one_process(folder):
    keras.utils.set_random_seed(7)
    found = trainings.saved(folder / "saves", trainings.image_model(), trainings.image_data())
    write_numbers(folder / "numbers.json", found)


def save_of_two_processes(folder):
    program = Path(trainings.__file__)
    if BACKEND == "torch":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        commands = [[sys.executable, *torchrun, program, folder]]
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        commands = [[sys.executable, program, folder, str(i), str(port)] for i in range(2)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    running = [subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags}) for command in commands]
    if any([process.wait() for process in running]):
        raise RuntimeError(
            "Every process must end with exit code 0. Received: a process that failed. Read its traceback above."
        )


def save_of_format_1(folder):
    """Writes a save of format 1: the arrays of a save of format 2, complete, in an archive of NumPy."""
    source = FORMATS / "checkpoint-2" / "one_process_jax"
    shutil.copy(source / "numbers.json", folder)
    (save,) = (source / "saves").glob("step_*")
    state = json.loads((save / "state.json").read_text("utf-8"))
    content, arrays, specs = (save / "arrays.bin").read_bytes(), [], []
    for shape, ((_, _, dtype, offset),) in state["arrays"]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays.append(np.frombuffer(content[offset : offset + size], "uint8"))
        specs.append([shape, dtype])
    kept = folder / "saves" / save.name
    kept.mkdir(parents=True)
    np.savez(kept / "arrays.npz", *arrays)
    del state["processes"], state["run"]
    state |= {"format": 1, "arrays": specs, "sha256": hashlib.sha256((kept / "arrays.npz").read_bytes()).hexdigest()}
    (kept / "state.json").write_text(json.dumps(state), "utf-8")


# Others


def prompt_state(folder):
    model = keras_jamba.JambaCausalLM.from_preset(FORMATS / "preset-1" / "language_model" / "preset")
    state = model.prefill(made.PROMPT)
    numbers = {"token_ids": state.token_ids, "logits": numpy(state.logits), "tokens": written(model)}
    write_numbers(folder / "numbers.json", numbers)
    state.save(folder / "state")


def byte_tokenizer(folder):
    save_tokenizer(ByteTokenizer(add_bos=False), folder)
    write_numbers(folder / "numbers.json", {"ids": ByteTokenizer(add_bos=False).encode(made.TEXT)})


def jamba_tokenizer(folder):
    """Writes a tokenizer of bytes and three special tokens, with two templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate([*special, *alphabet])}, merges=[]))
    library.add_special_tokens(special)
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = dict(single="<s> $A", special_tokens=[("<s>", 1)])
    library.post_processor = processors.TemplateProcessing(**template)
    given = folder / "given"
    given.mkdir()
    library.save(str(given / "tokenizer.json"))
    config = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    (given / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = load_tokenizer(given)
    shutil.rmtree(given)
    tokenizer.chat_template = {"default": TEMPLATE, "short": "{{ messages[0].content }}"}
    save_tokenizer(tokenizer, folder)
    chats = {name: tokenizer.apply_chat_template(made.CHAT, chat_template=name) for name in tokenizer.chat_template}
    write_numbers(folder / "numbers.json", {"ids": tokenizer.encode(made.TEXT), "chats": chats})


def trained_preset(name):
    """Writes inputs of a trained preset, and its logits on this backend."""
    file = PRESETS / f"{name}.npz"
    arrays = dict(np.load(file)) if file.exists() else {"inputs": preset_inputs(name)}
    if BACKEND not in arrays:
        file.parent.mkdir(exist_ok=True)
        model = keras_jamba.DHCJamba.from_preset(name)
        np.savez_compressed(file, **arrays | {BACKEND: logits(model, arrays["inputs"])})


def preset_inputs(name):
    if name == "digits":
        return (load_digits().images[898:902] / 16).astype("float32")[..., None]
    if not name.startswith("video_"):
        shape = keras_jamba.presets.read(name)[0]["config"]["image_shape"]
        # Smooth spots of random colours.
        spots = np.random.default_rng(0).random((3, 4, 4, shape[-1])).repeat(shape[0] // 4, 1).repeat(shape[1] // 4, 2)
        return spots.astype("float32")
    return TASKS[name.removeprefix("video_")].clips("test", 24, seed=7)[0][:3]


# `{name: (backend, function)}`. Some fixtures are made from earlier ones, so the order matters.
FIXTURES = {
    "tokenizers/byte": ("torch", byte_tokenizer),
    "tokenizers/jamba": ("torch", jamba_tokenizer),
    "preset-1/image_classifier": ("torch", preset_of_images),
    "preset-1/clip_classifier": ("jax", preset_of_clips),
    "preset-1/language_model": ("tensorflow", preset_of_language),
    "preset-1/text_classifier": ("torch", preset_of_texts),
    "keras/image_classifier": ("torch", keras_of_images),
    "keras/language_model": ("jax", keras_of_language),
    "keras/layers": ("tensorflow", keras_of_layers),
    "weights/int8": ("torch", weights_in("int8")),
    "weights/int4": ("jax", weights_in("int4")),
    "weights/experts_int8": ("tensorflow", weights_in("experts_int8")),
    "lora-1/language_model": ("torch", adapters),
    "lora-1/image_classifier": ("jax", adapters_of_images),
    "peft/language_model": ("torch", adapters_of_peft),
    "transformers/one_file": ("torch", exported(made.language_model, tokenizer="jamba")),
    "transformers/shards": ("torch", exported(made.language_model, dtype="bfloat16", max_shard_bytes=2000)),
    "transformers/classifier": ("torch", exported(made.text_classifier)),
    "transformers/mamba": ("torch", exported(made.mamba_model)),
    "checkpoint-2/one_process_jax": ("jax", save_of_one_process),
    "checkpoint-2/one_process_tensorflow": ("tensorflow", save_of_one_process),
    "checkpoint-2/one_process_torch": ("torch", save_of_one_process),
    "checkpoint-2/two_processes_jax": ("jax", save_of_two_processes),
    "checkpoint-2/two_processes_torch": ("torch", save_of_two_processes),
    "checkpoint-1/one_process_jax": ("torch", save_of_format_1),
    "prompt_state/language_model": ("jax", prompt_state),
    # With checksums.
    "preset-2/image_classifier": ("jax", preset_of_images),
    "preset-2/language_model": ("torch", preset_of_language),
    "lora-1-checksum/language_model": ("torch", adapters),
    "checkpoint-3/one_process_jax": ("jax", save_of_one_process),
    "checkpoint-3/one_process_torch": ("torch", save_of_one_process),
    # With the classes, arguments and kinds of variables.
    "checkpoint-3-identity/one_process_torch": ("torch", save_of_one_process),
    "prompt_state-checksum/language_model": ("torch", prompt_state),
}


def write_here(name):
    """Writes one fixture on the backend of this process."""
    if name == "presets":
        for preset in TRAINED:
            trained_preset(preset)
        return
    folder = FORMATS / name
    staging = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    keras.utils.set_random_seed(0)
    FIXTURES[name][1](staging)
    staging.rename(folder)


def main(*names):
    if names and names[0] == HERE:
        for name in names[1:]:
            write_here(name)
        return
    for name in names or (*FIXTURES, "presets"):
        backends = ("jax", "tensorflow", "torch") if name == "presets" else FIXTURES[name][:1]
        if (FORMATS / name).exists():
            print(f"{name} exists and is kept.")
            continue
        for backend in backends:
            print(f"{name} on {backend}", flush=True)
            environment = {x: v for x, v in os.environ.items() if x != "XLA_FLAGS"} | {"KERAS_BACKEND": backend}
            subprocess.run([sys.executable, __file__, HERE, name], env=environment, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
