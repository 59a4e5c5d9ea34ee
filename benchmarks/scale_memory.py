"""What a device of a mesh holds of a model, by arithmetic alone: no device of the mesh has to be there."""

import collections

import jax
import keras
import scale_steps
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from keras_jamba import training
from keras_jamba.estimation import model_report
from keras_jamba.layers.states import SPLIT_AXES

BATCH, MODEL = scale_steps.AXES


class Memory:
    """Bytes of a device, for many meshes.

    Args:
        config: constructor arguments of a `JambaCausalLM`.
        kind: "training" or "decoding".
        checkpointing: whether blocks are computed again for the gradient.
    """

    def __init__(self, config, kind, checkpointing=True):
        self.config, self.kind, self.checkpointing = config, kind, checkpointing
        self.model = scale_steps.model(config, kind, batch=(1, 64), checkpointing=checkpointing)
        self._kinds, self._caches = {}, {}
        # An optimizer's variables are laid like the weights that they are of.
        optimizer = getattr(self.model, "optimizer", None)
        self._slots = {}
        for held in (optimizer._momentums, optimizer._velocities) if optimizer else ():
            self._slots |= {id(x): v.path for x, v in zip(held, self.model.trainable_variables, strict=True)}

    def of(self, shape, layout, rows, length):
        """Bytes by what they are for, on each device of a mesh `shape` with `rows` of `length` tokens in all.

        Raises:
            ValueError: where a size is no multiple of the devices that would share it.
        """
        mesh = AbstractMesh(shape, scale_steps.AXES)
        found = {
            name: sum(count * _part(mesh, *alike) for alike, count in variables.items())
            for name, variables in self._variables(layout).items()
        }
        if self.kind == "decoding":
            caches = self._cache(rows, length)
            parts = [(name, _part(mesh, _cache_axes(shape, name, x), x.shape, x.dtype)) for name, x in caches]
            found["caches"] = sum(size for _, size in parts)
            # Attention makes one tensor of a layer's keys and the new token's, and one of the values.
            found["activations"] = 2 * max(size for name, size in parts if name == "key")
        else:
            found |= activations(self.config, shape, layout, rows, length, self.checkpointing)
        return found | {"total": sum(found.values())}

    def _variables(self, layout):
        """Of each group how many variables there are of which axes, shape and dtype: the same for all meshes."""
        key = tuple(sorted(layout.items()))
        if key not in self._kinds:
            mesh = keras.distribution.DeviceMesh((1, 1), scale_steps.AXES, ["cpu:0"])
            layouts = training.layout_map(mesh, **layout)
            axes = lambda v: getattr(layouts[self._slots.get(id(v), v.path)], "axes", ())  # noqa: E731
            self._kinds[key] = {
                name: collections.Counter((tuple(axes(v)), tuple(v.shape), v.dtype) for v in variables)
                for name, variables in scale_steps.groups(self.model).items()
            }
        return self._kinds[key]

    def _cache(self, rows, length):
        if (rows, length) not in self._caches:
            paths, _ = jax.tree_util.tree_flatten_with_path(scale_steps.cache(self.model, rows, length))
            self._caches[rows, length] = [(path[-1].key, x) for path, x in paths]
        return self._caches[rows, length]


def _part(mesh, axes, shape, dtype):
    return scale_steps.part_of(NamedSharding(mesh, PartitionSpec(*axes)), shape, dtype)


def _cache_axes(shape, name, x):
    """As XLA lays it: rows over the batch's axis, heads or channels over the model's, where that divides them."""
    if name == "document":
        return ()
    if name in ("length", "start") and x.shape[0] % (shape[0] * shape[1]) == 0:
        return [(BATCH, MODEL)]
    axes = [BATCH] + [None] * (len(x.shape) - 1)
    if name in SPLIT_AXES and x.shape[SPLIT_AXES[name]] % shape[1] == 0:
        axes[SPLIT_AXES[name]] = MODEL
    return axes


def activations(config, shape, layout, rows, length, checkpointing):
    """`model_report`'s bytes on a device that has its share of the rows, what its row of the mesh shares divided.

    Whole on every device are the tokens between blocks, what norms keep of them, the inputs of projections and
    perceptrons, the router's tensors, and delta's low rank, B and C. Divided by the devices of a row are channels,
    heads, hidden units, logits, and the copies of weights in the compute dtype; with `sequence_parallel` all but such
    copies of other weights than experts. Whole in any case is what experts work with: a rare routing may send all
    tokens of a row of the mesh to one device, and a program reserves the memory of all its branches. A scan keeps what
    "portable" does. With `fully_sharded` the gradients of a block are there once in the compute dtype before they are
    summed and split.
    """
    reports = [_report(config, shape, rows, length, dtype, checkpointing) for dtype in ("mixed_bfloat16", "bfloat16")]
    devices, splits_tokens = shape[1], layout.get("sequence_parallel", False)
    everywhere = 1 / devices if splits_tokens else 1
    tokens = reports[0].batch_size * length
    kept, blocks, copies = 0, [0], [0]
    for layer, bare in zip(*(report.layers for report in reports), strict=True):
        complete, experts = _whole(config, layer, tokens), _of_experts(config, layer, tokens)
        copied = _copies(config, layer, layer.activations - bare.activations, devices, splits_tokens)
        own = complete * everywhere + experts + (bare.activations - complete - experts) / devices + copied
        if layer.kind and checkpointing:
            blocks.append(own)
            kept += layer.checkpoint * everywhere
        else:
            kept += own
        copies += [copied] if layer.kind else []
    working = reports[0].working * everywhere + (max(copies) if layout.get("fully_sharded") else 0)
    return {"activations": round(kept + max(blocks)), "working": round(working)}


def _report(config, shape, rows, length, dtype, checkpointing):
    given = dict(batch_size=max(1, rows // shape[0]), context=length, platform="gpu", scan="portable")
    return model_report(config, **given, dtype=dtype, gradient_checkpointing=checkpointing)


# The parts of a layer's activations are those of `keras_jamba/estimation/activations.py`.
def _whole(config, layer, tokens):
    d, x, k = config["d_model"], config["num_experts"], config["num_experts_per_token"]
    narrow = config["dt_rank"] + 2 * config["d_state"]
    norm, given = 4 * tokens * (d + 1), 2 * tokens * d
    router = 4 * tokens * (d + 2 * x + 2) + 12 * tokens * k
    parts = {"mamba": given + 6 * tokens * narrow + 12 * tokens, "attention": given, "dense": given, "moe": router}
    if layer.kind:
        return sum(norm + parts[part] for part in layer.kind.split(" + "))
    return {"embedding": 4 * tokens, "final_norm": norm, "head": given}[layer.name]


def _of_experts(config, layer, tokens):
    """Tokens sorted by expert, the hidden layer, what comes out of it, and both orders, of all tokens."""
    rows = tokens * config["num_experts_per_token"]
    return rows * (2 * 2 * config["d_model"] + 4 * 2 * config["d_ff"] + 18) if "moe" in layer.kind else 0


def _copies(config, layer, copies, devices, splits_tokens):
    banks = 6 * config["num_experts"] * config["d_model"] * config["d_ff"] if "moe" in layer.kind else 0
    return (copies - banks) / (1 if splits_tokens else devices) + banks / devices
