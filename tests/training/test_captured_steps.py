"""Training steps that PyTorch captures as CUDA graphs. On a CPU a stand-in replaces the graph."""

import _thread
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import ops

import keras_jamba
from keras_jamba import _backend, training

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="JAX and TensorFlow compile complete steps")
if keras.backend.backend() == "torch":
    import torch

    from keras_jamba._backend.torch import _constants as constants
    from keras_jamba._backend.torch import _cuda_graph as captured


class FakeGraph:
    """Stand-in for a CUDA graph. Its capture assigns no variable; each replay fills the same output tensors."""

    pool = None

    def __init__(self, function, pool):
        self.function = function
        before = [(v, v.value.clone()) for v in self.model.variables]
        self.outputs = function()
        with torch.no_grad():
            for variable, value in before:
                variable.value.copy_(value)

    def replay(self):
        for output, value in zip(self._tensors(self.outputs), self._tensors(self.function()), strict=True):
            with torch.no_grad():
                output.copy_(value)

    def _tensors(self, outputs):
        return [x for x in keras.tree.flatten(outputs) if type(x) is torch.Tensor]


@pytest.fixture
def captures(monkeypatch):
    """Returns a function that makes PyTorch capture a model's steps and returns the list of its graphs."""

    def capture(model):
        graphs = []
        if not torch.cuda.is_available():
            graph = type("Graph", (FakeGraph,), {"model": model})
            monkeypatch.setattr(captured, "Graph", lambda *given: graphs.append(graph(*given)) or graphs[-1])
            monkeypatch.setattr(captured, "_has_gpu", lambda: True)
            monkeypatch.setattr(captured, "_side_stream", lambda: captured.contextlib.nullcontext())
            monkeypatch.setattr(captured, "_synchronizations", lambda: captured.contextlib.nullcontext([]))
            for module in (captured, constants):
                monkeypatch.setattr(module, "without_sync_debug", lambda function, *given: function(*given))
        else:
            real = captured.Graph
            monkeypatch.setattr(captured, "Graph", lambda *given: graphs.append(real(*given)) or graphs[-1])
        return graphs

    return capture


class CustomModel(keras_jamba.JambaCausalLM):
    pass


def language_model(kind=keras_jamba.JambaCausalLM, **more):
    keras.utils.set_random_seed(1)
    model = kind(vocab_size=50, d_model=32, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=4, **more)
    model.compile(training.optimizer(model, steps=20, learning_rate=0.01))
    return model


TOKENS = np.random.default_rng(0).integers(0, 50, (6, 4, 17), "int32")


def trained(model, batches=TOKENS):
    logs = [model.train_on_batch(x[:, :-1], x[:, 1:], return_dict=True) for x in batches]
    return logs, [ops.convert_to_numpy(v) for v in model.variables + model.optimizer.variables]


def test_captured_steps_train_and_log_like_eager_steps(captures):
    expected, values = trained(language_model())
    model = language_model()
    graphs = captures(model)
    logs, found = trained(model)
    assert len(graphs) == 1
    for mine, theirs in zip(logs, expected, strict=True):
        assert mine.keys() == theirs.keys()
        np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(found, values, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}])
def test_checkpointed_steps_are_captured_unless_they_draw_random_numbers(captures, options):
    runs = []
    for checkpointing in (False, True):
        model = language_model(gradient_checkpointing=checkpointing, **options)
        graphs = captures(model)
        runs.append(trained(model)[0])
        # The stand-in captures any function.
        captured_here = not (options and checkpointing and torch.cuda.is_available())
        assert len(graphs) == captured_here
    if not options:
        for mine, theirs in zip(*runs, strict=True):
            np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)


def test_recomputations_of_a_checkpoint_read_the_constants_of_the_step(monkeypatch):
    monkeypatch.setattr(constants, "without_sync_debug", lambda function, *given: function(*given))
    mode = constants.Constants()
    x = torch.ones(3, requires_grad=True)
    scaled = _backend.autodiff.remat(lambda x: x * torch.as_tensor(2.0), draws=False)
    with mode.recording():
        scaled(x)
    (key,) = mode.found
    mode.found[key] = torch.tensor(5.0)
    with mode.replaying():
        y = scaled(x).sum()
        # Only the recomputation runs here: its constant is the factor of the gradient.
        (gradient,) = torch.autograd.grad(y, x)
    np.testing.assert_array_equal(gradient, [5.0] * 3)


