"""Mistakes with text, token ids and generation."""

import numpy as np

import keras_jamba
from mistakes.subjects import BAD_ID, IDS, NAN, RIGHT, SIZES, Mistake, batches, fit, numbers, token_loss


def short_sequence_loss(s, **given):
    x, y = IDS[:, :-1], IDS[:, 1:]
    return s.text.evaluate(x, y, verbose=0, batch_size=2, return_dict=True, **given)["loss"]


VOCABULARY = "from 0 to vocab_size - 1"
HOLES = np.array([[True, False, True, True, True, True]] * 2)
MESSAGES = [{"role": "user", "content": "hi"}]
TEXT = [
    Mistake("call", "an id out of the vocabulary", VOCABULARY, lambda s: s.text(BAD_ID)),
    Mistake("call", "a negative id", VOCABULARY, lambda s: s.text(IDS - 11)),
    Mistake("call", "ids as floats", "token_ids must be integers", lambda s: s.text(IDS.astype("float32"))),
    Mistake("call", "ids without a batch axis", "token_ids must have the shape", lambda s: s.text(IDS[0])),
    Mistake("call", "an unknown input", "The inputs must be token ids", lambda s: s.text({"input_ids": IDS})),
    Mistake("call", "text", "Only input tensors may be passed", lambda s: s.text("hello")),
    Mistake(
        "call",
        "ids and embeddings",
        "The inputs must be token ids",
        lambda s: s.text({"token_ids": IDS, "inputs_embeds": np.zeros((2, 6, 8), "float32")}),
    ),
    Mistake(
        "call",
        "a padding_mask of another shape",
        "mask must have the shape",
        lambda s: s.text({"token_ids": IDS, "padding_mask": np.ones((2, 5), bool)}),
    ),
    Mistake(
        "call",
        "segment_ids as floats",
        "segment_ids must be integers",
        lambda s: s.text({"token_ids": IDS, "segment_ids": np.zeros((2, 6), "float32")}),
    ),
    Mistake(
        "call",
        "a reset_mask of another shape",
        "reset_mask must have the shape",
        lambda s: s.text({"token_ids": IDS, "reset_mask": np.zeros((2,), bool)}),
    ),
    Mistake(
        "call",
        "a state of another model",
        "must be a dict with",
        lambda s: s.text(IDS, initial_state={"block_0": {}}),
    ),
    Mistake(
        "call",
        "padding filled with -100",
        RIGHT,
        lambda s: (
            numbers(s.text({"token_ids": np.where(HOLES, IDS, -100), "padding_mask": HOLES}))[HOLES],
            numbers(s.text({"token_ids": IDS, "padding_mask": HOLES}))[HOLES],
        ),
    ),
    Mistake(
        "call",
        "a mask of zeros and ones",
        RIGHT,
        lambda s: (
            numbers(s.text({"token_ids": IDS, "padding_mask": HOLES.astype("int32")})),
            numbers(s.text({"token_ids": IDS, "padding_mask": HOLES})),
        ),
    ),
    Mistake("predict", "an id out of the vocabulary", VOCABULARY, lambda s: s.text.predict(BAD_ID, verbose=0)),
    Mistake(
        "predict",
        "ids without a batch axis",
        "token_ids must have the shape",
        lambda s: s.text.predict(IDS[0], verbose=0),
    ),
    Mistake(
        "predict",
        "ids as unsigned bytes",
        RIGHT,
        lambda s: (s.text.predict(IDS.astype("uint8"), verbose=0), numbers(s.text(IDS))),
    ),
    Mistake(
        "predict",
        "documents whose ids come again",
        RIGHT,
        lambda s: (
            s.text.predict({"token_ids": IDS, "segment_ids": np.array([[0, 0, 1, 1, 0, 0]] * 2)}, verbose=0),
            numbers(s.text({"token_ids": IDS, "segment_ids": np.array([[0, 0, 1, 1, 2, 2]] * 2)})),
        ),
    ),
    Mistake(
        "predict",
        "a classifier's id out of the vocabulary",
        VOCABULARY,
        lambda s: s.text_classifier.predict(BAD_ID, verbose=0),
    ),
    Mistake("fit", "an id out of the vocabulary", VOCABULARY, lambda s: fit(s.text, BAD_ID)),
    Mistake("fit", "a target out of the vocabulary", VOCABULARY, lambda s: fit(s.text, IDS, BAD_ID)),
    Mistake("fit", "text without a tokenizer", "Text needs a tokenizer", lambda s: fit(s.text, ["hello", "you"])),
    Mistake("fit", "one conversation without a list", "list of conversations", lambda s: fit(s.text, MESSAGES)),
    Mistake(
        "fit",
        "conversations and a tokenizer without a template",
        "tokenizer with a chat template",
        lambda s: fit(s.text_with_tokenizer, [MESSAGES]),
    ),
    Mistake(
        "PackedText",
        "conversations",
        "PackedConversations",
        lambda s: keras_jamba.training.PackedText([MESSAGES], length=8, batch_size=1),
    ),
    Mistake(
        "PackedText",
        "weights of other tokens",
        "one number per token",
        lambda s: keras_jamba.training.PackedText([[1, 2]], length=8, batch_size=1, weights=[[1]]),
    ),
    Mistake("fit", "rows of one token", "at least two tokens", lambda s: fit(s.text, IDS[:, :1])),
    Mistake("fit", "weights and no targets", "sample_weight", lambda s: fit(s.text, IDS, sample_weight=np.ones(2))),
    Mistake(
        "fit",
        "weights of another shape",
        "sample_weight",
        lambda s: fit(s.text, IDS, IDS, sample_weight=np.ones((2, 3))),
    ),
    Mistake(
        "fit", "a classifier's labels out of range", "labels", lambda s: fit(s.text_classifier, IDS, np.array([0, 3]))
    ),
    Mistake(
        "fit",
        "a later batch with an id out of the vocabulary",
        NAN,
        lambda s: fit(
            s.compiled_in("float32"),
            batches((IDS, IDS), (BAD_ID, IDS)),
            steps_per_epoch=2,
        ),
    ),
    Mistake("evaluate", "an id out of the vocabulary", VOCABULARY, lambda s: s.text.evaluate(BAD_ID, verbose=0)),
    Mistake(
        "evaluate",
        "one weight per row",
        RIGHT,
        lambda s: (
            short_sequence_loss(s, sample_weight=np.array([1.0, 3.0])),
            token_loss(s.text, IDS[:, :-1], IDS[:, 1:], np.array([[1.0], [3.0]])),
        ),
    ),
    Mistake(
        "compile",
        "a loss of probabilities for logits",
        "from_logits=True",
        lambda s: keras_jamba.JambaCausalLM(11, **SIZES).compile("adam", "sparse_categorical_crossentropy"),
    ),
    Mistake(
        "fit",
        "training in pure float16",
        "float16",
        lambda s: fit(s.compiled_in("float16"), IDS, IDS),
    ),
    Mistake("compile", "an unknown sampler", "sampler", lambda s: s.compiled_in("float32", sampler="nucleus")),
    Mistake("generate", "None", "Received: None", lambda s: s.text_with_tokenizer.generate(None)),
    Mistake("generate", "no prompts", "Every prompt must have a token", lambda s: s.text_with_tokenizer.generate([])),
    Mistake("generate", "text without a tokenizer", "Text needs a tokenizer", lambda s: s.text.generate("hello")),
    Mistake("generate", "temperature=0.7", "Sampler", lambda s: s.text_with_tokenizer.generate("a", temperature=0.7)),
    Mistake(
        "generate",
        "a misspelt option",
        "Received: .*max_token",
        lambda s: s.text_with_tokenizer.generate("a", max_token=3),
    ),
    Mistake(
        "generate",
        "max_length shorter than a prompt",
        "max_length",
        lambda s: s.text_with_tokenizer.generate("abcdef", max_length=3),
    ),
    Mistake(
        "generate",
        "max_new_tokens=-1",
        "max_new_tokens must be",
        lambda s: s.text_with_tokenizer.generate("a", max_new_tokens=-1),
    ),
    Mistake("generate", "an id out of the vocabulary", VOCABULARY, lambda s: s.text.generate([1, 11])),
    Mistake("generate", "ids as floats", "must be integers", lambda s: s.text.generate([1.5, 2.5])),
    Mistake(
        "generate",
        "padding in the middle of a row",
        "one side of a row",
        lambda s: s.text.generate({"token_ids": IDS, "padding_mask": HOLES & [True, True, False, True, True, True]}),
    ),
    Mistake(
        "generate", "stop strings without a tokenizer", "tokenizer", lambda s: s.text.generate([1], stop_strings=["."])
    ),
    Mistake("generate", "an unknown sampler", "sampler", lambda s: s.text.generate([1], sampler="nucleus")),
    Mistake(
        "generate", "a conversation without a template", "template", lambda s: s.text_with_tokenizer.generate(MESSAGES)
    ),
    Mistake(
        "generate",
        "an assistant that is a name",
        "assistant must be",
        lambda s: s.text.generate([1], assistant="draft"),
    ),
    Mistake(
        "generate",
        "the state of another prompt",
        "must begin with",
        lambda s: s.text.generate([4, 5], state=s.text.prefill([1, 2])),
    ),
    Mistake("stream", "a batch", "one prompt", lambda s: s.text.stream([[1], [2]])),
    Mistake(
        "stream",
        "beams",
        "BeamSampler",
        lambda s: s.text.stream([1], sampler=keras_jamba.generation.BeamSampler(num_beams=2)),
    ),
    Mistake("Sampler", "top_k=0", "top_k must be", lambda s: keras_jamba.Sampler(top_k=0)),
    Mistake("Sampler", "top_p=2", "top_p must be", lambda s: keras_jamba.Sampler(top_p=2)),
    Mistake("tokenizer", "a number", "Received", lambda s: s.text_with_tokenizer.tokenizer(3)),
]
