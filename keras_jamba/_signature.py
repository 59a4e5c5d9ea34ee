"""Inputs and outputs of a function that a kernel computes, on a CPU or a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signature:
    """Signature of a function of tensors and of its gradient.

    Attributes:
        name: unique among all signatures.
        inputs: names of the input tensors. Most may be None.
        differentiable: the number of leading inputs that have a gradient, which is named `grad_` and the input's name.
        outputs: names of the output tensors.
        num_residuals: the number of trailing outputs that only the backward pass reads.
        options: names of the integers that are neither sizes nor tensors.
        sizes: maps `{input name: shape}` to `{size name: size}`.
        shapes: maps these sizes to the shapes of the outputs. The first output has the dtype of the first input, the
            others are float32.
        twice_differentiable_with: the implementation of the same op that has second derivatives on all backends.
    """

    name: str
    inputs: tuple
    differentiable: int
    outputs: tuple
    num_residuals: int
    options: tuple
    sizes: Callable
    shapes: Callable
    twice_differentiable_with: str

    @property
    def no_second_derivative(self):
        """The message of the error that a second derivative raises."""
        return (
            f"The kernel of {self.name} has no second derivatives. Received: a gradient of its gradient. "
            f"Compute it with implementation={self.twice_differentiable_with!r}."
        )

    @property
    def gradients(self):
        """The names of the gradients, in the order of the inputs."""
        return [f"grad_{name}" for name in self.inputs[: self.differentiable]]

    def output_specs(self, shapes, dtype, train):
        """Returns `[(shape, dtype)]` of the outputs; without `train` the residuals are empty."""
        specs = [(shape, dtype if i == 0 else "float32") for i, shape in enumerate(self.shapes(self.sizes(shapes)))]
        return specs if train else specs[: len(specs) - self.num_residuals] + [((0,), "float32")] * self.num_residuals


def _attention_sizes(shapes):
    (batch, queries, heads, width), (_, keys, groups, _) = shapes["query"], shapes["key"]
    return dict(batch=batch, queries=queries, keys=keys, heads=heads, groups=groups, width=width)


# Arguments of the `Signature` of attention of few queries, on a CPU and a GPU.
ATTENTION: dict[str, Any] = dict(
    inputs=("query", "key", "value", "positions", "documents", "key_positions", "key_documents", "sinks"),
    differentiable=3,
    outputs=("y",),
    num_residuals=0,
    options=("causal", "window"),
    sizes=_attention_sizes,
    shapes=lambda sizes: [(sizes["batch"], sizes["queries"], sizes["heads"], sizes["width"])],
    twice_differentiable_with="dense",
)
