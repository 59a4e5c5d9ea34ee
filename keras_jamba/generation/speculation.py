"""The loop in which a model checks proposals: several tokens for one reading of the weights."""

import functools

import numpy as np
from keras import ops

from keras_jamba import _backend
from keras_jamba.generation.decoding import Decoder


class SpeculativeDecoder(Decoder):
    """Gives the tokens that `Decoder` gives, where an assistant has guessed them several at a time.

    In each round the model reads the last token and n proposals. At each place the sampler chooses with the number
    that plain decoding would draw there; so far as it chooses what was proposed, the logits are those of plain
    decoding. What was read beyond is taken back.

    Args:
        step, sampler, stop_token_ids, pad_token_id, compiled_step: see `Decoder`.
        variables: those of the model.
        check: `(inputs, cache) -> (logits of all tokens, cache, rollback_state)`.
        rollback: `(rollback_state, count) -> cache`.
        assistant: an `Assistant`.
    """

    def __init__(
        self, step, variables, sampler, stop_token_ids, pad_token_id, compiled_step=None, *, check, rollback, assistant
    ):
        super().__init__(step, variables, sampler, stop_token_ids, pad_token_id, compiled_step)
        self._check, self._rollback, self._assistant = check, rollback, assistant
        # The model reads so many tokens beyond those that stay.
        self.extra_capacity = assistant.num_tokens + 1

    @functools.cached_property
    def _compiled_loop(self):
        # The assistant may be the model itself.
        variables = {id(variable): variable for variable in (*self._variables, *self._assistant.variables)}
        return _backend.compilation.compiled_while_loop(self._loop_body, list(variables.values()))

    def decode(self, logits, cache, prompts, uniforms, limits, interval, *, assistant, assistant_state, capacity):
        """See `Decoder`; a chunk may have more tokens than `interval`.

        Args:
            assistant: the assistant whose statistics are kept.
            assistant_state: its state after the prompts.
            capacity: the most tokens of a row.
        """
        state = self._first(logits, cache, prompts, uniforms, limits, capacity) | {"assistant": assistant_state}
        given = np.zeros_like(prompts.lengths)
        while True:
            tokens, end = (_backend.sharding.to_numpy(state[name]) for name in ("tokens", "end"))
            counts = _backend.sharding.to_numpy(state["counts"]).tolist()
            assistant.statistics = dict(zip(("rounds", "proposed", "accepted"), counts, strict=True))
            begin = prompts.lengths + given
            yield [row[a:b] for row, a, b in zip(tokens, begin, end, strict=True)]
            given = end - prompts.lengths
            running = ~_backend.sharding.to_numpy(state["finished"])
            if not running.any():
                return
            # So many for the row that has fewest; those that are ahead go on meanwhile.
            target = (prompts.lengths + given[running].min() + interval).astype("int32")
            state = self._compiled_loop(ops.convert_to_tensor(True), state | {"target": ops.convert_to_tensor(target)})

    def _first(self, logits, cache, prompts, uniforms, limits, capacity):
        """The state after the first token. Rows begin at place 0, with the numbers drawn for each place."""
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

    def _loop_body(self, now):
        end, tokens, running = now["end"], now["tokens"], ops.logical_not(now["finished"])
        proposals, proposal_state = self._assistant.propose(now["assistant"], tokens, end)
        last = ops.take_along_axis(tokens, end[:, None] - 1, axis=1)
        read = ops.concatenate([last, ops.maximum(proposals, 0)], axis=1)
        logits, _, rollback_state = self._check({"token_ids": read}, now["cache"])
        chosen = self._chosen(logits, read, now)
        places = ops.arange(chosen.shape[1], dtype="int32")[None]
        agreed = ops.sum(ops.cumprod(ops.cast(chosen[:, :-1] == proposals, "int32"), axis=1), axis=1)
        stops = ops.cast(self._is_stop(chosen), "int32")
        # What agrees and one token more, up to a stop and as far as there is room.
        taken = ops.logical_and(places <= agreed[:, None], ops.cumsum(stops, axis=1) - stops == 0)
        taken = ops.logical_and(taken, end[:, None] + places < now["limit"][:, None])
        taken = ops.logical_and(taken, running[:, None])
        count = ops.sum(ops.cast(taken, "int32"), axis=1)
        stopped = ops.any(ops.logical_and(taken, stops > 0), axis=1)
        finished = ops.logical_or(now["finished"], ops.logical_or(stopped, end + count >= now["limit"]))
        right = ops.sum(ops.minimum(agreed, count))
        # Proposals beyond the end of a row do not count.
        left = ops.where(stopped, count, ops.where(running, now["limit"] - end, 0))
        proposed = ops.sum(ops.minimum(ops.sum(ops.cast(proposals >= 0, "int32"), axis=1), left))
        after = {
            "cache": self._rollback(rollback_state, count),
            "assistant": self._assistant.commit(now["assistant"], proposal_state, count),
            "tokens": _put(tokens, chosen, end, count),
            "end": end + count,
            "finished": finished,
            "seen": self._with_all(now["seen"], chosen, taken),
            "counts": now["counts"] + ops.stack([ops.ones_like(right), proposed, right]),
        }
        going = ops.logical_and(ops.logical_not(finished), after["end"] < now["target"])
        return ops.any(going), now | after

    def _chosen(self, logits, read, now):
        """`(b, n + 1)`: what plain decoding chooses at each place, if all proposals before it are right."""
        rows, count, size = logits.shape
        places = now["end"][:, None] + ops.arange(count, dtype="int32")[None]
        uniform = ops.take_along_axis(now["uniforms"], places, axis=1)
        seen = None
        if self._sampler.needs_seen:
            before = ops.cumsum(ops.one_hot(read[:, 1:], size, dtype="int32"), axis=1) > 0
            before = ops.pad(before, ((0, 0), (1, 0), (0, 0)))
            seen = ops.reshape(ops.logical_or(before, now["seen"][:, None]), (rows * count, size))
        flat = ops.reshape(logits, (rows * count, size)), ops.reshape(uniform, (rows * count,))
        return ops.reshape(self._sampler.choose(*flat, seen), (rows, count))

    def _with_all(self, seen, chosen, taken):
        if not self._sampler.needs_seen:
            return seen
        more = ops.one_hot(ops.where(taken, chosen, -1), seen.shape[1], dtype="int32")
        return ops.logical_or(seen, ops.max(more, axis=1) > 0)


def _put(tokens, chosen, end, count):
    """`(b, s)` with the first `count` of the chosen from place `end` on."""
    index = ops.arange(tokens.shape[1], dtype="int32")[None] - end[:, None]
    inside = ops.logical_and(index >= 0, index < count[:, None])
    new = ops.take_along_axis(chosen, ops.clip(index, 0, chosen.shape[1] - 1), axis=1)
    return ops.where(inside, new, tokens)
