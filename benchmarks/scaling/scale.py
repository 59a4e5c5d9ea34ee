"""Devices that Jamba-v0.1 (52 B) and Jamba-1.5-Large (398 B) need, and their collectives, by simulation.

    KERAS_BACKEND=jax python -m benchmarks.scaling.scale [--smoke] [--only REGEX] [--search] [--compiled FILE]

The script first searches the fewest devices of 80 GB and of 141 GB that hold the model, and the mesh of that size with
the fewest bytes per device. It leaves a tenth of each device free and creates no weights. The cases are:

- training: float32 weights, mixed bfloat16, AdamW with two moments, gradient checkpointing, 2 rows of 4096 tokens per
  row of the mesh;
- decoding: bfloat16, 8 rows, a cache capacity of 256 K tokens.

Bytes of weights, gradients, optimizer and caches are exact: the shards of their layouts, where gradients have the
layouts of their weights. Activations are not measured: they are those of `model_report`, divided as described in
`benchmarks.scaling.memory.activations`. For decoding they are the keys and values of one layer, which attention
concatenates with the new token's.

The script then compiles the step for that mesh of simulated CPUs, in a separate process, with one block (8 layers) and
with two. The complete model is extrapolated: one block, plus the difference to two for each further block. Collectives
are counted in the compiled program as bytes of their results per device, see `collectives.compiled` and
`usual_collectives`. They are counted in their original dtypes, before XLA combines small ones, and for the usual branch
of the experts. XLA for GPUs turns an all-reduce into a reduce-scatter if each device uses only a shard. XLA for CPUs
does not, so such gradients count in full.

"temporaries" are the bytes of XLA for CPUs besides arguments. They hold bfloat16 as float32, and gradient checkpointing
saves nothing there (a tiny model took 141 MB with it, 143 without). Compare them with the sum of gradients and "kept
without" (activations without checkpointing). They do not predict the memory of a GPU.

Decoding is also compiled with all blocks, to check the extrapolation. `--compiled` reads compiled programs from the
results of an earlier run, for equal meshes. `--smoke` takes a tiny model on 8 devices. Prints a table and writes
results/scale.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys

COMMON = dict(vocab_size=65536, mamba_ratio=7, attention_offset=4, moe_frequency=2, moe_offset=1, d_state=16)
COMMON |= dict(num_experts=16, num_experts_per_token=2, num_kv_heads=8)
MODELS = {
    "Jamba-v0.1": COMMON | dict(d_model=4096, num_layers=32, num_heads=32, d_ff=14336, dt_rank=256),
    "Jamba-1.5-Large": COMMON | dict(d_model=8192, num_layers=72, num_heads=64, d_ff=24576, dt_rank=512),
}
TINY = COMMON | dict(vocab_size=64, mamba_ratio=1, attention_offset=1, d_model=64, num_layers=6, num_heads=8)
TINY |= dict(d_ff=32, dt_rank=4)
# Training: rows per row of the mesh, and tokens per row. Decoding: rows, and capacity of the cache.
BATCHES = {"training": (2, 4096), "decoding": (8, 256 * 1024)}
SMOKE = {"training": (2, 64), "decoding": (8, 64)}
# In rising order of communication.
LAYOUTS = {
    "training": [{}, {"fully_sharded": True}, {"fully_sharded": True, "sequence_parallel": True}],
    "decoding": [{}],
}
SIZES, FREE, MOST = (80, 141), 0.1, 1024
MODEL_AXES = (1, 2, 4, 8, 16)


def rows_of(kind, shape, batches=BATCHES):
    rows, length = batches[kind]
    return (rows * shape[0] if kind == "training" else rows), length


def smallest_mesh(memory, gigabytes):
    """Returns the case with the fewest devices that hold the model, or None."""
    for devices in range(1, MOST + 1):
        for layout in LAYOUTS[memory.kind]:
            fitting = []
            for shape in [(devices // axis, axis) for axis in MODEL_AXES if devices % axis == 0]:
                rows, length = rows_of(memory.kind, shape)
                if rows % shape[0]:
                    continue
                try:
                    found = memory.per_device(shape, layout, rows, length)
                except ValueError:  # a sharded size is not a multiple of its devices
                    continue
                if found["total"] <= (1 - FREE) * gigabytes * 1e9:
                    fitting.append({"mesh": shape, "layout": layout, "bytes": found})
            if fitting:
                return min(fitting, key=lambda case: case["bytes"]["total"])
    return None


def search():
    from benchmarks.scaling.memory import Memory, activations

    cases = []
    for name, config in MODELS.items():
        for kind in BATCHES:
            memory = Memory(config, kind)
            for size in SIZES:
                found = smallest_mesh(memory, size)
                if found is None:
                    print(f"{name}, {kind}: no mesh of at most {MOST} devices of {size} GB", flush=True)
                    continue
                rows, length = rows_of(kind, found["mesh"])
                cases.append(dict(model=name, step=kind, device=size, rows=rows, tokens=length) | found)
                if kind == "training":
                    kept = activations(config, found["mesh"], found["layout"], rows, length, checkpointing=False)
                    cases[-1]["kept without"] = kept["activations"]
    return cases


def block_length(config):
    """Returns the number of layers after which the pattern repeats."""
    length = config["mamba_ratio"] + 1
    while length % config["moe_frequency"]:
        length += config["mamba_ratio"] + 1
    return length


def compile_blocks(config, case, blocks):
    """Compiles a step with `blocks` blocks and returns `{"collectives", "temporaries", "bytes"}`."""
    import jax

    from benchmarks.scaling import steps
    from benchmarks.scaling.collectives import compiled, usual_collectives

    config = config | {"num_layers": blocks * block_length(config)}
    kind, batch = case["step"], (case["rows"], case["tokens"])
    with steps.distribution(tuple(case["mesh"]), case["layout"]).scope():
        model = steps.model(config, kind, batch, checkpointing=True)
        program, text = compiled(steps.lowered(model, kind, *batch))
        groups = steps.groups(model).items()
        local_bytes = {name: steps.local_bytes([v._value for v in variables]) for name, variables in groups}
        if kind == "decoding":
            shapes, shardings = steps.cache(model, *batch), program.input_shardings[0][2]
            cache_bytes = jax.tree.map(lambda x, s: steps.shard_bytes(s, x.shape, x.dtype), shapes, shardings)
            local_bytes["caches"] = sum(jax.tree.leaves(cache_bytes))
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {"collectives": usual_collectives(text), "temporaries": temporaries, "bytes": local_bytes}


def extrapolated(one, two, blocks):
    """Returns the figures of `blocks` blocks from those of one and of two."""
    if isinstance(one, dict):
        return {key: extrapolated(one.get(key, (0, 0)), two.get(key, (0, 0)), blocks) for key in {**one, **two}}
    if isinstance(one, (tuple, list)):
        return [extrapolated(a, b, blocks) for a, b in zip(one, two, strict=True)]
    return one + (blocks - 1) * (two - one)


def compile_case(case):
    """Returns the figures of the compiled programs, in a process with the devices of the mesh."""
    config = TINY if case["model"] == "tiny" else MODELS[case["model"]]
    blocks = config["num_layers"] // block_length(config)
    one, two = (compile_blocks(config, case, count) for count in (1, 2))
    found = extrapolated(one, two, blocks)
    counted = {name: case["bytes"][name] for name in found["bytes"]}
    if counted != found["bytes"]:
        raise ValueError(
            f"The bytes per device of the program must be those computed: {counted}. Received: {found['bytes']}. "
            "Correct `benchmarks.scaling.memory`."
        )
    if case["step"] == "decoding":
        found["compiled as a whole"] = compile_blocks(config, case, blocks)
    return found


def compile_in_subprocess(case):
    devices = case["mesh"][0] * case["mesh"][1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--case", json.dumps(case)],
        # XLA dumps the text only when it compiles, so the compilation cache is off.
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:500]}
    return json.loads(done.stdout.splitlines()[-1])


def program_key(case):
    """Returns the properties of a case that determine its program, as JSON."""
    return json.dumps([case[name] for name in ("model", "step", "rows", "tokens", "mesh", "layout")])


def earlier_programs(file):
    with open(file, encoding="utf-8") as results:
        cases = json.load(results)["cases"]
    succeeded = [case for case in cases if "failed" not in case.get("compiled", {"failed": 0})]
    return {program_key(case): case["compiled"] for case in succeeded}


def table_row(case):
    gigabytes = lambda number: f"{number / 1e9:.3g}"  # noqa: E731
    cells = {"model": case["model"], "step": case["step"], "GB a device": case.get("device", "")}
    cells |= {"mesh": "{} x {}".format(*case["mesh"]), "layout": ", ".join(case["layout"]) or "-"}
    cells["batch"] = f"{case['rows']} x {case['tokens']}"
    cells |= {name: gigabytes(size) for name, size in case["bytes"].items()}
    compiled = case.get("compiled", {})
    for kind, (count, size) in compiled.get("collectives", {}).items():
        cells[kind] = f"{gigabytes(size)} ({count})"
    sizes = {"kept without": case.get("kept without"), "temporaries": compiled.get("temporaries")}
    return cells | {name: gigabytes(size) for name, size in sizes.items() if size is not None}


def smoke():
    from benchmarks.scaling.memory import Memory

    for kind in SMOKE:
        shape, layout = (2, 4), LAYOUTS[kind][-1] if kind == "decoding" else LAYOUTS[kind][1]
        rows, length = rows_of(kind, shape, SMOKE)
        found = Memory(TINY, kind).per_device(shape, layout, rows, length)
        yield dict(model="tiny", step=kind, rows=rows, tokens=length, mesh=shape, layout=layout, bytes=found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="run a tiny model and record nothing")
    parser.add_argument("--search", action="store_true", help="search only: compile and record nothing")
    parser.add_argument("--only", metavar="REGEX", default="", help="compile only cases where this matches MODEL STEP")
    parser.add_argument("--compiled", help="results file of an earlier run")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(compile_case(json.loads(args.case))))
        return
    from benchmarks import measure

    cases = list(smoke() if args.smoke else search())
    earlier = earlier_programs(args.compiled) if args.compiled else {}
    for case in cases:
        if program_key(case) in earlier:
            case["compiled"] = earlier[program_key(case)]
        elif not args.search and re.search(args.only, f"{case['model']} {case['step']}"):
            case["compiled"] = compile_in_subprocess(case)
        print(table_row(case), case.get("compiled", {}).get("failed", ""), flush=True)
        if not args.smoke and not args.search:
            measure.record("scale", {"free": FREE, "cases": cases})
    rows = [table_row(case) for case in cases]
    print(measure.table(rows, list(dict.fromkeys(column for each in rows for column in each))))
    for case in cases:
        complete = case.get("compiled", {}).get("compiled as a whole", {})
        for name in complete:
            print(case["model"], case["step"], name, case["compiled"][name], "as a whole", complete[name])


if __name__ == "__main__":
    main()
