"""Documents packed into rows of one length."""

from bisect import bisect_left, insort

import numpy as np

from keras_jamba.ops import _checks
from keras_jamba.training.data._ahead import Latest
from keras_jamba.training.data.batches import ORDER, Batches


class PackedText(Batches):
    """Documents of tokens, several to a row, that do not see each other: next-token prediction without padding.

    A document longer than a row is cut into pieces of the row's length and a rest. Pieces, longest first, go each to
    the fullest row that has room ("best fit decreasing"); in each epoch pieces of equal length change places, and the
    rows are shuffled, so that the number of rows is the same in all. Every token of every document is an input exactly
    once an epoch. Its target is the token after it in its document, at the end of a piece too; the last of a document
    is to predict `eos_id`, or has weight 0. A piece does not see the one before it.

    What is left of a row has token 0, target 0, weight 0 and no padding_mask. The last batch is filled up with
    such rows: all batches have one shape. Compile with a loss that divides by the weights, such as
    `SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")`.

    Args:
        documents: a list of arrays of integers; or, with `boundaries`, one array of all tokens, which may be a
            `numpy.memmap`: it is read where it lies. Documents without tokens are left out.
        length: tokens t in a row.
        batch_size: rows b in a batch.
        boundaries: where documents begin and end in the one array: 0, the end of the first, ..., its length.
        eos_id: the target of a document's last token. None: it has weight 0. As an input it does not occur.
        seed, shuffle, transform, workers, max_queue_size, shard: see `Batches`.

    Returns:
        From `batch`: `({"token_ids", "segment_ids", "padding_mask"}, targets, sample_weight)`, all `(b, t)`;
        padding_mask bool, sample_weight float32, the others int32. The segments of a row are numbered 0, 1, ...
        and its padding is the last.

    Raises:
        ValueError: for arguments out of range, documents that are not integers, or none.

    Example:
        >>> from keras_jamba.training.data import PackedText
        >>> text = PackedText([[5, 6, 7], [8, 9]], length=5, batch_size=1, eos_id=1, shuffle=False)
        >>> inputs, targets, weight = text.batch(0)
        >>> inputs["token_ids"].tolist(), targets.tolist(), inputs["segment_ids"].tolist()
        ([[5, 6, 7, 8, 9]], [[6, 7, 1, 9, 1]], [[0, 0, 0, 1, 1]])

    Reference:
        [Ding et al. (2024)](https://arxiv.org/abs/2404.10830), of which the pieces and the best fit are.
    """

    _fills = True  # with rows of padding alone

    def __init__(
        self,
        documents,
        length,
        batch_size,
        seed=0,
        shuffle=True,
        boundaries=None,
        eos_id=None,
        transform=None,
        workers=1,
        max_queue_size=10,
        shard=(0, 1),
    ):
        _checks.check_integer("length", length)
        if eos_id is not None:
            _checks.check_integer("eos_id", eos_id, at_least=0)
        self.length, self.eos_id = int(length), eos_id
        self._tokens, boundaries = _one_array(documents, boundaries)
        begins, sizes, final = _pieces(boundaries, self.length)
        falling = np.argsort(-sizes, kind="stable")
        self._begins, self._sizes, self._final = begins[falling], sizes[falling], final[falling]
        rows, count = _best_fit(self._sizes, self.length)
        # Row r has the places from _starts[r] to _starts[r + 1] of _places, and a place gets a piece in each epoch.
        self._places = np.argsort(rows, kind="stable")
        self._starts = np.searchsorted(rows[self._places], np.arange(count + 1))
        self._assigned = Latest(self._exchanged)
        super().__init__(range(count), batch_size, seed, shuffle, transform, False, workers, max_queue_size, shard)

    @property
    def utilisation(self):
        """The share of the tokens of all batches that are real."""
        return int(self._sizes.sum()) / (self.steps_per_epoch * self.batch_size * self.length)

    def _exchanged(self, epoch):
        """The piece that each place gets, one of the length for which it was made."""
        pieces = np.arange(len(self._sizes))
        if self.shuffle:
            pieces = self._random(ORDER, epoch).permuted(pieces)
        return pieces[np.argsort(-self._sizes[pieces], kind="stable")]

    def _examples(self, chosen, epoch):
        shape = (self.batch_size // self.shard[1], self.length)
        inputs = {name: np.zeros(shape, "int32") for name in ("token_ids", "segment_ids")}
        inputs["padding_mask"] = np.zeros(shape, bool)
        targets, weight = np.zeros(shape, "int32"), np.zeros(shape, "float32")
        assigned = self._assigned(epoch)
        for r, row in enumerate(chosen):
            places = self._places[self._starts[row] : self._starts[row + 1]]
            at = 0
            for piece in assigned[places]:
                tokens, following = self._piece(piece)
                here, known = slice(at, at + len(tokens)), slice(at, at + len(following))
                inputs["token_ids"][r, here], inputs["padding_mask"][r, here] = tokens, True
                targets[r, known], weight[r, known] = following, 1.0
                at = here.stop
                # All that comes after, until the next piece says otherwise.
                inputs["segment_ids"][r, at:] += 1
        return inputs, targets, weight

    def _piece(self, piece):
        """Its tokens and, one each but for a document's end without `eos_id`, their targets."""
        begin, size, final = self._begins[piece], self._sizes[piece], self._final[piece]
        tokens = self._tokens[begin : begin + size + (not final)]
        if not final:
            return tokens[:-1], tokens[1:]
        return tokens, tokens[1:] if self.eos_id is None else np.append(tokens[1:], self.eos_id)


def _one_array(documents, boundaries):
    """All tokens one after the other, and where documents begin and end."""
    if boundaries is None:
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
            f"There must be a token. Received: {len(boundaries) - 1} documents without one. Check the text."
        )
    return tokens, boundaries.astype("int64")


def _check_boundaries(boundaries, end):
    good = boundaries.ndim == 1 and len(boundaries) > 1 and np.issubdtype(boundaries.dtype, np.integer)
    if not (good and boundaries[0] == 0 and boundaries[-1] == end and np.all(boundaries[1:] >= boundaries[:-1])):
        raise ValueError(
            f"boundaries must be integers that rise from 0 to the number of tokens, {end}. Received: "
            f"{boundaries!r}. Pass 0 and then the end of each document: numpy.cumsum([0, *lengths])."
        )


def _pieces(boundaries, length):
    """`(begins, sizes, final)` of the pieces of all documents; final ones are the last of their document."""
    begins, ends = boundaries[:-1], boundaries[1:]
    counts = -(-(ends - begins) // length)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_begins = begins[document] + number * length
    piece_ends = np.minimum(piece_begins + length, ends[document])
    return piece_begins, piece_ends - piece_begins, piece_ends == ends[document]


def _best_fit(sizes, length):
    """The row of each piece, and how many rows there are."""
    rows, count = np.empty(len(sizes), "int64"), 0
    with_room = [[] for _ in range(length + 1)]  # rows by the tokens for which they have room
    rooms = []  # those of which there are rows, rising
    for i, size in enumerate(sizes.tolist()):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room, count = count, length, count + 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        rows[i], room = row, room - size
        if room:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(row)
    return rows, count
