"""Models of text in folders: our own presets, and checkpoints of transformers."""

import inspect

import keras

from keras_jamba import presets
from keras_jamba.converters import checkpoints, hub, peft
from keras_jamba.generation import generation_config
from keras_jamba.layers.quantization import assigners, float_values
from keras_jamba.models import _adapters
from keras_jamba.models._pattern import pattern_of
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks
from keras_jamba.tokenizers.files import check_comes_back, load_tokenizer, save_tokenizer

_DEFAULTS = {name: p.default for name, p in inspect.signature(JambaBackbone.__init__).parameters.items()}


def from_preset(cls, preset, load_weights, dtype, overrides, head):
    """See `TextModel.from_preset`; `head` are the arguments on which only the head depends."""
    folder = hub.folder_of(preset)
    given = overrides if dtype is None else overrides | {"dtype": dtype}
    if checkpoints.is_foreign(folder):
        checkpoints.warn_of_adapters(folder)
        model = _from_checkpoint(cls, folder, load_weights, given, head)
    else:
        model = presets.build(cls, folder, load_weights, given, head=head)
    read_assets(model, folder)
    return model


def _from_checkpoint(cls, folder, load_weights, given, head):
    kind, arguments = checkpoints.read(folder, cls.__name__)
    make = lambda: cls(**arguments | given)  # noqa: E731
    if not load_weights:
        return make()
    keep_head = not any(name in given and given[name] != arguments[name] for name in head)
    return checkpoints.load(folder, kind, _DEFAULTS | arguments | given, pattern_of, make, assigners, keep_head)


def save_to_preset(model, folder):
    """See `TextModel.save_to_preset`."""
    model._check_has_no_adapters()
    model._check_is_as_configured()
    check_comes_back(model.tokenizer)
    presets.write(model, folder, more=lambda staging: write_assets(model, staging))


def export_to_transformers(model, folder, dtype, max_shard_bytes):
    """See `TextModel.export_to_transformers`."""
    dtype = model.variable_dtype if dtype is None else dtype
    _checks.check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
    _checks.check_integer("max_shard_bytes", max_shard_bytes)
    model._check_has_no_adapters()
    model._check_is_as_configured()
    values = {path.removeprefix(f"{model.name}/"): value for path, value in float_values(model).items()}
    with presets.whole_folder(folder) as staging:
        config = model.constructor_arguments()
        if config["eos_token_id"] is None:
            # Where `generate` would take it from; transformers does not ask a tokenizer.
            config["eos_token_id"] = getattr(model.tokenizer, "eos_token_id", None)
        checkpoints.write(staging, type(model).__name__, config, model.block_pattern, values, dtype, max_shard_bytes)
        write_assets(model, staging)


def export_lora_to_peft(model, folder):
    """See `TextModel.export_lora_to_peft`."""
    pairs, fully_trained, ranks = {}, {}, set()
    weights = {weight.path: weight for weight in _places(model)}
    for path, layer in _adapters.adapted(model).items():
        weight = weights[f"{path}/kernel"] if f"{path}/kernel" in weights else None
        if weight is None:
            raise ValueError(
                f"PEFT has no place for adapters of experts. Received: adapters of {path!r}. Call merge_lora and "
                "export_to_transformers, or adapt other targets."
            )
        pairs[weight.names[0].removesuffix(".weight")] = _adapters.pair(layer)
        ranks.add((layer.lora_rank, layer.lora_alpha))
    if len(ranks) > 1:
        raise ValueError(
            f"All adapters must have one rank and lora_alpha. Received: {sorted(ranks)}. Call the model's "
            "enable_lora, once."
        )
    for path, variable in _adapters.fully_trained_variables(model).items():
        fully_trained |= weights[path].theirs(keras.ops.convert_to_numpy(variable))
    with presets.whole_folder(folder) as staging:
        peft.write(staging, type(model).__name__, pairs, *ranks.pop(), fully_trained)


def load_peft(model, folder):
    """Gives a model the adapters of a folder of PEFT's."""
    pairs, rank, lora_alpha, fully_trained = peft.read(folder)
    weights = {name: weight for weight in _places(model) for name in weight.names}
    unknown = [name for name in (*(f"{module}.weight" for module in pairs), *fully_trained) if name not in weights]
    if unknown:
        raise ValueError(
            f"Adapters must be of modules of the model. Received: {unknown[0]!r} in {str(folder)!r}. Load them "
            "into the model that they were trained with."
        )
    adapters, tensors = {}, {}
    for module, sides in pairs.items():
        path = weights[f"{module}.weight"].path.removesuffix("/kernel")
        adapters[path] = (rank, lora_alpha)
        tensors |= {f"{path}/kernel{suffix}": x for suffix, x in zip(_adapters.ADAPTER, sides, strict=True)}
    tensors |= {weights[name].path: weights[name].ours(fully_trained.__getitem__) for name in fully_trained}
    _adapters.install(model, adapters, tensors, folder)


def _places(model):
    config = model.constructor_arguments()
    return checkpoints.places(type(model).__name__, config, model.block_pattern)[1]


def write_assets(model, folder):
    """Writes the files besides the weights that `generate` needs: tokenizer files and generation_config.json."""
    if model.tokenizer is not None:
        save_tokenizer(model.tokenizer, folder)
    if model.generation_config is not None:
        generation_config.write(model.generation_config, folder)


def read_assets(model, folder):
    """Reads what `write_assets` or transformers wrote."""
    model.tokenizer = load_tokenizer(folder)
    model.generation_config = generation_config.read(folder)
