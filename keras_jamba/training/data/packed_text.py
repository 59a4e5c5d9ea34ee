"""Documents packed into rows of equal length."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from keras_jamba._typing import Array
from keras_jamba.ops import _checks
from keras_jamba.training.data._ahead import EpochCache
from keras_jamba.training.data._token_weights import checked_weights
from keras_jamba.training.data.batches import ORDER, Batches, Transform


class PackedText(Batches):
    """Packed documents for next-token prediction: several isolated documents share a row, with little padding.

    A document longer than a row is cut into chunks of the row's length and a remainder. Each chunk, longest first, goes
    to the fullest row with enough capacity ("best fit decreasing"). In each epoch chunks of equal length are exchanged
    and rows are shuffled, so that all epochs have the same number of rows.

    Every token of every document is an input exactly once per epoch. Its target is the next token of its document, also
    at the end of a chunk. The last token of a document has the target `eos_id`, or weight 0. A chunk does not see the
    previous one.

    The rest of a row is padding: token 0, target 0, weight 0 and padding_mask False. Rows of padding fill up the last
    batch, so that all batches have one shape. Compile with a loss that divides by the weights, such as
    `SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")`.

    Args:
        documents: a list of arrays of integers; or, with `boundaries`, one array of all tokens. The latter may be a
            `numpy.memmap`, which stays on disk. Documents without tokens are left out.
        length: tokens t per row.
        batch_size: rows b per batch.
        boundaries: the document boundaries in the one array: 0, the end of the first document, ..., the array's length.
        eos_id: the target of a document's last token. It is never an input. None gives that token weight 0.
        weights: the weight of each token as a target, in the form of the documents: a list of arrays of numbers; or,
            with `boundaries`, one array. 0 excludes a token from the loss. The target `eos_id` has the weight 1. None
            gives all tokens the weight 1. `PackedConversations` makes such weights.
        seed, shuffle, transform, workers, max_queue_size, shard: see `Batches`.

    Returns:
        From `batch`: `({"token_ids", "segment_ids", "padding_mask"}, targets, sample_weight)`, all `(b, t)`.
        padding_mask is bool, sample_weight float32, the others int32. The segments of a row are numbered 0, 1, ...
        and its padding is the last segment.

    Raises:
        ValueError: for arguments out of range, documents that are not integers, documents without any token, and
            weights that do not belong to the tokens, are negative or not finite, or are all 0.

    Example:
        >>> from keras_jamba.training.data import PackedText
        >>> text = PackedText([[5, 6, 7], [8, 9]], length=5, batch_size=1, eos_id=1, shuffle=False)
        >>> inputs, targets, weight = text.batch(0)
        >>> inputs["token_ids"].tolist(), targets.tolist(), inputs["segment_ids"].tolist()
        ([[5, 6, 7, 8, 9]], [[6, 7, 1, 9, 1]], [[0, 0, 0, 1, 1]])

    Reference:
        [Ding et al. (2024)](https://arxiv.org/abs/2404.10830): chunks and best-fit packing.
    """

    _fills = True  # with rows of padding

    def __init__(
        self,
        documents: Iterable[npt.ArrayLike] | Array,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        boundaries: npt.ArrayLike | None = None,
        eos_id: int | None = None,
        transform: Transform | None = None,
        workers: int = 1,
        max_queue_size: int = 10,
        shard: tuple[int, int] = (0, 1),
        weights: Iterable[npt.ArrayLike] | Array | None = None,
    ) -> None:
        _checks.check_integer("length", length)
        if eos_id is not None:
            _checks.check_integer("eos_id", eos_id, at_least=0)
        self.length, self.eos_id = int(length), eos_id
        one_array = boundaries is not None
        self._tokens, boundaries = _one_array(documents, boundaries)
        self._weights = None if weights is None else checked_weights(weights, boundaries, one_array)
        begins, sizes, final = _chunks(boundaries, self.length)
        falling = np.argsort(-sizes, kind="stable")
        self._begins, self._sizes, self._final = begins[falling], sizes[falling], final[falling]
        rows, count = _best_fit(self._sizes, self.length)
        # Row r holds the slots _places[_starts[r] : _starts[r + 1]]. `_all_to_all` assigns them chunks per epoch.
        self._places = np.argsort(rows, kind="stable")
        self._starts = np.searchsorted(rows[self._places], np.arange(count + 1))
        self._assigned = EpochCache(self._all_to_all)
        super().__init__(range(count), batch_size, seed, shuffle, transform, False, workers, max_queue_size, shard)

    @property
    def utilisation(self) -> float:
        """The share of token positions in all batches that hold a token of a document."""
        return int(self._sizes.sum()) / (self.steps_per_epoch * self.batch_size * self.length)

    def _all_to_all(self, epoch):
        """Returns the chunk of each slot in an epoch, always one of the slot's size."""
        chunks = np.arange(len(self._sizes))
        if self.shuffle:
            chunks = self._random(ORDER, epoch).permuted(chunks)
        return chunks[np.argsort(-self._sizes[chunks], kind="stable")]

    def _examples(self, chosen, epoch):
        shape = (self.batch_size // self.shard[1], self.length)
        inputs = {name: np.zeros(shape, "int32") for name in ("token_ids", "segment_ids")}
        inputs["padding_mask"] = np.zeros(shape, bool)
        targets, weight = np.zeros(shape, "int32"), np.zeros(shape, "float32")
        assigned = self._assigned(epoch)
        for r, row in enumerate(chosen):
            places = self._places[self._starts[row] : self._starts[row + 1]]
            at = 0
            for chunk in assigned[places]:
                tokens, following, weights = self._chunk(chunk)
                here, known = slice(at, at + len(tokens)), slice(at, at + len(following))
                inputs["token_ids"][r, here], inputs["padding_mask"][r, here] = tokens, True
                targets[r, known], weight[r, known] = following, weights
                at = here.stop
                # The rest of the row is the next segment, until another chunk follows.
                inputs["segment_ids"][r, at:] += 1
        return inputs, targets, weight

    def _chunk(self, chunk):
        """Returns a chunk's tokens, targets and their weights.

        Without `eos_id` a document's last token has no target.
        """
        begin, size, final = self._begins[chunk], self._sizes[chunk], self._final[chunk]
        tokens = self._tokens[begin : begin + size]
        known = slice(begin + 1, begin + size + (not final))
        following = self._tokens[known]
        weights = np.ones(len(following), "float32") if self._weights is None else self._weights[known]
        if not final or self.eos_id is None:
            return tokens, following, weights
        return tokens, np.append(following, self.eos_id), np.append(weights, 1)


def _one_array(documents, boundaries):
    """Returns `(tokens, boundaries)`: all tokens in one array, and the document boundaries in it."""
    if boundaries is None:
        documents = list(documents)
        if any(map(_has_messages, documents)):
            raise ValueError(
                "PackedText takes documents of token ids. Received: messages of conversations. Pass conversations to "
                "keras_jamba.training.PackedConversations, with a tokenizer."
            )
        arrays = [np.asarray(document) for document in documents]
        bad = [i for i, x in enumerate(arrays) if x.ndim != 1 or (x.size and not np.issubdtype(x.dtype, np.integer))]
        if bad:
            raise ValueError(
                "Each document must be a one-dimensional array of integers. Received: documents"
                f"[{bad[0]}] with the shape {arrays[bad[0]].shape} and dtype {arrays[bad[0]].dtype}. Tokenize text "
                "first; for one array of all tokens pass boundaries too."
            )
        boundaries = np.cumsum([0, *map(len, arrays)])
        tokens = np.concatenate([np.zeros(0, "int32"), *(x.astype("int32") for x in arrays)])
    else:
        tokens, boundaries = documents, np.asarray(boundaries)
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                "With boundaries, documents must be one one-dimensional NumPy array of integers. Received: "
                f"{type(tokens).__name__}. Convert it with numpy.asarray, or leave boundaries out."
            )
        _check_boundaries(boundaries, len(tokens))
    if not len(tokens):
        raise ValueError(
            f"documents must have at least one token. Received: {len(boundaries) - 1} documents without tokens. "
            "Check the text."
        )
    return tokens, boundaries.astype("int64")


def _has_messages(document):
    """Returns whether a document is a message or a conversation in place of token ids."""
    first = document[:1] if isinstance(document, (list, tuple)) else [document]
    return any(isinstance(x, Mapping) for x in first)


def _check_boundaries(boundaries, end):
    good = boundaries.ndim == 1 and len(boundaries) > 1 and np.issubdtype(boundaries.dtype, np.integer)
    if not (good and boundaries[0] == 0 and boundaries[-1] == end and np.all(boundaries[1:] >= boundaries[:-1])):
        raise ValueError(
            f"boundaries must be integers that rise from 0 to the number of tokens, {end}. Received: "
            f"{boundaries!r}. Pass 0 and then the end of each document: numpy.cumsum([0, *lengths])."
        )


def _chunks(boundaries, length):
    """Returns `(begins, sizes, final)` of all chunks. `final` marks the last chunk of each document."""
    begins, ends = boundaries[:-1], boundaries[1:]
    counts = -(-(ends - begins) // length)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    chunk_begins = begins[document] + number * length
    chunk_ends = np.minimum(chunk_begins + length, ends[document])
    return chunk_begins, chunk_ends - chunk_begins, chunk_ends == ends[document]


def _best_fit(sizes, length):
    """Returns the row of each chunk, and the number of rows."""
    rows, count = np.empty(len(sizes), "int64"), 0
    rows_with = [[] for _ in range(length + 1)]  # rows by free capacity in tokens
    capacities = []  # capacities of existing rows, ascending
    for i, size in enumerate(sizes.tolist()):
        place = bisect_left(capacities, size)
        if place == len(capacities):
            row, capacity, count = count, length, count + 1
        else:
            capacity = capacities[place]
            row = rows_with[capacity].pop()
            if not rows_with[capacity]:
                del capacities[place]
        rows[i], capacity = row, capacity - size
        if capacity:
            if not rows_with[capacity]:
                insort(capacities, capacity)
            rows_with[capacity].append(row)
    return rows, count
