"""Expert parallelism: the model axis shards the experts, and devices exchange tokens and outputs.

A device receives a token once for all of its experts that the token chose, and returns one sum. Every pair of devices
exchanges the same number of rows, `SLACK` times those of an even routing. If any device needs more, all devices use a
capacity for all tokens instead. So no token is dropped, and the capacity affects only the time. Tokens without an
expert pad the number of tokens, for example in decoding, to a multiple of the number of devices. Without this padding
every device would fetch all experts.
"""

import math

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._sharding import divides

# Capacity as a multiple of the rows of an even routing.
SLACK = 1.5


def devices(tokens, experts):
    """Returns `(devices that share the experts, tokens per device)`, or None if neither can be sharded."""
    mesh = _backend.sharding.active_mesh()
    if mesh is None or not isinstance(tokens, int) or not divides(mesh.count(mesh.model), experts):
        return None
    across, count = mesh.count(mesh.batch) * mesh.count(mesh.model), mesh.count(mesh.model)
    return (count, -(-tokens // across)) if across > 1 else None


def capacity_for(tokens, per_token, count):
    """Returns the number of rows that each of `count` devices sends to each other one, of its `tokens` tokens."""
    return min(tokens, math.ceil(SLACK * tokens * per_token / count))


def run(mixture, tokens, weights, indices, banks):
    """Computes `expert_mlp` with sharded experts.

    `mixture(tokens, weights, indices, **banks)` computes the contribution of a device's own experts. Its indices are
    local, and the number of local experts means no expert.
    """
    mesh = _backend.sharding.active_mesh()
    number, experts = tokens.shape[0], banks["up_bank"].shape[0]
    count, own = devices(number, experts)
    local = experts // count
    capacity = capacity_for(own, indices.shape[1], count)

    def on_a_device(given):
        if count == 1:
            return (mixture(**given),)
        tokens, weights, indices = (given[name] for name in ("tokens", "weights", "indices"))
        device = indices // local
        # (s, devices): whether a token is sent to a device, and as which row.
        goes = ops.any(device[:, None] == ops.arange(count, dtype=device.dtype)[None, :, None], axis=-1)
        place = ops.cumsum(ops.cast(goes, "int32"), axis=0) - 1
        there = lambda capacity: _there_and_back(mixture, given, device, goes, place, capacity, local, mesh.model)  # noqa: E731
        if capacity == own:
            return (there(own),)
        most = _backend.sharding.pmax(ops.max(place) + 1, (mesh.batch, mesh.model))
        return (ops.cond(most <= capacity, lambda: there(capacity), lambda: there(own)),)

    rows = (tuple(axis for axis in (mesh.batch, mesh.model) if axis), None)
    fill = {"tokens": 0, "weights": 0, "indices": experts}
    more = own * mesh.count(mesh.batch) * count - number
    given = dict(tokens=tokens, weights=weights, indices=indices)
    given = {k: ops.pad(x, ((0, more), (0, 0)), constant_values=fill[k]) if more else x for k, x in given.items()}
    given |= {k: v for k, v in banks.items() if v is not None}
    split = {name: (mesh.model,) if name.endswith("bank") else rows for name in given}
    (found,) = _backend.sharding.shard_map(on_a_device, given, split, [rows])
    return found[:number] if more else found


def _there_and_back(mixture, given, device, goes, place, capacity, local, axis):
    tokens, weights, indices = (given[name] for name in ("tokens", "weights", "indices"))
    own, count = goes.shape
    # Row `place` of the rows for a device; one past the end if the token is not sent there.
    to = ops.where(goes, ops.arange(count, dtype="int32")[None] * capacity + place, count * capacity)
    source = ops.scatter(
        ops.reshape(to, (-1, 1)), ops.repeat(ops.arange(1, own + 1, dtype="int32"), count), (count * capacity + 1,)
    )
    source = source[:-1] - 1  # the token of each row, or -1
    there = source >= 0
    source = ops.maximum(source, 0)
    peer = ops.repeat(ops.arange(count, dtype=device.dtype), capacity)
    mine = there[:, None] & (ops.take(device, source, axis=0) == peer[:, None])
    sent = {
        "tokens": ops.where(there[:, None], ops.take(tokens, source, axis=0), 0),
        "weights": ops.where(mine, ops.take(weights, source, axis=0), 0),
        "indices": ops.where(mine, ops.take(indices, source, axis=0) % local, local),
    }
    received = {name: _all_to_all(x, count, axis) for name, x in sent.items()}
    banks = {name: x for name, x in given.items() if name.endswith("bank")}
    made = _all_to_all(mixture(**received, **banks), count, axis)
    # The outputs of every device per token; zeros from devices that did not receive the token.
    made = ops.concatenate([made, ops.zeros((1, made.shape[1]), made.dtype)], axis=0)
    return ops.sum(ops.reshape(ops.take(made, ops.reshape(to, (-1,)), axis=0), (own, count, -1)), axis=1)


def _all_to_all(x, count, axis):
    """Exchanges rows: takes the rows for each device, and returns the rows from each device."""
    by_device = ops.reshape(x, (count, -1, *x.shape[1:]))
    return ops.reshape(_backend.sharding.all_to_all(by_device, axis), x.shape)
