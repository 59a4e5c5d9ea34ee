"""The loop that chooses tokens: a prefill in pieces, then one token after the other over a cache of one size."""

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.generation.samplers import ProbabilitySampler

# Sizes of caches and buffers are rounded up to multiples of these and prefills to powers of two from the last on, so
# that few programs are compiled.
CACHE, BUFFER, PIECE = 64, 32, 16


class Decoder:
    """Runs a model token by token.

    Args:
        step: `(inputs, cache) -> (logits of the last token (b, 1, v), cache)`.
        variables: those that `step` reads.
        sampler: chooses.
        stop_token_ids: after one of these a row is finished.
        pad_token_id: what a finished row is given.
        prefill: of another decoder of the same step and variables, or None.
    """

    def __init__(self, step, variables, sampler, stop_token_ids, pad_token_id, prefill=None):
        self._sampler, self._stops, self._pad = sampler, tuple(stop_token_ids), pad_token_id
        self._step, self._prefill = step, prefill or _backend.compilation.jit_inference(step, variables)
        self._turns = _backend.compilation.compiled_while_loop(self._turn, variables)
        self._run = self._from_outside if isinstance(sampler, ProbabilitySampler) else self._many

    # Places in a cache that it needs beyond those of prompts and new tokens.
    more_room = 0

    def prefill(self, token_ids, mask, cache, piece):
        """`(logits (b, v) of the last tokens, cache)` after tokens `(b, t)` padded on the left, `piece` at a time."""
        return prefilled(self._prefill, token_ids, mask, cache, piece)

    def pieces(self, logits, cache, prompts, uniforms, limits, at_a_time):
        """New tokens as they come, each time a list of those of each row: the first, then `at_a_time` for each.

        Args:
            logits, cache: what `prefill` returned.
            prompts: the `Prompts`.
            uniforms: what the sampler draws, `(n, b)` for n tokens.
            limits: `(b,)`, how many tokens are wanted; those beyond do no harm.
            at_a_time: how many are chosen before they are given.
        """
        state = self.begin(logits, cache, prompts.token_ids, prompts.mask, uniforms[0])
        yield _backend.sharding.to_numpy(state["token"])[:, None]
        for done in range(1, len(uniforms), at_a_time):
            tokens, state = self.run(state, uniforms[done : done + at_a_time])
            yield tokens

    def begin(self, logits, cache, token_ids, mask, uniform):
        """The state of the loop with the first new token chosen, from the logits after a prefill."""
        seen = self._seen(token_ids, mask, logits.shape[-1])
        token = self._sampler.choose(logits, ops.convert_to_tensor(uniform), seen)
        return {"token": token, "cache": cache, "finished": self._is_stop(token), "seen": self._with(seen, token)}

    def run(self, state, uniforms):
        """`(tokens (b, n), state)`: as many more tokens as there are rows of `uniforms`, unless all are finished."""
        count = len(uniforms)
        room = -(-count // BUFFER) * BUFFER
        padded = np.zeros((room, uniforms.shape[1]), "float32")
        padded[:count] = uniforms
        tokens, state = self._run(state, padded, count)
        return _backend.sharding.to_numpy(tokens)[:count].T, state

    def _many(self, state, uniforms, count):
        """`(tokens (n, b), state)`; `uniforms` are `(n, b)`, of which `count` are used."""
        tokens = ops.full(uniforms.shape, self._pad, "int32")
        begin = {"turn": ops.zeros((), "int32"), "count": ops.convert_to_tensor(count, "int32")}
        begin |= {"tokens": tokens, "uniforms": ops.convert_to_tensor(uniforms), "state": state}
        end = self._turns(ops.logical_not(ops.all(state["finished"])), begin)
        return end["tokens"], end["state"]

    def _turn(self, now):
        here = ops.arange(now["tokens"].shape[0], dtype="int32") == now["turn"]
        uniform = ops.sum(ops.where(here[:, None], now["uniforms"], 0.0), axis=0)
        state = self._next(now["state"], uniform, self._step)
        tokens = ops.where(here[:, None], state["token"][None], now["tokens"])
        turn = now["turn"] + 1
        going = ops.logical_and(turn < now["count"], ops.logical_not(ops.all(state["finished"])))
        return going, now | {"turn": turn, "tokens": tokens, "state": state}

    def _from_outside(self, state, uniforms, count):
        tokens = np.full(uniforms.shape, self._pad, "int32")
        for turn in range(count):
            if _backend.sharding.to_numpy(state["finished"]).all():
                break
            state = self._next(state, uniforms[turn], self._prefill)
            tokens[turn] = _backend.sharding.to_numpy(state["token"])
        return tokens, state

    def _next(self, state, uniform, step):
        """Gives the model the last token chosen, and chooses the next."""
        logits, cache = step({"token_ids": state["token"][:, None]}, state["cache"])
        token = self._sampler.choose(logits[:, -1], uniform, state["seen"])
        token = ops.where(state["finished"], self._pad, token)
        finished = ops.logical_or(state["finished"], self._is_stop(token))
        return {"token": token, "cache": cache, "finished": finished, "seen": self._with(state["seen"], token)}

    def _is_stop(self, token):
        if not self._stops:
            return ops.zeros_like(token, dtype="bool")
        return ops.any(token[..., None] == ops.convert_to_tensor(self._stops, "int32"), axis=-1)

    def _seen(self, token_ids, mask, size):
        if not self._sampler.needs_seen:
            return ops.zeros((token_ids.shape[0], 0), "bool")
        seen = np.zeros((token_ids.shape[0], size), bool)
        rows, places = np.nonzero(mask)
        seen[rows, token_ids[rows, places]] = True
        return ops.convert_to_tensor(seen)

    def _with(self, seen, token):
        if not self._sampler.needs_seen:
            return seen
        return ops.logical_or(seen, ops.arange(seen.shape[1], dtype="int32")[None] == token[:, None])


def prefilled(step, token_ids, mask, cache, piece):
    """See `Decoder.prefill`, for any `step`."""
    if _backend.compilation.has_jit():
        token_ids, mask = _rounded_up(token_ids, mask, piece)
    for begin in range(0, token_ids.shape[1], piece):
        here = slice(begin, begin + piece)
        inputs = {"token_ids": ops.convert_to_tensor(token_ids[:, here])}
        if not mask[:, here].all():
            inputs["padding_mask"] = ops.convert_to_tensor(mask[:, here])
        logits, cache = step(inputs, cache)
    return logits[:, -1], cache


def _rounded_up(token_ids, mask, piece):
    """More padding on the left, which takes no place in a cache: to whole pieces, or below one to a power of two."""
    length = token_ids.shape[1]
    rounded = min(max(PIECE, 1 << (length - 1).bit_length()), piece) if length < piece else -(-length // piece) * piece
    more = ((0, 0), (rounded - length, 0))
    return np.pad(token_ids, more), np.pad(mask, more)
