"""What the devices of a compiled JAX program send each other, by kind."""

import collections
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(rf"({'|'.join(_BYTES)})\[([\d,]*)\]")


def collectives(text):
    """`{kind: (operations, bytes)}` of a program's text: what each device gets of them, all branches of conditions
    counted, and of a loop one turn."""
    found = collections.defaultdict(lambda: [0, 0])
    for shapes, kind in _OPERATION.findall(text):
        found[kind][0] += 1
        found[kind][1] += sum(_size(*array) for array in _ARRAY.findall(shapes))
    return {kind: tuple(found[kind]) for kind in KINDS if kind in found}


def _size(dtype, shape):
    size = _BYTES[dtype]
    for length in filter(None, shape.split(",")):
        size *= int(length)
    return size
