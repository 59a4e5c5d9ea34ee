"""Decoding loops that PyTorch replays as CUDA graphs give the tokens of plain loops. On a CPU a stand-in replaces them.

The stand-in runs the step anew at each replay. It shows that the loop keeps, copies and releases the right tensors.
"""

import contextlib
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import ops
from tiny_text import tiny

from keras_jamba import Sampler
from keras_jamba.generation import BeamSampler, DraftModel, PromptLookup
from keras_jamba.layers import quantize

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="JAX and TensorFlow compile complete loops")
if keras.backend.backend() == "torch":
    import torch

    from keras_jamba._backend.torch import _constants as constants
    from keras_jamba._backend.torch import _graphed_loop as looped
    from keras_jamba._backend.torch import _partial_evaluation as partial

PROMPTS = [[5, 6, 7, 5, 6, 7, 8], [3], [9, 8, 9, 8]]
NEW = 12
SAMPLERS = {
    "greedy": "greedy",
    "sampled": Sampler(temperature=0.8, top_k=8, top_p=0.9, seed=3),
    "penalised": Sampler(temperature=0.0, repetition_penalty=1.5),
    "beams": BeamSampler(3),
}


class FakeGraph:
    """Stand-in for a CUDA graph. Its capture computes nothing, and each replay fills `outputs`.

    Kept results replace their operations, as in the capture.
    """

    def __init__(self, function, stream):
        self.function, self.evaluation = function, partial._of_thread.mode.evaluation

    def replay(self):
        with self.evaluation.replaying():
            self.outputs = self.function()


@pytest.fixture
def captures(monkeypatch):
    """Returns the list of captured graphs. Loops are captured from here on."""
    graphs = []
    graph = looped.Graph if torch.cuda.is_available() else FakeGraph
    monkeypatch.setattr(looped, "Graph", lambda *given, **more: graphs.append(graph(*given, **more)) or graphs[-1])
    if not torch.cuda.is_available():
        monkeypatch.setattr(looped, "_are_on_one_gpu", lambda leaves: True)
        monkeypatch.setattr(looped, "_side_stream", contextlib.nullcontext)
        monkeypatch.setattr(looped, "_synchronizations", lambda: contextlib.nullcontext([]))
        monkeypatch.setattr(constants, "without_sync_debug", lambda function, *given: function(*given))
    return graphs


@pytest.fixture
def plain(monkeypatch):
    """Returns a function that generates without graphs."""

    def generate(model, prompts=PROMPTS, **given):
        with monkeypatch.context() as patch:
            patch.setattr(looped, "_are_on_one_gpu", lambda leaves: True)
            patch.setattr(looped, "_PLAIN_STEPS", 10**9)
            found = model.generate(prompts, **{"max_new_tokens": NEW, "stop_token_ids": None} | given)
        vars(model).pop("_decoders")
        return found

    return generate


def generate(model, prompts=PROMPTS, **given):
    return model.generate(prompts, **{"max_new_tokens": NEW, "stop_token_ids": None} | given)


def assert_same(rows, expected):
    for mine, theirs in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_chooses_the_tokens_of_a_plain_loop(plain, captures, name):
    model = tiny(4)
    expected = plain(model, sampler=SAMPLERS[name])
    for count in (1, 1):  # the second generation replays the graph from its first step
        assert_same(generate(model, sampler=SAMPLERS[name]), expected)
        assert len(captures) == count


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_assistants_give_the_tokens_of_a_plain_loop(plain, captures, kind):
    model = tiny(4)
    expected = plain(model)
    assistant = PromptLookup(4) if kind == "lookup" else DraftModel(tiny(4, noise=0.05), 2)
    for _ in range(2):
        assert_same(generate(model, assistant=assistant), expected)
    assert len(captures) == 1 and assistant.statistics["accepted"]


@pytest.mark.parametrize("change", ["lora", "int8", "assign", "replace"])
def test_changed_weights_are_those_of_the_next_generation(plain, captures, change):
    model = tiny(4)
    generate(model)
    kernel = model.backbone.blocks[0].mixer.in_proj.kernel
    if change == "lora":
        model.enable_lora(2)
        for variable in model.trainable_variables:
            variable.assign(keras.random.normal(variable.shape, seed=4))
    elif change == "int8":
        quantize(model, "int8")
    elif change == "assign":
        kernel.assign(kernel * -1.0)
    else:  # as `model.cpu()` and `model.cuda()` do
        kernel._value = torch.nn.Parameter(-kernel.value.detach().clone())
    found = generate(model)
    assert_same(found, plain(model))
    assert len(captures) == (1 if change == "assign" else 2)


def test_a_stream_yields_the_tokens_of_a_generation(plain, captures):
    model = tiny(4)
    expected = plain(model, PROMPTS[0], strip_prompt=True)
    found = list(model.stream(PROMPTS[0], max_new_tokens=NEW, stop_token_ids=None))
    assert found == expected.tolist() and len(captures) == 1


