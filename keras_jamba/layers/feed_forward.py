"""The dense feed-forward part of a block."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Config, Shape, Tensor
from keras_jamba.layers import _initializers
from keras_jamba.layers._eager_fast_path import EagerFastPath
from keras_jamba.layers._projection import Projection
from keras_jamba.layers._sublayer_quantization import SublayerQuantizationConfig
from keras_jamba.ops import _checks
from keras_jamba.ops._sharding import check_divisible
from keras_jamba.ops.quantization import gated_product


@keras.saving.register_keras_serializable(package="keras_jamba")
class FeedForward(EagerFastPath, SublayerQuantizationConfig, keras.layers.Layer):
    """SwiGLU, `down(silu(gate(x)) * up(x))`, or a two-layer perceptron with GELU, `down(gelu(up(x)))`.

    Args:
        d_model: width of input and output.
        d_ff: hidden width; None means `4 * d_model`.
        use_swiglu: True for SwiGLU, False for the perceptron.
        residual_gain: factor on the initial weights of the last projection. A model with n skip connections passes
            `n**-0.5`, so that its initial outputs are as large as a shallow model's (Radford et al. 2019, section
            2.3).

    Call arguments:
        inputs: `(b, t, d)`.

    Returns:
        `(b, t, d)`.

    Raises:
        ValueError: if an argument is out of range or the input has another width.

    Reference:
        [Shazeer (2020)](https://arxiv.org/abs/2002.05202).
    """

    @_checks.python_numbers
    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        use_swiglu: bool = True,
        residual_gain: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        d_ff = 4 * d_model if d_ff is None else d_ff
        for name, value in dict(d_model=d_model, d_ff=d_ff).items():
            _checks.check_integer(name, value)
        _checks.check_number("residual_gain", residual_gain, low=0)
        self.d_model, self.d_ff, self.use_swiglu = d_model, d_ff, use_swiglu
        self.residual_gain = residual_gain

        def dense(units, name, gain=1.0):
            return Projection(units, kernel_initializer=_initializers.xavier(gain), name=name, dtype=self.dtype_policy)

        if use_swiglu:
            self.gate_proj = dense(d_ff, "gate_proj")
        self.up_proj, self.down_proj = dense(d_ff, "up_proj"), dense(d_model, "down_proj", residual_gain)

    def build(self, input_shape: Sequence[int | None]) -> None:
        _checks.check_last_axis("FeedForward", input_shape, self.d_model)
        check_divisible(self.d_model, by_channels={"d_ff": self.d_ff})
        if self.use_swiglu:
            self.gate_proj.build((None, None, self.d_model))
        self.up_proj.build((None, None, self.d_model))
        self.down_proj.build((None, None, self.d_ff))

    def call(self, inputs: Tensor) -> Tensor:
        _checks.check_last_axis("FeedForward", inputs.shape, self.d_model)
        if not self.use_swiglu:
            return self.down_proj(ops.gelu(self.up_proj(inputs), approximate=False))
        hidden = self._hidden_of_few(inputs)
        if hidden is None:
            up = self.up_proj(inputs)
            hidden = _backend.numerics.swiglu(self.gate_proj(inputs), up)
        return self.down_proj(hidden)

    def _hidden_of_few(self, inputs):
        """Returns the hidden units from one kernel for few tokens, or None if there is none."""
        layers = self.gate_proj, self.up_proj
        if not _backend.decoding.applies(inputs) or not all(layer.is_plain_product(inputs) for layer in layers):
            return None
        return gated_product(inputs, *(layer.stored_matrix("kernel") for layer in layers))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        _checks.check_last_axis("FeedForward", input_shape, self.d_model)
        return input_shape

    def get_config(self) -> Config:
        return super().get_config() | {
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "use_swiglu": self.use_swiglu,
            "residual_gain": self.residual_gain,
        }
