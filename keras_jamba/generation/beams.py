"""Beam search: the loop that carries several beginnings of each row, and the pool of those that have ended."""

import numpy as np
from keras import ops, tree

from keras_jamba import _backend
from keras_jamba.generation.decoding import BUFFER_MULTIPLE, Decoder, rounded_up

# In the place of minus infinity, which would make numbers of no meaning.
_NEVER = -1e36


class BeamDecoder(Decoder):
    """Runs a model on the most likely beginnings of each row; `Decoder`'s arguments, and a `BeamSampler`.

    Of all continuations of all beams by one token, the most likely are looked at: so many that as many as there are
    beams go on whatever ends. What ends among the first of them, with a stop token or for want of room, goes into the
    pool of its row, which keeps the best.
    """

    def decode(self, logits, cache, prompts, uniforms, limits, interval):
        """Yields one chunk, the best beam of each row; see `Decoder`."""
        rows, beams = len(prompts.lengths), self._sampler.num_beams
        capacity = rounded_up(len(uniforms), BUFFER_MULTIPLE)
        wide = lambda x: ops.repeat(x, beams, axis=0)  # noqa: E731
        # The beams of a row are equal at first: only one counts.
        scores = np.where(np.arange(beams) == 0, 0.0, _NEVER).astype("float32")
        nothing = np.full((rows, beams, capacity), self._pad, "int32")
        numbers = dict(
            tokens=nothing,
            scores=np.tile(scores, (rows, 1)),
            pool=nothing,
            pool_scores=np.full((rows, beams), _NEVER, "float32"),
            pool_lengths=np.zeros((rows, beams), "int32"),
            ended=np.zeros((rows, beams), bool),
            open=np.ones(rows, bool),
            limits=np.asarray(limits, "int32"),
            step=np.int32(0),
        )
        state = {name: ops.convert_to_tensor(x) for name, x in numbers.items()}
        state |= {"logits": wide(logits), "cache": tree.map_structure(wide, cache)}
        end = self._compiled_loop(ops.convert_to_tensor(True), state)
        best, lengths = (_backend.sharding.to_numpy(end[name])[:, 0] for name in ("pool", "pool_lengths"))
        yield [row[:length] for row, length in zip(best, lengths, strict=True)]

    def _loop_body(self, now):
        beams, length = self._sampler.num_beams, now["step"] + 1
        scores, beam, token, tokens = self._continued(now)
        ends = ops.logical_or(self._is_stop(token), length >= now["limits"][:, None])
        pool = self._pool(now, scores, tokens, ends, length)
        running, kept = ops.top_k(scores + _NEVER * ops.cast(ends, "float32"), beams)
        kept = ops.cast(kept, "int32")
        beam, token = (ops.take_along_axis(x, kept, axis=1) for x in (beam, token))
        # On the device: rows of the cache follow their beams.
        source = ops.reshape(beam + beams * ops.arange(beam.shape[0], dtype="int32")[:, None], (-1,))
        cache = tree.map_structure(lambda x: ops.take(x, source, axis=0), now["cache"])
        logits, cache = self._step({"token_ids": ops.reshape(token, (-1, 1))}, cache)
        still_open = self._still_open(now, pool, running, length)
        going = ops.logical_and(ops.any(still_open), ops.logical_not(ops.all(ends)))
        if self._sampler.early_stopping is True:
            going = ops.logical_and(going, ops.logical_not(ops.all(pool["ended"])))
        after = pool | {"open": still_open, "step": length, "scores": running}
        after |= {"tokens": _rows(tokens, kept), "logits": logits[:, -1], "cache": cache}
        return going, now | after

    def _continued(self, now):
        """The most likely of all beams by one token: `(scores, beam, token)`, `(b, m)`, and the tokens `(b, m, s)`."""
        rows, beams, capacity = now["tokens"].shape
        size = now["logits"].shape[-1]
        # So many that after all that end as many go on as there are beams; a single beam goes the way of greedy.
        count = beams if beams == 1 else min(max(2, 1 + len(self._stops)) * beams, beams * size)
        likely = ops.reshape(ops.log_softmax(now["logits"], axis=-1), (rows, beams, size)) + now["scores"][..., None]
        scores, index = ops.top_k(ops.reshape(likely, (rows, beams * size)), count)
        index = ops.cast(index, "int32")
        beam, token = index // size, ops.mod(index, size)
        here = ops.arange(capacity, dtype="int32") == now["step"]
        return scores, beam, token, ops.where(here, token[..., None], _rows(now["tokens"], beam))

    def _pool(self, now, scores, tokens, ends, length):
        """The pool with what ends now."""
        beams, rows = self._sampler.num_beams, scores.shape[0]
        # The others stand by in case that these end.
        ended = ops.logical_and(ends, ops.arange(scores.shape[1])[None] < beams)
        allowed = ops.logical_and(ended, now["open"][:, None])
        if self._sampler.early_stopping is True:
            allowed = ops.logical_and(allowed, ops.logical_not(ops.all(now["ended"], axis=1, keepdims=True)))
        normalized = ops.where(allowed, self._normalized(scores, length), 2 * _NEVER)
        lengths = ops.broadcast_to(length, (rows, scores.shape[1]))
        both = lambda name, new: ops.concatenate([now[name], new], axis=1)  # noqa: E731
        best, index = ops.top_k(both("pool_scores", normalized), beams)
        index = ops.cast(index, "int32")
        return {
            "pool": _rows(both("pool", tokens), index),
            "pool_scores": best,
            "pool_lengths": ops.take_along_axis(both("pool_lengths", lengths), index, axis=1),
            "ended": ops.take_along_axis(both("ended", allowed), index, axis=1),
        }

    def _still_open(self, now, pool, running, length):
        """`(b,)`: whether the best beam of a row may yet be better than the worst in its pool."""
        never = self._sampler.early_stopping == "never" and self._sampler.length_penalty > 0
        hoped = self._normalized(running[:, 0], now["limits"] if never else length)
        full = ops.all(pool["ended"], axis=1)
        better = ops.logical_or(ops.logical_not(full), hoped > ops.min(pool["pool_scores"], axis=1))
        return ops.logical_and(now["open"], better)

    def _normalized(self, scores, length):
        return scores / ops.power(ops.cast(length, "float32"), self._sampler.length_penalty)


def _rows(x, index):
    """`(b, k, s)` and `(b, m)` to `(b, m, s)`."""
    return ops.take_along_axis(x, index[..., None], axis=1)
