"""PackedConversations: the targets with weight are the assistant's tokens, and nothing else changes."""

import keras
import numpy as np
import pytest
import transformers
from chats import TEMPLATE, chat_tokenizer, talk
from checks import full, jitted, numpy, once

import keras_jamba
from keras_jamba.training import Checkpoint, PackedConversations, PackedText

TALKS = [
    talk("Where?", "On the mat.", "Who?", "The cat: 🐈 é"),
    talk("Hi", "Ho"),
    [{"role": "system", "content": "Be brief"}, *talk("And?", "So.")],
    talk("No answer"),
    {"messages": [*talk("x", "y"), {"role": "tool", "content": "z"}, {"role": "assistant", "content": "w"}]},
    talk("A long question of many words, and then", "a short answer"),
]
ANSWERS = [["On the mat.", "The cat: 🐈 é"], ["Ho"], ["So."], [], ["y", "w"], ["a short answer"]]
TINY = dict(d_model=16, num_layers=2, mamba_ratio=1, num_heads=2, num_experts=2, d_ff=16, d_state=4, moe_frequency=0)


def all_rows(data, epoch=0):
    batches = [data.batch(epoch * len(data) + i) for i in range(len(data))]
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)


def model_of(tokenizer):
    keras.utils.set_random_seed(0)
    model = keras_jamba.JambaCausalLM(tokenizer.vocab_size, **TINY)
    model.tokenizer = tokenizer
    model.compile(keras.optimizers.SGD(0.5))
    return model


@pytest.mark.parametrize("length", [9, 31, 80])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_targets_with_weight_are_the_answers_with_their_ends(length, epoch):
    tokenizer = chat_tokenizer()
    inputs, targets, weight = all_rows(PackedConversations(TALKS, tokenizer, length, 2), epoch)
    assert set(np.unique(weight)) == {0, 1}
    expected = "".join(answer + "<end>" for answers in ANSWERS for answer in answers)
    found = tokenizer.decode_with_special_tokens(targets[weight == 1])
    # A chunk of another row can begin within a character.
    assert sorted(targets[weight == 1]) == sorted(tokenizer.encode(expected))
    if length == 80:
        assert sorted(found.split("<end>")) == sorted(expected.split("<end>"))
    # Without the weights these are the rows of the documents.
    messages = [x["messages"] if isinstance(x, dict) else x for x in TALKS]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=True)
    plain = all_rows(PackedText(ids, length, 2), epoch)
    keras.tree.map_structure(np.testing.assert_array_equal, (inputs, targets), plain[:2])
    assert not np.any(weight > plain[2])


def test_the_tokenizer_of_transformers_gives_the_same_batches():
    ours = chat_tokenizer()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours._tokenizer, chat_template=TEMPLATE)
    batches = [all_rows(PackedConversations(TALKS, each, 31, 2)) for each in (ours, theirs)]
    keras.tree.map_structure(np.testing.assert_array_equal, *batches)


def cross_entropy_of_answers(model, tokenizer):
    """Returns the mean over the assistant's tokens, with one call per conversation."""
    call, losses = jitted(model), []
    for conversation in TALKS:
        conversation = conversation["messages"] if isinstance(conversation, dict) else conversation
        mask = dict(return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False)
        found = tokenizer.apply_chat_template(conversation, **mask)
        # Zeros at the end change nothing, and are compiled once.
        ids = np.pad(found["input_ids"], (0, 80 - len(found["input_ids"])))
        logits = numpy(call(ids[None]))[0].astype("float64")
        log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = np.flatnonzero(found["assistant_masks"])
        losses += [-log[i - 1, ids[i]] for i in places]
    return np.mean(losses)


@full("jax", "tensorflow")
def test_the_loss_is_the_mean_over_the_assistants_tokens():
    tokenizer = chat_tokenizer()
    model = model_of(tokenizer)
    expected = cross_entropy_of_answers(model, tokenizer)
    for data in (PackedConversations(TALKS, tokenizer, 240, 1), TALKS, np.array([*TALKS, None], object)[:-1]):
        found = model.evaluate(data, verbose=0, batch_size=None if hasattr(data, "batch") else 32, return_dict=True)
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


@full("jax", "tensorflow")
def test_a_batch_without_answers_leaves_the_loss_finite():
    tokenizer = chat_tokenizer()
    model = model_of(tokenizer)
    # Rows of nine tokens without any answer are part of an epoch.
    data = PackedConversations(TALKS, tokenizer, 9, 1)
    weights = [data.batch(i)[2].any() for i in range(len(data))]
    assert any(weights) and not all(weights)
    model.fit(data, epochs=1, verbose=0)
    assert all(np.isfinite(numpy(v.value)).all() for v in model.variables)


@once
def test_fit_on_a_list_learns_its_answers():
    model = model_of(chat_tokenizer())
    model.compile(keras.optimizers.Adam(0.01))
    history = model.fit(TALKS, epochs=30, verbose=0, validation_data=TALKS[:2]).history
    assert history["loss"][-1] < history["loss"][0] / 2 and len(history["val_loss"]) == 30


