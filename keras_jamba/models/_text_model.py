"""What the models of text have in common: tokens in, features out."""

import numbers

import keras
from keras import ops

from keras_jamba.layers._token_embedding import TokenEmbedding, as_indices
from keras_jamba.layers.quantization import QUANTIZATIONS
from keras_jamba.models import _checkpoints
from keras_jamba.models._backbone_config import BACKBONE_ARGUMENTS
from keras_jamba.models._logits_model import LogitsModel
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks
from keras_jamba.tokenizers.files import check_comes_back

# Where a model of text differs from `JambaBackbone`: as Jamba was trained.
DEFAULTS = dict(
    use_rope=False,
    normalize_top_k=False,
    balance_loss="switch",
    balance_over="model",
    balance_coefficient=0.001,
    z_coefficient=0.0,
)
_INPUTS = ("token_ids", "padding_mask", "segment_ids", "reset_mask", "inputs_embeds")


class TextModel(LogitsModel, keras.Model):
    """A token embedding before a `JambaBackbone`; what is made of its features is the subclass' affair.

    Args:
        options: the subclass' own constructor arguments and their values; among them `vocab_size` and, of special
            tokens, `bos_token_id`, `eos_token_id` and `pad_token_id`.
        backbone: those of `JambaBackbone`.

    Attributes:
        tokenizer: turns texts into token ids and back, or None.
        generation_config: of a checkpoint's generation_config.json, a dict, or None. `generate` follows it. It may be
            set or changed, and goes with the model into presets, exports and `.keras` files.
    """

    generation_config = None
    # Arguments on which only the head depends.
    _head_arguments = ()

    def __init__(self, options, backbone, dtype, name):
        # No autocast: it would round the float32 states on their way in.
        super().__init__(name=name, dtype=dtype, autocast=False)
        _checks.check_integer("vocab_size", options["vocab_size"])
        for argument in backbone:
            _checks.check_choice("a constructor argument", argument, (*options, *BACKBONE_ARGUMENTS))
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _check_special(special, options[special], options["vocab_size"])
        self.backbone = JambaBackbone(**DEFAULTS | backbone, dtype=dtype, name="backbone")
        self.block_pattern = self.backbone.block_pattern
        self._config = {**options, **self.backbone.get_config()}
        self.token_embedding = self._embedding(options["vocab_size"], options.get("tie_embeddings"))
        self.tokenizer = None
        self._add_routing_metrics()

    def _embedding(self, vocab_size, tie_embeddings):
        d_model = self._config["d_model"]
        start = keras.initializers.RandomNormal(stddev=0.02)
        given = dict(embeddings_initializer=start, name="token_embedding", dtype=self.dtype_policy)
        # A model without a head has no second matrix.
        layer = TokenEmbedding(vocab_size, d_model, tie_weights=tie_embeddings is not False, **given)
        mode = QUANTIZATIONS.get(self._config["quantization"], {}).get(layer.KIND)
        if mode and not layer.keeps_float:
            layer.set_mode(mode)
        layer.build((None, None))
        return layer

    def build(self, input_shape=None):
        """Everything has its weights from the beginning."""

    def embed(self, token_ids):
        """What enters the backbone, `(b, t, d)`, of token ids `(b, t)`; to be mixed with what is not text."""
        return self.token_embedding(token_ids)

    def extract_features(self, inputs):
        """What the parts of the model make of the inputs.

        Args:
            inputs: see a call.

        Returns:
            A dict of tensors: `"embeddings"` `(b, t, d)`; `"block_0"`, `"block_1"`, ..., the sequence after each
            block; `"features"`, after the final norm; and `"routing"`, what the routers decided, `{"block_1": what
            MoELayer returns, ...}`.
        """
        embeddings, given = self._read(inputs)
        blocks, routing = self.backbone.block_outputs(embeddings, **given)
        named = {f"block_{i}": block for i, block in enumerate(blocks)}
        features = self.backbone.final_norm(blocks[-1])
        return {"embeddings": embeddings, **named, "features": features, "routing": routing}

    def _read(self, inputs):
        """`(embeddings, {"padding_mask", "segment_ids", "reset_mask"})` of the inputs of a call."""
        inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
        given = {name for name, x in inputs.items() if x is not None}
        if not given <= set(_INPUTS) or len(given & {"token_ids", "inputs_embeds"}) != 1:
            raise ValueError(
                "The inputs must be token ids (b, t), or a dict with either token_ids or inputs_embeds, and where "
                "wanted padding_mask, segment_ids and reset_mask. "
                f"Received: {sorted(inputs)}. Leave out or add what differs."
            )
        if "inputs_embeds" in given:
            embeddings = ops.cast(inputs["inputs_embeds"], self.compute_dtype)
            _checks.check_last_axis("the model as inputs_embeds", embeddings.shape, self._config["d_model"])
        else:
            embeddings = self.embed(self._checked_ids(inputs["token_ids"], inputs.get("padding_mask")))
        return embeddings, {name: inputs.get(name) for name in ("padding_mask", "segment_ids", "reset_mask")}

    def check_batch(self, x, y=None, sample_weight=None):
        """Raises a ValueError for inputs that a call would refuse; ids are looked at on the host."""
        inputs = x if isinstance(x, dict) else {"token_ids": x}
        if inputs.get("token_ids") is not None:
            token_ids = self._checked_ids(inputs["token_ids"], inputs.get("padding_mask"))
            _checks.check_token_ids(ops.convert_to_numpy(token_ids), self._config["vocab_size"])

    def _checked_ids(self, token_ids, mask):
        """Token ids `(b, t)` as a tensor, 0 for padding: what stands there may be no id of the vocabulary."""
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
        return _checkpoints.from_preset(cls, preset, load_weights, dtype, overrides, cls._head_arguments)

    def save_to_preset(self, folder):
        """Writes configuration, weights, tokenizer and generation_config to a folder that is new or empty.

        The folder appears whole or not at all.

        Raises:
            ValueError: if the folder exists and holds anything.
        """
        _checkpoints.save_to_preset(self, folder)

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
        _checkpoints.export_to_transformers(self, folder, dtype, max_shard_bytes)

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
        _checkpoints.export_lora_to_peft(self, folder)

    def _load_peft(self, folder):
        _checkpoints.load_peft(self, folder)

    def _check_comes_back(self):
        super()._check_comes_back()
        check_comes_back(self.tokenizer)

    def save_assets(self, folder):
        check_comes_back(self.tokenizer)
        _checkpoints.write_assets(self, folder)

    def load_assets(self, folder):
        if folder is not None:
            _checkpoints.read_assets(self, folder)


def _check_special(name, value, vocab_size):
    several = name == "eos_token_id" and isinstance(value, (tuple, list))
    for each in value if several else (value,):
        good = isinstance(each, numbers.Integral) and not isinstance(each, bool) and 0 <= each < vocab_size
        if each is not None and not good:
            raise ValueError(
                f"{name} must be an id from 0 to vocab_size - 1 = {vocab_size - 1}, or None. Received: "
                f"{name}={value!r}. Pass the id that the tokenizer gives this token."
            )
