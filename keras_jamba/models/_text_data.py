"""Conversion of texts and token ids to the arrays of `fit`."""

import numpy as np

from keras_jamba._padding import padded
from keras_jamba.generation.prompts import integers, prompts_of
from keras_jamba.ops import _checks
from keras_jamba.tokenizers import _conversations


def is_text(x):
    """Returns whether `x` is a list or array of texts or rows of ids, which `fit` must convert."""
    if isinstance(x, np.ndarray):
        return x.dtype.kind in "OU"
    return (
        isinstance(x, (list, tuple))
        and len(x) > 0
        and all(isinstance(row, (str, list, tuple, np.ndarray)) for row in x)
    )


def rows_of(model, x, sequence_length, adds_eos):
    """Returns `(token_ids, mask)` `(b, t)` of texts or rows of ids, padded on the right.

    Rows are truncated to `sequence_length`. With `adds_eos`, texts end with the tokenizer's eos.
    """
    vocab_size = model.constructor_arguments()["vocab_size"]
    prompts = prompts_of(x if isinstance(x, np.ndarray) else list(x), model.tokenizer, 0, vocab_size)
    rows = [prompts.row(i) for i in range(len(prompts.token_ids))]
    eos = getattr(model.tokenizer, "eos_token_id", None)
    if adds_eos and prompts.kind == "texts" and eos is not None:
        rows = [np.append(row, eos) for row in rows]
    return _right_padded(rows, sequence_length)


def _right_padded(rows, sequence_length):
    if sequence_length is not None:
        _checks.check_integer("sequence_length", sequence_length)
    longest = max(map(len, rows))
    return padded(rows, side="post", length=min(longest, sequence_length or longest))


def are_conversations(x):
    """Returns whether `x` is a list or array of conversations, which `fit` must render.

    Raises:
        ValueError: for one conversation in place of a list.
    """
    rows = x.tolist() if isinstance(x, np.ndarray) and x.dtype.kind == "O" else x
    if not isinstance(rows, (list, tuple)):
        return False
    if any(map(_conversations.is_message, rows)):
        raise ValueError(
            "fit and evaluate take a list of conversations. Received: a list of messages, which is one conversation. "
            "Pass [messages]."
        )
    return any(map(_conversations.is_conversation, rows))


def conversation_rows(model, x, sequence_length):
    """Returns `(token_ids, mask, weights)` `(b, t)` of conversations, padded on the right.

    Rows are truncated to `sequence_length`. The weights, float32, are 1 for the tokens of the assistant.

    Raises:
        ValueError: for conversations that cannot be rendered, or whose answers are all truncated.
    """
    rows, weights = _conversations.encoded(x, model.tokenizer)
    token_ids, mask = _right_padded(rows, sequence_length)
    weights = padded(weights, side="post", length=token_ids.shape[1])[0].astype("float32")
    if not weights[:, 1:].any():
        raise ValueError(
            "Conversations must keep a token of an answer. Received: "
            f"sequence_length={token_ids.shape[1] - 1}, which truncates all answers. Raise sequence_length."
        )
    return token_ids, mask, weights


def next_tokens(token_ids, mask=None, segment_ids=None, reset_mask=None):
    """Returns `(inputs, targets, weights)` in which each token predicts the next one in its document.

    Args:
        token_ids: `(b, t + 1)`.
        mask: `(b, t + 1)` bool or None.
        segment_ids: `(b, t + 1)` or None: the last token of a document predicts nothing.
        reset_mask: `(b, t + 1)` bool or None: a token before a True predicts nothing.

    Raises:
        ValueError: for rows of fewer than two tokens, and for a mask of another shape.
    """
    token_ids = integers("token_ids", token_ids)
    mask = np.ones(token_ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if token_ids.ndim != 2 or token_ids.shape[1] < 2 or mask.shape != token_ids.shape:
        raise ValueError(
            "Next-token training needs rows of at least two tokens, (b, t) with t > 1, and a padding_mask of "
            f"their shape. Received: {token_ids.shape} and {mask.shape}. Pass longer rows."
        )
    inputs = {"token_ids": token_ids[:, :-1]}
    weights = mask[:, 1:] & mask[:, :-1]
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        inputs["segment_ids"] = segment_ids[:, :-1].astype("int32")
        weights &= segment_ids[:, 1:] == segment_ids[:, :-1]
    if reset_mask is not None:
        reset_mask = np.asarray(reset_mask).astype(bool)
        inputs["reset_mask"] = reset_mask[:, :-1]
        weights &= ~reset_mask[:, 1:]
    # The last token of a document predicts nothing and no other token sees it, so the mask hides it for any row width.
    # An all-True mask is omitted: it disables fused attention and makes the convolution sort tokens.
    if not weights.all():
        inputs["padding_mask"] = weights
    return inputs, token_ids[:, 1:], weights.astype("float32")
