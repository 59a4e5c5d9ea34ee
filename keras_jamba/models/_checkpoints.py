"""Text models in folders: presets, checkpoints of transformers, and adapters of PEFT."""

import inspect

import keras

from keras_jamba import _keras_internals, presets
from keras_jamba.converters import checkpoints, hub, peft
from keras_jamba.generation import generation_config
from keras_jamba.layers.quantization import assigners, float_values
from keras_jamba.models import _adapters
from keras_jamba.models._backbone_config import check_sizes
from keras_jamba.models._pattern import pattern_of
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks
from keras_jamba.tokenizers.files import check_can_be_restored, load_tokenizer, save_tokenizer

_DEFAULTS = {name: p.default for name, p in inspect.signature(JambaBackbone.__init__).parameters.items()}


@_keras_internals.restored_scopes()
def from_preset(cls, preset, load_weights, dtype, overrides, head):
    """Implements `TextModel.from_preset`; `head` names the arguments that change the head alone."""
    folder = hub.folder_of(preset)
    given = overrides if dtype is None else overrides | {"dtype": dtype}
    if checkpoints.is_foreign(folder):
        checkpoints.warn_of_adapters(folder)
        model = _from_checkpoint(cls, folder, load_weights, given, head)
    else:
        model = presets.build(cls, folder, load_weights, given, check_sizes, head=head)
    read_assets(model, folder)
    return model


def _from_checkpoint(cls, folder, load_weights, given, head):
    kind, arguments = checkpoints.read(folder, cls.__name__)

    def make(filled=frozenset()):
        # The name of the model is only in some paths of variables.
        is_filled_later = lambda path: path in filled or path.split("/", 1)[-1] in filled  # noqa: E731
        with _keras_internals.without_initial_values(is_filled_later) as skipped:
            model = cls(**arguments | given)
        _keras_internals.initialize_others(skipped, model.weights)
        return model

    if not load_weights:
        return make()
    keep_head = not any(name in given and given[name] != arguments[name] for name in head)
    return checkpoints.load(folder, kind, _DEFAULTS | arguments | given, pattern_of, make, assigners, keep_head)


def save_to_preset(model, folder, weights_dtype):
    """Implements `TextModel.save_to_preset`."""
    model._check_has_no_adapters()
    model._check_quantization_matches_config()
    check_can_be_restored(model.tokenizer)
    presets.write(model, folder, weights_dtype, more=lambda staging: write_assets(model, staging))


def export_to_transformers(model, folder, dtype, max_shard_bytes, include_tied_head):
    """Implements `TextModel.export_to_transformers`."""
    dtype = model.variable_dtype if dtype is None else dtype
    _checks.check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
    _checks.check_integer("max_shard_bytes", max_shard_bytes)
    model._check_has_no_adapters()
    model._check_quantization_matches_config()
    values = {path.removeprefix(f"{model.name}/"): value for path, value in float_values(model).items()}
    with presets.preset_folder(folder) as staging:
        config = model.constructor_arguments()
        if config["eos_token_id"] is None:
            # `generate` falls back to the tokenizer's id; transformers does not.
            config["eos_token_id"] = getattr(model.tokenizer, "eos_token_id", None)
        options = dict(dtype=dtype, shard_bytes=max_shard_bytes, include_tied_head=include_tied_head)
        checkpoints.write(staging, type(model).__name__, config, model.block_pattern, values, **options)
        write_assets(model, staging)


def export_lora_to_peft(model, folder):
    """Implements `TextModel.export_lora_to_peft`."""
    pairs, fully_trained, ranks = {}, {}, set()
    weights = {weight.path: weight for weight in _checkpoint_weights(model)}
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
            f"All adapters must have the same rank and lora_alpha. Received: {sorted(ranks)}. Call "
            "enable_lora of the model once."
        )
    for path, variable in _adapters.fully_trained_variables(model).items():
        fully_trained |= weights[path].theirs(keras.ops.convert_to_numpy(variable))
    with presets.preset_folder(folder) as staging:
        peft.write(staging, type(model).__name__, pairs, *ranks.pop(), fully_trained)


def load_peft(model, folder):
    """Installs the adapters of a PEFT folder in a model.

    Raises:
        ValueError: if the folder has adapters of modules that the model lacks.
    """
    pairs, rank, lora_alpha, fully_trained = peft.read(folder)
    weights = {name: weight for weight in _checkpoint_weights(model) for name in weight.names}
    unknown = [name for name in (*(f"{module}.weight" for module in pairs), *fully_trained) if name not in weights]
    if unknown:
        raise ValueError(
            f"Adapters must belong to modules of the model. Received: {unknown[0]!r} in {str(folder)!r}. Load them "
            "into the model that they were trained with."
        )
    adapters, tensors = {}, {}
    for module, sides in pairs.items():
        path = weights[f"{module}.weight"].path.removesuffix("/kernel")
        adapters[path] = (rank, lora_alpha)
        tensors |= {f"{path}/kernel{suffix}": x for suffix, x in zip(_adapters.ADAPTER, sides, strict=True)}
    tensors |= {weights[name].path: weights[name].ours(fully_trained.__getitem__) for name in fully_trained}
    _adapters.install(model, adapters, tensors, folder)


def _checkpoint_weights(model):
    """Returns the list of `Weight`s that maps the model's variables to checkpoint tensors."""
    config = model.constructor_arguments()
    return checkpoints.places(type(model).__name__, config, model.block_pattern)[1]


def write_assets(model, folder):
    """Writes the files that `generate` needs besides the weights: tokenizer files and generation_config.json."""
    if model.tokenizer is not None:
        save_tokenizer(model.tokenizer, folder)
    if model.generation_config is not None:
        generation_config.write(model.generation_config, folder)


def read_assets(model, folder):
    """Sets tokenizer and generation_config from the files of `write_assets` or transformers."""
    model.tokenizer = load_tokenizer(folder)
    model.generation_config = generation_config.read(folder)