def test_packed_steps_are_captured(captures):
    ids = np.repeat(np.arange(4), 4)[None].repeat(4, 0).astype("int32")
    runs = []
    for capture in (lambda model: [], captures):
        model = language_model()
        graphs = capture(model)
        batches = [({"token_ids": x[:, :-1], "segment_ids": ids}, x[:, 1:]) for x in TOKENS]
        runs.append([model.train_on_batch(*batch, return_dict=True) for batch in batches])
    assert len(graphs) == 1
    for mine, theirs in zip(*runs, strict=True):
        np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)


def test_a_step_with_documents_reads_no_number_from_the_device():
    layer = keras_jamba.layers.AttentionLayer(16, num_heads=2)
    x = ops.ones((2, 8, 16))
    ids = ops.cast(np.repeat([[0, 1]], 4, axis=1).repeat(2, axis=0), "int32")
    keras_jamba.ops.attention_implementations()
    layer(x, segment_ids=ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_JAMBA_ATTENTION", "dense")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the profiler itself
            with torch.profiler.profile() as profile:
                layer(x, segment_ids=ids)
    assert "aten::_local_scalar_dense" not in {event.name for event in profile.events()}


def test_captured_steps_cast_all_weights_together(captures):
    model = language_model(dtype="mixed_bfloat16")
    made = []
    kind = captured.WeightCasts
    with pytest.MonkeyPatch.context() as patch:
        cast_all = lambda casts, weights: (kind_cast_all(casts, weights), made.append(dict(casts.made)))  # noqa: E731
        kind_cast_all = kind.cast_all
        patch.setattr(kind, "cast_all", cast_all)
        captures(model)
        found = trained(model)[0]
    assert len(made[0]) > 15 and {x.dtype for x in made[0].values()} == {torch.bfloat16}
    expected = trained(language_model(dtype="mixed_bfloat16"))[0]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-3, atol=1e-4)


def test_casts_of_an_assigned_or_a_checkpointed_weight_are_single():
    assigned, inside = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    twice = _backend.autodiff.remat(lambda w: 2 * w.to(torch.bfloat16), draws=False)
    casts = captured.WeightCasts()
    with casts.recording():
        assigned.to(torch.bfloat16), twice(inside)
    with casts.replaying():
        casts.cast_all([assigned, inside])
        assert {key[0] for key in casts.made} == {id(assigned)}
        with torch.no_grad():
            assigned.add_(2)
        found = assigned.to(torch.bfloat16).tolist(), twice(inside).tolist()
    assert found == ([2.0] * 3, [2.0] * 3)


def test_cast_weights_have_the_gradients_of_single_casts():
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    unused, twice = torch.randn(2, requires_grad=True), torch.randn(4, requires_grad=True)
    everything = [*weights, unused, twice]

    def loss():
        products = [(3 * w.to(torch.bfloat16)).square().sum() for w in [*weights, twice, twice]]
        return sum(products).float()

    casts = captured.WeightCasts()
    with casts.recording():
        expected = torch.autograd.grad(loss(), everything, allow_unused=True)
    with casts.replaying():
        casts.cast_all(everything)
        assert len(casts.made) == 2
        found = torch.autograd.grad(loss(), everything, allow_unused=True)
    assert casts.made is None and found[2] is None and expected[2] is None
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not None:
            assert mine.dtype == torch.float32
            np.testing.assert_array_equal(mine, theirs)


def test_frequent_batch_shapes_are_captured_and_rare_ones_are_not(captures):
    model = language_model()
    graphs = captures(model)
    trained(model, [*TOKENS[:4], *(x[:2] for x in TOKENS[:5]), TOKENS[5][:, :9], TOKENS[4]])
    assert len(graphs) == 2


def test_later_steps_do_not_overwrite_the_logs_of_a_step(captures):
    model = language_model()
    captures(model)
    model.make_train_function()
    model.reset_metrics()
    steps = [model.train_function([(x[:, :-1], x[:, 1:])])["loss"] for x in TOKENS]
    assert len({float(loss) for loss in steps}) == len(steps)


def test_weights_frozen_after_a_capture_stay_unchanged(captures):
    model = language_model()
    graphs = captures(model)
    trained(model)
    model.token_embedding.trainable = False
    before = ops.convert_to_numpy(model.token_embedding.embeddings)
    trained(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.token_embedding.embeddings), before)
    assert len(graphs) == 2


