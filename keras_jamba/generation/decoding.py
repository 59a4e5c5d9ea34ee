"""The decoding loop: a prefill, then one token per step with a cache of fixed capacity."""

import functools

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.generation.prefilling import prefilled
from keras_jamba.generation.samplers import ProbabilitySampler

# Fewer shapes need fewer compiled programs. Capacities of caches are rounded up to a multiple of CAPACITY_MULTIPLE, and
# long ones by at most a sixteenth.
CAPACITY_MULTIPLE, BUFFER_MULTIPLE = 64, 32
# Sizes of the buffer of new tokens. The largest is the most tokens per run of the loop.
BUFFERS = (32, 256)


class Decoder:
    """Runs a model token by token.

    Args:
        step: `step(inputs, cache) -> (logits (b, 1, v) of the last token, cache)`.
        variables: the variables that `step` reads.
        sampler: the sampler, which chooses the tokens.
        stop_token_ids: ids that finish a row.
        pad_token_id: id that fills finished rows.
        compiled_step: `compiled_step` of another decoder with the same step and variables, or None.
        is_known: whether `step` and all layers that it runs are those of Keras and of this package.
    """

    # Tokens of cache capacity beyond the prompts and the new tokens.
    extra_capacity = 0

    def __init__(self, step, variables, sampler, stop_token_ids, pad_token_id, compiled_step=None, is_known=False):
        self._step, self._variables, self._sampler, self._is_known = step, variables, sampler, is_known
        self._stops, self._pad = tuple(stop_token_ids), pad_token_id
        self._shared_step = compiled_step

    @functools.cached_property
    def compiled_step(self):
        """`step`, compiled once per input shape."""
        return self._shared_step or _backend.compilation.jit_inference(self._step, self._variables)

    @functools.cached_property
    def _compiled_loop(self):
        # These layers read the new cache only, so that a step may write into the old one.
        options = dict(folds=self._is_known, overwrites=self._is_known)
        return _backend.compilation.compiled_while_loop(self._loop_body, self._variables, **options)

    def prepare(self):
        """Makes the compiled functions. They compile at their first call."""
        return self.compiled_step, self._compiled_loop

    def prefill(self, token_ids, mask, cache, longest):
        """Runs the model on the prompts; see `prefilled`."""
        return prefilled(self.compiled_step, token_ids, mask, cache, longest)

    def decode(self, logits, cache, prompts, uniforms, limits, interval):
        """Yields chunks `(b, n)` of new tokens, one token per row of `uniforms`; finished rows get padding.

        The first chunk holds one token per row, the following chunks up to `interval` tokens.

        Args:
            logits, cache: the outputs of `prefill`.
            prompts: the `Prompts`.
            uniforms: the random numbers of the sampler, `(n, b)` for n tokens.
            limits: `(b,)`, the most new tokens per row. This loop may choose more, which the caller drops.
            interval: the most tokens per chunk.
        """
        state = self.init_state(logits, cache, prompts.token_ids, prompts.mask, uniforms[0])
        yield _backend.sharding.to_numpy(state["token"])[:, None]
        interval = min(interval, BUFFERS[-1])
        # One size for all chunks: each size needs a compiled program.
        buffer = next(size for size in BUFFERS if min(len(uniforms) - 1, interval) <= size)
        for done in range(1, len(uniforms), interval):
            tokens, state = self.advance(state, uniforms[done : done + interval], buffer)
            yield tokens

    def init_state(self, logits, cache, token_ids, mask, uniform):
        """Returns the initial state of the loop, with the first new token, which the logits of the prefill give."""
        seen = self._seen(token_ids, mask, logits.shape[-1])
        token = self._sampler.choose(logits, ops.convert_to_tensor(uniform), seen)
        seen = self._mark_seen(seen, token)
        return {"token": token, "cache": cache, "finished": self._is_stop(token), "seen": seen}

    def advance(self, state, uniforms, buffer):
        """Returns `(tokens (b, n), state)` for n rows of `uniforms`. The loop ends early if all rows are finished.

        `buffer` is the size of the buffer of tokens, at least n.
        """
        count = len(uniforms)
        padded = np.zeros((buffer, uniforms.shape[1]), "float32")
        padded[:count] = uniforms
        if isinstance(self._sampler, ProbabilitySampler):
            tokens, state = self._loop_on_host(state, padded, count)
            return tokens[:count].T, state
        carry = {"step": ops.zeros((), "int32"), "count": ops.convert_to_tensor(count, "int32"), "state": state}
        carry |= {"uniforms": ops.convert_to_tensor(padded), "tokens": ops.full(padded.shape, self._pad, "int32")}
        # Steps of finished rows only add padding.
        end = self._compiled_loop(ops.logical_not(ops.all(state["finished"])), carry, count)
        return _backend.sharding.to_numpy(end["tokens"])[:count].T, end["state"]

    def _loop_body(self, carry):
        is_current = ops.arange(carry["tokens"].shape[0], dtype="int32") == carry["step"]
        uniform = ops.sum(ops.where(is_current[:, None], carry["uniforms"], 0.0), axis=0)
        state = self._next_token(carry["state"], uniform, self._step)
        tokens = ops.where(is_current[:, None], state["token"][None], carry["tokens"])
        step = carry["step"] + 1
        going = ops.logical_and(step < carry["count"], ops.logical_not(ops.all(state["finished"])))
        return going, carry | {"step": step, "tokens": tokens, "state": state}

    def _loop_on_host(self, state, uniforms, count):
        """Runs the loop in Python, for samplers that backends cannot compile. See `advance`."""
        tokens = np.full(uniforms.shape, self._pad, "int32")
        for step in range(count):
            if _backend.sharding.to_numpy(state["finished"]).all():
                break
            state = self._next_token(state, uniforms[step], self.compiled_step)
            tokens[step] = _backend.sharding.to_numpy(state["token"])
        return tokens, state

    def _next_token(self, state, uniform, step):
        """Runs the model on the last token, chooses the next token and returns the new state."""
        logits, cache = step({"token_ids": state["token"][:, None]}, state["cache"])
        token = self._sampler.choose(logits[:, -1], uniform, state["seen"])
        token = ops.where(state["finished"], self._pad, token)
        finished = ops.logical_or(state["finished"], self._is_stop(token))
        return {"token": token, "cache": cache, "finished": finished, "seen": self._mark_seen(state["seen"], token)}

    def _is_stop(self, token):
        if not self._stops:
            return ops.zeros_like(token, dtype="bool")
        return ops.any(token[..., None] == ops.convert_to_tensor(self._stops, "int32"), axis=-1)

    def _seen(self, token_ids, mask, size):
        if not self._sampler.needs_seen:
            return ops.zeros((token_ids.shape[0], 0), "bool")
        seen = np.zeros((token_ids.shape[0], size), bool)
        rows, positions = np.nonzero(mask)
        seen[rows, token_ids[rows, positions]] = True
        return ops.convert_to_tensor(seen)

    def _mark_seen(self, seen, token):
        if not self._sampler.needs_seen:
            return seen
        return ops.logical_or(seen, ops.arange(seen.shape[1], dtype="int32")[None] == token[:, None])


def rounded_capacity(length):
    """Returns the capacity of a cache for `length` tokens."""
    return rounded_up(length, max(CAPACITY_MULTIPLE, 1 << max(0, (length - 1).bit_length() - 5)))


def rounded_up(value, multiple):
    """Returns `value` rounded up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple
