"""Prompts as padded rows of token ids."""

from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_jamba._padding import padded
from keras_jamba.ops import _checks


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left, with the format of the outputs.

    Attributes:
        token_ids, mask: `(b, t)` NumPy arrays, int32 and bool.
        kind: format of the inputs and outputs, "text", "texts", "row", "rows" or "padded".
        right: whether the padding of the inputs was on the right.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    kind: str
    right: bool = False

    @property
    def is_text(self):
        return self.kind in ("text", "texts")

    @property
    def is_single(self):
        """Whether the input was one prompt and not a batch."""
        return self.kind in ("text", "row")

    @property
    def lengths(self):
        return self.mask.sum(axis=1)

    def row(self, i):
        return self.token_ids[i][self.mask[i]]


def prompts_of(inputs, tokenizer, pad_token_id, vocab_size):
    """Returns the `Prompts` of the inputs of `generate`.

    Args:
        inputs: a string or a list of strings; a conversation, which is a list of messages, or a list of conversations;
            a list of ids, a list of lists of ids, or an array of ids; or `{"token_ids", "padding_mask"}`.
        tokenizer: the tokenizer for text, or None.
        pad_token_id: id of the padding.
        vocab_size: size of the vocabulary. Ids are below it.

    Raises:
        ValueError: for other inputs, for prompts without tokens, and for ids out of the vocabulary.
    """
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "OU":
        inputs = inputs.tolist()
    if isinstance(inputs, dict):
        found = _from_dict(inputs, pad_token_id)
    elif isinstance(inputs, str):
        found = _from_texts([inputs], tokenizer, pad_token_id, "text")
    elif isinstance(inputs, (list, tuple)) and any(isinstance(x, str) for x in inputs):
        found = _from_texts(inputs, tokenizer, pad_token_id, "texts")
    elif _is_conversation(inputs):
        found = _from_conversations([inputs], tokenizer, pad_token_id, "text")
    elif isinstance(inputs, (list, tuple)) and any(map(_is_conversation, inputs)):
        found = _from_conversations(inputs, tokenizer, pad_token_id, "texts")
    else:
        found = _from_ids(inputs, pad_token_id)
    _check(found, vocab_size)
    return found


def _from_texts(texts, tokenizer, pad_token_id, kind):
    if tokenizer is None:
        raise ValueError(
            "Text needs a tokenizer. Received: text, and a model whose tokenizer is None. Set model.tokenizer, "
            "for example to keras_jamba.tokenizers.ByteTokenizer(), or pass token ids."
        )
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(
            f"A batch of texts must hold strings alone. Received: {type(wrong[0]).__name__} {str(wrong[0])[:60]!r} "
            "among strings. Pass a list of strings."
        )
    return _padded([tokenizer.encode(text) for text in texts], pad_token_id, kind)


def _is_conversation(x):
    return isinstance(x, (list, tuple)) and any(isinstance(message, dict) for message in x)


def _from_conversations(conversations, tokenizer, pad_token_id, kind):
    render = getattr(tokenizer, "apply_chat_template", None)
    if render is None:
        have = "None" if tokenizer is None else f"a {type(tokenizer).__name__} without apply_chat_template"
        raise ValueError(
            "A conversation needs a tokenizer with a chat template. Received: messages, and a model whose tokenizer is "
            f"{have}. Load a chat checkpoint, or pass the prompt as text."
        )
    for conversation in conversations:
        messages = conversation if isinstance(conversation, (list, tuple)) else [conversation]
        for message in messages:
            if not isinstance(message, dict) or "role" not in message:
                raise ValueError(
                    "A conversation must be a list of messages with a role and a content. Received: "
                    f"{str(message)[:60]!r} among the messages. Pass [{{'role': 'user', 'content': 'Hello!'}}]."
                )
    return _padded([render(list(x), tokenize=True) for x in conversations], pad_token_id, kind)


