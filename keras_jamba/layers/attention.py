"""The attention mixer."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.ops import _checks, grouped_query_attention, rotary_embedding


@keras.saving.register_keras_serializable(package="keras_jamba")
class AttentionLayer(keras.layers.Layer):
    """Multi-head attention with grouped key-value heads and optional rotary positions.

    Args:
        d_model: width of input and output.
        num_heads: query heads h; divides d_model.
        num_kv_heads: key-value heads g; divides num_heads. None is num_heads.
        use_rope: whether queries and keys are rotated by their position.
        rope_theta: base of the rotary frequencies.
        rope_interleaved: pairs of neighbours (True) or of the two halves; see `ops.rotary_embedding`.
        causal: whether a token sees only itself and the tokens before it.

    Call arguments:
        inputs: `(b, t, d)`.

    Returns:
        `(b, t, d)`.

    Raises:
        ValueError: for head counts that do not divide, or an input of another width.

    Reference:
        [Ainslie et al. (2023)](https://arxiv.org/abs/2305.13245),
        [Su et al. (2021)](https://arxiv.org/abs/2104.09864).
    """

    def __init__(
        self,
        d_model,
        num_heads,
        num_kv_heads=None,
        use_rope=True,
        rope_theta=10000.0,
        rope_interleaved=True,
        causal=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = dict(d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads)
        for name, value in sizes.items():
            _checks.check_integer(name, value)
        _check_divides("num_heads", num_heads, "d_model", d_model)
        _check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        self.head_width = d_model // num_heads
        if use_rope and self.head_width % 2:
            raise ValueError(
                "With use_rope=True the head width d_model / num_heads must be even. Received: "
                f"d_model={d_model}, num_heads={num_heads}. Change num_heads or pass use_rope=False."
            )
        _checks.check_number("rope_theta", rope_theta, low=1.0)
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.use_rope, self.rope_theta, self.rope_interleaved = (
            use_rope,
            rope_theta,
            rope_interleaved,
        )
        self.causal = causal

        def dense(units, name, gain=1.0):
            return keras.layers.Dense(
                units,
                use_bias=False,
                kernel_initializer=_initializers.xavier(gain),
                name=name,
                dtype=self.dtype_policy,
            )

        self.q_proj = dense(d_model, "q_proj")
        self.k_proj = dense(num_kv_heads * self.head_width, "k_proj")
        self.v_proj = dense(num_kv_heads * self.head_width, "v_proj")
        self.out_proj = dense(d_model, "out_proj", gain=0.5)

    def build(self, input_shape):
        _checks.check_last_axis("AttentionLayer", input_shape, self.d_model)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            layer.build((None, None, self.d_model))

    def call(self, inputs):
        query = self._heads(self.q_proj(inputs), self.num_heads)
        key = self._heads(self.k_proj(inputs), self.num_kv_heads)
        value = self._heads(self.v_proj(inputs), self.num_kv_heads)
        if self.use_rope:
            query, key = (
                rotary_embedding(x, theta=self.rope_theta, interleaved=self.rope_interleaved) for x in (query, key)
            )
        mixed = grouped_query_attention(query, key, value, causal=self.causal)
        batch, length = ops.shape(inputs)[:2]
        return self.out_proj(ops.reshape(mixed, (batch, length, self.d_model)))

    def _heads(self, x, count):
        batch, length = ops.shape(x)[:2]
        return ops.reshape(x, (batch, length, count, self.head_width))

    def compute_output_shape(self, input_shape):
        _checks.check_last_axis("AttentionLayer", input_shape, self.d_model)
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "d_model": self.d_model,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "use_rope": self.use_rope,
            "rope_theta": self.rope_theta,
            "rope_interleaved": self.rope_interleaved,
            "causal": self.causal,
        }


def _check_divides(part_name, part, whole_name, whole):
    if whole % part:
        raise ValueError(
            f"{part_name} must divide {whole_name}. Received: {part_name}={part}, {whole_name}={whole}. "
            f"Choose {part_name} among {[i for i in range(1, whole + 1) if whole % i == 0]}."
        )
