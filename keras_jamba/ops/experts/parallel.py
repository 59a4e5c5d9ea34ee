"""Experts of several devices: each device has some of them, tokens go to those that they chose and come back; or all.

A token goes to a device once, however many of its experts are there, and what these make of it comes back as one sum.
Devices send each other as many rows, room for some more than an even routing needs. Where a routing needs more, which
all devices find out together, there is room for all tokens: none is dropped, and nothing depends on the room but the
time. Tokens that are no multiple of the devices, as in a step of decoding, are filled up with ones that go nowhere:
otherwise every device would fetch the experts of all.
"""

import math

from keras import ops

from keras_jamba import _backend
from keras_jamba.ops._sharding import divides

# Room for this many times the rows of an even routing.
SLACK = 1.5


def devices(tokens, experts):
    """How many devices share the experts, and how many tokens each has; None where neither can be shared."""
    mesh = _backend.sharding.active_mesh()
    if mesh is None or not isinstance(tokens, int) or not divides(mesh.count(mesh.model), experts):
        return None
    across, count = mesh.count(mesh.batch) * mesh.count(mesh.model), mesh.count(mesh.model)
    return (count, -(-tokens // across)) if across > 1 else None


def room_for(tokens, per_token, count):
    """Rows that each of `count` devices sends to each, of its so many tokens."""
    return min(tokens, math.ceil(SLACK * tokens * per_token / count))


def run(mixture, tokens, weights, indices, banks):
    """As `expert_mlp`; `mixture(tokens, weights, indices, **banks)` is that of a device's own experts.

    Its indices go up to their number, which is none of them.
    """
    mesh = _backend.sharding.active_mesh()
    number, experts = tokens.shape[0], banks["up_bank"].shape[0]
    count, own = devices(number, experts)
    local = experts // count
    room = room_for(own, indices.shape[1], count)

    def on_a_device(given):
        if count == 1:
            return (mixture(**given),)
        tokens, weights, indices = (given[name] for name in ("tokens", "weights", "indices"))
        device = indices // local
        # (s, devices): whether a token goes there, and as which row.
        goes = ops.any(device[:, None] == ops.arange(count, dtype=device.dtype)[None, :, None], axis=-1)
        place = ops.cumsum(ops.cast(goes, "int32"), axis=0) - 1
        there = lambda room: _there_and_back(mixture, given, device, goes, place, room, local, mesh.model)  # noqa: E731
        if room == own:
            return (there(own),)
        most = _backend.sharding.pmax(ops.max(place) + 1, (mesh.batch, mesh.model))
        return (ops.cond(most <= room, lambda: there(room), lambda: there(own)),)

    rows = (tuple(axis for axis in (mesh.batch, mesh.model) if axis), None)
    fill = {"tokens": 0, "weights": 0, "indices": experts}
    more = own * mesh.count(mesh.batch) * count - number
    given = dict(tokens=tokens, weights=weights, indices=indices)
    given = {k: ops.pad(x, ((0, more), (0, 0)), constant_values=fill[k]) if more else x for k, x in given.items()}
    given |= {k: v for k, v in banks.items() if v is not None}
    split = {name: (mesh.model,) if name.endswith("bank") else rows for name in given}
    (found,) = _backend.sharding.shard_map(on_a_device, given, split, [rows])
    return found[:number] if more else found


def _there_and_back(mixture, given, device, goes, place, room, local, axis):
    tokens, weights, indices = (given[name] for name in ("tokens", "weights", "indices"))
    own, count = goes.shape
    # Row `place` of the rows for a device; what does not go there goes nowhere.
    to = ops.where(goes, ops.arange(count, dtype="int32")[None] * room + place, count * room)
    source = ops.scatter(
        ops.reshape(to, (-1, 1)), ops.repeat(ops.arange(1, own + 1, dtype="int32"), count), (count * room + 1,)
    )
    source = source[:-1] - 1  # of each row its token, or -1
    there = source >= 0
    source = ops.maximum(source, 0)
    peer = ops.repeat(ops.arange(count, dtype=device.dtype), room)
    mine = there[:, None] & (ops.take(device, source, axis=0) == peer[:, None])
    sent = {
        "tokens": ops.where(there[:, None], ops.take(tokens, source, axis=0), 0),
        "weights": ops.where(mine, ops.take(weights, source, axis=0), 0),
        "indices": ops.where(mine, ops.take(indices, source, axis=0) % local, local),
    }
    received = {name: _exchanged(x, count, axis) for name, x in sent.items()}
    banks = {name: x for name, x in given.items() if name.endswith("bank")}
    made = _exchanged(mixture(**received, **banks), count, axis)
    # Of each token what comes back from every device, zeros from those where it was not.
    made = ops.concatenate([made, ops.zeros((1, made.shape[1]), made.dtype)], axis=0)
    return ops.sum(ops.reshape(ops.take(made, ops.reshape(to, (-1,)), axis=0), (own, count, -1)), axis=1)


def _exchanged(x, count, axis):
    """Rows for each device, to those of each device."""
    by_device = ops.reshape(x, (count, -1, *x.shape[1:]))
    return ops.reshape(_backend.sharding.all_to_all(by_device, axis), x.shape)