def test_rows_end_with_their_stop_token(plain, captures):
    model = tiny(4)
    complete = plain(model, strip_prompt=True)
    stops = [int(complete[0][NEW // 2])]
    assert_same(generate(model, stop_token_ids=stops), plain(model, stop_token_ids=stops))
    assert len(captures) == 1


def test_several_prompts_continue_one_state_which_stays_unchanged(plain, captures):
    model = tiny(4)
    state = model.prefill(PROMPTS[0])
    before = [ops.convert_to_numpy(x) for x in keras.tree.flatten(state.cache)]
    prompts = [PROMPTS[0] + [i] for i in (1, 2)]
    expected = plain(model, prompts)
    for _ in range(2):
        assert_same(generate(model, prompts, state=state), expected)
    for x, y in zip(keras.tree.flatten(state.cache), before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(x), y)


def test_threads_share_graphs_and_get_their_own_tokens(plain, captures):
    model = tiny(4)
    prompts = [[i, 2 * i + 1, 5] for i in range(8)]
    expected = [plain(model, prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for found, tokens in zip(
            pool.map(lambda prompt: generate(model, prompt), prompts * 2), expected * 2, strict=True
        ):
            np.testing.assert_array_equal(found, tokens)
    assert len(captures) == 1


def test_the_process_keeps_a_bounded_number_of_graphs(plain, captures, monkeypatch):
    monkeypatch.setattr(looped, "_MAX_GRAPHS", 2)
    monkeypatch.setattr(looped, "_kept", [])
    models = [tiny(4) for _ in range(3)]
    for model in models:
        generate(model)
    kept = [loop().programs for loop, _ in looped._kept]
    assert len(captures) == 3 and list(map(len, kept)) == [1, 1]
    assert_same(generate(models[0]), plain(models[0]))
    assert len(looped._kept) == 2


def test_graphs_are_released_with_the_model(captures):
    model = tiny(4)
    generate(model)
    graph = weakref.ref(captures.pop())
    assert graph() is not None
    del model
    gc.collect()
    assert graph() is None


def test_a_refused_capture_is_logged_and_the_plain_loop_runs(plain, captures, monkeypatch, caplog):
    def refuse(*given, **more):
        raise RuntimeError("no graph here")

    model = tiny(4)
    expected = plain(model)
    monkeypatch.setattr(looped, "Graph", refuse)
    caplog.set_level(logging.INFO, "keras_jamba")
    for _ in range(2):
        assert_same(generate(model), expected)
    refusals = [record for record in caplog.records if record.message.endswith("not captured: no graph here")]
    assert len(refusals) == looped._ATTEMPTS


def test_short_generations_need_no_graph(plain, captures):
    model = tiny(4)
    assert_same(generate(model, max_new_tokens=3), plain(model, max_new_tokens=3))
    assert captures == []


def test_a_state_on_the_cpu_is_never_captured(plain, monkeypatch):
    model = tiny(4)
    expected = plain(model)
    monkeypatch.setattr(looped, "_Program", None)  # a capture would raise TypeError, which is logged
    monkeypatch.setattr(looped, "_logger", None)  # and this one raises
    if not torch.cuda.is_available():
        assert_same(generate(model), expected)


def test_a_step_that_reads_the_old_cache_later_is_never_overwritten(plain, captures):
    class TwoSteps(type(tiny(4))):
        """A model whose step runs twice from the same cache, and returns the cache of the first run."""

        def step(self, inputs, cache, **given):
            _, first = super().step(inputs, cache, **given)
            other = {"token_ids": inputs["token_ids"] * 0 + 1}
            logits, _ = super().step(other, cache, **given)
            return logits, first

    model = tiny(4)
    twice = TwoSteps(**model.constructor_arguments())
    for mine, its in zip(twice.weights, model.weights, strict=True):
        mine.assign(its)
    assert_same(generate(twice), plain(twice))
    assert len(captures) == 1


def test_a_loop_whose_body_changes_shapes_continues_without_a_graph(captures):
    from keras_jamba import _backend

    def body(state):
        return ops.all(state["x"].shape[1] < 8), {"x": ops.concatenate([state["x"], state["x"][:, :1]], axis=1)}

    loop = _backend.compilation.compiled_while_loop(body, [])
    for _ in range(6):
        assert loop(ops.convert_to_tensor(True), {"x": ops.ones((1, 3))})["x"].shape == (1, 9)


def test_a_scan_of_one_token_reads_slices_of_a_wider_array():
    # The kernels read rows with a stride, or a contiguous copy.
    from keras_jamba.ops import selective_scan

    rng = np.random.default_rng(0)
    normal = lambda *shape: ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))  # noqa: E731
    u, delta, joined, A = normal(3, 1, 4), normal(3, 1, 4), normal(3, 1, 10), -ops.exp(normal(4, 5))
    B, C = joined[..., :5], joined[..., 5:]
    copies = (ops.convert_to_tensor(np.ascontiguousarray(ops.convert_to_numpy(x))) for x in (B, C))
    found, expected = selective_scan(u, delta, A, B, C), selective_scan(u, delta, A, *copies)
    np.testing.assert_array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(expected))
