"""The counts per device of `benchmarks/scaling/scale.py` equal those of a real model on each of 8 devices."""

import sys
from pathlib import Path

import jax
import numpy as np

import keras_jamba
from keras_jamba import training

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.scaling import memory, scale, steps  # noqa: E402
from benchmarks.scaling.collectives import collectives, compiled, usual_collectives  # noqa: E402

TINY = scale.TINY | {"num_layers": 2}


def on_each_device(arrays):
    """Returns the bytes per device, which must be equal on all devices."""
    found = {device: 0 for device in jax.devices()}
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            found[shard.device] += shard.data.nbytes
    (same,) = set(found.values())
    return same


def check_training(shape, layout):
    counted = memory.Memory(TINY, "training").per_device(shape, layout, 8, 16)
    with steps.distribution(shape, layout).scope():
        model = keras_jamba.JambaCausalLM(**TINY, dtype="mixed_bfloat16")
        model.compile(training.optimizer(model, steps=10))
        model.optimizer.build(model.trainable_variables)
        for name, variables in steps.groups(model).items():
            found = on_each_device([v.value for v in variables])
            assert found == counted[name], (shape, layout, name, found, counted[name])


def check_decoding(shape):
    """Checks a step that is compiled from shapes and run on arrays. XLA chooses the layout of the cache."""
    rows, length = 8, 64
    counted = memory.Memory(TINY, "decoding").per_device(shape, {}, rows, length)
    with steps.distribution(shape, {}).scope():
        lowered = steps.lowered(steps.model(TINY, "decoding"), "decoding", rows, length)
        program, text = compiled(lowered)
        model = keras_jamba.JambaCausalLM(**TINY, dtype="bfloat16")
        values = [v.value for v in model.variables]
        given = np.zeros((rows, 1), "int32"), model.init_cache(rows, length)
        given = jax.device_put(given, program.input_shardings[0][1:])
        tokens, cache = program(values, *given)
    assert on_each_device(values) == counted["weights"]
    assert on_each_device(cache) == counted["caches"]
    # The compiled CPU program computes bfloat16 in float32, so it sends more bytes.
    most, usual, run = (sum(size for _, size in x.values()) for x in (
        collectives(text), usual_collectives(text), collectives(program.as_text())
    ))  # fmt: skip
    assert usual <= most <= run


def check_branches():
    """Checks that a condition counts as the branch that sends fewer bytes, and that loops are refused."""
    gather = "  %a = f32[{}]{{0}} all-gather(%x)"
    branches = ["%few (x: f32[2]) -> f32[4] {", gather.format(4), "}"]
    branches += ["%all (x: f32[2]) -> f32[8] {", gather.format(8), "}"]
    entry = ["ENTRY %main (x: f32[2]) -> f32[8] {", gather.format(16)]
    entry += ["  %c = f32[8] conditional(%p, %x, %x), branch_computations={%all, %few}", "}"]
    assert usual_collectives("\n".join(branches + entry)) == {"all-gather": (2, 4 * (16 + 4))}
    entry.insert(1, "  %w = f32[8] while(%x), condition=%none, body=%all")
    try:
        usual_collectives("\n".join(branches + entry))
    except ValueError as error:
        assert "in a loop" in str(error)
    else:
        raise AssertionError("A collective in a loop was counted once.")


def check_gathered_as_computed():
    """Checks that shards of a float32 matrix are sent in bfloat16, the compute dtype."""
    with steps.distribution((2, 4), {"fully_sharded": True}).scope():
        layer = keras_jamba.layers.FeedForward(64, 32, dtype="mixed_bfloat16", name="feed_forward")
        layer.build((None, None, 64))
        function = jax.jit(lambda values, x: layer.stateless_call(values, [], x)[0])
        values = [v.value for v in layer.trainable_variables]
        _, text = compiled(function.lower(values, np.zeros((8, 16, 64), "float32")))
    gathered = [line.split()[2] for line in text.splitlines() if " all-gather(" in line]
    assert gathered and all(shape.startswith("bf16") for shape in gathered), gathered


def check_channels_stay_apart():
    """Checks that rematerialization gathers no full channel axis of a Mamba layer, for tokens or weights."""
    rows, length, d = 8, 16, 64
    with steps.distribution((2, 4), {}).scope():
        given = dict(mamba_ratio=None, moe_frequency=1, num_experts=16, gradient_checkpointing=True)
        model = keras_jamba.models.JambaBackbone(d_model=d, num_layers=2, **given, dtype="mixed_bfloat16")

        def loss(trainable, others, x):
            return (model.stateless_call(trainable, others, x, training=True)[0] ** 2).sum()

        variables = model.trainable_variables, model.non_trainable_variables
        values = [[v.value for v in each] for each in variables]
        _, text = compiled(jax.jit(jax.grad(loss)).lower(*values, np.zeros((rows, length, d), "float32")))
    gathered = [line.split()[2] for line in text.splitlines() if " all-gather(" in line]
    wide = (f",{2 * d}]", f",{4 * d}]")  # one half of the projection or both
    assert gathered and not any(end in shape for shape in gathered for end in wide), gathered


def main():
    check_channels_stay_apart()
    check_gathered_as_computed()
    check_branches()
    check_training((4, 2), {"fully_sharded": True})
    check_decoding((2, 4))
    one, two = {"a": (1, 10)}, {"a": (3, 14), "b": (1, 1)}
    assert scale.extrapolated(one, two, 4) == {"a": [7, 22], "b": [3, 3]}
    print("all are equal")


if __name__ == "__main__":
    main()
