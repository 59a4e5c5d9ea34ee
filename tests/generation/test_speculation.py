"""Speculative decoding returns the tokens of plain decoding with any assistant, and counts its proposals."""

import keras
import numpy as np
import pytest
from checks import jitted, numpy
from keras import ops
from tiny_text import SIZE, tiny

import keras_jamba
from keras_jamba import _backend
from keras_jamba.generation import Assistant, BeamSampler, DraftModel, PromptLookup

PROMPTS = [[5, 6, 7, 5, 6, 7, 8], [3], [9, 8, 9, 8]]
NEW = 20
GREEDY, PENALISED = dict(temperature=0.0), dict(temperature=0.8, top_k=8, repetition_penalty=1.5)
NOT_ON_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="all backends share the loop; the other two run this test"
)


@pytest.fixture(scope="module")
def model():
    return tiny(4)  # its text repeats, but not for ever


@pytest.fixture(scope="module")
def stop(model):
    """Returns a stop token that ends one row early."""
    rows = model.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[SIZE - 1], strip_prompt=True)
    return int(rows[1][NEW // 2])


@pytest.fixture(scope="module")
def assistants():
    return {"lookup": PromptLookup(4), "draft": DraftModel(tiny(4, noise=0.05), 2)}


class Oracle(Assistant):
    """An assistant that proposes the continuation in given texts `(b, s)`, where -1 means no proposal."""

    def __init__(self, texts, num_tokens):
        super().__init__(num_tokens)
        self.texts = np.pad(texts, ((0, 0), (0, num_tokens + 1)), constant_values=-1)

    kind, calls = "oracle", 0  # all texts share one program

    def init_state(self, token_ids, mask, capacity, chunk_size):
        return {"texts": ops.convert_to_tensor(self.texts)}

    def propose(self, state, tokens, end):
        Oracle.calls += 1
        places = ops.minimum(end[:, None] + ops.arange(self.num_tokens, dtype="int32"), self.texts.shape[1] - 1)
        return ops.take_along_axis(state["texts"], places, axis=1), {}


def lookup_proposals(text, num_tokens, max_ngram):
    """Returns the proposals of `PromptLookup`, computed token by token."""
    for size in range(min(max_ngram, len(text) - 1), 0, -1):
        for begin in range(len(text) - size - 1, -1, -1):
            if text[begin : begin + size] == text[-size:]:
                longer = list(text)
                for i in range(num_tokens):
                    longer.append(longer[begin + size + i])
                return longer[len(text) :]
    return []


def most_likely(model):
    """Returns a function from a text to its most likely next token, by a full forward pass."""
    step = lambda ids, mask: model.step({"token_ids": ids, "padding_mask": mask}, model.init_cache(1, 32))[0]  # noqa: E731
    run = _backend.compilation.jit_inference(step, model.variables)

    def most_likely(text):
        ids, places = np.zeros((1, 32), "int32"), np.arange(32)[None]
        ids[0, : len(text)] = text
        logits = run(*map(ops.convert_to_tensor, (ids, places < len(text))))
        return int(numpy(logits)[0, len(text) - 1].argmax())

    return most_likely


def expected_statistics(propose, rows, limit, stop):
    """Returns the statistics of generating `rows`, each `(prompt, new tokens)`, with `propose(row, text)`."""
    rounds, proposed, accepted = [], 0, 0
    for i, (prompt, new) in enumerate(rows):
        count, row_rounds = 1, 0
        while count < limit and new[count - 1] != stop:
            proposals, rest = propose(i, [*prompt, *new[:count]]), new[count:]
            agreed = next((j for j, (a, b) in enumerate(zip(proposals, rest, strict=False)) if a != b), None)
            agreed = min(len(proposals), len(rest)) if agreed is None else agreed
            taken = min(agreed + 1, len(rest))
            ends = new[count + taken - 1] == stop
            proposed += min(len(proposals), taken if ends else limit - count)
            accepted, count, row_rounds = accepted + agreed, count + taken, row_rounds + 1
        rounds.append(row_rounds)
    return {"rounds": max(rounds), "proposed": proposed, "accepted": accepted}


def lists(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("lookup", PENALISED),
        ("draft", GREEDY),
        # XLA compiles each of these for seconds.
        *(pytest.param(*pair, marks=NOT_ON_TENSORFLOW) for pair in (("lookup", GREEDY), ("draft", PENALISED))),
    ],
    ids=["lookup-sampled", "draft-greedy", "lookup-greedy", "draft-sampled"],
)
def test_speculation_returns_the_tokens_of_plain_decoding(model, assistants, stop, name, rules):
    assistant, sampler = assistants[name], keras_jamba.Sampler(**rules, seed=10)
    given = dict(stop_token_ids=[stop], sampler=sampler)
    plain = lists(model.generate(PROMPTS, max_new_tokens=NEW, **given))
    assert lists(model.generate(PROMPTS, max_new_tokens=NEW, assistant=assistant, **given)) == plain
    found = assistant.statistics
    assert assistant.acceptance_rate == found["accepted"] / found["proposed"]
    # Each round adds at least one token to the longest row, and to any row at most its proposals and one more.
    assert NEW // (assistant.num_tokens + 1) <= found["rounds"] < NEW
    rows = [(prompt, row[len(prompt) :]) for prompt, row in zip(PROMPTS, plain, strict=True)]
    if name == "lookup":
        assert found == expected_statistics(lambda i, text: lookup_proposals(text, 4, 3), rows, NEW, stop)
    else:
        after = most_likely(assistant.model)
        assert found == expected_statistics(
            lambda i, text: [first := after(text), after([*text, first])], rows, NEW, stop
        )
    assert 0 < found["accepted"] < found["proposed"]
    # Rows may add different numbers of tokens, and one row none.
    plain = lists(model.generate(PROMPTS, max_length=7, **given))
    assert lists(model.generate(PROMPTS, max_length=7, assistant=assistant, **given)) == plain


@NOT_ON_TENSORFLOW
def test_exactly_the_right_proposals_are_accepted(model, stop):
    given = dict(max_new_tokens=NEW, stop_token_ids=[stop], sampler=keras_jamba.Sampler(**PENALISED, seed=10))
    plain = lists(model.generate(PROMPTS, **given))
    texts = np.full((3, max(map(len, plain))), -1, "int32")
    for i, row in enumerate(plain):
        texts[i, : len(row)] = row
    rows = [(prompt, row[len(prompt) :]) for prompt, row in zip(PROMPTS, plain, strict=True)]
    wrong = texts.copy()
    wrong[0, 9::3] = (wrong[0, 9::3] + 1) % SIZE  # one row: every third token is wrong; another row: no proposals
    wrong[2] = -1
    assert all(len(row) > len(prompt) + 3 for row, prompt in zip(plain, PROMPTS, strict=True))
    for text in (texts, wrong):
        oracle = Oracle(text, 3)
        assert lists(model.generate(PROMPTS, assistant=oracle, **given)) == plain
        expected = expected_statistics(lambda i, tokens, text=text: oracle_after(text[i], len(tokens)), rows, NEW, stop)
        assert oracle.statistics == expected
        assert (oracle.acceptance_rate == 1) == (text is texts)
        # Recorded or compiled once: no round runs Python. On a GPU, PyTorch runs a few rounds before it captures one.
        assert Oracle.calls <= (8 if _backend.tensors.platform() == "gpu" else 2)
        assert oracle.statistics["rounds"] > 2


def oracle_after(text, length):
    return [int(token) for token in text[length : length + 3] if token >= 0]


@NOT_ON_TENSORFLOW
def test_assistants_work_with_streams_stop_strings_and_prompt_states(model, assistants):
    given = dict(max_new_tokens=NEW, stop_token_ids=None)
    text, assistant = "abcabc", assistants["lookup"]
    new = model.generate(text, strip_prompt=True, **given)
    assert model.generate(text, strip_prompt=True, assistant=assistant, **given) == new
    chunks = list(model.stream(text, assistant=assistant, **given))
    assert "".join(chunks) == new and len(chunks) == assistant.statistics["rounds"] + 1
    assert list(model.stream([1, 2, 3, 1, 2, 3], assistant=assistant, **given)) == model.tokenizer.encode(new)
    stops = dict(stop_strings=[new[7:9]])
    assert model.generate(text, strip_prompt=True, assistant=assistant, **given, **stops) == new[: new.index(new[7:9])]
    model.generate(text, max_new_tokens=0, assistant=assistant)
    assert assistant.statistics == {"rounds": 0, "proposed": 0, "accepted": 0} and assistant.acceptance_rate == 0
    state = model.prefill(text[:4])
    assert model.generate(text, strip_prompt=True, assistant=assistant, state=state, **given) == new


def test_prompt_lookup_continues_the_latest_longest_ngram():
    rng = np.random.default_rng(0)
    tokens, ends = rng.integers(0, 4, (40, 24)).astype("int32"), rng.integers(2, 25, 40).astype("int32")
    lookup = PromptLookup(5, max_ngram=3)
    found = numpy(jitted(lambda *given: lookup.propose({}, *given)[0])(*map(ops.convert_to_tensor, (tokens, ends))))
    for row, end, proposals in zip(tokens.tolist(), ends, found.tolist(), strict=True):
        assert proposals == (lookup_proposals(row[:end], 5, 3) or [-1] * 5)
    assert (found < 0).any() and lookup_proposals([1, 2, 1, 2], 5, 3) == [1, 2, 1, 2, 1]


class MostLikely:
    def get_next_token(self, probabilities):
        return ops.argmax(probabilities, axis=-1)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda: "lookup", {}, "assistant must be a keras_jamba.generation.PromptLookup.*Received: assistant='lookup'"),
        (lambda: tiny(vocab_size=9), {}, r"For a model pass DraftModel\(model\)"),
        (lambda: DraftModel(tiny(vocab_size=9)), {}, "the vocabulary of the model, 27 tokens. Received: one of 9"),
        (lambda: DraftModel(keras.layers.Dense(3)), {}, "Received: a Dense without .*'step', 'rollback'"),
        (lambda: DraftModel(tiny(), num_tokens=0), {}, "num_tokens must be an integer of at least 1"),
        (lambda: PromptLookup(num_tokens=2.5), {}, "num_tokens must be an integer"),
        (lambda: PromptLookup(max_ngram=0), {}, "max_ngram must be an integer of at least 1"),
        (PromptLookup, dict(sampler=BeamSampler(2)), "a BeamSampler of keras_jamba, which chooses otherwise"),
        (PromptLookup, dict(sampler=MostLikely()), "an? MostLikely of test_speculation, which chooses otherwise"),
    ],
)
def test_unusable_assistants_are_refused(model, make, given, message):
    with pytest.raises(ValueError, match=message):
        model.generate([1, 2], assistant=make(), **given)
