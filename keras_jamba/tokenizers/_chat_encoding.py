"""Token ids of a rendered conversation, and the mask of the assistant's tokens."""

import reprlib

from keras_jamba.tokenizers._tokenizer import checked_text


def check_request(return_dict, return_assistant_tokens_mask, continue_final_message):
    """Raises ValueError for arguments of apply_chat_template that do not go together."""
    given = dict(return_dict=return_dict, return_assistant_tokens_mask=return_assistant_tokens_mask)
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"{name} must be True or False. Received: {name}={reprlib.repr(value)}. Pass one of the two."
            )
    if return_assistant_tokens_mask and not return_dict:
        raise ValueError(
            "The mask of the assistant's tokens is an item of a dict. Received: return_assistant_tokens_mask=True, "
            "return_dict=False. Pass return_dict=True."
        )
    if return_assistant_tokens_mask and continue_final_message:
        raise ValueError(
            "A mask of the assistant's tokens needs complete messages. Received: return_assistant_tokens_mask=True and "
            f"continue_final_message={continue_final_message!r}. Pass continue_final_message=False."
        )


def encoded(library, text, answers):
    """Returns a dict with the keys of transformers, whose values are lists of int with one number per token.

    Args:
        library: a tokenizer of the library tokenizers.
        text: a rendered conversation.
        answers: `[(begin, end), ...]`, places of the answers in the text, in order; or None for a dict without a mask.
    """
    encoding = library.encode(checked_text(text), add_special_tokens=False)
    found = {"input_ids": encoding.ids, "attention_mask": [1] * len(encoding.ids)}
    return found if answers is None else found | {"assistant_masks": _mask(encoding.offsets, answers)}


def _mask(offsets, answers):
    """Returns 1 for each token that shares a character with an answer, otherwise 0."""
    mask, place = [], 0
    for begin, end in offsets:
        # Offsets and answers rise, so that one pass over both suffices.
        while place < len(answers) and answers[place][1] <= begin:
            place += 1
        mask.append(int(place < len(answers) and answers[place][0] < end))
    return mask
