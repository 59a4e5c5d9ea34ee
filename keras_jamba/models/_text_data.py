"""Texts and token ids as what `fit` takes."""

import numpy as np

from keras_jamba._padding import padded
from keras_jamba.generation.prompts import integers, prompts_of
from keras_jamba.ops import _checks


def is_text(x):
    """Whether `x` is texts or rows of ids that `fit` cannot take as they are: a list or array of them."""
    if isinstance(x, np.ndarray):
        return x.dtype.kind in "OU"
    return (
        isinstance(x, (list, tuple))
        and len(x) > 0
        and all(isinstance(row, (str, list, tuple, np.ndarray)) for row in x)
    )


def rows_of(model, x, sequence_length, adds_eos):
    """`(token_ids, mask)` `(b, t)` of texts or rows of ids, padded on the right and cut to `sequence_length`.

    Texts end with the tokenizer's eos where `adds_eos`.
    """
    config = model._config
    prompts = prompts_of(x if isinstance(x, np.ndarray) else list(x), model.tokenizer, 0, config["vocab_size"])
    rows = [prompts.row(i) for i in range(len(prompts.token_ids))]
    eos = getattr(model.tokenizer, "eos_token_id", None)
    if adds_eos and prompts.kind == "texts" and eos is not None:
        rows = [np.append(row, eos) for row in rows]
    if sequence_length is not None:
        _checks.check_integer("sequence_length", sequence_length)
    longest = max(map(len, rows))
    return padded(rows, side="post", length=min(longest, sequence_length or longest))


def next_tokens(token_ids, mask=None, segment_ids=None, reset_mask=None):
    """`(inputs, targets, weights)`: each token is to predict the one after it in its document.

    Args:
        token_ids: `(b, t + 1)`.
        mask: `(b, t + 1)` bool or None.
        segment_ids: `(b, t + 1)` or None: the last token of a document predicts nothing.
        reset_mask: `(b, t + 1)` bool or None: a token before one that is True predicts nothing.
    """
    token_ids = integers("token_ids", token_ids)
    mask = np.ones(token_ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if token_ids.ndim != 2 or token_ids.shape[1] < 2 or mask.shape != token_ids.shape:
        raise ValueError(
            "To predict the next token takes rows of at least two tokens, (b, t) with t > 1, and a padding_mask of "
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
    # The last token of a document predicts nothing and is seen by nobody: however wide a row is, it does not count.
    # A mask of nothing is left out: attention would go without its fused form, and the convolution sort tokens.
    if not weights.all():
        inputs["padding_mask"] = weights
    return inputs, token_ids[:, 1:], weights.astype("float32")
