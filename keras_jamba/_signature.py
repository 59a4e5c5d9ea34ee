"""What a function that is computed by a kernel takes and gives, wherever the kernel runs."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """A function of tensors, and the one for its gradient.

    Attributes:
        name: unique among all.
        inputs: names of the tensors that go in. Most may be None.
        differentiable: how many of the inputs, the first ones, have a gradient, `grad_` and the name.
        outputs: names of the tensors that come out.
        num_residuals: how many outputs, the last ones, are for the backward pass alone.
        options: names of the integers that are neither sizes nor tensors.
        sizes: the shapes of the inputs by name, to the sizes that matter by name.
        shapes: sizes to the shapes of the outputs. The first has the dtype of the first input, the others float32.
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
        """What to answer to whoever asks for one."""
        return (
            f"The kernel of {self.name} has no second derivatives. Received: a gradient of its gradient. "
            f"Compute it with implementation={self.twice_differentiable_with!r}."
        )

    @property
    def gradients(self):
        return [f"grad_{name}" for name in self.inputs[: self.differentiable]]

    def output_specs(self, shapes, dtype, train):
        """`[(shape, dtype)]` of the outputs; without `train` the residuals are empty."""
        specs = [(shape, dtype if i == 0 else "float32") for i, shape in enumerate(self.shapes(self.sizes(shapes)))]
        return specs if train else specs[: len(specs) - self.num_residuals] + [((0,), "float32")] * self.num_residuals
