"""Configs of layers whose sublayers may be quantized or have adapters."""

from typing import Any, Self

import keras

from keras_jamba._typing import Config
from keras_jamba.layers._quantizable import float_policy, quantizable_layers
from keras_jamba.layers._trainable import KeepsTrainable


class SublayerQuantizationConfig(KeepsTrainable):
    """A mixin for a layer with `QuantizableWeights` sublayers: its config keeps their modes and adapters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dtype_policy.quantization_mode is not None:
            raise ValueError(
                f"A {type(self).__name__} has a dtype policy in floating point; only its matrices are quantized. "
                f"Received: dtype={self.dtype_policy.name!r}. Call keras_jamba.layers.quantize on the layer, before or "
                "after it is built."
            )

    def get_config(self) -> Config:
        found = {}
        for name, layer in quantizable_layers(self):
            state = {"mode": layer.quantization_mode, "lora": [layer.lora_rank, layer.lora_alpha]}
            if layer.quantization_mode or layer.lora_rank:
                found[name] = state
        config = super().get_config()
        policies = isinstance(self.dtype_policy, keras.dtype_policies.DTypePolicyMap)
        config["dtype"] = keras.dtype_policies.serialize(self.dtype_policy if policies else float_policy(self))
        return config | ({"compact": found} if found else {})

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        found = config.pop("compact", {})
        layer = super().from_config(config)
        for name, inner in quantizable_layers(layer):
            if name in found:
                inner.lora_rank, inner.lora_alpha = found[name]["lora"]
                if found[name]["mode"]:
                    inner.set_mode(found[name]["mode"])
        return layer
