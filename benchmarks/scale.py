"""How many devices Jamba-v0.1 (52 B) and Jamba-1.5-Large (398 B) need, and what these send each other: by simulation.

    KERAS_BACKEND=jax python benchmarks/scale.py [--smoke] [--only REGEX] [--search] [--compiled FILE]

No device holds a weight. For training (a model stored in float32, mixed bfloat16, AdamW with two moments, gradient
checkpointing, 2 rows of 4096 tokens for each row of the mesh) and for decoding (bfloat16, 8 rows, room for 256 K
tokens) it searches the fewest devices of 80 and of 141 GB that hold the model, and of as many the mesh on which each
holds least; a tenth of a device is left free. Weights, gradients, optimizer and caches are exact: the parts that their
layouts give a device. Gradients lie as their weights do. Activations are `model_report`'s, divided as
`scale_memory.activations` says, and no measurement; of decoding, the keys and values of one layer, which attention puts
together with the new token's.

On the mesh that was found the step is compiled for as many simulated CPUs, in a process of its own, with one block (8
layers) and with two: a step of the whole model takes what one block takes, and as often as there are further blocks
what the second adds. Collectives are counted in that program, see `collectives.compiled` and `usual_collectives`: in
bfloat16 where they are, of the experts' two branches the usual one, before XLA puts small ones together, and as bytes
of their results on a device. XLA for CPUs makes no reduce-scatter of an all-reduce of which a device keeps a part, as
it does for GPUs: such gradients count whole.

"temporaries" are what XLA for CPUs takes besides arguments: bfloat16 as float32, and nothing saved by gradient
checkpointing (a tiny model took 141 MB with it, 143 without). They are to be compared with gradients and "kept without"
checkpointing together, and predict no GPU's.

Decoding is compiled as a whole too, to compare with what one block and two say of it. `--compiled` takes what an
earlier run compiled from its results, where the mesh is the same. `--smoke` is a tiny model on 8 devices. Prints a
table and writes results/scale.json.
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
# Rows for each row of the mesh and tokens of one, of training; rows and room of the cache, of decoding.
BATCHES = {"training": (2, 4096), "decoding": (8, 256 * 1024)}
SMOKE = {"training": (2, 64), "decoding": (8, 64)}
# Those that send less go first.
LAYOUTS = {
    "training": [{}, {"fully_sharded": True}, {"fully_sharded": True, "sequence_parallel": True}],
    "decoding": [{}],
}
SIZES, FREE, MOST = (80, 141), 0.1, 1024
MODEL_AXES = (1, 2, 4, 8, 16)


def rows_of(kind, shape, batches=BATCHES):
    rows, length = batches[kind]
    return (rows * shape[0] if kind == "training" else rows), length


def smallest(memory, gigabytes):
    """The case with the fewest devices that hold it, or None."""
    for devices in range(1, MOST + 1):
        for layout in LAYOUTS[memory.kind]:
            fitting = []
            for shape in [(devices // axis, axis) for axis in MODEL_AXES if devices % axis == 0]:
                rows, length = rows_of(memory.kind, shape)
                if rows % shape[0]:
                    continue
                try:
                    found = memory.of(shape, layout, rows, length)
                except ValueError:  # a size is no multiple of the devices that would share it
                    continue
                if found["total"] <= (1 - FREE) * gigabytes * 1e9:
                    fitting.append({"mesh": shape, "layout": layout, "bytes": found})
            if fitting:
                return min(fitting, key=lambda case: case["bytes"]["total"])
    return None


def search():
    from scale_memory import Memory, activations

    cases = []
    for name, config in MODELS.items():
        for kind in BATCHES:
            memory = Memory(config, kind)
            for size in SIZES:
                found = smallest(memory, size)
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
    """Layers until the pattern repeats itself."""
    length = config["mamba_ratio"] + 1
    while length % config["moe_frequency"]:
        length += config["mamba_ratio"] + 1
    return length


def of_blocks(config, case, blocks):
    """What a step with so many blocks takes: `{"collectives", "temporaries", "bytes"}`, bytes as it has them."""
    import jax
    import scale_steps
    from collectives import compiled, usual_collectives

    config = config | {"num_layers": blocks * block_length(config)}
    kind, batch = case["step"], (case["rows"], case["tokens"])
    with scale_steps.distribution(tuple(case["mesh"]), case["layout"]).scope():
        model = scale_steps.model(config, kind, batch, checkpointing=True)
        program, text = compiled(scale_steps.lowered(model, kind, *batch))
        groups = scale_steps.groups(model).items()
        held = {name: scale_steps.bytes_where_laid([v._value for v in variables]) for name, variables in groups}
        if kind == "decoding":
            shapes, shardings = scale_steps.cache(model, *batch), program.input_shardings[0][2]
            parts = jax.tree.map(lambda x, s: scale_steps.part_of(s, x.shape, x.dtype), shapes, shardings)
            held["caches"] = sum(jax.tree.leaves(parts))
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {"collectives": usual_collectives(text), "temporaries": temporaries, "bytes": held}


def extrapolated(one, two, blocks):
    """What `blocks` blocks take."""
    if isinstance(one, dict):
        return {key: extrapolated(one.get(key, (0, 0)), two.get(key, (0, 0)), blocks) for key in {**one, **two}}
    if isinstance(one, (tuple, list)):
        return [extrapolated(a, b, blocks) for a, b in zip(one, two, strict=True)]
    return one + (blocks - 1) * (two - one)


def compile_case(case):
    """In a process with as many devices as the mesh: adds what the compiled programs say."""
    config = TINY if case["model"] == "tiny" else MODELS[case["model"]]
    blocks = config["num_layers"] // block_length(config)
    one, two = (of_blocks(config, case, count) for count in (1, 2))
    found = extrapolated(one, two, blocks)
    counted = {name: case["bytes"][name] for name in found["bytes"]}
    if counted != found["bytes"]:
        raise ValueError(f"The program has other bytes a device than were counted: {found['bytes']}, {counted}.")
    if case["step"] == "decoding":
        found["compiled as a whole"] = of_blocks(config, case, blocks)
    return found


def in_a_process(case):
    devices = case["mesh"][0] * case["mesh"][1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)],
        # What comes from a cache was not compiled, and wrote nothing down.
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:500]}
    return json.loads(done.stdout.splitlines()[-1])


def program_of(case):
    """What decides about the program."""
    return json.dumps([case[name] for name in ("model", "step", "rows", "tokens", "mesh", "layout")])


def earlier_programs(file):
    with open(file, encoding="utf-8") as results:
        cases = json.load(results)["cases"]
    return {program_of(case): case["compiled"] for case in cases if "failed" not in case.get("compiled", {"failed": 0})}


def row(case):
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
    from scale_memory import Memory

    for kind in SMOKE:
        shape, layout = (2, 4), LAYOUTS[kind][-1] if kind == "decoding" else LAYOUTS[kind][1]
        rows, length = rows_of(kind, shape, SMOKE)
        found = Memory(TINY, kind).of(shape, layout, rows, length)
        yield dict(model="tiny", step=kind, rows=rows, tokens=length, mesh=shape, layout=layout, bytes=found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, nothing recorded")
    parser.add_argument("--search", action="store_true", help="nothing is compiled, nothing recorded")
    parser.add_argument("--only", default="", help="compile cases whose model and step this is found in")
    parser.add_argument("--compiled", help="results of an earlier run")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(compile_case(json.loads(args.case))))
        return
    import measure

    cases = list(smoke() if args.smoke else search())
    earlier = earlier_programs(args.compiled) if args.compiled else {}
    for case in cases:
        if program_of(case) in earlier:
            case["compiled"] = earlier[program_of(case)]
        elif not args.search and re.search(args.only, f"{case['model']} {case['step']}"):
            case["compiled"] = in_a_process(case)
        print(row(case), case.get("compiled", {}).get("failed", ""), flush=True)
        if not args.smoke and not args.search:
            measure.record("scale", {"free": FREE, "cases": cases})
    rows = [row(case) for case in cases]
    print(measure.table(rows, list(dict.fromkeys(column for each in rows for column in each))))
    for case in cases:
        complete = case.get("compiled", {}).get("compiled as a whole", {})
        for name in complete:
            print(case["model"], case["step"], name, case["compiled"][name], "as a whole", complete[name])


if __name__ == "__main__":
    main()