def test_shards_divide_the_complete_batch_of_conversations():
    tokenizer = chat_tokenizer()
    complete = PackedConversations(TALKS, tokenizer, 31, 4, seed=3)
    for index in range(2):
        shard = PackedConversations(TALKS, tokenizer, 31, 4, seed=3, shard=(index, 2))
        for step in range(2 * len(complete)):
            part = keras.tree.map_structure(lambda x, index=index: x[index::2], complete.batch(step))
            keras.tree.map_structure(np.testing.assert_array_equal, shard.batch(step), part)


@once
def test_a_stopped_training_resumes_with_the_same_batches_and_weights(tmp_path):
    tokenizer = chat_tokenizer()

    def train(folder, epochs):
        model, data = model_of(tokenizer), PackedConversations(TALKS, tokenizer, 31, 2)
        model.fit(data, epochs=epochs, verbose=0, callbacks=[Checkpoint(folder, data, every=1)])
        return model

    complete = train(tmp_path / "a", 3)
    train(tmp_path / "b", 1)
    resumed = train(tmp_path / "b", 3)
    for a, b in zip(complete.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(numpy(a.value), numpy(b.value), err_msg=a.path)


def test_weights_of_text_follow_their_tokens(tmp_path):
    documents = [np.arange(1, 6), np.arange(6, 8), np.arange(8, 20)]
    # Each weight is its token / 4, which identifies it.
    weights = [document / 4 for document in documents]
    bounds = np.cumsum([0, *map(len, documents)])
    np.concatenate(documents).astype("uint16").tofile(tmp_path / "tokens")
    np.concatenate(weights).astype("float32").tofile(tmp_path / "weights")
    tokens, mapped = (np.memmap(tmp_path / n, t, "r") for n, t in (("tokens", "uint16"), ("weights", "float32")))
    for eos_id in (None, 40):
        listed = all_rows(PackedText(documents, 5, 2, eos_id=eos_id, weights=weights))
        on_disk = all_rows(PackedText(tokens, 5, 2, boundaries=bounds, eos_id=eos_id, weights=mapped))
        keras.tree.map_structure(np.testing.assert_array_equal, listed, on_disk)
        _, targets, weight = listed
        np.testing.assert_array_equal(weight, np.where(targets == 40, 1, targets / 4))
        assert weight.dtype == "float32"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"weights": [[1, 1]]}, "1 arrays for 2 documents"),
        ({"weights": [[1, 1], [1, 1]]}, r"weights\[0\] of shape \(2,\) for 3 tokens"),
        ({"weights": [[0, 0, 0], [0, 0]]}, "Received: values from 0 to 0"),
        ({"weights": [[1, 1, -1], [0, 0]]}, "Received: values from -1 to 1"),
        ({"weights": [[1, 1, np.nan], [0, 0]]}, "Received: values from nan to nan"),
        ({"weights": [["1"] * 3, ["1"] * 2]}, "Received: dtype <U1"),
        ({"weights": np.ones(4), "boundaries": [0, 3, 5]}, r"of shape \(5,\), one.* Received: ndarray of shape \(4,\)"),
    ],
)
def test_weights_of_other_tokens_are_refused(given, message):
    documents = np.arange(5) if "boundaries" in given else [[1, 2, 3], [4, 5]]
    with pytest.raises(ValueError, match=f"eights must .*{message}"):
        PackedText(documents, 4, 1, **given)


NO_TAG = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "conversations, template, message",
    [
        (TALKS[0], TEMPLATE, r"must be a list, and each.*Received: dict .*Pass \[messages\]"),
        ("hello", TEMPLATE, "must be a list, and each.*Received: str 'hello'"),
        (["hello"], TEMPLATE, "must be a list, and each.*Received: str 'hello'"),
        ([], TEMPLATE, r"must be a list, and each.*Received: list \[\]"),
        ([TALKS[1], [{"role": "user"}, "a"]], TEMPLATE, "must be a dict with a role.*in conversation 1, counted"),
        ([TALKS[3]], TEMPLATE, "must have an answer.*1 conversations without"),
        (TALKS, NO_TAG, "without {% generation %}.*Write .*in conversation 0"),
    ],
)
def test_other_conversations_and_templates_are_refused(conversations, template, message):
    tokenizer = chat_tokenizer(template)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PackedConversations(conversations, tokenizer, 8, 1)
    model = model_of(tokenizer)
    if conversations is TALKS:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            model.fit(conversations, verbose=0)


def test_conversations_in_another_place_get_an_error_that_says_where_they_belong():
    with pytest.raises(ValueError, match="Received: messages.*training.PackedConversations, with a tokenizer"):
        PackedText(TALKS, 8, 1)
    with pytest.raises(ValueError, match="Received: messages.*type ByteTokenizer without apply_chat_template"):
        PackedConversations(TALKS, keras_jamba.tokenizers.ByteTokenizer(), 8, 1)
    model = model_of(chat_tokenizer())
    with pytest.raises(ValueError, match=r"list of messages, which is one conversation. Pass \[messages\]"):
        model.fit(TALKS[0], verbose=0)
    with pytest.raises(ValueError, match="sequence_length=1, which truncates all answers. Raise sequence_length"):
        model.fit(TALKS, sequence_length=1, verbose=0)
