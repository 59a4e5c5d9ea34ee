"""Low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path

import numpy as np

from keras_jamba import _files
from keras_jamba.converters import _safetensors
from keras_jamba.converters._fields import rank_and_alpha

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {"JambaCausalLM": "CAUSAL_LM", "JambaClassifier": "SEQ_CLS"}
# Fields of adapter_config.json for variants of LoRA, and the values that mean plain LoRA.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
}


def write(folder, class_name, pairs, rank, lora_alpha, fully_trained):
    """Writes adapters to a folder.

    Args:
        folder: an existing folder.
        class_name: class name of the model.
        pairs: `{module name in PEFT: (a, b)}`, NumPy arrays of shape `(d, r)` and `(r, f)`.
        rank, lora_alpha: rank and alpha of all adapters.
        fully_trained: `{tensor name in PEFT: array}`, weights that were trained without an adapter.

    Raises:
        ValueError: if a fully trained weight is a single parameter, which PEFT cannot store.
    """
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    tensors |= {f"{_PREFIX}{name}": np.ascontiguousarray(x) for name, x in fully_trained.items()}
    config = {name: values[0] for name, values in _PLAIN.items()} | {
        "task_type": _TASKS[class_name],
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(pairs),
        "modules_to_save": sorted({_module(name) for name in fully_trained}) or None,
        "inference_mode": True,
    }
    folder = Path(folder)
    _safetensors.write(tensors, folder / WEIGHTS, {"format": "pt"})
    _files.write_json(folder / CONFIG, config)


def _module(name):
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        raise ValueError(
            f"PEFT trains complete modules, not single parameters. Received: {name!r}, trained without an adapter. "
            "Leave its layer out of also_train, or call merge_lora and export_to_transformers."
        )
    return module


def read(folder):
    """Returns `(pairs, rank, lora_alpha, fully_trained)`, see `write`.

    Raises:
        ValueError: if a file is missing or damaged, or the adapter is not plain LoRA.
    """
    damaged = _safetensors.library().SafetensorError
    folder = Path(folder)
    try:
        config = _files.read_json(folder / CONFIG)
        with _safetensors.opened(folder / WEIGHTS) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        rank, lora_alpha = rank_and_alpha(config["r"], config["lora_alpha"])
    # safetensors knows dtypes that NumPy does not.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, damaged) as error:
        raise ValueError(
            f"A PEFT folder must hold {CONFIG} and {WEIGHTS}. Received: {str(folder)!r}, {error!r}. Pass a folder that "
            "PEFT's save_pretrained wrote."
        ) from error
    for name, values in _PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(
                f"Adapters must be plain LoRA. Received: {name}={config[name]!r} in {str(folder / CONFIG)!r}. Merge "
                "them with PEFT, and load the model as a checkpoint."
            )
    sides = {"lora_A": {}, "lora_B": {}}
    fully_trained = {}
    for name, x in tensors.items():
        module, _, side = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if side in sides:
            sides[side][module] = x.T
        else:
            fully_trained[name.removeprefix(_PREFIX)] = x
    if set(sides["lora_A"]) != set(sides["lora_B"]):
        odd = sorted(set(sides["lora_A"]) ^ set(sides["lora_B"]))
        raise ValueError(
            f"An adapter must have two matrices. Received: {str(folder)!r} with only one for {odd[:3]}. Save it again."
        )
    return (
        {module: (a, sides["lora_B"][module]) for module, a in sides["lora_A"].items()},
        rank,
        lora_alpha,
        fully_trained,
    )
