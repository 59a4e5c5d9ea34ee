"""PackedText: every token occurs once, documents stay apart, and targets are next tokens."""

import hypothesis
import keras
import numpy as np
import pytest
from checks import full
from hypothesis import strategies as st

import keras_jamba
from keras_jamba.training.data import PackedText

VOCABULARY = 40


def documents_of(lengths):
    """Returns documents of distinct tokens, which identify their positions."""
    bounds = np.cumsum([0, *lengths])
    return [np.arange(a, b) + 1 for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def rows_of(text, epoch=0):
    """Returns all rows of an epoch as one batch."""
    batches = [text.batch(epoch * len(text) + i) for i in range(len(text))]
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any),
    length=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    eos_id=st.sampled_from([None, 1000]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_every_token_is_one_input_and_its_target_is_the_next_token(lengths, length, batch_size, eos_id, shuffle, epoch):
    documents = documents_of(lengths)
    text = PackedText(documents, length, batch_size, shuffle=shuffle, eos_id=eos_id)
    inputs, targets, weight = rows_of(text, epoch)
    tokens, real = inputs["token_ids"], inputs["padding_mask"]
    assert sorted(tokens[real]) == list(range(1, sum(lengths) + 1))
    assert text.utilisation == real.mean()
    following = {int(a): int(b) for document in documents for a, b in zip(document[:-1], document[1:], strict=True)}
    expected = np.vectorize(lambda token: following.get(token, eos_id or 0), otypes=["int64"])(tokens)
    known = real & (expected > 0)
    np.testing.assert_array_equal(weight, known)
    np.testing.assert_array_equal(targets, np.where(known, expected, 0))
    ids = inputs["segment_ids"]
    assert np.all(np.diff(ids, axis=1) >= 0) and not ids[:, 0].any()
    # Each segment of a row is a span of one document.
    steps = np.diff(tokens, axis=1)
    same = (np.diff(ids, axis=1) == 0) & real[:, 1:]
    assert np.all(steps[same] == 1)
    ends = np.isin(tokens[:, :-1], [document[-1] for document in documents if len(document)])
    assert np.all(ids[:, 1:][ends & real[:, :-1]] > ids[:, :-1][ends & real[:, :-1]])


def test_rows_are_full_and_their_documents_change_per_epoch():
    lengths = np.random.default_rng(0).geometric(1 / 60, size=2000)
    text = PackedText(documents_of(lengths), length=256, batch_size=1)
    assert text.utilisation > 0.99
    first, second = (rows_of(text, epoch)[0] for epoch in (0, 1))
    full_rows = [
        {tuple(row) for row, ids in zip(inputs["token_ids"], inputs["segment_ids"], strict=True) if ids[-1]}
        for inputs in (first, second)
    ]
    # A span without another of the same length keeps its row.
    assert len(full_rows[0] & full_rows[1]) < 0.1 * len(full_rows[0])
    again = PackedText(documents_of(lengths), length=256, batch_size=1)
    np.testing.assert_array_equal(rows_of(again, 1)[0]["token_ids"], second["token_ids"])


def test_a_memory_mapped_file_with_boundaries_gives_the_same_rows(tmp_path):
    lengths = [5, 0, 12, 1, 7]
    documents = documents_of(lengths)
    np.concatenate(documents).astype("uint16").tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", dtype="uint16", mode="r")
    mapped = PackedText(tokens, 6, 2, boundaries=np.cumsum([0, *lengths]), eos_id=0)
    listed = PackedText(documents, 6, 2, eos_id=0)
    for a, b in zip(keras.tree.flatten(rows_of(mapped)), keras.tree.flatten(rows_of(listed)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class LanguageModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, 8)
        self.backbone = keras_jamba.JambaBackbone(
            d_model=8, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=2, d_ff=8, d_state=2
        )
        self.head = keras.layers.Dense(VOCABULARY)

    def call(self, inputs):
        masks = {name: inputs[name] for name in ("padding_mask", "segment_ids") if name in inputs}
        return self.head(self.backbone(self.embedding(inputs["token_ids"]), **masks))


@full("jax", "tensorflow")
def test_a_packed_batch_gives_the_outputs_of_each_document_alone():
    documents = [np.random.default_rng(i).integers(0, VOCABULARY, n) for i, n in enumerate((5, 3, 4, 7, 2))]
    model, length = LanguageModel(), 8
    inputs, _, _ = PackedText(documents, length, 4).batch(0)
    assert inputs["padding_mask"].any(axis=1).tolist() == [True] * 3 + [False]
    outputs = model.predict_on_batch(inputs)
    assert np.isfinite(outputs).all()
    # The causal model ignores zeros at the end. With them the backend compiles one length only.
    alone = model.predict_on_batch({"token_ids": np.stack([np.pad(x, (0, length - len(x))) for x in documents])})
    for tokens, expected in zip(documents, alone, strict=True):
        spans = [
            (row, slice(at, at + len(tokens)))
            for row in range(4)
            for at in range(length - len(tokens) + 1)
            if np.array_equal(inputs["token_ids"][row, at : at + len(tokens)], tokens)
        ]
        assert len(spans) == 1
        np.testing.assert_allclose(outputs[spans[0]], expected[: len(tokens)], atol=1e-5)


@full("jax", "tensorflow")
def test_fit_learns_from_packed_text():
    # Each token is followed by its successor.
    documents = [
        np.arange(a, a + n) % VOCABULARY for a, n in zip(range(0, 40, 4), (9, 3, 14, 6, 2, 8) * 2, strict=False)
    ]
    model = LanguageModel()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    model.compile(keras.optimizers.Adam(0.05), loss)
    history = model.fit(PackedText(documents, 8, 4), epochs=12, verbose=0).history["loss"]
    assert history[-1] < history[0] / 2


@pytest.mark.parametrize(
    "documents, arguments, message",
    [
        ([], {}, "at least one token.*0 documents"),
        ([[], []], {}, "at least one token.*2 documents"),
        ([[1], [1.5]], {}, r"integers.*documents\[1\].*float64"),
        ([[[1]]], {}, r"documents\[0\] with the shape \(1, 1\)"),
        ([[1]], {"length": 0}, "length must be an integer"),
        ([[1]], {"eos_id": -1}, "eos_id must be an integer"),
        ([1, 2], {"boundaries": [0, 2]}, "one one-dimensional NumPy array.*list"),
        (np.arange(4), {"boundaries": [0, 3]}, "from 0 to the number of tokens, 4"),
        (np.arange(4), {"boundaries": [0, 3, 2, 4]}, "rise"),
    ],
)
def test_errors_give_the_rule_what_was_received_and_the_remedy(documents, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PackedText(documents, **{"length": 4, "batch_size": 1} | arguments)


def test_shards_of_packed_text_divide_the_complete_batch():
    documents = documents_of([5, 9, 2, 14, 7, 1])
    complete = PackedText(documents, length=8, batch_size=4)
    shards = [PackedText(documents, length=8, batch_size=4, shard=(index, 2)) for index in range(2)]
    for step in range(len(complete)):
        expected, _, _ = complete.batch(step)
        for index, shard in enumerate(shards):
            inputs, _, _ = shard.batch(step)
            assert inputs["token_ids"].shape[0] == 2
            np.testing.assert_array_equal(inputs["token_ids"], expected["token_ids"][index::2])
