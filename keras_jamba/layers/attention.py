"""The attention mixer."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._projection import Projection
from keras_jamba.layers._requested import append_requested
from keras_jamba.layers._sublayer_quantization import SublayerQuantizationConfig
from keras_jamba.layers.states import empty_state, joined, kept_tokens, rollback_state_of
from keras_jamba.ops import _checks, attention_weights, grouped_query_attention, rotary_embedding
from keras_jamba.ops._sharding import before_heads, by_heads, by_tokens, check_parts
from keras_jamba.ops._tokens import NO_DOCUMENT
from keras_jamba.ops.attention import CachedTokens, resized


@keras.saving.register_keras_serializable(package="keras_jamba")
class AttentionLayer(SublayerQuantizationConfig, keras.layers.Layer):
    """Multi-head attention with grouped key-value heads, optional rotary positions and an optional window.

    Args:
        d_model: width of input and output.
        num_heads: query heads h; divides d_model.
        num_kv_heads: key-value heads g; divides num_heads. None is num_heads.
        use_rope: whether queries and keys are rotated by their position.
        rope_theta: base of the rotary frequencies.
        rope_interleaved: pairs of neighbours (True) or of the two halves; see `ops.rotary_embedding`.
        causal: whether a token sees only itself and the tokens before it.
        attention_window: how many tokens a token sees, itself included, on both sides unless causal; None is
            all. Time and memory grow with tokens times window, and a cache of that many tokens is enough for ever.
        residual_gain: a factor on the start of the last projection. A model of n skip connections passes
            `n**-0.5`, so that it starts no louder than a shallow one (Radford et al. 2019, section 2.3).

    Call arguments:
        inputs: `(b, t, d)`.
        mask: `(b, t)` bool or None, Keras' own. Tokens where it is False do not exist for the others.
        segment_ids: `(b, t)` integers or None: the document of each token. A change of the id begins a document, so
            0 1 0 are three. No document sees anything of another.
        reset_mask: `(b, t)` bool or None: True where a sequence begins anew. That token begins a document, with the
            same id or without ids, and forgets the initial state. At padding the next real token does.
        initial_state: what an earlier call returned, or `init_cache`; None is no tokens.
        return_state: whether to return the state too, which then has room for all tokens so far, or with a
            window for that many; `step` keeps the room that there is.

    Returns:
        `(b, t, d)`, or that and the state: `{"key": (b, s, g, c), "value": (b, s, g, c)` in the compute
        dtype, keys rotated`, "length": (b,), "start": (b,), "document": (b,)` int32`}`: the token at position p
        of a row lies in slot `p % s`, `length` tokens were seen, and the last document, of that number (the
        least int32 where none had one), began at position `start`.
        Gradients flow through keys and values.

    Raises:
        ValueError: for head counts that do not divide, an input of another width, a state of another
            layer, batch or dtype, or a cache without room.

    Reference:
        [Ainslie et al. (2023)](https://arxiv.org/abs/2305.13245),
        [Su et al. (2021)](https://arxiv.org/abs/2104.09864);
        the window: [Beltagy et al. (2020)](https://arxiv.org/abs/2004.05150).
    """

    @_checks.python_numbers
    def __init__(
        self,
        d_model,
        num_heads,
        num_kv_heads=None,
        use_rope=True,
        rope_theta=10000.0,
        rope_interleaved=True,
        causal=True,
        attention_window=None,
        residual_gain=1.0,
        **kwargs,
    ):
        _checks.check_not_backwards(kwargs, "AttentionLayer", "causal=False")
        # No autocast: it would round a cache of another dtype silently on its way in.
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
        if attention_window is not None:
            _checks.check_integer("attention_window", attention_window)
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.use_rope, self.rope_theta, self.rope_interleaved = (
            use_rope,
            rope_theta,
            rope_interleaved,
        )
        self.causal, self.attention_window, self.residual_gain = causal, attention_window, residual_gain

        def dense(units, name, gain=1.0):
            start = _initializers.xavier(gain)
            return Projection(units, kernel_initializer=start, name=name, dtype=self.dtype_policy)

        self.q_proj = dense(d_model, "q_proj")
        self.k_proj = dense(num_kv_heads * self.head_width, "k_proj")
        self.v_proj = dense(num_kv_heads * self.head_width, "v_proj")
        self.out_proj = dense(d_model, "out_proj", gain=0.5 * residual_gain)

    def build(self, input_shape):
        _checks.check_last_axis("AttentionLayer", input_shape, self.d_model)
        keys = {"num_kv_heads * head_width": self.num_kv_heads * self.head_width}
        check_parts(self.d_model, by_channels={"d_model": self.d_model} | keys)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            layer.build((None, None, self.d_model))

    def call(self, inputs, mask=None, segment_ids=None, reset_mask=None, initial_state=None, return_state=False):
        _checks.check_last_axis("AttentionLayer", inputs.shape, self.d_model)
        mask = mask_of(inputs, mask)
        stateful = initial_state is not None or return_state
        if stateful:
            self._check_has_state()
        plain = all(x is None for x in (mask, segment_ids, reset_mask, self.attention_window))
        if plain and not stateful:
            return self._attend(inputs, 0, lambda *heads: grouped_query_attention(*heads, causal=self.causal))
        inputs = ops.convert_to_tensor(inputs)
        given = _checks.check_sequence(mask, segment_ids, reset_mask, inputs.shape)
        if initial_state is not None:
            initial_state = _checks.check_state("initial_state", initial_state, self._state_specs(inputs.shape[0]))
        outputs, new, tokens = self._after(inputs, initial_state, *given)
        if not return_state:
            return outputs
        room = 0 if initial_state is None else ops.shape(initial_state["key"])[1]
        return outputs, _written(tokens, new, initial_state, self.attention_window or room + ops.shape(inputs)[1])

    def init_cache(self, batch_size, max_length=None):
        """A cache with room for `max_length` tokens, or for the window where that is less, that has seen none."""
        self._check_has_state()
        _checks.check_integer("batch_size", batch_size)
        if max_length is not None:
            _checks.check_integer("max_length", max_length)
        room = [size for size in (max_length, self.attention_window) if size is not None]
        if not room:
            raise ValueError(
                "A cache of attention without a window needs max_length, the most tokens that it shall hold. "
                "Received: max_length=None. Pass init_cache(batch_size, max_length=1024), for example."
            )
        return empty_state(self._state_specs(batch_size, min(room)))

    def with_room(self, cache, max_length):
        """A cache that goes on where `cache` is, with room for `max_length` tokens or for the window.

        Raises:
            ValueError: if there is more room already.
        """
        have = cache["key"].shape[1]
        more = min(size for size in (max_length, self.attention_window) if size is not None) - have
        if more < 0 and have != self.attention_window:
            raise ValueError(
                f"A cache cannot lose room. Received: max_length={max_length} for one of {have} tokens. "
                "Pass at least as much."
            )
        if more <= 0:
            return cache
        return cache | {name: resized(cache[name], cache["length"], have + more) for name in ("key", "value")}

    def step(self, inputs, cache, mask=None, segment_ids=None, reset_mask=None, return_rollback_state=False):
        """Some more tokens, `(b, t, d)`, after those that the cache has seen; `(outputs, cache)`.

        The cache keeps its room: one shape, one compilation. Without a window it must have room for the current
        document of each row. A row without room is an error on a CPU outside of compiled functions. Elsewhere its
        outputs are NaN, in this step and in all later ones of that document. With `return_rollback_state` it also
        returns what `rollback` takes.
        """
        self._check_has_state()
        if not self.built:
            self.build(inputs.shape)
        _checks.check_last_axis("AttentionLayer", inputs.shape, self.d_model)
        cache = _checks.check_state("cache", cache, self._state_specs(inputs.shape[0]))
        inputs = ops.convert_to_tensor(inputs)
        given = _checks.check_sequence(mask_of(inputs, mask), segment_ids, reset_mask, inputs.shape)
        outputs, new, tokens = self._after(inputs, cache, *given)
        capacity = cache["key"].shape[1]
        if not (self.attention_window and capacity >= self.attention_window):
            # The root of -1 is NaN. On PyTorch a number instead would be taken to the device and waited for there.
            not_a_number = ops.sqrt(ops.cast(tokens.fits(capacity), outputs.dtype) - 1)
            outputs = outputs + not_a_number[:, None, None]
        after = _written(tokens, new, cache, capacity)
        return append_requested(
            outputs, (True, after), (return_rollback_state, rollback_state_of(cache, *given, **new))
        )

    def rollback(self, rollback_state, count):
        """The cache after only some of the tokens of a step; see `JambaBackbone.rollback`.

        Their keys and values are written into the cache before it; nothing is projected again.
        """
        rollback_state = joined(rollback_state)
        _checks.check_rollback_state(rollback_state, ("key", "value"))
        new, *given = kept_tokens(rollback_state, count)
        cache = rollback_state["cache"]
        counts = (cache[name] for name in _COUNTS)
        tokens = CachedTokens(*given, *counts, ops.shape(new["key"])[:2])
        return _written(tokens, new, cache, cache["key"].shape[1])

    def attention_weights(self, inputs):
        """How much each token takes of each other in a call on the same inputs, without padding and as one document.

        Args:
            inputs: `(b, t, d)`.

        Returns:
            `(b, h, t, t)` float32, queries before keys: rows sum to 1. A call returns the `out_proj` of the heads'
            weighted means of values.

        Raises:
            ValueError: for an input of another width.

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
        return attention_weights(*self._query_and_key(inputs, 0), self.causal, self.attention_window)

    def _after(self, inputs, state, mask, segment_ids, reset_mask):
        """`(outputs, {"key", "value"} of the tokens, where they stand)`."""
        if mask is not None:
            # Not even what is not finite in the padding shall reach the others.
            inputs = ops.where(mask[..., None], inputs, 0.0)
        batch, length = ops.shape(inputs)[:2]
        zeros = ops.zeros((batch,), "int32")
        counts, held = (zeros, zeros, ops.full((batch,), NO_DOCUMENT, "int32")), None
        if state is not None:
            counts, held = (state[name] for name in _COUNTS), (state["key"], state["value"])
        tokens = CachedTokens(mask, segment_ids, reset_mask, *counts, (batch, length))
        new = {}

        def mix(query, key, value):
            new.update(key=key, value=value)
            return tokens.attend(query, key, value, held, self.attention_window, self.causal)

        return self._attend(inputs, tokens.positions, mix), new, tokens

    def _query_and_key(self, inputs, positions):
        query = self._heads(self.q_proj(inputs), self.num_heads)
        key = self._heads(self.k_proj(inputs), self.num_kv_heads)
        if not self.use_rope:
            return query, key
        return (rotary_embedding(x, positions, self.rope_theta, self.rope_interleaved) for x in (query, key))

    def _attend(self, inputs, positions, mix):
        query, key = self._query_and_key(inputs, positions)
        value = self._heads(self.v_proj(inputs), self.num_kv_heads)
        mixed = mix(query, key, value)
        batch, length = ops.shape(inputs)[:2]
        return self.out_proj(by_tokens(ops.reshape(mixed, (batch, length, self.d_model))))

    def _heads(self, x, count):
        batch, length = ops.shape(x)[:2]
        return by_heads(ops.reshape(before_heads(x, count), (batch, length, count, self.head_width)))

    def _check_has_state(self):
        if not self.causal:
            raise ValueError(
                "Attention that is not causal has no state to go on from: earlier tokens would have to see later ones. "
                "Received: causal=False. Build the layer with causal=True."
            )

    def _state_specs(self, batch_size, capacity=None):
        # Each a tensor of its own: Keras knows the outputs of a layer by their identity.
        heads = (batch_size, capacity, self.num_kv_heads, self.head_width)
        specs = {name: keras.KerasTensor(heads, self.compute_dtype) for name in ("key", "value")}
        return specs | {name: keras.KerasTensor((batch_size,), "int32") for name in _COUNTS}

    def compute_output_spec(
        self, inputs, mask=None, segment_ids=None, reset_mask=None, initial_state=None, return_state=False
    ):
        _checks.check_last_axis("AttentionLayer", inputs.shape, self.d_model)
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        return (outputs, self._state_specs(inputs.shape[0], self.attention_window)) if return_state else outputs

    def get_config(self):
        return super().get_config() | {
            "d_model": self.d_model,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "use_rope": self.use_rope,
            "rope_theta": self.rope_theta,
            "rope_interleaved": self.rope_interleaved,
            "causal": self.causal,
            "attention_window": self.attention_window,
            "residual_gain": self.residual_gain,
        }


_COUNTS = ("length", "start", "document")


def _written(tokens, new, state, capacity):
    """The state with room for `capacity` tokens after new keys and values, from that before them or None."""
    held = {} if state is None else state
    slots = {name: tokens.written(held.get(name), x, capacity) for name, x in new.items()}
    return slots | dict(zip(_COUNTS, tokens.next_counts(), strict=True))


def _check_divides(name, value, total_name, total):
    if total % value:
        raise ValueError(
            f"{name} must divide {total_name}. Received: {name}={value}, {total_name}={total}. "
            f"Choose {name} among {[i for i in range(1, total + 1) if total % i == 0]}."
        )
