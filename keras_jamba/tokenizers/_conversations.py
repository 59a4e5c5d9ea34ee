"""Conversations as token ids, and weights that select what the assistant wrote."""

import reprlib
from collections.abc import Mapping

import numpy as np

_EXAMPLE = "[[{'role': 'user', 'content': 'Hello!'}, {'role': 'assistant', 'content': 'Hi!'}], ...]"


def is_message(x):
    return isinstance(x, Mapping) and "role" in x


def is_conversation(x):
    """Returns whether `x` is a list of messages, or a dict that holds one."""
    if isinstance(x, Mapping):
        return "messages" in x
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], Mapping)


def encoded(conversations, tokenizer, chat_template=None):
    """Returns the token ids of conversations, and the weights of the tokens as targets.

    Args:
        conversations: a list. Each item is a list of messages, or a dict with "messages" and optionally "tools".
        tokenizer: its `apply_chat_template` renders one conversation as that of `JambaTokenizer` does.
        chat_template: the name or the text of a template, or None for that of the tokenizer.

    Returns:
        `(rows, weights)`: lists with one array `(t,)` per conversation, int32 ids, and bool for the assistant's tokens.

    Raises:
        ValueError: for another tokenizer, other conversations, a template that marks no answers, and conversations
            without any answer.
    """
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise ValueError(
            "Conversations need a tokenizer with a chat template. Received: messages, and a tokenizer of type "
            f"{type(tokenizer).__name__} without apply_chat_template. Use keras_jamba.tokenizers.JambaTokenizer, for "
            "example that of a chat checkpoint."
        )
    conversations = _listed(conversations)
    found = [_encoded(each, tokenizer, chat_template, i) for i, each in enumerate(conversations)]
    rows = [np.array(each["input_ids"], "int32") for each in found]
    weights = [np.array(each["assistant_masks"], bool) for each in found]
    if not any(row[1:].any() for row in weights):
        raise ValueError(
            "Conversations must have an answer, which the chat template encloses in {% generation %}. Received: "
            f"{len(rows)} conversations without a token of an assistant. Add messages of the role that the template "
            "takes for the assistant, or the tag."
        )
    return rows, weights


def _listed(conversations):
    """Returns conversations as a list. Raises ValueError for one conversation, and for other objects."""
    single = isinstance(conversations, (str, Mapping)) or not hasattr(conversations, "__iter__")
    listed = [conversations] if single else list(conversations)
    wrong = [x for x in listed if not is_conversation(x) and not hasattr(x, "messages")]
    if single or wrong or not listed:
        given = (wrong or [conversations])[0]
        remedy = f"Pass [messages] for one conversation, and {_EXAMPLE} for several."
        raise ValueError(
            "Conversations must be a list, and each of them a list of messages or a dict with 'messages'. Received: "
            f"{type(given).__name__} {reprlib.repr(given)}. {remedy}"
        )
    return listed


def _encoded(conversation, tokenizer, chat_template, number):
    given = dict(return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False, tokenize=True)
    if isinstance(conversation, Mapping):
        given["tools"] = conversation.get("tools")
        conversation = conversation["messages"]
    try:
        return tokenizer.apply_chat_template(conversation, chat_template=chat_template, **given)
    except ValueError as error:
        raise ValueError(f"{error} This happened in conversation {number}, counted from 0.") from error