def _from_ids(inputs, pad_token_id):
    if inputs is None or isinstance(inputs, (bytes, bool, int, float, set)):
        raise ValueError(
            "Prompts must be a string, a list of strings, a conversation, or token ids. Received: "
            f"{type(inputs).__name__} {str(inputs)[:60]!r}. Pass for example 'Once upon a time', or [[1, 2, 3]]."
        )
    if not isinstance(inputs, (list, tuple)):
        inputs = integers("token ids", inputs)
        if inputs.ndim == 2:
            return Prompts(inputs, np.ones(inputs.shape, bool), "padded")
        if inputs.ndim != 1:
            raise ValueError(
                f"Token ids must be of shape (t,) or (b, t). Received: shape={inputs.shape}. For one prompt pass "
                "a row, for several an array of rows."
            )
    rows = list(inputs)
    try:
        ranks = {np.ndim(row) for row in rows}
    except ValueError:  # nested rows of different lengths
        ranks = {2}
    if len(ranks) > 1 or ranks - {0, 1}:
        raise ValueError(
            "A list of prompts must hold ids alone, or rows of ids alone. Received: "
            f"{str(inputs)[:60]!r}. For one prompt pass [1, 2, 3], for several [[1, 2, 3], [4]]."
        )
    return _padded([rows], pad_token_id, "row") if ranks == {0} else _padded(rows, pad_token_id, "rows")


def _from_dict(inputs, pad_token_id):
    if set(inputs) - {"padding_mask"} != {"token_ids"}:
        raise ValueError(
            "A dict of prompts must hold token_ids, and may hold padding_mask. "
            f"Received: {sorted(inputs)}. Pass only these keys."
        )
    token_ids = integers("token_ids", inputs["token_ids"])
    given = inputs.get("padding_mask")
    mask = np.ones(token_ids.shape, bool) if given is None else ops.convert_to_numpy(given).astype(bool)
    if token_ids.ndim != 2 or mask.shape != token_ids.shape:
        raise ValueError(
            "token_ids and padding_mask must have one shape (b, t). Received: "
            f"{token_ids.shape} and {mask.shape}. For one sequence add an axis, token_ids[None]."
        )
    if (np.diff(mask.astype(int), axis=1) != 0).sum(axis=1).max(initial=0) > 1:
        raise ValueError(
            "Padding must be on one side of a row. Received: a padding_mask that changes more than once in a row. "
            "Pad on the left or on the right."
        )
    right = bool((~mask[:, -1]).any()) if mask.shape[1] else False
    rows = [row[real].tolist() for row, real in zip(token_ids, mask, strict=True)]
    found = _padded(rows, pad_token_id, "padded", token_ids.shape[1])
    return Prompts(found.token_ids, found.mask, "padded", right)


def integers(name, x):
    """Returns token ids as a NumPy array, int32.

    Raises:
        ValueError: if they are not integers.
    """
    x = np.asarray(ops.convert_to_numpy(x))
    _checks.check_token_ids(x, name=name)
    # An id beyond 32 bits must stay out of the vocabulary: a cast could wrap it to a valid id.
    return np.minimum(x, 2**31 - 1).astype("int64").clip(-1).astype("int32") if x.itemsize > 2 else x.astype("int32")


def _padded(rows, pad_token_id, kind, length=None):
    rows = [integers("token ids", row) if len(row) else np.zeros(0, "int32") for row in rows]
    return Prompts(*padded(rows, pad_token_id, length=length), kind)


def _check(prompts, vocab_size):
    empty = np.flatnonzero(prompts.lengths == 0)
    if not len(prompts.token_ids) or len(empty):
        raise ValueError(
            f"Every prompt must have a token. Received: {f'none in row {empty[0]}' if len(empty) else 'no prompts'}. "
            "Begin the prompt with bos_token_id."
        )
    _checks.check_token_ids(prompts.token_ids, vocab_size, prompts.mask)
