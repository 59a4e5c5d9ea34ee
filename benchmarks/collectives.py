"""What the devices of a compiled JAX program send each other, by kind."""

import collections
import re
import tempfile
from pathlib import Path

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(rf"({'|'.join(_BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=([^\s,]+)")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
# XLA's pass that makes all-reduces of small numbers float32 on a CPU; another one then does so with whatever is left.
_ROUNDED = "all-reduce-promotion"


def collectives(text):
    """`{kind: (operations, bytes)}` of a program's text: what each device gets of them, all branches of conditions
    counted, and of a loop one turn."""
    return _sorted(_found(text))


def usual_collectives(text):
    """The same of one run: of a condition the branch with the fewest bytes.

    That of experts has room for what an even routing needs and half as much again in the one, for all tokens in the
    other.

    Raises:
        ValueError: where devices exchange something in a loop: how often is not in the text.
    """
    programs, entry = _computations(text)
    return _sorted(_of_a_run(programs, entry))


def compiled(lowered):
    """`(compiled, text)` of a lowered program: its text with the collectives in the numbers that they have elsewhere.

    XLA's compiler for CPUs computes in float32 what is bfloat16, collectives included, and would count twice: the text
    is that of before, behind the partitioner and all simplifications, but with small all-reduces still apart.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": f".*{_ROUNDED}.*"}
        # Machine code comes later, and is not asked for.
        options |= {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        made = lowered.compile(compiler_options=options)
        (file,) = Path(folder).glob(f"*before_{_ROUNDED}*.txt")
        return made, file.read_text()


def _of_a_run(programs, name):
    found = collections.defaultdict(lambda: [0, 0])
    for line in programs[name]:
        branches = _BRANCHES.search(line)
        called = [inner for inner in _CALLED.findall(line) if inner in programs]
        if branches:
            names = re.findall(r"[\w.\-]+", " ".join(filter(None, branches.groups())))
            runs = [_of_a_run(programs, branch) for branch in names]
            run = min(runs, key=lambda run: sum(size for _, size in run.values()))
        elif _OPERATION.search(line):
            run = _found(line)
        elif called:
            run = _summed([_of_a_run(programs, inner) for inner in called])
            if run and " while(" in line:
                raise ValueError(f"Devices exchange something in a loop, of which nobody says how often: {run}.")
        else:
            continue
        found = _summed([found, run])
    return found


def _summed(runs):
    found = collections.defaultdict(lambda: [0, 0])
    for run in runs:
        for kind, (count, size) in run.items():
            found[kind] = [found[kind][0] + count, found[kind][1] + size]
    return found


def _computations(text):
    """`({name: lines}, name of the entry)`."""
    programs, entry, name = {}, None, None
    for line in text.splitlines():
        begins = None if line.startswith((" ", "HloModule")) else _COMPUTATION.match(line)
        if begins:
            name = begins[2]
            programs[name], entry = [], name if begins[1] else entry
        elif name is not None:
            programs[name].append(line)
    return programs, entry


def _found(text):
    found = collections.defaultdict(lambda: [0, 0])
    for shapes, kind in _OPERATION.findall(text):
        found[kind][0] += 1
        found[kind][1] += sum(_size(*array) for array in _ARRAY.findall(shapes))
    return found


def _sorted(found):
    return {kind: tuple(found[kind]) for kind in KINDS if kind in found}


def _size(dtype, shape):
    size = _BYTES[dtype]
    for length in filter(None, shape.split(",")):
        size *= int(length)
    return size
