"""What `MambaLayer` and `GatedConvLayer` have in common: all but what mixes the tokens."""

import keras
from keras import ops

from keras_jamba.layers import _initializers
from keras_jamba.layers._asked import asked
from keras_jamba.layers._compact import Holder
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._projection import Projection
from keras_jamba.layers.states import empty_state, joined, kept_tokens, trail_of
from keras_jamba.ops import _checks
from keras_jamba.ops._sharding import by_channels, by_tokens, check_parts
from keras_jamba.ops._tokens import NO_DOCUMENT, documents_of


class GatedMixer(Holder, keras.layers.Layer):
    """Projects to `x` and a gate `z`, mixes over time in one direction or two, and projects back.

    A subclass has `_directions()`, its one or two layers `(x, z, ...) -> (y, state)`, of which a call with
    `return_state=False` computes no state, with `state_shapes` and, of what a call with `return_trail` returns besides,
    `state_after`.

    Args:
        d_model: width d.
        expand: inner width as a multiple of d_model.
        proj_bias: whether the projections have a bias.
        bidirectional: whether there are two directions.
        residual_gain: a factor on the start of the last projection.
    """

    def __init__(self, d_model, expand, proj_bias, bidirectional, residual_gain, **kwargs):
        _checks.check_not_backwards(kwargs, type(self).__name__, "bidirectional=True")
        # No autocast: it would round the float32 state to the compute dtype on its way in.
        super().__init__(autocast=False, **kwargs)
        for name, value in dict(d_model=d_model, expand=expand).items():
            _checks.check_integer(name, value)
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.supports_masking = True
        self.d_model, self.expand, self.proj_bias = d_model, expand, proj_bias
        self.bidirectional, self.inner = bidirectional, expand * d_model
        self.residual_gain = residual_gain
        self.in_proj = self._dense(2 * self.inner, "in_proj", gain=1.0)
        self.out_proj = self._dense(d_model, "out_proj", gain=0.5 * residual_gain)

    def _dense(self, units, name, gain):
        return Projection(
            units,
            use_bias=self.proj_bias,
            kernel_initializer=_initializers.xavier(gain),
            name=name,
            dtype=self.dtype_policy,
        )

    def build(self, input_shape):
        _checks.check_last_axis(type(self).__name__, input_shape, self.d_model)
        check_parts(self.d_model, {"expand * d_model": self.inner})
        inner = (None, None, self.inner)
        self.in_proj.build((None, None, self.d_model))
        self.out_proj.build(inner)
        for direction in self._directions():
            direction.build(inner, inner)

    def call(self, inputs, mask=None, segment_ids=None, reset_mask=None, initial_state=None, return_state=False):
        if initial_state is not None or return_state:
            self._check_has_state()
        _checks.check_last_axis(type(self).__name__, inputs.shape, self.d_model)
        tokens = _checks.check_sequence(mask_of(inputs, mask), segment_ids, reset_mask, inputs.shape)
        return asked(*self._mixed(inputs, *tokens, initial_state, return_state))

    def _mixed(self, inputs, mask, segment_ids, reset_mask, initial_state, return_state=True, return_trail=False):
        """The outputs, and for `asked` the state, and what of the tokens the state after some of them needs."""
        state = before = documents = None
        if return_state or any(x is not None for x in (initial_state, segment_ids, reset_mask)):
            state, before = self._state_and_document(inputs, initial_state)
            documents = documents_of(segment_ids, reset_mask, mask, before)
        if documents is not None and state is not None:
            state = documents.opening(state)
        # Each half goes to all devices, forward and backward: told so, XLA fetches no more than that.
        x, z = (by_channels(half) for half in ops.split(by_channels(self.in_proj(inputs)), 2, axis=-1))
        forward, *backward = self._directions()
        given = dict(mask=mask, segment_ids=None if documents is None else documents.numbers)
        wanted = dict(return_state=return_state, return_trail=return_trail)
        y = forward(x, z, **given, initial_state=state, **wanted)
        y, *extras = y if any(wanted.values()) else (y,)
        if backward:
            y = y + self._turned_round(*backward, x, z, **given)
        state = self._closed(extras[0], documents, before) if return_state else None
        return self.out_proj(by_tokens(y)), (return_state, state), (return_trail, extras[-1] if return_trail else None)

    def _state_and_document(self, inputs, state):
        """The state before the tokens, or None, and the id of the document that it ends in `(b,)`."""
        if state is None:
            # Not `ops.full`: on PyTorch it takes the number to the device and waits for it there.
            return None, ops.zeros(ops.shape(inputs)[:1], "int32") + NO_DOCUMENT
        state = dict(_checks.check_state("initial_state", state, self._state_specs(inputs.shape[0])))
        document = state.pop("document")
        return state, document

    @staticmethod
    def _closed(state, documents, before):
        """The state after the tokens, with the id of its document."""
        if documents is None:
            return state | {"document": before}
        return documents.closing(state) | {"document": documents.last}

    def _turned_round(self, direction, x, z, mask, segment_ids):
        flip = lambda x: None if x is None else ops.flip(x, axis=1)  # noqa: E731
        given = dict(mask=flip(mask), segment_ids=flip(segment_ids))
        return flip(direction(flip(x), flip(z), **given, return_state=False))

    def init_cache(self, batch_size, max_length=None):
        """The state before the first token. `max_length` is there for the sake of attention alone."""
        self._check_has_state()
        _checks.check_integer("batch_size", batch_size)
        return empty_state(self._state_specs(batch_size))

    def step(self, inputs, cache, mask=None, segment_ids=None, reset_mask=None, return_trail=False):
        """Some more tokens, `(b, t, d)`, after those that the cache has seen; `(outputs, cache)`.

        The same as a call with `initial_state`; the cost does not depend on how many those were. With `return_trail`
        it returns what `rollback` takes too.
        """
        given = dict(mask=mask, segment_ids=segment_ids, reset_mask=reset_mask)
        if not return_trail:
            return self(inputs, **given, initial_state=cache, return_state=True)
        self._check_has_state()
        inputs = ops.convert_to_tensor(inputs)
        if not self.built:
            self.build(inputs.shape)
        _checks.check_last_axis(type(self).__name__, inputs.shape, self.d_model)
        tokens = _checks.check_sequence(mask_of(inputs, mask), segment_ids, reset_mask, inputs.shape)
        cache = _checks.check_state("cache", cache, self._state_specs(inputs.shape[0]))
        outputs, (_, state), (_, trail) = self._mixed(inputs, *tokens, cache, return_trail=True)
        return outputs, state, trail_of(cache, *tokens, **trail)

    def rollback(self, trail, count):
        """The cache after only some of the tokens of a step; see `JambaBackbone.rollback`.

        The projections are not run again: the convolution's state is taken anew from its inputs, and the state space
        runs over what it was fed, with the tokens left out that are taken back.
        """
        trail = joined(trail)
        direction = self._directions()[0]
        _checks.check_trail(trail, direction.trail)
        tokens, mask, segment_ids, reset_mask = kept_tokens(trail, count)
        # From the cache itself: of a row that keeps no token, none began a document.
        state, before = self._state_and_document(tokens["x"], trail["cache"])
        documents = documents_of(segment_ids, reset_mask, mask, before)
        state = state if documents is None else documents.opening(state)
        numbers = None if documents is None else documents.numbers
        return self._closed(direction.state_after(tokens, state, mask, numbers), documents, before)

    def _check_has_state(self):
        if self.bidirectional:
            raise ValueError(
                f"A bidirectional {type(self).__name__} has no state to go on from: it needs the whole sequence at "
                "once. Received: bidirectional=True. Build the layer with bidirectional=False."
            )

    def _state_specs(self, batch_size):
        leaves = self._directions()[0].state_shapes(batch_size) | {"document": ((batch_size,), "int32")}
        return {name: keras.KerasTensor(*leaf) for name, leaf in leaves.items()}

    def compute_output_spec(
        self, inputs, mask=None, segment_ids=None, reset_mask=None, initial_state=None, return_state=False
    ):
        _checks.check_last_axis(type(self).__name__, inputs.shape, self.d_model)
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        return (outputs, self._state_specs(inputs.shape[0])) if return_state else outputs

    def get_config(self):
        names = ("d_model", "expand", "proj_bias", "bidirectional", "residual_gain")
        return super().get_config() | {name: getattr(self, name) for name in names}
