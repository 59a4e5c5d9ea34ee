"""Models of text to and from folders: our own presets, and checkpoints of transformers."""

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


class Checkpoints:
    """A model whose constructor arguments are its config, with `from_preset` and what writes that back.

    Attributes:
        generation_config: of a checkpoint's generation_config.json, a dict, or None. `generate` follows it, see there.
            It may be set or changed, and goes with the model into presets, exports and `.keras` files.
    """

    generation_config = None

    @classmethod
    def from_preset(cls, preset, load_weights=True, dtype=None, **overrides):
        """Builds a model from a preset of ours or a checkpoint of transformers, with its tokenizer.

        Of a checkpoint's generation_config.json `generate` follows what transformers does by default; the model has it
        as `generation_config`.

        Args:
            preset: a folder; or `"hf://owner/name"`, which is downloaded from huggingface.co. A folder whose
                config.json has a model_type is one of transformers': Jamba's, or of Mamba-1. Its weights are
                safetensors, in one file or shards, each expert by itself or stacked. Otherwise it is what
                `save_to_preset` wrote.
            load_weights: whether to load the weights.
            dtype: a dtype or policy, "bfloat16" for example; None is Keras' own, float32 as a rule. What the memory
                must hold is one copy of the weights in it.
            **overrides: constructor arguments that replace the preset's. With another num_classes a classifier gets
                all weights but the head's. With `quantization="int8"`, "int4" or "experts_int8" weights are rounded
                one after the other as they are read.

        Returns:
            The model; its `tokenizer` is None where the folder has none.

        Raises:
            ValueError: if a file is missing or damaged, a tensor missing, unexpected, of another shape or not
                finite, or if the checkpoint is of a model that cannot be expressed here. Nothing is loaded then.

        Example:
            ```python
            model = JambaCausalLM.from_preset("hf://ai21labs/AI21-Jamba-Reasoning-3B", dtype="bfloat16")
            print(model.generate("The capital of France is", max_new_tokens=20))
            ```
        """
        folder = hub.folder_of(preset)
        given = overrides if dtype is None else overrides | {"dtype": dtype}
        if checkpoints.is_foreign(folder):
            checkpoints.warn_of_adapters(folder)
            model = cls._from_checkpoint(folder, load_weights, given)
        else:
            model = presets.build(cls, folder, load_weights, given, head=cls._head_arguments)
        model._read_assets(folder)
        return model

    # Arguments on which only the head depends.
    _head_arguments = ()

    @classmethod
    def _from_checkpoint(cls, folder, load_weights, given):
        kind, arguments = checkpoints.read(folder, cls.__name__)
        make = lambda: cls(**arguments | given)  # noqa: E731
        if not load_weights:
            return make()
        keep_head = not any(name in given and given[name] != arguments[name] for name in cls._head_arguments)
        return checkpoints.load(folder, kind, _DEFAULTS | arguments | given, pattern_of, make, assigners, keep_head)

    def save_to_preset(self, folder):
        """Writes configuration, weights, tokenizer and generation_config to a folder that is new or empty.

        The folder appears whole or not at all.

        Raises:
            ValueError: if the folder exists and holds anything.
        """
        self._check_has_no_adapters()
        self._check_is_as_configured()
        check_comes_back(self.tokenizer)
        presets.write(self, folder, more=self._write_assets)

    def export_to_transformers(self, folder, dtype=None, max_shard_bytes=5 * 10**9):
        """Writes a checkpoint that transformers reads to a folder that does not exist yet or is empty.

        `JambaForCausalLM.from_pretrained(folder)` has the same logits, and its `generate` ends with the same tokens;
        tokenizer and generation_config go with it. Weights in few bits are written as the floating-point numbers that
        they stand for.

        Args:
            folder: appears whole or not at all.
            dtype: "float32", "bfloat16" or "float16"; None is the dtype of the model's variables.
            max_shard_bytes: of a file; what is more goes into another.

        Raises:
            ValueError: if the folder holds anything, or the model has adapters or options that transformers' does not
                have.
        """
        dtype = self.variable_dtype if dtype is None else dtype
        _checks.check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
        _checks.check_integer("max_shard_bytes", max_shard_bytes)
        self._check_has_no_adapters()
        self._check_is_as_configured()
        values = {path.removeprefix(f"{self.name}/"): value for path, value in float_values(self).items()}
        with presets.whole_folder(folder) as staging:
            config = self.constructor_arguments()
            if config["eos_token_id"] is None:
                # Where `generate` would take it from; transformers does not ask a tokenizer.
                config["eos_token_id"] = getattr(self.tokenizer, "eos_token_id", None)
            checkpoints.write(staging, type(self).__name__, config, self.block_pattern, values, dtype, max_shard_bytes)
            self._write_assets(staging)

    def export_lora_to_peft(self, folder):
        """Writes adapters that PEFT reads to a folder that does not exist yet or is empty; `load_lora` reads it too.

        `PeftModel.from_pretrained(JambaForCausalLM.from_pretrained(...), folder).merge_and_unload()` has the same
        logits. Unmerged, transformers (5.23) passes over the adapters of `mamba.dt_proj`, whose weight it multiplies by
        itself: leave these out of the targets where adapters shall stay unmerged there.

        Args:
            folder: appears whole or not at all.

        Raises:
            ValueError: if the folder holds anything, or the model has no adapters, or some that PEFT has no place
                for: those of experts.
        """
        pairs, fully_trained, ranks = {}, {}, set()
        weights = {weight.path: weight for weight in self._places()}
        for path, layer in _adapters.adapted(self).items():
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
        for path, variable in _adapters.fully_trained_variables(self).items():
            fully_trained |= weights[path].theirs(keras.ops.convert_to_numpy(variable))
        with presets.whole_folder(folder) as staging:
            peft.write(staging, type(self).__name__, pairs, *ranks.pop(), fully_trained)

    def _load_peft(self, folder):
        """Gives the model the adapters of a folder of PEFT's."""
        pairs, rank, lora_alpha, fully_trained = peft.read(folder)
        weights = {name: weight for weight in self._places() for name in weight.names}
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
        _adapters.install(self, adapters, tensors, folder)

    def _places(self):
        config = self.constructor_arguments()
        return checkpoints.places(type(self).__name__, config, self.block_pattern)[1]

    def _write_assets(self, folder):
        """Writes the files beside the weights that `generate` needs: those of the tokenizer, generation_config.json."""
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)
        if self.generation_config is not None:
            generation_config.write(self.generation_config, folder)

    def _read_assets(self, folder):
        """Reads what `_write_assets` wrote, or what transformers wrote."""
        self.tokenizer = load_tokenizer(folder)
        self.generation_config = generation_config.read(folder)
