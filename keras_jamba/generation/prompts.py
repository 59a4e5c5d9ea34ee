"""What is to be gone on from: prompts as rows of ids, and the state after one."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from keras import ops


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left, and how what comes out is to be given back.

    Attributes:
        token_ids, mask: `(b, t)` NumPy arrays, int32 and bool.
        kind: "text", "texts", "row", "rows" or "padded".
        right: whether padding stood on the right.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    kind: str
    right: bool = False

    @property
    def lengths(self):
        return self.mask.sum(axis=1)

    def row(self, i):
        return self.token_ids[i][self.mask[i]]


def prompts_of(inputs, tokenizer, pad_token_id, vocab_size):
    """`Prompts` of a string, a list of strings, ids, a list of lists of ids, or `{"token_ids", "padding_mask"}`.

    Raises:
        ValueError: for anything else, for prompts without tokens, and for ids out of the vocabulary.
    """
    if isinstance(inputs, str) or (_is_list(inputs) and len(inputs) and all(isinstance(x, str) for x in inputs)):
        if tokenizer is None:
            raise ValueError(
                "Text needs a tokenizer. Received: text, and a model whose tokenizer is None. Set model.tokenizer, "
                "for example to keras_jamba.tokenizers.ByteTokenizer(), or pass token ids."
            )
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        found = _padded(
            [tokenizer.encode(text) for text in texts], pad_token_id, "text" if isinstance(inputs, str) else "texts"
        )
    elif isinstance(inputs, dict):
        found = _from_dict(inputs, pad_token_id)
    else:
        found = _from_ids(inputs, pad_token_id)
    _check(found, vocab_size)
    return found


def _is_list(x):
    return isinstance(x, (list, tuple)) or (isinstance(x, np.ndarray) and x.dtype.kind in "OU")


def _from_ids(inputs, pad_token_id):
    if not isinstance(inputs, (list, tuple)):
        inputs = integers("token ids", inputs)
        if inputs.ndim == 2:
            return Prompts(inputs, np.ones(inputs.shape, bool), "padded")
    rows = list(inputs)
    if rows and not any(np.ndim(row) for row in rows):
        return _padded([rows], pad_token_id, "row")
    return _padded(rows, pad_token_id, "rows")


def _from_dict(inputs, pad_token_id):
    if set(inputs) - {"padding_mask"} != {"token_ids"}:
        raise ValueError(
            "A dict of prompts must hold token_ids, and where wanted padding_mask. "
            f"Received: {sorted(inputs)}. Leave out or add what differs."
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
            "Padding must stand on one side of a row. Received: a padding_mask that changes more than once in a row. "
            "Pad on the left or on the right."
        )
    right = bool((~mask[:, -1]).any()) if mask.shape[1] else False
    rows = [row[real].tolist() for row, real in zip(token_ids, mask, strict=True)]
    found = _padded(rows, pad_token_id, "padded", token_ids.shape[1])
    return Prompts(found.token_ids, found.mask, "padded", right)


def integers(name, x):
    """Token ids as a NumPy array, int32."""
    x = np.asarray(ops.convert_to_numpy(x))
    if x.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers. Received: dtype={x.dtype}. Pass ids, or text with a model that has a tokenizer."
        )
    # What is too large for 32 bits is in no vocabulary, and must not wrap into one.
    return np.clip(x, -1, 2**31 - 1).astype("int32")


def _padded(rows, pad_token_id, kind, length=None):
    rows = [integers("token ids", row) if len(row) else np.zeros(0, "int32") for row in rows]
    length = max([length or 0, *map(len, rows)])
    token_ids = np.full((len(rows), length), pad_token_id, "int32")
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        token_ids[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return Prompts(token_ids, mask, kind)


def _check(prompts, vocab_size):
    empty = np.flatnonzero(prompts.lengths == 0)
    if not len(prompts.token_ids) or len(empty):
        raise ValueError(
            f"Every prompt must have a token. Received: {f'none in row {empty[0]}' if len(empty) else 'no prompts'}. "
            "Begin with the token for the beginning, bos_token_id."
        )
    wrong = prompts.mask & ((prompts.token_ids < 0) | (prompts.token_ids >= vocab_size))
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        raise ValueError(
            f"Token ids must be from 0 to vocab_size - 1 = {vocab_size - 1}. Received: "
            f"{prompts.token_ids[row, place]} in row {row}. Tokenize with the model's own tokenizer; padding is told "
            "by padding_mask."
        )


@dataclass(frozen=True)
class PromptState:
    """What a model has made of a prompt: to be gone on from many times, and saved.

    Attributes:
        token_ids: the prompt's `(t,)`.
        cache: the state after it, of one row.
        logits: of the token after it, `(1, v)`.
        model: what tells the model with its weights from others.
    """

    token_ids: np.ndarray
    cache: dict
    logits: object
    model: str

    def save(self, file):
        """Writes it to a file, `numpy.load` reads it."""
        leaves = {f"cache/{block}/{leaf}": x for block, state in self.cache.items() for leaf, x in state.items()}
        arrays = {name: _storable(x) for name, x in (leaves | {"logits": self.logits}).items()}
        with open(file, "wb") as stream:
            np.savez(stream, token_ids=self.token_ids, model=np.array(self.model), **arrays)

    @classmethod
    def load(cls, file):
        """Reads what `save` wrote, on whichever backend.

        Raises:
            ValueError: if the file is damaged or another's.
        """
        try:
            # Opened here: of a damaged file NumPy would leave it open.
            with open(Path(file), "rb") as stream, np.load(stream, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            cache = {}
            for name in arrays:
                if name.startswith("cache/"):
                    _, block, leaf = name.split("/")
                    cache.setdefault(block, {})[leaf] = ops.convert_to_tensor(arrays[name])
            return cls(arrays["token_ids"], cache, ops.convert_to_tensor(arrays["logits"]), str(arrays["model"]))
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"A prompt's state must be a file that its save wrote. Received: {str(file)!r}, {error}. Prefill again."
            ) from error


def _storable(x):
    x = ops.convert_to_numpy(ops.stop_gradient(x))
    # NumPy's files do not know bfloat16; float32 holds it exactly.
    return x.astype("float32") if x.dtype.name == "bfloat16" else x
