"""Speculative decoding: one step of the model checks several proposed tokens."""

import functools

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.generation.decoding import Decoder


class SpeculativeDecoder(Decoder):
    """Speculative decoder. It gives the tokens of `Decoder`, with proposals of an assistant.

    In each round the model reads the last token and n proposals. At each position the sampler uses the random number
    that plain decoding would draw there. The logits are those of plain decoding up to the first position where the
    sampler does not choose the proposal. A rollback removes the rejected proposals from the cache.

    Args:
        step, sampler, stop_token_ids, pad_token_id, compiled_step, is_known: see `Decoder`.
        variables: the variables of the model.
        check: `(inputs, cache) -> (logits of all tokens, cache, rollback_state)`.
        rollback: `(rollback_state, count) -> cache`.
        assistant: an `Assistant`.
    """

    def __init__(
        self,
        step,
        variables,
        sampler,
        stop_token_ids,
        pad_token_id,
        compiled_step=None,
        is_known=False,
        *,
        check,
        rollback,
        assistant,
    ):
        super().__init__(step, variables, sampler, stop_token_ids, pad_token_id, compiled_step, is_known)
        self._check, self._rollback, self._assistant = check, rollback, assistant
        # The model reads this many tokens beyond the accepted ones.
        self.extra_capacity = assistant.num_tokens + 1

    @functools.cached_property
    def _compiled_loop(self):
        # The model and the assistant may share variables.
        variables = {id(variable): variable for variable in (*self._variables, *self._assistant.variables)}
        return _backend.compilation.compiled_while_loop(self._loop_body, list(variables.values()))

    def decode(self, logits, cache, prompts, uniforms, limits, interval, *, assistant, assistant_state, capacity):
        """Yields the new tokens of each row. A chunk may have more tokens than `interval`. See `Decoder`.

        Args:
            assistant: the assistant of this generation. Its statistics are updated per chunk.
            assistant_state: the state of the assistant after the prompts.
            capacity: the most tokens of a row.
        """
        state = self._first_state(logits, cache, prompts, uniforms, limits, capacity) | {"assistant": assistant_state}
        yielded = np.zeros_like(prompts.lengths)
        while True:
            tokens, end = (_backend.sharding.to_numpy(state[name]) for name in ("tokens", "end"))
            counts = _backend.sharding.to_numpy(state["counts"]).tolist()
            assistant.statistics = dict(zip(("rounds", "proposed", "accepted"), counts, strict=True))
            begin = prompts.lengths + yielded
            yield [row[a:b] for row, a, b in zip(tokens, begin, end, strict=True)]
            yielded = end - prompts.lengths
            running = ~_backend.sharding.to_numpy(state["finished"])
            if not running.any():
                return
            # The row with the fewest new tokens gets `interval` more. Rows ahead of it continue meanwhile.
            target = (prompts.lengths + yielded[running].min() + interval).astype("int32")
            state = self._compiled_loop(ops.convert_to_tensor(True), state | {"target": ops.convert_to_tensor(target)})

    def _first_state(self, logits, cache, prompts, uniforms, limits, capacity):
        """Returns the state after the first token. Rows start at position 0. Each position has its random number."""
        rows, lengths = len(prompts.lengths), prompts.lengths.astype("int32")
        tokens, numbers = np.zeros((rows, capacity), "int32"), np.zeros((rows, capacity), "float32")
        for i, length in enumerate(lengths):
            tokens[i, :length], numbers[i, length : length + len(uniforms)] = prompts.row(i), uniforms[:, i]
        state = self.init_state(logits, cache, prompts.token_ids, prompts.mask, uniforms[0])
        fixed = dict(uniforms=numbers, limit=(lengths + limits).astype("int32"), counts=np.zeros(3, "int32"))
        state |= {name: ops.convert_to_tensor(x) for name, x in fixed.items()}
        lengths, token = ops.convert_to_tensor(lengths), state.pop("token")
        first = ops.arange(capacity, dtype="int32")[None] == lengths[:, None]
        state["tokens"] = ops.where(first, token[:, None], ops.convert_to_tensor(tokens))
        state["end"], state["target"] = lengths + 1, lengths
        state["finished"] = ops.logical_or(state["finished"], state["end"] >= state["limit"])
        return state

    def _loop_body(self, carry):
        end, tokens, running = carry["end"], carry["tokens"], ops.logical_not(carry["finished"])
        proposals, proposal_state = self._assistant.propose(carry["assistant"], tokens, end)
        last = ops.take_along_axis(tokens, end[:, None] - 1, axis=1)
        read = ops.concatenate([last, ops.maximum(proposals, 0)], axis=1)
        logits, _, rollback_state = self._check({"token_ids": read}, carry["cache"])
        chosen = self._chosen(logits, read, carry)
        positions = ops.arange(chosen.shape[1], dtype="int32")[None]
        agreed = ops.sum(ops.cumprod(ops.cast(chosen[:, :-1] == proposals, "int32"), axis=1), axis=1)
        stops = ops.cast(self._is_stop(chosen), "int32")
        # Accepts the matching proposals and one more token, up to a stop token or the limit of the row.
        taken = ops.logical_and(positions <= agreed[:, None], ops.cumsum(stops, axis=1) - stops == 0)
        taken = ops.logical_and(taken, end[:, None] + positions < carry["limit"][:, None])
        taken = ops.logical_and(taken, running[:, None])
        count = ops.sum(ops.cast(taken, "int32"), axis=1)
        stopped = ops.any(ops.logical_and(taken, stops > 0), axis=1)
        finished = ops.logical_or(carry["finished"], ops.logical_or(stopped, end + count >= carry["limit"]))
        accepted = ops.sum(ops.minimum(agreed, count))
        # The statistics exclude proposals beyond the end of a row.
        remaining = ops.where(stopped, count, ops.where(running, carry["limit"] - end, 0))
        proposed = ops.sum(ops.minimum(ops.sum(ops.cast(proposals >= 0, "int32"), axis=1), remaining))
        updates = {
            "cache": self._rollback(rollback_state, count),
            "assistant": self._assistant.commit(carry["assistant"], proposal_state, count),
            "tokens": _insert(tokens, chosen, end, count),
            "end": end + count,
            "finished": finished,
            "seen": self._mark_taken(carry["seen"], chosen, taken),
            "counts": carry["counts"] + ops.stack([ops.ones_like(accepted), proposed, accepted]),
        }
        going = ops.logical_and(ops.logical_not(finished), updates["end"] < carry["target"])
        return ops.any(going), carry | updates

    def _chosen(self, logits, read, carry):
        """Returns `(b, n + 1)`: the choices of plain decoding, if all proposals before each position are accepted."""
        rows, count, size = logits.shape
        positions = carry["end"][:, None] + ops.arange(count, dtype="int32")[None]
        uniform = ops.take_along_axis(carry["uniforms"], positions, axis=1)
        seen = None
        if self._sampler.needs_seen:
            before = ops.cumsum(ops.one_hot(read[:, 1:], size, dtype="int32"), axis=1) > 0
            before = ops.pad(before, ((0, 0), (1, 0), (0, 0)))
            seen = ops.reshape(ops.logical_or(before, carry["seen"][:, None]), (rows * count, size))
        flat = ops.reshape(logits, (rows * count, size)), ops.reshape(uniform, (rows * count,))
        return ops.reshape(self._sampler.choose(*flat, seen), (rows, count))

    def _mark_taken(self, seen, chosen, taken):
        if not self._sampler.needs_seen:
            return seen
        added = ops.one_hot(ops.where(taken, chosen, -1), seen.shape[1], dtype="int32")
        return ops.logical_or(seen, ops.max(added, axis=1) > 0)


def _insert(tokens, chosen, end, count):
    """Returns `tokens` `(b, s)` with the first `count` of `chosen` written from position `end` on."""
    index = ops.arange(tokens.shape[1], dtype="int32")[None] - end[:, None]
    inside = ops.logical_and(index >= 0, index < count[:, None])
    new = ops.take_along_axis(chosen, ops.clip(index, 0, chosen.shape[1] - 1), axis=1)
    return ops.where(inside, new, tokens)
