"""The base class of mixers with a recurrent state."""

from collections.abc import Sequence

import keras

from keras_jamba._typing import Tensor, Tensors
from keras_jamba.layers import states
from keras_jamba.layers._eager_fast_path import EagerFastPath
from keras_jamba.layers._masks import mask_of
from keras_jamba.layers._sublayer_quantization import SublayerQuantizationConfig
from keras_jamba.ops import _checks
from keras_jamba.ops._tokens import zero_padding


class RecurrentMixer(EagerFastPath, SublayerQuantizationConfig, keras.layers.Layer):
    """The abstract base of `MambaLayer` and `GatedConvLayer`: the state, the step and the rollback.

    A subclass defines the constructor, `build`, `call`, `_forward_layer` and `get_config`.

    Attributes:
        d_model: width of input and output.
        bidirectional: whether a second recurrence runs from the last token to the first.
    """

    d_model: int
    bidirectional: bool

    @property
    def _forward_layer(self):
        """The sublayer that runs from the first token to the last and holds the state."""
        raise NotImplementedError

    def init_cache(self, batch_size: int, max_length: int | None = None) -> dict[str, Tensor]:
        """Returns the state before the first token. `max_length` matters to attention only."""
        states.check_has_state(self)
        _checks.check_integer("batch_size", batch_size)
        return states.empty_state(self._state_specs(batch_size))

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

        A step equals a call with `initial_state`. Its cost does not depend on the number of earlier tokens.

        Returns:
            `(outputs, cache)`; with `return_rollback_state` also the input of `rollback`.
        """
        given = dict(mask=mask, segment_ids=segment_ids, reset_mask=reset_mask, initial_state=cache)
        return self(inputs, **given, return_state=True, return_rollback_state=return_rollback_state)

    def rollback(self, rollback_state: Tensors, count: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Returns the cache after only the first `count` tokens of a step; see `JambaBackbone.rollback`.

        No projection runs again: the state is computed anew from the inputs of the convolution and of the scan.
        """
        return states.rolled_back(self._forward_layer, self._state_specs, rollback_state, count)

    def _state_specs(self, batch_size):
        return states.recurrent_specs(self._forward_layer, batch_size)

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reset_mask: Tensor | None = None,
        initial_state: dict[str, Tensor] | None = None,
        return_state: bool = False,
        return_rollback_state: bool = False,
    ) -> Tensors:
        _checks.check_last_axis(type(self).__name__, inputs.shape, self.d_model)
        if return_rollback_state:
            raise ValueError(
                "A rollback state is returned of tensors, not of symbolic inputs. Received: "
                "return_rollback_state=True. Call the layer on tensors."
            )
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        if not return_state:
            return outputs
        return outputs, states.symbolic_state(self._state_specs(inputs.shape[0]))


def checked_sequence(layer, inputs, tokens, initial_state, return_state, return_rollback_state):
    """Checks the arguments of a call of a `RecurrentMixer`.

    Args:
        layer: the mixer.
        inputs: `(b, t, d)`.
        tokens: `(mask, segment_ids, reset_mask)`, each `(b, t)` or None.
        initial_state, return_state, return_rollback_state: see `MambaLayer`.

    Returns:
        `(inputs with zeros at padding, initial state or None, checked tokens, states.SequenceState)`.
    """
    if initial_state is not None or return_state or return_rollback_state:
        states.check_has_state(layer)
    states.check_rollback_request(layer, initial_state, return_rollback_state)
    _checks.check_last_axis(type(layer).__name__, inputs.shape, layer.d_model)
    if initial_state is not None:
        specs = states.recurrent_specs(layer._forward_layer, inputs.shape[0])
        initial_state = _checks.check_state("initial_state", initial_state, specs)
    mask, segment_ids, reset_mask = tokens
    tokens = _checks.check_sequence(mask_of(inputs, mask), segment_ids, reset_mask, inputs.shape)
    inputs = zero_padding(inputs, tokens[0])
    return inputs, initial_state, tokens, states.SequenceState.begin(initial_state, *tokens, inputs)
