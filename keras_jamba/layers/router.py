"""The router of a mixture of experts."""

from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

from keras_jamba import _backend
from keras_jamba._typing import Config, Tensor
from keras_jamba.layers import _initializers
from keras_jamba.layers._decay import without_decay
from keras_jamba.layers._trainable import KeepsTrainable
from keras_jamba.ops import (
    _checks,
    router_z_loss,
    switch_balance_loss,
    top_k_routing,
    variance_balance_loss,
)
from keras_jamba.ops.routing import finite_routing

BALANCE_LOSSES = ("variance", "switch")


@keras.saving.register_keras_serializable(package="keras_jamba")
class Router(KeepsTrainable, keras.layers.Layer):
    """Router that chooses k experts per token, in float32 under every dtype policy, and adds the auxiliary loss.

    For another policy, subclass `Router` and override `choose`, `auxiliary_loss` or both. Register the class with
    `keras.saving.register_keras_serializable`, and pass an instance: `MoELayer(d_model, router=MyRouter(8, 2))`.

    Each call, in training and evaluation, adds the auxiliary loss, so that `loss` and `val_loss` are the same quantity.
    `aux_loss`, a weight of the layer, holds its last value. A call adds no loss if the attribute `adds_loss` is False.
    A model that computes one loss over all its layers sets it to False.

    Args:
        num_experts: number of experts x.
        num_experts_per_token: number of experts per token k, at most num_experts.
        normalize_top_k: whether the k weights of a token sum to 1; False for Jamba's checkpoints.
        balance_loss: "variance", `sum((usage - 1/x)^2)` of the mean probabilities, or "switch" (Fedus et al.);
            see docs/concepts/architecture.md.
        balance_coefficient: weight alpha of the balance loss.
        squared_z_loss: whether the z-loss is squared. The form without the square has no lower bound.
        z_coefficient: weight beta of the z-loss.

    Call arguments:
        inputs: `(s, d)`, tokens.
        mask: `(s,)` bool or None. The losses ignore tokens where it is False.
        training: for policies that differ in training; this policy ignores it.

    Returns:
        A dict: `"logits"` and `"probabilities"` `(s, x)` float32; `"weights"` `(s, k)` float32 and `"indices"`
        `(s, k)` int32 of the chosen experts.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        [Shazeer et al. (2017)](https://arxiv.org/abs/1701.06538),
        [Fedus et al. (2021)](https://arxiv.org/abs/2101.03961),
        [Zoph et al. (2022)](https://arxiv.org/abs/2202.08906).
    """

    @_checks.python_numbers
    def __init__(
        self,
        num_experts: int = 8,
        num_experts_per_token: int = 2,
        normalize_top_k: bool = True,
        balance_loss: Literal["variance", "switch"] = "variance",
        balance_coefficient: float = 0.01,
        squared_z_loss: bool = True,
        z_coefficient: float = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        sizes = dict(num_experts=num_experts, num_experts_per_token=num_experts_per_token)
        for name, value in sizes.items():
            _checks.check_integer(name, value)
        if num_experts_per_token > num_experts:
            raise ValueError(
                "num_experts_per_token must be at most num_experts. Received: num_experts_per_token="
                f"{num_experts_per_token}, num_experts={num_experts}. Lower the first or raise the second."
            )
        _checks.check_choice("balance_loss", balance_loss, BALANCE_LOSSES)
        _checks.check_number("balance_coefficient", balance_coefficient, low=0)
        _checks.check_number("z_coefficient", z_coefficient, low=0)
        self.num_experts, self.num_experts_per_token = num_experts, num_experts_per_token
        self.normalize_top_k, self.balance_loss = normalize_top_k, balance_loss
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.squared_z_loss = squared_z_loss
        self.adds_loss = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        shape = (input_shape[-1], self.num_experts)
        self.kernel = without_decay(
            self.add_weight(shape, _initializers.xavier(), name="kernel", dtype="float32", autocast=False)
        )
        zero = keras.initializers.Constant(0.0)
        self.aux_loss = self.add_weight((), zero, name="aux_loss", dtype="float32", trainable=False, autocast=False)

    def call(self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = None) -> dict[str, Tensor]:
        routing = self.route(inputs, mask, training)
        if self.adds_loss and not _backend.compilation.is_exporting(inputs.shape):
            aux_loss = self.auxiliary_loss(finite_routing(routing), mask)
            self.add_loss(aux_loss)
            self.aux_loss.assign(ops.stop_gradient(aux_loss))
        return routing

    def route(self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = False) -> dict[str, Tensor]:
        """Returns the result of a call, but adds no loss and assigns no variable."""
        logits = ops.matmul(ops.cast(inputs, "float32"), ops.convert_to_tensor(self.kernel))
        weights, indices, probabilities = self.choose(logits, mask, training)
        return dict(logits=logits, probabilities=probabilities, weights=weights, indices=indices)

    def compute_mask(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        return None

    def choose(self, logits: Tensor, mask: Tensor | None, training: bool | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(weights, indices, probabilities)`, the policy of the router; see `ops.top_k_routing`.

        Args:
            logits: `(s, x)` float32.
            mask: `(s,)` bool or None.
            training: whether the call is in training, where a policy may add noise to the logits.
        """
        return top_k_routing(logits, self.num_experts_per_token, self.normalize_top_k)

    def auxiliary_loss(self, routing: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        """Returns the auxiliary loss, a float32 scalar.

        Args:
            routing: the result of a call, but tokens whose logits are not finite have equal logits and probabilities.
            mask: `(s,)` bool or None, False for padding, which does not count.
        """
        loss = ops.zeros((), "float32")
        # A loss with weight 0 would still cost about ten operations over all tokens, and their gradients.
        if self.balance_coefficient:
            loss = loss + self.balance_coefficient * self._balance(routing, mask)
        if self.z_coefficient:
            loss = loss + self.z_coefficient * router_z_loss(routing["logits"], self.squared_z_loss, mask)
        return loss

    def _balance(self, routing, mask):
        if self.balance_loss == "variance":
            return variance_balance_loss(routing["probabilities"], mask)
        return switch_balance_loss(routing["probabilities"], routing["indices"], mask)

    def compute_output_spec(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = None
    ) -> dict[str, Tensor]:
        wide, chosen = (inputs.shape[0], self.num_experts), (inputs.shape[0], self.num_experts_per_token)
        return {
            "logits": keras.KerasTensor(wide, "float32"),
            "probabilities": keras.KerasTensor(wide, "float32"),
            "weights": keras.KerasTensor(chosen, "float32"),
            "indices": keras.KerasTensor(chosen, "int32"),
        }

    def get_config(self) -> Config:
        return super().get_config() | self.options()

    def options(self) -> Config:
        """Returns the constructor arguments other than those of `keras.layers.Layer`."""
        return {
            "num_experts": self.num_experts,
            "num_experts_per_token": self.num_experts_per_token,
            "normalize_top_k": self.normalize_top_k,
            "balance_loss": self.balance_loss,
            "balance_coefficient": self.balance_coefficient,
            "squared_z_loss": self.squared_z_loss,
            "z_coefficient": self.z_coefficient,
        }


def router_from_config(config):
    """Returns the router of a serialized config; None stays None.

    The class must be `Router` or a registered subclass: a file never builds another class.

    Raises:
        ValueError: for another class, or for arguments that it does not take.
    """
    if config is None or isinstance(config, Router):
        return config
    name = config.get("registered_name") or config.get("class_name") if isinstance(config, dict) else None
    cls = keras.saving.get_registered_object(name) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        raise ValueError(
            "The router of a config must be a Router, or a subclass that keras.saving.register_keras_serializable has "
            f"registered. Received: {name or config!r}. Decorate the class with it."
        )
    try:
        if config["class_name"] == cls.__name__:
            return keras.saving.deserialize_keras_object(config)
        error = f"class_name={config['class_name']!r}"
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        error = problem
    raise ValueError(
        f"The config of a router must hold its arguments. Received: {name!r}, {error}. Save the model again."
    )
