"""The loop that chooses tokens: a prefill in pieces, then one token after the other over a cache of one size."""

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.generation.samplers import ProbabilitySampler

# Sizes of caches, prefills and buffers are rounded up to these, so that few programs are compiled.
CACHE, BUFFER = 64, 32


class Decoder:
    """Runs a model token by token.

    Args:
        step: `(inputs, cache) -> (logits of the last token (b, 1, v), cache)`.
        variables: those that `step` reads.
        sampler: chooses.
        stop_token_ids: after one of these a row is finished.
        pad_token_id: what a finished row is given.
    """

    def __init__(self, step, variables, sampler, stop_token_ids, pad_token_id):
        self._sampler, self._stops, self._pad = sampler, tuple(stop_token_ids), pad_token_id
        self._step = step
        self._prefill = _backend.inference(step, variables)
        inside = not isinstance(sampler, ProbabilitySampler)
        self._run = _backend.inference(self._many, variables) if inside else self._many_from_outside
        self._advance = self._prefill

    def prefill(self, token_ids, mask, cache, piece):
        """`(logits (b, v) of the last tokens, cache)` after tokens `(b, t)` padded on the left, `piece` at a time."""
        for begin in range(0, token_ids.shape[1], piece):
            here = slice(begin, begin + piece)
            inputs = {"token_ids": ops.convert_to_tensor(token_ids[:, here])}
            if not mask[:, here].all():
                inputs["padding_mask"] = ops.convert_to_tensor(mask[:, here])
            logits, cache = self._prefill(inputs, cache)
        return logits[:, -1], cache

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
        tokens, state = self._run(state, ops.convert_to_tensor(padded), ops.convert_to_tensor(count, "int32"))
        return ops.convert_to_numpy(tokens)[:, :count], state

    def _many(self, state, uniforms, count):
        rows = state["token"].shape[0]
        tokens = ops.full((uniforms.shape[0], rows), self._pad, "int32")

        def going(turn, tokens, state):
            return ops.logical_and(turn < count, ops.logical_not(ops.all(state["finished"])))

        def body(turn, tokens, state):
            state = self._next(state, ops.take(uniforms, turn, axis=0), self._step)
            tokens = ops.slice_update(tokens, (turn, 0), state["token"][None])
            return turn + 1, tokens, state

        _, tokens, state = ops.while_loop(going, body, (ops.zeros((), "int32"), tokens, state))
        return ops.transpose(tokens), state

    def _many_from_outside(self, state, uniforms, count):
        tokens = np.full((uniforms.shape[0], state["token"].shape[0]), self._pad, "int32")
        for turn in range(int(count)):
            if ops.convert_to_numpy(state["finished"]).all():
                break
            state = self._next(state, uniforms[turn], self._advance)
            tokens[turn] = ops.convert_to_numpy(state["token"])
        return tokens.T, state

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
        return ops.any(token[:, None] == ops.convert_to_tensor(self._stops, "int32")[None], axis=1)

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
        return ops.logical_or(seen, ops.one_hot(token, seen.shape[1], dtype="bool"))
