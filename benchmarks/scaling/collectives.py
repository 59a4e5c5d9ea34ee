"""Collectives of a compiled JAX program: operations and bytes by kind."""

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
# XLA's pass that promotes all-reduces of 16-bit floats to float32 on a CPU. A later pass promotes the others.
_PROMOTION_PASS = "all-reduce-promotion"


def collectives(text):
    """Returns `{kind: (operations, bytes)}` of a program's text.

    Bytes are those of the results on each device. All branches of conditions count, and one iteration of each loop.
    """
    return _sorted(_counted(text))


def usual_collectives(text):
    """Returns `{kind: (operations, bytes)}` of one run.

    Of each condition, only the branch with the fewest bytes counts. The condition of the experts has two branches: one
    has a capacity of 1.5 times an even routing, the other of all tokens.

    Raises:
        ValueError: if a loop contains collectives: the text does not tell the number of iterations.
    """
    programs, entry = _computations(text)
    return _sorted(_collectives_per_run(programs, entry))


def compiled(lowered):
    """Returns `(compiled, text)` of a lowered program, where the text has the collectives in their original dtypes.

    XLA for CPUs computes bfloat16 in float32, including collectives, which would double the bytes. The text is
    therefore that before this promotion. The partitioner and all simplifications have run, but XLA has not combined
    small all-reduces yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_pass_re": f".*{_PROMOTION_PASS}.*",
        }
        # The text does not depend on the machine code, which is therefore not optimised.
        options |= {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        program = lowered.compile(compiler_options=options)
        (file,) = Path(folder).glob(f"*before_{_PROMOTION_PASS}*.txt")
        return program, file.read_text()


def _collectives_per_run(programs, name):
    found = collections.defaultdict(lambda: [0, 0])
    for line in programs[name]:
        branches = _BRANCHES.search(line)
        called = [inner for inner in _CALLED.findall(line) if inner in programs]
        if branches:
            names = re.findall(r"[\w.\-]+", " ".join(filter(None, branches.groups())))
            runs = [_collectives_per_run(programs, branch) for branch in names]
            run = min(runs, key=lambda run: sum(size for _, size in run.values()))
        elif _OPERATION.search(line):
            run = _counted(line)
        elif called:
            run = _summed([_collectives_per_run(programs, inner) for inner in called])
            if run and " while(" in line:
                raise ValueError(
                    "Collectives in a loop cannot be counted: the number of iterations is not in the text. "
                    f"Received: {run}. Move the collectives out of the loop."
                )
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
    """Returns `({name: lines}, name of the entry)`."""
    programs, entry, name = {}, None, None
    for line in text.splitlines():
        header = None if line.startswith((" ", "HloModule")) else _COMPUTATION.match(line)
        if header:
            name = header[2]
            programs[name], entry = [], name if header[1] else entry
        elif name is not None:
            programs[name].append(line)
    return programs, entry


def _counted(text):
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
