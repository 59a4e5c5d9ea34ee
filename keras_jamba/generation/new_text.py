"""The text of new tokens, and the strings at which it ends."""


class NewText:
    """The text that the new tokens of one row add to its prompt.

    Strings are searched in the text with special tokens, as transformers does, and the text is given without these.

    Args:
        tokenizer: has `decode(ids)`, and where special tokens have a text, `decode_with_special_tokens(ids)`.
        prompt: the ids of the prompt.
        stop_strings: before one of these the text ends.
    """

    def __init__(self, tokenizer, prompt, stop_strings=()):
        self._prompt, self._stops = list(prompt), tuple(stop_strings)
        self._decode = tokenizer.decode
        searched = getattr(tokenizer, "decode_with_special_tokens", None) if self._stops else None
        self._decode_searched = searched or self._decode
        self._before = {}
        # A stop string may begin in the prompt, but must end behind it.
        longest = max(map(len, self._stops), default=0)
        self._tail = self._decode_searched(self._prompt)[-(longest - 1) :] if longest > 1 else ""

    def text(self, ids):
        """What new tokens add to the text of the prompt, without special tokens."""
        return self._added(self._decode, ids)

    def _searched(self, ids):
        return self._added(self._decode_searched, ids)

    def _added(self, decode, ids):
        """By themselves some tokens begin without their space."""
        if decode not in self._before:
            self._before[decode] = decode(self._prompt)
        before, text = self._before[decode], decode([*self._prompt, *ids])
        # A prompt may end in the middle of a character.
        return text[len(before) :] if text.startswith(before) else decode(ids)

    def find(self, ids):
        """Where in the searched text the first stop string begins, 0 if before it; None where there is none."""
        text = self._tail + self._searched(ids)
        first = len(self._tail) + 1
        places = [text.find(stop, max(first - len(stop), 0)) for stop in self._stops]
        places = [max(place - len(self._tail), 0) for place in places if place >= 0]
        return min(places, default=None)

    def settled(self, ids):
        """How much of the searched text no later token can change: no half of a character, no begun stop string."""
        text = (self._tail + self._searched(ids)).rstrip("\ufffd")
        begun = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )
        return max(len(text) - max(begun, default=0) - len(self._tail), 0)

    def until(self, ids, end):
        """The text without special tokens, of the first `end` characters of the searched text."""
        searched, text = self._searched(ids), self.text(ids)
        if searched == text:
            return text[:end]
        count = len(ids)
        while count and not (
            len(self._searched(ids[:count])) <= end and searched.startswith(self._searched(ids[:count]))
        ):
            count -= 1
        begin = self.text(ids[:count])
        # Of a token that ends later, the part before: nothing of a special one.
        special = count < len(ids) and self.text(ids[: count + 1]) == begin
        return begin if special else begin + searched[len(self._searched(ids[:count])) : end]
