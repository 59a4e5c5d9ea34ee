"""The base of text models: embedding and backbone, presets, checkpoints and adapters."""

import numbers
from typing import Any, Literal, Self

import keras
from keras import ops

from keras_jamba._typing import Config, DType, PathLike, Tensor, Tensors
from keras_jamba.layers._token_embedding import TokenEmbedding, as_indices
from keras_jamba.layers.quantization import QUANTIZATIONS
from keras_jamba.models import _checkpoints
from keras_jamba.models._backbone_config import BACKBONE_ARGUMENTS
from keras_jamba.models._logits_model import LogitsModel
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks
from keras_jamba.tokenizers.files import check_can_be_restored

# Defaults that differ from `JambaBackbone`, as in the training of Jamba.
DEFAULTS: Config = dict(
    use_rope=False,
    normalize_top_k=False,
    balance_loss="switch",
    balance_over="model",
    balance_coefficient=0.001,
    z_coefficient=0.0,
)
_INPUTS = ("token_ids", "padding_mask", "segment_ids", "reset_mask", "inputs_embeds")


class TextModel(LogitsModel, keras.Model):
    """The abstract base of a token embedding and a `JambaBackbone`; subclasses add the head.

    Args:
        options: a dict of the subclass' own constructor arguments. It has `vocab_size`, `bos_token_id`,
            `eos_token_id` and `pad_token_id`.
        backbone: a dict of arguments of `JambaBackbone`.

    Attributes:
        tokenizer: converts texts to token ids and back, or None.
        generation_config: a dict, as in a checkpoint's generation_config.json, or None. `generate` follows it. It is
            assignable, and presets, exports and `.keras` files include it.
    """

    generation_config: Config | None = None
    # Arguments that change the head alone.
    _head_arguments: tuple[str, ...] = ()

    def __init__(self, options: Config, backbone: Config, dtype: DType | None, name: str | None) -> None:
        # Autocast would round the float32 states among the inputs.
        super().__init__(name=name, dtype=dtype, autocast=False)
        _checks.check_integer("vocab_size", options["vocab_size"])
        for argument in backbone:
            _checks.check_choice("a constructor argument", argument, (*options, *BACKBONE_ARGUMENTS))
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _check_special_token(special, options[special], options["vocab_size"])
        self.backbone = JambaBackbone(**DEFAULTS | backbone, dtype=dtype, name="backbone")
        self.block_pattern = self.backbone.block_pattern
        self._config = {**options, **self.backbone.constructor_arguments()}
        self.token_embedding = self._embedding(options["vocab_size"], options.get("tie_embeddings"))
        self.tokenizer: Any = None
        self._add_routing_metrics()

    def _embedding(self, vocab_size, tie_embeddings):
        d_model = self._config["d_model"]
        start = keras.initializers.RandomNormal(stddev=0.02)
        given = dict(embeddings_initializer=start, name="token_embedding", dtype=self.dtype_policy)
        # A model without output projection has no second matrix.
        layer = TokenEmbedding(vocab_size, d_model, tie_weights=tie_embeddings is not False, **given)
        mode = QUANTIZATIONS.get(self._config["quantization"], {}).get(layer.KIND)
        if mode and not layer.keeps_float:
            layer.set_mode(mode)
        layer.build((None, None))
        return layer

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: the constructor creates all weights."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """Returns the inputs `(b, t, d)` of the backbone for token ids `(b, t)`, to be mixed with other embeddings."""
        return self.token_embedding(token_ids)

    def extract_features(self, inputs: Tensors) -> dict[str, Tensors]:
        """Returns the outputs of each part of the model.

        Args:
            inputs: see a call.

        Returns:
            A dict of tensors. `"embeddings"` `(b, t, d)` are the inputs of the backbone. `"block_0"`, `"block_1"`, ...
            are the outputs of each block. `"features"` are the outputs of the final norm. `"routing"` is
            `{"block_1": routing as MoELayer returns it, ...}`.
        """
        embeddings, given = self._prepare_inputs(inputs)
        blocks, routing = self.backbone.block_outputs(embeddings, **given)
        named = {f"block_{i}": block for i, block in enumerate(blocks)}
        features = self.backbone.final_norm(blocks[-1])
        return {"embeddings": embeddings, **named, "features": features, "routing": routing}

    def _prepare_inputs(self, inputs):
        """Returns `(embeddings, {"padding_mask", "segment_ids", "reset_mask"})` from the inputs of a call."""
        inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
        given = {name for name, x in inputs.items() if x is not None}
        if not given <= set(_INPUTS) or len(given & {"token_ids", "inputs_embeds"}) != 1:
            raise ValueError(
                "The inputs must be token ids (b, t), or a dict with either token_ids or inputs_embeds, and "
                "optionally padding_mask, segment_ids and reset_mask. "
                f"Received: {sorted(inputs)}. Pass exactly one of token_ids and inputs_embeds, and no other keys."
            )
        if "inputs_embeds" in given:
            embeddings = ops.cast(inputs["inputs_embeds"], self.compute_dtype)
            _checks.check_last_axis("the model as inputs_embeds", embeddings.shape, self._config["d_model"])
        else:
            embeddings = self.embed(self._prepare_token_ids(inputs["token_ids"], inputs.get("padding_mask")))
        return embeddings, {name: inputs.get(name) for name in ("padding_mask", "segment_ids", "reset_mask")}

    def check_batch(self, x: Tensors, y: Tensors | None = None, sample_weight: Tensors | None = None) -> None:
        """Raises ValueError for inputs that a call refuses; copies ids to the host to check them."""
        inputs = x if isinstance(x, dict) else {"token_ids": x}
        if inputs.get("token_ids") is not None:
            token_ids = self._prepare_token_ids(inputs["token_ids"], inputs.get("padding_mask"))
            _checks.check_token_ids(ops.convert_to_numpy(token_ids), self._config["vocab_size"])

    def _prepare_token_ids(self, token_ids, mask):
        """Returns token ids `(b, t)` as a tensor with 0 for padding, where the input may hold any number.

        Raises:
            ValueError: for ids of another rank or dtype, and for a mask of another shape.
        """
        token_ids = ops.convert_to_tensor(token_ids)
        _checks.check_token_ids(token_ids)
        if len(token_ids.shape) != 2:
            raise ValueError(
                f"token_ids must have the shape (b, t). Received: shape={tuple(token_ids.shape)}. For one sequence add "
                "an axis, token_ids[None]."
            )
        mask, _ = _checks.check_tokens(mask, None, token_ids.shape)
        token_ids = as_indices(token_ids)
        return token_ids if mask is None else token_ids * ops.cast(mask, token_ids.dtype)

    # Presets and checkpoints

    @classmethod
    def from_preset(
        cls, preset: PathLike, load_weights: bool = True, dtype: DType | None = None, **overrides: Any
    ) -> Self:
        """Builds a model from a preset of keras_jamba or a checkpoint of transformers, with its tokenizer.

        With a checkpoint's generation_config.json, `generate` follows the defaults of transformers. The model has it as
        `generation_config`.

        Args:
            preset: a folder, or `"hf://owner/name"`, which is downloaded from huggingface.co. If its config.json has a
                model_type, the folder is a transformers checkpoint of Jamba or Mamba-1. Its weights are safetensors, in
                one file or in shards, with experts separate or stacked. Otherwise `save_to_preset` wrote the folder.
            load_weights: whether to load the weights.
            dtype: a dtype or policy, for example "bfloat16"; None is Keras' default, usually float32. Loading needs
                memory for one copy of the weights in this dtype.
            **overrides: constructor arguments that replace the preset's. With another num_classes, a classifier loads
                all weights except the head's. With `quantization="int8"`, "int4" or "experts_int8", each weight is
                rounded as it is read.

        Returns:
            The model; its `tokenizer` is None if the folder has none.

        Raises:
            ValueError: if a file is missing or damaged, if a tensor is missing, unexpected, of another shape or not
                finite, or if this package cannot express the checkpoint's model. Nothing is loaded then.

        Example:
            ```python
            model = JambaCausalLM.from_preset("hf://ai21labs/AI21-Jamba-Reasoning-3B", dtype="bfloat16")
            print(model.generate("The capital of France is", max_new_tokens=20))
            ```
        """
        return _checkpoints.from_preset(cls, preset, load_weights, dtype, overrides, cls._head_arguments)

    def save_to_preset(self, folder: PathLike, weights_dtype: Literal["float16", "float32"] | None = None) -> None:
        """Writes configuration, weights, tokenizer and generation_config to a folder that is new or empty.

        Args:
            folder: a path. The folder appears completely or not at all.
            weights_dtype: dtype of the floats in the file: "float16", which halves the file and rounds, numbers below
                6e-8 to zero; "float32"; or None, which keeps the dtype of the variables. A loaded model has the dtype
                of its policy in all cases.

        Raises:
            ValueError: if the folder is not empty, the model cannot be saved as a preset, or a weight is too large for
                the dtype.
        """
        _checkpoints.save_to_preset(self, folder, weights_dtype)

    def export_to_transformers(
        self,
        folder: PathLike,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        max_shard_bytes: int = 5 * 10**9,
        include_tied_head: bool = False,
    ) -> None:
        """Writes a transformers checkpoint, with tokenizer and generation_config, to a folder that is new or empty.

        `JambaForCausalLM.from_pretrained(folder)` has the same logits, and its `generate` stops at the same tokens.
        Quantized weights are written as the floating-point numbers that they represent.

        Args:
            folder: a path. The folder appears completely or not at all.
            dtype: "float32", "bfloat16" or "float16"; None is the dtype of the model's variables.
            max_shard_bytes: the most bytes per file; further weights go to further files.
            include_tied_head: whether to also write the projection to logits if it is tied to the embedding.
                transformers needs no copy of it, but vLLM does.

        Raises:
            ValueError: if the folder is not empty, or the model has adapters, or options that transformers' Jamba
                lacks.
        """
        _checkpoints.export_to_transformers(self, folder, dtype, max_shard_bytes, include_tied_head)

    def export_lora_to_peft(self, folder: PathLike) -> None:
        """Writes adapters for PEFT to a folder that is new or empty; `load_lora` reads it too.

        `PeftModel.from_pretrained(JambaForCausalLM.from_pretrained(...), folder).merge_and_unload()` has the same
        logits. Unmerged, transformers (5.23) ignores the adapters of `mamba.dt_proj`, because it uses that weight
        directly. Leave `mamba.dt_proj` out of the targets if adapters must stay unmerged there.

        Args:
            folder: a path. The folder appears completely or not at all.

        Raises:
            ValueError: if the folder is not empty, or the model has no adapters, or has adapters of experts, which PEFT
                cannot store.
        """
        _checkpoints.export_lora_to_peft(self, folder)

    def _load_peft(self, folder):
        _checkpoints.load_peft(self, folder)

    def _check_can_be_saved(self):
        super()._check_can_be_saved()
        check_can_be_restored(self.tokenizer)

    def save_assets(self, folder: PathLike) -> None:
        check_can_be_restored(self.tokenizer)
        _checkpoints.write_assets(self, folder)

    def load_assets(self, folder: PathLike | None) -> None:
        if folder is not None:
            _checkpoints.read_assets(self, folder)


def _check_special_token(name, value, vocab_size):
    """Raises ValueError unless `value` is an id of the vocabulary or None; eos_token_id may be several ids."""
    several = name == "eos_token_id" and isinstance(value, (tuple, list))
    for each in value if several else (value,):
        good = isinstance(each, numbers.Integral) and not isinstance(each, bool) and 0 <= each < vocab_size
        if each is not None and not good:
            raise ValueError(
                f"{name} must be an id from 0 to vocab_size - 1 = {vocab_size - 1}, or None. Received: "
                f"{name}={value!r}. Pass the id that the tokenizer gives this token."
            )
