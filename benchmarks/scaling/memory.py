"""Bytes of a model on each device of a mesh, by arithmetic alone: the devices need not exist."""

import collections

import jax
import keras
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from benchmarks.scaling import steps
from keras_jamba import training
from keras_jamba.estimation import model_report
from keras_jamba.layers.states import SPLIT_AXES

BATCH, MODEL = steps.AXES


class Memory:
    """Bytes per device, for any mesh.

    Args:
        config: constructor arguments of a `JambaCausalLM`.
        kind: "training" or "decoding".
        checkpointing: whether the backward pass recomputes blocks.
    """

    def __init__(self, config, kind, checkpointing=True):
        self.config, self.kind, self.checkpointing = config, kind, checkpointing
        self.model = steps.model(config, kind, batch=(1, 64), checkpointing=checkpointing)
        self._kinds, self._caches = {}, {}
        # An optimizer's slot variables have the layouts of their weights.
        optimizer = getattr(self.model, "optimizer", None)
        self._slots = {}
        for slots in (optimizer._momentums, optimizer._velocities) if optimizer else ():
            self._slots |= {id(x): v.path for x, v in zip(slots, self.model.trainable_variables, strict=True)}

    def per_device(self, shape, layout, rows, length):
        """Returns bytes by purpose on each device of a mesh `shape`, for a global batch of `rows` of `length` tokens.

        Raises:
            ValueError: if a sharded size is not a multiple of its number of devices.
        """
        mesh = AbstractMesh(shape, steps.AXES)
        found = {
            name: sum(count * _shard_bytes(mesh, *variable) for variable, count in variables.items())
            for name, variables in self._variables(layout).items()
        }
        if self.kind == "decoding":
            caches = self._cache(rows, length)
            caches = [(name, _shard_bytes(mesh, _cache_axes(shape, name, x), x.shape, x.dtype)) for name, x in caches]
            found["caches"] = sum(size for _, size in caches)
            # Attention concatenates one layer's keys with the new token's, and the values likewise.
            found["activations"] = 2 * max(size for name, size in caches if name == "key")
        else:
            found |= activations(self.config, shape, layout, rows, length, self.checkpointing)
        return found | {"total": sum(found.values())}

    def _variables(self, layout):
        """Returns per group the number of variables by axes, shape and dtype, which are the same for all meshes."""
        key = tuple(sorted(layout.items()))
        if key not in self._kinds:
            mesh = keras.distribution.DeviceMesh((1, 1), steps.AXES, ["cpu:0"])
            layouts = training.layout_map(mesh, **layout)
            axes = lambda v: getattr(layouts[self._slots.get(id(v), v.path)], "axes", ())  # noqa: E731
            self._kinds[key] = {
                name: collections.Counter((tuple(axes(v)), tuple(v.shape), v.dtype) for v in variables)
                for name, variables in steps.groups(self.model).items()
            }
        return self._kinds[key]

    def _cache(self, rows, length):
        if (rows, length) not in self._caches:
            paths, _ = jax.tree_util.tree_flatten_with_path(steps.cache(self.model, rows, length))
            self._caches[rows, length] = [(path[-1].key, x) for path, x in paths]
        return self._caches[rows, length]


def _shard_bytes(mesh, axes, shape, dtype):
    return steps.shard_bytes(NamedSharding(mesh, PartitionSpec(*axes)), shape, dtype)


def _cache_axes(shape, name, x):
    """Returns the axes that XLA shards: rows by the batch axis; heads or channels by the model axis if divisible."""
    if name == "document":
        return ()
    if name in ("length", "start") and x.shape[0] % (shape[0] * shape[1]) == 0:
        return [(BATCH, MODEL)]
    axes = [BATCH] + [None] * (len(x.shape) - 1)
    if name in SPLIT_AXES and x.shape[SPLIT_AXES[name]] % shape[1] == 0:
        axes[SPLIT_AXES[name]] = MODEL
    return axes


def activations(config, shape, layout, rows, length, checkpointing):
    """Returns the activation bytes of `model_report` on one device, for its rows and its share of the model axis.

    - Every device holds in full: the tokens between blocks, the residuals of norms, the inputs of projections and
      perceptrons, the router's tensors, and delta's low rank, B and C.
    - The model axis divides channels, heads, hidden units, logits, and the weight copies in the compute dtype. With
      `sequence_parallel` it divides everything except the weight copies outside of experts.
    - It never divides the tensors of experts. A rare routing may send all tokens of a row of the mesh to one device,
      and a program reserves the memory of all its branches.

    A scan has the residuals of "portable". With `fully_sharded`, a device holds the gradients of one block in the
    compute dtype before they are summed and split.
    """
    reports = [_report(config, shape, rows, length, dtype, checkpointing) for dtype in ("mixed_bfloat16", "bfloat16")]
    devices, splits_tokens = shape[1], layout.get("sequence_parallel", False)
    token_share = 1 / devices if splits_tokens else 1
    tokens = reports[0].batch_size * length
    kept, blocks, copies = 0, [0], [0]
    for layer, bare in zip(*(report.layers for report in reports), strict=True):
        unsharded, experts = _unsharded_bytes(config, layer, tokens), _expert_bytes(config, layer, tokens)
        copied = _copy_bytes(config, layer, layer.activations - bare.activations, devices, splits_tokens)
        sharded = (bare.activations - unsharded - experts) / devices
        layer_bytes = unsharded * token_share + experts + sharded + copied
        if layer.kind and checkpointing:
            blocks.append(layer_bytes)
            kept += layer.checkpoint * token_share
        else:
            kept += layer_bytes
        copies += [copied] if layer.kind else []
    working = reports[0].working * token_share + (max(copies) if layout.get("fully_sharded") else 0)
    return {"activations": round(kept + max(blocks)), "working": round(working)}


def _report(config, shape, rows, length, dtype, checkpointing):
    inputs = dict(batch_size=max(1, rows // shape[0]), context=length, platform="gpu", scan="portable")
    return model_report(config, **inputs, dtype=dtype, gradient_checkpointing=checkpointing)


# The terms of a layer's activations are those of `keras_jamba/estimation/activations.py`.
def _unsharded_bytes(config, layer, tokens):
    d, x, k = config["d_model"], config["num_experts"], config["num_experts_per_token"]
    narrow = config["dt_rank"] + 2 * config["d_state"]
    norm, inputs = 4 * tokens * (d + 1), 2 * tokens * d
    router = 4 * tokens * (d + 2 * x + 2) + 12 * tokens * k
    parts = {"mamba": inputs + 6 * tokens * narrow + 12 * tokens, "attention": inputs, "dense": inputs, "moe": router}
    if layer.kind:
        return sum(norm + parts[part] for part in layer.kind.split(" + "))
    return {"embedding": 4 * tokens, "final_norm": norm, "head": inputs}[layer.name]


def _expert_bytes(config, layer, tokens):
    """Returns the bytes of tokens sorted by expert, the hidden layer, its outputs, and both orders, for all tokens."""
    rows = tokens * config["num_experts_per_token"]
    return rows * (2 * 2 * config["d_model"] + 4 * 2 * config["d_ff"] + 18) if "moe" in layer.kind else 0


def _copy_bytes(config, layer, copies, devices, splits_tokens):
    banks = 6 * config["num_experts"] * config["d_model"] * config["d_ff"] if "moe" in layer.kind else 0
    return (copies - banks) / (1 if splits_tokens else devices) + banks / devices
