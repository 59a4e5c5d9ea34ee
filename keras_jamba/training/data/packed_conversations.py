"""Conversations packed into rows of equal length, with weights on what the assistant wrote."""

from collections.abc import Iterable
from typing import Any

from keras_jamba.tokenizers import _conversations
from keras_jamba.training.data.batches import Transform
from keras_jamba.training.data.packed_text import PackedText


class PackedConversations(PackedText):
    """Packed conversations for training on the assistant's turns alone.

    Each conversation is a document of `PackedText`. The chat template writes it, and the weight of a target is 1 if the
    template has the token between `{% generation %}` and `{% endgeneration %}`. All other targets, those of users,
    systems and tools, have the weight 0. The token that ends a turn has the weight 1 if it is inside the tag.

    A conversation of more than `length` tokens is cut into chunks, and a later chunk does not see the earlier ones.
    Choose a length that holds nearly all conversations. All conversations are rendered when the object is made.

    Args:
        conversations: a list of conversations. Each is a list of messages, `{"role": ..., "content": ...}`; or a dict
            with "messages" and optionally "tools", as data sets have them. Other keys of the dict are ignored.
        tokenizer: a `JambaTokenizer`, or another object with the `apply_chat_template` of transformers.
        length: tokens t per row.
        batch_size: rows b per batch.
        chat_template: the name or the text of a template; None for that of the tokenizer.
        seed, shuffle, transform, workers, max_queue_size, shard: see `Batches`.

    Returns:
        From `batch`: `({"token_ids", "segment_ids", "padding_mask"}, targets, sample_weight)`, as from `PackedText`.

    Raises:
        ValueError: for arguments out of range, conversations that the template cannot render, a template without the
            tag `{% generation %}`, and conversations without any answer.

    Example:
        >>> from keras_jamba.training.data import PackedConversations
        >>> template = "{% for m in messages %}{% if m.role == 'assistant' %}"
        >>> template += "{% generation %}{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        >>> template += "{% endfor %}"
        >>> talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
        >>> chats = PackedConversations([talk], tokenizer, length=6, batch_size=1, chat_template=template)
        >>> _, targets, weight = chats.batch(0)
        >>> tokenizer.decode(targets[weight == 1]), weight.tolist()
        ('cd!', [[0.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    """

    def __init__(
        self,
        conversations: Iterable[Any],
        tokenizer: Any,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        chat_template: str | None = None,
        transform: Transform | None = None,
        workers: int = 1,
        max_queue_size: int = 10,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        rows, weights = _conversations.encoded(conversations, tokenizer, chat_template)
        super().__init__(
            rows,
            length,
            batch_size,
            seed,
            shuffle,
            transform=transform,
            workers=workers,
            max_queue_size=max_queue_size,
            shard=shard,
            weights=weights,
        )