def mean_of_logits(y_true, y_pred):
    return ops.mean(y_pred)


@pytest.mark.parametrize("kind", ["loss", "eager", "model", "step", "method"])
def test_steps_with_custom_code_are_not_captured(captures, kind):
    model = language_model(CustomModel if kind == "model" else keras_jamba.JambaCausalLM)
    graphs = captures(model)
    if kind == "loss":
        model.compile("adam", loss=mean_of_logits)
    elif kind == "eager":
        model.compile("adam", run_eagerly=True)
    elif kind == "step":
        step = model.train_step
        model.train_step = lambda data: step(data)
    elif kind == "method":
        model.compute_metrics = lambda *given, **more: type(model).compute_metrics(model, *given, **more)
    trained(model)
    assert not graphs


def test_steps_that_cannot_be_captured_run_eagerly(captures, monkeypatch, caplog):
    expected, values = trained(language_model())
    model = language_model()
    captures(model)

    def refuse(*given):
        raise RuntimeError("a step that synchronises the device")

    monkeypatch.setattr(captured, "Graph", refuse)
    with caplog.at_level("INFO", "keras_jamba"):
        logs, found = trained(model)
    np.testing.assert_allclose([x["loss"] for x in logs], [x["loss"] for x in expected], rtol=1e-6)
    # A GPU sums the gradients of embeddings in any order.
    bounds = dict(rtol=1e-3, atol=1e-6) if _backend.tensors.platform() == "gpu" else dict(rtol=1e-6, atol=1e-7)
    for mine, theirs in zip(found, values, strict=True):
        np.testing.assert_allclose(mine, theirs, **bounds)
    assert "a step that synchronises the device" in caplog.text


def test_moved_weights_are_captured_again(captures):
    expected, values = trained(language_model(), [*TOKENS, *TOKENS])
    model = language_model()
    graphs = captures(model)
    trained(model)
    model.double()
    model.float()
    _, found = trained(model)
    assert len(graphs) == 2
    for mine, theirs in zip(found, values, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_quantized_model_is_captured_again(captures):
    # No layer has experts: on a GPU, quantized experts are read one by one, which synchronises the device.
    model = language_model(moe_frequency=3, moe_offset=2)
    graphs = captures(model)
    trained(model)
    keras_jamba.layers.quantize(model.backbone, "int8")
    trained(model)
    assert len(graphs) == 2


@pytest.mark.parametrize("mode", [0, 1])
def test_synchronisations_of_other_python_threads_are_ignored(monkeypatch, mode):
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def synchronise(name):
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, name, 1)

    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with captured._synchronizations() as synchronised:
            with ThreadPoolExecutor(1) as callbacks:
                callbacks.submit(synchronise, "callback.py").result()
            warnings.warn("something else", UserWarning, stacklevel=1)
            assert not synchronised
            synchronise("step.py")
            # PyTorch computes gradients in threads that Python did not start.
            done = threading.Event()
            _thread.start_new_thread(lambda: (synchronise("gradient.py"), done.set()), ())
            done.wait()
    assert synchronised == ["step.py:1", "gradient.py:1"]
    # A user who has set the mode gets the warnings of the other threads.
    expected = ["called a synchronizing CUDA operation"] * mode + ["something else"]
    assert [str(warning.message) for warning in others] == expected


def test_a_wrapped_optimizer_apply_sees_every_update(captures):
    model = language_model()
    graphs = captures(model)
    apply, seen = model.optimizer.apply, []
    model.optimizer.apply = lambda *given: (seen.append(len(given[0])), apply(*given))
    trained(model)
    assert len(graphs) == 1 and len(seen) == len(TOKENS)


@pytest.mark.skipif("torch" not in globals() or not torch.cuda.is_available(), reason="requires a GPU")
def test_a_metric_that_synchronises_the_gpu_prevents_its_capture_only(captures):
    class Synchronising(keras.metrics.Mean):
        def update_state(self, values, *given, **more):
            super().update_state(float(values[0, 0]))

    Synchronising.__module__ = "keras.metrics"
    model = language_model()
    model.compile("adam", weighted_metrics=[Synchronising()])
    graphs, before = captures(model), torch.cuda.current_stream()
    trained(model)
    assert not graphs and torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    model = language_model()
    graphs = captures(model)
    trained(model)
    assert len(graphs) == 1
