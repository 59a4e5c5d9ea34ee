"""Beam search: a decoding loop with several beams per row, and a pool of finished beams."""

import numpy as np
from keras import ops, tree

from keras_jamba import _backend
from keras_jamba.generation.decoding import BUFFER_MULTIPLE, Decoder, rounded_up

# A finite substitute for -inf: 0 * -inf is NaN.
_NEVER = -1e36


class BeamDecoder(Decoder):
    """Beam search decoder. It takes the arguments of `Decoder`, with a `BeamSampler` as sampler.

    Each step ranks the continuations of all beams of a row by one token. It keeps enough of the best candidates that
    `num_beams` unfinished ones remain, whichever end. A candidate ends at a stop token or at the length limit of its
    row. If it is among the first `num_beams`, it enters the pool of its row. The pool keeps the best `num_beams`
    sequences.
    """

    def decode(self, logits, cache, prompts, uniforms, limits, interval):
        """Yields one chunk: the new tokens of the best beam of each row. See `Decoder`."""
        rows, beams = len(prompts.lengths), self._sampler.num_beams
        capacity = rounded_up(len(uniforms), BUFFER_MULTIPLE)
        repeated = lambda x: ops.repeat(x, beams, axis=0)  # noqa: E731
        # The beams of a row are equal at first: only one of them may continue.
        scores = np.where(np.arange(beams) == 0, 0.0, _NEVER).astype("float32")
        empty = np.full((rows, beams, capacity), self._pad, "int32")
        arrays = dict(
            tokens=empty,
            scores=np.tile(scores, (rows, 1)),
            pool=empty,
            pool_scores=np.full((rows, beams), _NEVER, "float32"),
            pool_lengths=np.zeros((rows, beams), "int32"),
            ended=np.zeros((rows, beams), bool),
            open=np.ones(rows, bool),
            limits=np.asarray(limits, "int32"),
            step=np.int32(0),
        )
        state = {name: ops.convert_to_tensor(x) for name, x in arrays.items()}
        state |= {"logits": repeated(logits), "cache": tree.map_structure(repeated, cache)}
        end = self._compiled_loop(ops.convert_to_tensor(True), state)
        best, lengths = (_backend.sharding.to_numpy(end[name])[:, 0] for name in ("pool", "pool_lengths"))
        yield [row[:length] for row, length in zip(best, lengths, strict=True)]

    def _loop_body(self, carry):
        beams, length = self._sampler.num_beams, carry["step"] + 1
        scores, beam, token, tokens = self._continued(carry)
        ends = ops.logical_or(self._is_stop(token), length >= carry["limits"][:, None])
        pool = self._pool(carry, scores, tokens, ends, length)
        running, kept = ops.top_k(scores + _NEVER * ops.cast(ends, "float32"), beams)
        kept = ops.cast(kept, "int32")
        beam, token = (ops.take_along_axis(x, kept, axis=1) for x in (beam, token))
        # Reorders the rows of the cache on the device, to follow their beams.
        source = ops.reshape(beam + beams * ops.arange(beam.shape[0], dtype="int32")[:, None], (-1,))
        cache = tree.map_structure(lambda x: ops.take(x, source, axis=0), carry["cache"])
        logits, cache = self._step({"token_ids": ops.reshape(token, (-1, 1))}, cache)
        still_open = self._still_open(carry, pool, running, length)
        going = ops.logical_and(ops.any(still_open), ops.logical_not(ops.all(ends)))
        if self._sampler.early_stopping is True:
            going = ops.logical_and(going, ops.logical_not(ops.all(pool["ended"])))
        updates = pool | {"open": still_open, "step": length, "scores": running}
        updates |= {"tokens": _take_rows(tokens, kept), "logits": logits[:, -1], "cache": cache}
        return going, carry | updates

    def _continued(self, carry):
        """Computes the m most likely continuations of all beams by one token.

        Returns:
            `(scores, beam, token, tokens)`: score, source beam and new token `(b, m)`, and all new tokens `(b, m, s)`.
        """
        rows, beams, capacity = carry["tokens"].shape
        size = carry["logits"].shape[-1]
        # A beam ends at most once per stop token: `num_beams` unfinished candidates remain. One beam is greedy.
        count = beams if beams == 1 else min(max(2, 1 + len(self._stops)) * beams, beams * size)
        totals = (
            ops.reshape(ops.log_softmax(carry["logits"], axis=-1), (rows, beams, size)) + carry["scores"][..., None]
        )
        scores, index = ops.top_k(ops.reshape(totals, (rows, beams * size)), count)
        index = ops.cast(index, "int32")
        beam, token = index // size, ops.mod(index, size)
        is_current = ops.arange(capacity, dtype="int32") == carry["step"]
        return scores, beam, token, ops.where(is_current, token[..., None], _take_rows(carry["tokens"], beam))

    def _pool(self, carry, scores, tokens, ends, length):
        """Returns the pool after the candidates that end in this step."""
        beams, rows = self._sampler.num_beams, scores.shape[0]
        # Candidates beyond the first `num_beams` only replace beams that end.
        ended = ops.logical_and(ends, ops.arange(scores.shape[1])[None] < beams)
        allowed = ops.logical_and(ended, carry["open"][:, None])
        if self._sampler.early_stopping is True:
            allowed = ops.logical_and(allowed, ops.logical_not(ops.all(carry["ended"], axis=1, keepdims=True)))
        normalized = ops.where(allowed, self._normalized(scores, length), 2 * _NEVER)
        lengths = ops.broadcast_to(length, (rows, scores.shape[1]))
        joined = lambda name, new: ops.concatenate([carry[name], new], axis=1)  # noqa: E731
        best, index = ops.top_k(joined("pool_scores", normalized), beams)
        index = ops.cast(index, "int32")
        return {
            "pool": _take_rows(joined("pool", tokens), index),
            "pool_scores": best,
            "pool_lengths": ops.take_along_axis(joined("pool_lengths", lengths), index, axis=1),
            "ended": ops.take_along_axis(joined("ended", allowed), index, axis=1),
        }

    def _still_open(self, carry, pool, running, length):
        """Returns `(b,)` bool: whether the best beam of a row can still beat the worst of its pool."""
        never = self._sampler.early_stopping == "never" and self._sampler.length_penalty > 0
        attainable = self._normalized(running[:, 0], carry["limits"] if never else length)
        full = ops.all(pool["ended"], axis=1)
        can_improve = ops.logical_or(ops.logical_not(full), attainable > ops.min(pool["pool_scores"], axis=1))
        return ops.logical_and(carry["open"], can_improve)

    def _normalized(self, scores, length):
        return scores / ops.power(ops.cast(length, "float32"), self._sampler.length_penalty)


def _take_rows(x, index):
    """Returns the rows `index` `(b, m)` of `x` `(b, k, s)`, as `(b, m, s)`."""
    return ops.take_along_axis(x, index[..., None], axis=1)
