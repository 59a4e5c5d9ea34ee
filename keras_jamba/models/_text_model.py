"""What the models of text have in common: tokens in, features out."""

import inspect
import numbers

import keras
from keras import ops

from keras_jamba.layers._token_embedding import TokenEmbedding, as_indices
from keras_jamba.layers.quantization import QUANTIZATIONS
from keras_jamba.models._adapting import Adapting
from keras_jamba.models._checkpoints import Checkpoints
from keras_jamba.models._label_checks import LogitsLoss
from keras_jamba.models._routing_metrics import RoutingMetrics
from keras_jamba.models._trainer_hooks import TrainerHooks
from keras_jamba.models.jamba_backbone import JambaBackbone
from keras_jamba.ops import _checks
from keras_jamba.tokenizers.files import check_comes_back

BACKBONE_ARGUMENTS = tuple(
    name for name in inspect.signature(JambaBackbone.__init__).parameters if name not in ("self", "dtype", "name")
)
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


class TextModel(Checkpoints, Adapting, TrainerHooks, RoutingMetrics, LogitsLoss, keras.Model):
    """A token embedding before a `JambaBackbone`; what is made of its features is the subclass' affair.

    Args:
        options: the subclass' own constructor arguments and their values; among them `vocab_size` and, of special
            tokens, `bos_token_id`, `eos_token_id` and `pad_token_id`.
        backbone: those of `JambaBackbone`.
    """

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
        self._watch_routing()

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

    def _check_comes_back(self):
        super()._check_comes_back()
        check_comes_back(self.tokenizer)

    def save_assets(self, folder):
        check_comes_back(self.tokenizer)
        self._write_assets(folder)

    def load_assets(self, folder):
        if folder is not None:
            self._read_assets(folder)


def _check_special(name, value, vocab_size):
    several = name == "eos_token_id" and isinstance(value, (tuple, list))
    for each in value if several else (value,):
        good = isinstance(each, numbers.Integral) and not isinstance(each, bool) and 0 <= each < vocab_size
        if each is not None and not good:
            raise ValueError(
                f"{name} must be an id from 0 to vocab_size - 1 = {vocab_size - 1}, or None. Received: "
                f"{name}={value!r}. Pass the id that the tokenizer gives this token."
            )
