"""The attention mixer."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_jamba._typing import Config, Tensor, Tensors
from keras_jamba.layers import _initializers
from keras_jamba.layers._eager_fast_path import EagerFastPath
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._projection import Projection
from keras_jamba.layers._requested import append_requested
from keras_jamba.layers._sublayer_quantization import SublayerQuantizationConfig
from keras_jamba.layers.states import Leaf, empty_state, joined, kept_tokens, rollback_state_of, symbolic_state
from keras_jamba.ops import _checks, attention_weights, grouped_query_attention, rotary_embedding
from keras_jamba.ops._sharding import before_heads, by_heads, by_tokens, check_divisible
from keras_jamba.ops._tokens import NO_DOCUMENT, zero_padding
from keras_jamba.ops.attention.cache import CachedTokens, resized


@keras.saving.register_keras_serializable(package="keras_jamba")
class AttentionLayer(EagerFastPath, SublayerQuantizationConfig, keras.layers.Layer):
    """Multi-head attention with grouped key-value heads, optional rotary positions and an optional window.

    Args:
        d_model: width of input and output.
        num_heads: number of query heads h; divides d_model.
        num_kv_heads: number of key-value heads g; divides num_heads. None means num_heads.
        use_rope: whether rotary embedding rotates queries and keys by their positions.
        rope_theta: base of the rotary frequencies.
        rope_interleaved: True rotates pairs of neighbouring channels, False pairs across the two halves; see
            `ops.rotary_embedding`.
        causal: whether a token attends only to itself and to earlier tokens.
        attention_window: number of tokens that a token attends to, itself included; None means all. Unless causal,
            the window extends to both sides. Time grows with tokens times window, and a cache with a capacity of one
            window suffices for sequences of any length.
        attention_sinks: number of first tokens per document that the window does not hide. The cache holds them too.
            0 without a window.
        residual_gain: factor on the initial weights of the output projection. A model with n skip connections passes
            `n**-0.5`, so that its initial outputs are as large as a shallow model's (Radford et al. 2019, section
            2.3).

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, the Keras mask. Other tokens ignore tokens where it is False.
        segment_ids: `(b, t)` integers or None: the document id of each token. Every change of the id begins a new
            document: ids 0 1 0 are three documents. Documents do not attend to each other.
        reset_mask: `(b, t)` bool or None: True where a new sequence begins. The token begins a document, whatever its
            id, and ignores the initial state. A reset at padding takes effect at the next real token.
        initial_state: state of an earlier call, or of `init_cache`; None means that no token came before.
        return_state: whether to also return the state. Its capacity is the window, or without a window that of the
            initial state plus t. `step` keeps the capacity of its cache.

    Returns:
        `(b, t, d)`, or `((b, t, d), state)`. The state is a dict: `"key"` and `"value"` `(b, s, g, c)` in the compute
        dtype, keys after rotary embedding; `"length"`, `"start"` and `"document"` `(b,)` int32. The token at position
        p of a row is in slot `p % s`. With n sinks, the first n slots hold the first tokens of the document, and other
        tokens are in slot `n + p % (s - n)`. `length` counts the tokens seen. The last document has the id `document`,
        or the least int32 without an id, and begins at position `start`. Gradients flow through keys and values.

    Raises:
        ValueError: if head counts do not divide, the input has another width, the state belongs to another layer,
            batch or dtype, or the capacity of a cache is too small.

    Reference:
        [Ainslie et al. (2023)](https://arxiv.org/abs/2305.13245),
        [Su et al. (2021)](https://arxiv.org/abs/2104.09864);
        the window: [Beltagy et al. (2020)](https://arxiv.org/abs/2004.05150);
        the sinks: [Xiao et al. (2023)](https://arxiv.org/abs/2309.17453).
    """

    @_checks.python_numbers
    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        use_rope: bool = True,
        rope_theta: float = 10000.0,
        rope_interleaved: bool = True,
        causal: bool = True,
        attention_window: int | None = None,
        attention_sinks: int = 0,
        residual_gain: float = 1.0,
        **kwargs: Any,
    ) -> None:
        _checks.check_not_backwards(kwargs, "AttentionLayer", "causal=False")
        # Autocast would silently round a cache of another dtype.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
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
        _checks.check_window(attention_window, attention_sinks, prefix="attention_")
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.use_rope, self.rope_theta, self.rope_interleaved = use_rope, rope_theta, rope_interleaved
        self.causal, self.residual_gain = causal, residual_gain
        self.attention_window, self.attention_sinks = attention_window, attention_sinks
        # Slots of a cache that suffices for sequences of any length.
        self._enough = attention_window and attention_window + attention_sinks

        def dense(units, name, gain=1.0):
            return Projection(units, kernel_initializer=_initializers.xavier(gain), name=name, dtype=self.dtype_policy)

        self.q_proj = dense(d_model, "q_proj")
        self.k_proj = dense(num_kv_heads * self.head_width, "k_proj")
        self.v_proj = dense(num_kv_heads * self.head_width, "v_proj")
        self.out_proj = dense(d_model, "out_proj", gain=0.5 * residual_gain)

    def build(self, input_shape: Sequence[int | None]) -> None:
        _checks.check_last_axis("AttentionLayer", input_shape, self.d_model)
        keys = {"num_kv_heads * head_width": self.num_kv_heads * self.head_width}
        check_divisible(self.d_model, by_channels={"d_model": self.d_model} | keys)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            layer.build((None, None, self.d_model))

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: dict[str, Tensor] | None = None,
        return_state: bool = False,
    ) -> Tensors:
        _checks.check_last_axis("AttentionLayer", inputs.shape, self.d_model)
        mask = mask_of(inputs, mask)
        stateful = initial_state is not None or return_state
        if stateful:
            self._check_has_state()
        plain = all(x is None for x in (mask, segment_ids, reset_mask, self.attention_window))
        if plain and not stateful:
            # The fused attention of the backend, which takes no documents, windows or caches.
            query, key, value = self._query_key_value(inputs, 0)
            return self._output(grouped_query_attention(query, key, value, causal=self.causal), inputs)

        inputs = ops.convert_to_tensor(inputs)
        given = _checks.check_sequence(mask, segment_ids, reset_mask, inputs.shape)
        if initial_state is not None:
            initial_state = _checks.check_state("initial_state", initial_state, self._state_specs(inputs.shape[0]))
        outputs, new, tokens = self._attend_after(initial_state, inputs, *given)
        if not return_state:
            return outputs
        capacity = 0 if initial_state is None else ops.shape(initial_state["key"])[1]
        capacity = self._enough or capacity + ops.shape(inputs)[1]
        return outputs, _write_cache(initial_state, new, tokens, capacity)

    def init_cache(self, batch_size: int, max_length: int | None = None) -> dict[str, Tensor]:
        """Returns an empty cache.

        Its capacity is `max_length`, or the window and the sinks if they are fewer. It is at least one more than the
        number of sinks.

        Raises:
            ValueError: if the attention has no window and `max_length` is None.
        """
        self._check_has_state()
        _checks.check_integer("batch_size", batch_size)
        if max_length is not None:
            _checks.check_integer("max_length", max_length)
        sizes = [size for size in (max_length, self._enough) if size is not None]
        if not sizes:
            raise ValueError(
                "A cache of attention without a window needs max_length, the capacity in tokens. "
                "Received: max_length=None. Pass init_cache(batch_size, max_length=1024), for example."
            )
        return empty_state(self._state_specs(batch_size, max(min(sizes), self.attention_sinks + 1)))

    def grow_cache(self, cache: dict[str, Tensor], max_length: int | None) -> dict[str, Tensor]:
        """Returns a cache with capacity for `max_length` tokens, or for the window; `cache` itself if it suffices.

        Raises:
            ValueError: if the capacity is larger already.
        """
        capacity = cache["key"].shape[1]
        wanted = min(size for size in (max_length, self._enough) if size is not None)
        if wanted < capacity and capacity != self._enough:
            raise ValueError(
                f"The capacity of a cache cannot shrink. Received: max_length={max_length} for a cache with a "
                f"capacity of {capacity} tokens. Pass max_length={capacity} or more."
            )
        if wanted <= capacity:
            return cache
        counts = cache["length"], cache["start"]
        grown = {name: resized(cache[name], *counts, wanted, self.attention_sinks) for name in ("key", "value")}
        return cache | grown

    def step(
        self,
        inputs: Tensor,
        cache: dict[str, Tensor],
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        return_rollback_state: bool = False,
    ) -> tuple[Tensors, ...]:
        """Runs `(b, t, d)` more tokens after the tokens of the cache.

        The cache keeps its capacity, so that a compiler compiles `step` once. Unless it holds a complete window, its
        capacity must suffice for the current document of each row. Otherwise the outputs of that row are NaN, in this
        step and in all later steps of the document.

        Returns:
            `(outputs, cache)`; with `return_rollback_state` also the input of `rollback`.

        Raises:
            ValueError: if the capacity is too small, on a CPU and outside of compiled functions.
        """
        self._check_has_state()
        if not self.built:
            self.build(inputs.shape)
        _checks.check_last_axis("AttentionLayer", inputs.shape, self.d_model)
        cache = _checks.check_state("cache", cache, self._state_specs(inputs.shape[0]))
        inputs = ops.convert_to_tensor(inputs)
        given = _checks.check_sequence(mask_of(inputs, mask), segment_ids, reset_mask, inputs.shape)
        inputs = zero_padding(inputs, given[0])
        tokens = self._cached_tokens(cache, inputs, *given)
        query, new = self._query_and_new(inputs, tokens)
        capacity = cache["key"].shape[1]
        if tokens.can_attend_to_written(self.attention_window):
            updated = _write_cache(cache, new, tokens, capacity)
            mixed = tokens.attend_to_written(query, (updated["key"], updated["value"]), self.attention_window)
        else:
            buffers = cache["key"], cache["value"]
            mixed = tokens.attend(query, new["key"], new["value"], buffers, self.attention_window)
            updated = _write_cache(cache, new, tokens, capacity)
        outputs = zero_padding(self._output(mixed, inputs), given[0])
        if not (self._enough and capacity >= self._enough):
            # sqrt(-1) is NaN. PyTorch would copy a constant to the device and synchronise.
            zero_or_nan = ops.sqrt(ops.cast(tokens.fits(capacity), outputs.dtype) - 1)
            outputs = outputs + zero_or_nan[:, None, None]
        rollback_state = rollback_state_of(cache, *given, **new)
        return append_requested(outputs, (True, updated), (return_rollback_state, rollback_state))

    def rollback(self, rollback_state: Tensors, count: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Returns the cache after only the first `count` tokens of a step; see `JambaBackbone.rollback`.

        It writes their keys and values into the cache before the step. No projection runs again.
        """
        rollback_state = joined(rollback_state)
        _checks.check_rollback_state(rollback_state, ("key", "value"))
        new, *given = kept_tokens(rollback_state, count)
        cache = rollback_state["cache"]
        tokens = self._cached_tokens(cache, new["key"], *given)
        return _write_cache(cache, new, tokens, cache["key"].shape[1])

    def attention_weights(self, inputs: Tensor) -> Tensor:
        """Returns the attention weights of a call on the same inputs, without padding and as one document.

        Args:
            inputs: `(b, t, d)`.

        Returns:
            `(b, h, t, t)` float32, queries before keys. Each row sums to 1. A call applies `out_proj` to the means of
            the values with these weights.

        Raises:
            ValueError: if the input has another width.

        Example:
            >>> import keras
            >>> from keras_jamba.layers import AttentionLayer
            >>> AttentionLayer(64, num_heads=4).attention_weights(keras.random.normal((2, 100, 64))).shape
            (2, 4, 100, 100)
        """
        inputs = ops.convert_to_tensor(inputs)
        _checks.check_last_axis("AttentionLayer", inputs.shape, self.d_model)
        if not self.built:
            self.build(inputs.shape)
        query, key = self._query_and_key(inputs, 0)
        return attention_weights(query, key, self.causal, self.attention_window, self.attention_sinks)

    # One call: projection, rotary embedding, attention, output projection; and the cache write.

    def _attend_after(self, cache, inputs, mask, segment_ids, reset_mask):
        """Runs attention of `inputs` `(b, t, d)` after the tokens of `cache`, or of None.

        Returns:
            `(outputs, new, tokens)`: the keys and values of the inputs by name, and their `CachedTokens`.
        """
        inputs = zero_padding(inputs, mask)
        tokens = self._cached_tokens(cache, inputs, mask, segment_ids, reset_mask)
        query, new = self._query_and_new(inputs, tokens)
        cached = None if cache is None else (cache["key"], cache["value"])
        mixed = tokens.attend(query, new["key"], new["value"], cached, self.attention_window, self.causal)
        # A gradient at padding reaches no key or value.
        return zero_padding(self._output(mixed, inputs), mask), new, tokens

    def _cached_tokens(self, cache, inputs, mask, segment_ids, reset_mask):
        """Returns the `CachedTokens` of `inputs` `(b, t, d)` after `cache`, or after None."""
        batch, length = ops.shape(inputs)[:2]
        if cache is None:
            zeros = ops.zeros((batch,), "int32")
            # Not `ops.full`, for which PyTorch copies the number from the device and synchronises.
            counts = zeros, zeros, zeros + NO_DOCUMENT
        else:
            counts = (cache[name] for name in _COUNTS)
        return CachedTokens(mask, segment_ids, reset_mask, *counts, (batch, length), self.attention_sinks)

    def _query_and_new(self, inputs, tokens):
        """Returns the queries of `tokens`, and their keys and values by name."""
        query, key, value = self._query_key_value(inputs, tokens.positions)
        return query, {"key": key, "value": value}

    def _query_key_value(self, inputs, positions):
        """Returns `(b, t, h, c)`, `(b, t, g, c)` and `(b, t, g, c)`; rotary embedding rotates the first two."""
        query, key = self._query_and_key(inputs, positions)
        return query, key, self._heads(self.v_proj(inputs), self.num_kv_heads)

    def _query_and_key(self, inputs, positions):
        query = self._heads(self.q_proj(inputs), self.num_heads)
        key = self._heads(self.k_proj(inputs), self.num_kv_heads)
        if not self.use_rope:
            return query, key
        return (rotary_embedding(x, positions, self.rope_theta, self.rope_interleaved) for x in (query, key))

    def _heads(self, x, count):
        batch, length = ops.shape(x)[:2]
        return by_heads(ops.reshape(before_heads(x, count), (batch, length, count, self.head_width)))

    def _output(self, mixed, inputs):
        """Projects the outputs of all heads, `(b, t, h, c)`, to the shape of `inputs`, `(b, t, d)`."""
        batch, length = ops.shape(inputs)[:2]
        return self.out_proj(by_tokens(ops.reshape(mixed, (batch, length, self.d_model))))

    def _check_has_state(self):
        if not self.causal:
            raise ValueError(
                "Attention that is not causal has no state: earlier tokens attend to later tokens. "
                "Received: causal=False. Build the layer with causal=True."
            )

    def _state_specs(self, batch_size, capacity=None):
        heads = Leaf((batch_size, capacity, self.num_kv_heads, self.head_width), self.compute_dtype)
        return {"key": heads, "value": heads} | dict.fromkeys(_COUNTS, Leaf((batch_size,), "int32"))

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: dict[str, Tensor] | None = None,
        return_state: bool = False,
    ) -> Tensors:
        _checks.check_last_axis("AttentionLayer", inputs.shape, self.d_model)
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        if not return_state:
            return outputs
        return outputs, symbolic_state(self._state_specs(inputs.shape[0], self._enough))

    def get_config(self) -> Config:
        return super().get_config() | {
            "d_model": self.d_model,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "use_rope": self.use_rope,
            "rope_theta": self.rope_theta,
            "rope_interleaved": self.rope_interleaved,
            "causal": self.causal,
            "attention_window": self.attention_window,
            "attention_sinks": self.attention_sinks,
            "residual_gain": self.residual_gain,
        }


_COUNTS = ("length", "start", "document")


def _write_cache(cache, new, tokens, capacity):
    """Returns the cache with `capacity` slots after `tokens`, whose keys and values are `new`; `cache` may be None."""
    before = {} if cache is None else cache
    counts = dict(zip(_COUNTS, tokens.next_counts, strict=True))
    return {name: tokens.written(before.get(name), x, capacity) for name, x in new.items()} | counts


def _check_divides(name, value, total_name, total):
    if total % value:
        raise ValueError(
            f"{name} must divide {total_name}. Received: {name}={value}, {total_name}={total}. "
            f"Choose {name} among {[i for i in range(1, total + 1) if total % i == 0]}."
        )
