"""Captured steps keep the results of operations on weights and constants, and never an outdated one."""

import keras
import pytest

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="XLA moves such operations out of loops")
if keras.backend.backend() == "torch":
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from keras_jamba._backend.torch._constants import Constants
    from keras_jamba._backend.torch._partial_evaluation import PartialEvaluation, are_constant

    class Recorder(TorchDispatchMode):
        """Records the names of the operations that run."""

        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.names.append(operation._schema.name.removeprefix("aten::"))
            return operation(*args, **(kwargs or {}))


def evaluated(function, *weights):
    found = PartialEvaluation(weights, Constants())
    with torch.inference_mode():
        found.record(function)
    return found


def replayed(evaluation, function):
    """Returns `(result, names of the operations that ran)`."""
    with torch.inference_mode(), Recorder() as recorder, evaluation.replaying():
        result = function()
    return result, recorder.names


def test_operations_on_weights_and_constants_run_once_and_the_others_each_time():
    weight, x = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    function = lambda: -torch.exp(weight.double()) * x + torch.arange(2)  # noqa: E731
    evaluation = evaluated(function, weight)
    for _ in range(2):
        result, names = replayed(evaluation, function)
        assert [name for name in names if name != "detach"] == ["mul", "add"]
        torch.testing.assert_close(result, function())
        x += 1


def test_changed_weights_change_the_kept_results_and_views_of_them():
    weight, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2)
    function = lambda: (2 * weight).T[0] * x + torch.exp(2 * weight)[1]  # noqa: E731
    evaluation = evaluated(function, weight)
    weight.add_(5)
    with torch.inference_mode():
        evaluation.refresh()
    result, names = replayed(evaluation, function)
    torch.testing.assert_close(result, function())
    assert "exp" not in names


def test_weights_made_in_inference_mode_are_read_anew_at_each_refresh():
    with torch.inference_mode():
        weight = torch.ones(2)
    x = torch.ones(2)
    function = lambda: torch.exp(weight) * x  # noqa: E731
    evaluation = evaluated(function, weight)
    with torch.inference_mode():
        weight.fill_(2.0)
        evaluation.refresh()
    torch.testing.assert_close(replayed(evaluation, function)[0], function())


def test_a_constant_that_the_function_overwrites_is_made_anew():
    weight, x = torch.ones(3), torch.tensor([5.0])

    def function():
        total = torch.zeros(3)
        total[1:2] += x
        return total + 2 * weight

    evaluation = evaluated(function, weight)
    for _ in range(2):
        result, names = replayed(evaluation, function)
        torch.testing.assert_close(result, torch.tensor([2.0, 7.0, 2.0]))
    assert "zeros" in names and names.count("mul") == 0


def test_random_numbers_uninitialised_memory_and_large_results_are_not_kept():
    weight, large = torch.ones(3), torch.ones(2**19)
    for function, name in (
        (lambda: torch.rand(3) + weight, "rand"),
        (lambda: torch.bernoulli(weight / 2), "bernoulli"),
        (lambda: torch.empty(3).copy_(weight), "copy_"),
        (lambda: torch.empty_like(weight).fill_(1), "fill_"),
        (lambda: large.double(), "to"),
    ):
        assert name in replayed(evaluated(function, weight, large), function)[1]


def test_only_weights_and_kept_results_are_constant_while_a_step_is_captured():
    weight, x, found = torch.ones(3), torch.ones(3), []

    def function():
        doubled = 2 * weight
        found.append([are_constant([each]) for each in (weight, doubled, x, doubled * x)])
        return doubled * x

    evaluation = evaluated(function, weight)
    replayed(evaluation, function)
    assert found[-1] == [True, True, False, False]
    assert found[0] == [False] * 4 and not are_constant([weight])
