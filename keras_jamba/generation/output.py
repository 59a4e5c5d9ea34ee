"""Outputs of a generation: new tokens, their text, and the formats in which `generate` returns them."""

import numpy as np

from keras_jamba._padding import padded


class NewText:
    """Text that the new tokens of one row add to its prompt.

    The searched text, in which stop strings are found, includes special tokens, as in transformers. The returned text
    excludes them.

    Args:
        tokenizer: an object with `decode(ids)` and, if special tokens have a text, `decode_with_special_tokens(ids)`.
        prompt: the ids of the prompt.
        stop_strings: strings that end the text. The text excludes them.
    """

    def __init__(self, tokenizer, prompt, stop_strings=()):
        self._prompt, self._stops = list(prompt), tuple(stop_strings)
        self._decode = tokenizer.decode
        searched = getattr(tokenizer, "decode_with_special_tokens", None) if self._stops else None
        self._decode_searched = searched or self._decode
        self._before = {}
        # A stop string may begin in the prompt, but must end in the new text.
        longest = max(map(len, self._stops), default=0)
        self._tail = self._decode_searched(self._prompt)[-(longest - 1) :] if longest > 1 else ""

    def text(self, ids):
        """Returns the text that new tokens add to the prompt, without special tokens."""
        return self._added(self._decode, ids)

    def _searched(self, ids):
        return self._added(self._decode_searched, ids)

    def _added(self, decode, ids):
        """Returns the text that new tokens add to the prompt.

        It decodes them with the prompt: without it, some tokens lose their leading space.
        """
        if decode not in self._before:
            self._before[decode] = decode(self._prompt)
        before, text = self._before[decode], decode([*self._prompt, *ids])
        # A prompt may end in the middle of a character.
        return text[len(before) :] if text.startswith(before) else decode(ids)

    def find(self, ids):
        """Returns the start of the first stop string in the searched text, 0 for a start in the prompt, or None."""
        text = self._tail + self._searched(ids)
        first = len(self._tail) + 1
        starts = [text.find(stop, max(first - len(stop), 0)) for stop in self._stops]
        starts = [max(start - len(self._tail), 0) for start in starts if start >= 0]
        return min(starts, default=None)

    def settled(self, ids):
        """Returns the number of characters of the searched text that later tokens cannot change.

        It excludes an incomplete character and the beginning of a stop string at the end of the text.
        """
        text = (self._tail + self._searched(ids)).rstrip("\ufffd")
        partial_sizes = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )
        return max(len(text) - max(partial_sizes, default=0) - len(self._tail), 0)

    def until(self, ids, end):
        """Returns the first `end` characters of the searched text, without special tokens."""
        searched, text = self._searched(ids), self.text(ids)
        if searched == text:
            return text[:end]
        count = len(ids)
        while count and not (
            len(self._searched(ids[:count])) <= end and searched.startswith(self._searched(ids[:count]))
        ):
            count -= 1
        begin = self.text(ids[:count])
        # The token that crosses `end` adds its part before `end`. A special token adds nothing.
        special = count < len(ids) and self.text(ids[: count + 1]) == begin
        return begin if special else begin + searched[len(self._searched(ids[:count])) : end]


class GeneratedRows:
    """New tokens of all rows of a `GenerationRequest`.

    Attributes:
        tokens: the new tokens of each row.
        ended: whether each row has ended.
    """

    def __init__(self, request, tokenizer):
        self._request, self._prompts, self._tokenizer = request, request.prompts, tokenizer
        self.tokens = [[] for _ in request.limits]
        self.ended = [limit == 0 for limit in request.limits]
        # The text of each row that ended at a stop string, otherwise None.
        self._stopped_text = [None for _ in request.limits]
        if request.stop_strings or self._prompts.is_text:
            rows = map(self._prompts.row, range(len(self.tokens)))
            self._texts = [NewText(tokenizer, row, request.stop_strings) for row in rows]

    def append(self, chunk):
        """Appends new tokens to each row. It drops tokens after the end of a row."""
        for i, row in enumerate(chunk):
            for token in row:
                if not self.ended[i]:
                    self.tokens[i].append(int(token))
                    stopped = int(token) in self._request.stop_token_ids
                    self.ended[i] = stopped or len(self.tokens[i]) == self._request.limits[i]
            if self._request.stop_strings and self._stopped_text[i] is None:
                self._find_stop_string(i)

    def _find_stop_string(self, i):
        tokens, text = self.tokens[i], self._texts[i]
        if text.find(tokens) is None:
            return
        # The loop chose later tokens before the text was checked.
        while text.find(tokens[:-1]) is not None:
            tokens.pop()
        self._stopped_text[i], self.ended[i] = text.until(tokens, text.find(tokens)), True

    def settled_text(self):
        """Returns the new text of the first row, as far as later tokens cannot change it."""
        if self._stopped_text[0] is not None:
            return self._stopped_text[0]
        text, tokens = self._texts[0], self.tokens[0]
        return text.text(tokens) if self.ended[0] else text.until(tokens, text.settled(tokens))

    def result(self, strip_prompt):
        """Returns the rows in the format of the prompts. See `JambaCausalLM.generate`."""
        kind = self._prompts.kind
        if self._prompts.is_text:
            texts = [self._text(i, strip_prompt) for i in range(len(self.tokens))]
            return texts[0] if kind == "text" else texts
        rows = [self._ids(i, strip_prompt) for i in range(len(self.tokens))]
        if kind == "row":
            return rows[0]
        return rows if kind == "rows" else self._padded(strip_prompt)

    def _text(self, i, strip_prompt):
        stopped = self._stopped_text[i]
        new = self._texts[i].text(self.tokens[i]) if stopped is None else stopped
        return new if strip_prompt else self._tokenizer.decode(self._prompts.row(i)) + new

    def _ids(self, i, strip_prompt):
        before = [] if strip_prompt else self._prompts.row(i)
        return np.array([*before, *self.tokens[i]], "int32")

    def _padded(self, strip_prompt):
        """Returns `(b, t)`: the padded prompts, then the new tokens. New tokens replace padding on the right."""
        pad = self._request.pad_token_id
        new, _ = padded(self.tokens, pad, "post")
        if strip_prompt:
            return new
        before = self._prompts.token_ids
        if not self._prompts.right:
            return np.concatenate([before, new], axis=1)
        rows = [self._ids(i, strip_prompt) for i in range(len(self.tokens))]
        return padded(rows, pad, "post", before.shape[1] + new.shape[1])[0]
