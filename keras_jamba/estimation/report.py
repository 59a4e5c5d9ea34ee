"""The cost report of a model: one row per layer, and totals."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras

from keras_jamba import _backend
from keras_jamba._typing import DType
from keras_jamba.estimation import activations, operations, parameters, quantization, working
from keras_jamba.estimation._plan import Run, bytes_of, plan_of, sizes_of
from keras_jamba.estimation.caches import cache_bytes, readout_bytes
from keras_jamba.models import DHCJamba, JambaBackbone, JambaCausalLM
from keras_jamba.ops import _checks, implementations
from keras_jamba.ops.scan import _FASTEST_FIRST


@dataclass(frozen=True)
class LayerReport:
    """The costs of one layer: counts, operations per step, and bytes.

    Attributes:
        name: "encoder", "tokens", "embedding", "block_0", ..., "final_norm", "readout" or "head".
        kind: mixer and feed-forward part of a block, else empty.
        parameters: the number of weights, including frozen quantized ones.
        active_parameters: the number of weights that one token uses: k of x experts.
        statistics: the number of untrained values: statistics of batch norms and of the last routing.
        flops_forward, flops_backward: operations as counted in `scan_flops`.
        flops_recomputed: operations of the second forward pass of a checkpointed block.
        weights, gradients, optimizer: bytes.
        activations: bytes that the backward pass needs without checkpointing. Without training, bytes alive at once
            while the layer runs.
        checkpoint: bytes kept of the layer with gradient checkpointing. A block keeps its input.
        kv_cache, conv_cache, ssm_cache, counters: bytes of the states of `init_cache` after the context. The sums of a
            stream's readout count as counters.
    """

    name: str
    kind: str
    parameters: int
    active_parameters: int
    statistics: int
    flops_forward: int
    flops_backward: int
    flops_recomputed: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int
    kv_cache: int
    conv_cache: int
    ssm_cache: int
    counters: int


_SUMS = [field.name for field in dataclasses.fields(LayerReport)[2:]]


@dataclass(frozen=True)
class ModelReport:
    """The costs of a model: one row per layer, and totals as attributes.

    `print(report)` shows a table, and `to_dict()` is for JSON. Every number of a `LayerReport` is also an attribute of
    the report, summed over the layers. The exception is `activations`, which is not the plain sum.

    Attributes:
        layers: one `LayerReport` per layer.
        batch_size, context: sequences, and tokens per sequence.
        training: whether a step trains. Otherwise a step is one forward pass over the context.
        dtype: name of the dtype policy.
        gradient_checkpointing: whether blocks are recomputed for the gradient.
        platform, scan: the platform, and the implementation of the scan.
        working: bytes of a training step besides weights, gradients, optimizer and kept activations.
    """

    layers: tuple[LayerReport, ...]
    batch_size: int
    context: int
    training: bool
    dtype: str
    gradient_checkpointing: bool
    platform: str
    scan: str
    working: int

    def __getattr__(self, name: str) -> int:
        """Returns the sum over the layers of one of their numbers."""
        if name not in _SUMS:
            raise AttributeError(f"A ModelReport has no attribute {name!r}. It has {_SUMS} besides its fields.")
        return self._sum(name)

    def _sum(self, name: str) -> int:
        return sum(getattr(layer, name) for layer in self.layers)

    @property
    def flops_per_step(self) -> int:
        """Operations of the model per step without recomputation, the numerator of MFU.

        [Chowdhery et al. (2022)](https://arxiv.org/abs/2204.02311), appendix B.
        """
        return self.flops_forward + self.flops_backward

    @property
    def activations_plain(self) -> int:
        """Bytes that the backward pass needs without checkpointing."""
        return self._sum("activations")

    @property
    def activations_checkpointed(self) -> int:
        """Bytes with every block checkpointed: the blocks' inputs, and all activations of the largest block."""
        blocks = [layer.activations for layer in self.layers if layer.kind]
        return self._sum("checkpoint") + max(blocks)

    @property
    def activations(self) -> int:
        """Bytes with the model's own checkpointing setting. Without training, bytes of the largest layer."""
        if not self.training:
            return max(layer.activations for layer in self.layers)
        return self.activations_checkpointed if self.gradient_checkpointing else self.activations_plain

    @property
    def cache(self) -> int:
        """Bytes of the states of all layers."""
        return self.kv_cache + self.conv_cache + self.ssm_cache + self.counters

    @property
    def peak(self) -> int:
        """Peak bytes.

        The peak of training is at the end of the forward pass. It includes the previous step's gradients, which Keras
        frees only then.
        """
        total = self.weights + self.activations
        return total + (self.gradients + self.optimizer + self.working if self.training else self.cache)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts, lists and numbers."""
        totals = [*_SUMS, "flops_per_step", "activations_plain", "activations_checkpointed", "cache", "peak"]
        return dataclasses.asdict(self) | {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "totals": {name: getattr(self, name) for name in totals},
        }

    def __str__(self) -> str:
        mode = "training" if self.training else "inference"
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing and self.training else ""
        head = f"{mode}{checkpointing}, batch {self.batch_size}, context {self.context}, {self.dtype}"
        head += f", {self.platform}, scan {self.scan}"
        rows = [[column for column, _, _ in _COLUMNS]]
        rows += [[show(getattr(layer, name)) for _, name, show in _COLUMNS] for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(_aligned, row, widths, range(len(row)))).rstrip() for row in rows]
        totals = [f"{name.replace('_', ' '):25}{show(getattr(self, name)):>12}" for name, show in _TOTALS]
        return "\n".join([head, *lines, "", *totals])


def _aligned(cell, width, column):
    """Aligns names to the left and numbers to the right."""
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _count(number):
    return _scaled(number, 1000, ("", " K", " M", " G", " T", " P", " E"))


def _bytes(number):
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(number, step, units):
    """Formats a number with four digits and a unit."""
    power = 0
    while abs(number) >= step and power < len(units) - 1:
        number, power = number / step, power + 1
    return f"{number:.4g}{units[power]}"


_COLUMNS = (
    ("layer", "name", str),
    ("kind", "kind", str),
    ("parameters", "parameters", _count),
    ("active", "active_parameters", _count),
    ("forward", "flops_forward", _count),
    ("backward", "flops_backward", _count),
    ("weights", "weights", _bytes),
    ("activations", "activations", _bytes),
    ("kv cache", "kv_cache", _bytes),
    ("conv cache", "conv_cache", _bytes),
    ("ssm cache", "ssm_cache", _bytes),
)
_TOTALS = (
    ("parameters", _count),
    ("active_parameters", _count),
    ("flops_forward", _count),
    ("flops_backward", _count),
    ("flops_recomputed", _count),
    ("weights", _bytes),
    ("gradients", _bytes),
    ("optimizer", _bytes),
    ("activations", _bytes),
    ("working", _bytes),
    ("cache", _bytes),
    ("peak", _bytes),
)


def model_report(
    model: JambaBackbone | DHCJamba | JambaCausalLM | dict[str, Any],
    *,
    batch_size: int = 1,
    context: int | None = None,
    image_size: Sequence[int] | None = None,
    training: bool = True,
    dtype: DType | None = None,
    gradient_checkpointing: bool | None = None,
    optimizer_slots: int = 2,
    platform: Literal["cpu", "gpu", "tpu"] | None = None,
    scan: str | None = None,
) -> ModelReport:
    """Estimates the costs of a model without building it.

    Args:
        model: a `JambaBackbone`, a `DHCJamba`, a `JambaCausalLM`, or a dict of constructor arguments. A dict with
            `vocab_size` is a language model: a backbone, an embedding `(v, d)` and a head `(d, v)` without bias. With
            `tie_embeddings=True` embedding and head share weights. With `quantization` weights count in their stored
            size. Adapters are not counted.
        batch_size: sequences or images b.
        context: tokens t per sequence. Must be None for an image model, where the size of the image or clip determines
            the tokens.
        image_size: `(H, W)` for an image model of any size, `(T, H, W)` for one of clips.
        training: whether a step trains. False runs forward over the complete context at once.
        dtype: a dtype policy or its name: "float32", "mixed_bfloat16", "bfloat16", ... None takes the model's.
        gradient_checkpointing: whether blocks are checkpointed. None takes the model's setting.
        optimizer_slots: values that the optimizer keeps per trained weight: 2 for Adam, 1 for momentum.
        platform: "cpu", "gpu" or "tpu"; None is the current one.
        scan: name of the scan's implementation. None takes `KERAS_JAMBA_SCAN` on the current platform, else the
            fastest on the platform.

    Returns:
        A `ModelReport`. Memory is that of eager PyTorch. Parameters, operations and caches hold for all backends.

    Raises:
        ValueError: for arguments out of range or unknown.

    Example:
        >>> from keras_jamba.estimation import model_report
        >>> report = model_report(dict(d_model=4096, num_layers=32, vocab_size=65536), context=4096)
        >>> report.parameters > 30e9
        True
    """
    plan = plan_of(model)
    policy = keras.dtype_policies.get(plan.dtype if dtype is None else dtype)
    if gradient_checkpointing is None:
        gradient_checkpointing = plan.config["gradient_checkpointing"]
    _checks.check_integer("batch_size", batch_size)
    _checks.check_integer("optimizer_slots", optimizer_slots, at_least=0)
    context, grid, frames = _sizes(plan, context, image_size)
    platform, scan, convolution = _implementations(platform, scan)
    run = Run(
        batch_size,
        context,
        bytes_of(policy.variable_dtype),
        bytes_of(policy.compute_dtype),
        platform,
        scan,
        convolution,
        grid,
        frames,
    )
    layers = tuple(_layers(plan, run, training, gradient_checkpointing, optimizer_slots))
    last_scan = max((i for i, layer in enumerate(layers) if "mamba" in layer.kind), default=0)
    freed = 0 if gradient_checkpointing else sum(layer.activations for layer in layers[last_scan + 1 :])
    report = ModelReport(
        layers,
        batch_size,
        context,
        training,
        policy.name,
        gradient_checkpointing,
        run.platform,
        run.scan,
        working=0,
    )
    if not training:
        return report
    after_encoder = report.activations - layers[0].activations
    return dataclasses.replace(report, working=working.backward(run, plan, freed, after_encoder))


def _sizes(plan, context, image_size):
    """Returns `(tokens, grid, frames)`: see `Run`."""
    if plan.image is None:
        if image_size is not None:
            raise ValueError(
                f"Only an image model has image_size. Received: image_size={image_size!r}. Pass context instead."
            )
        if context is None:
            raise ValueError(
                "A model of sequences needs the number of tokens. Received: context=None. Pass for example "
                "context=4096."
            )
        _checks.check_integer("context", context)
        return context, (), 1
    if context is not None:
        raise ValueError(
            f"An image model takes no context. Received: context={context!r}. Leave it out: the image size determines "
            "the number of tokens. Pass image_size to a model that takes images of any size."
        )
    return sizes_of(plan, image_size)


def _implementations(platform, scan):
    """Returns `(platform, scan, convolution)`, by default the fastest on the platform."""
    here = _backend.tensors.platform()
    platform = here if platform is None else platform
    _checks.check_choice("platform", platform, list(_FASTEST_FIRST))
    refused = implementations() if platform == here else {}
    names = [name for name in _FASTEST_FIRST[platform] if name in activations.SCANS]
    if scan is None and platform == here:
        scan = os.environ.get("KERAS_JAMBA_SCAN") or None
    if scan is None:
        scan = next(name for name in names if refused.get(name) is None)
    _checks.check_choice("scan", scan, names)
    convolution = "native" if platform == "cpu" and refused.get("native") is None else "portable"
    return platform, scan, convolution


def _layers(plan, run, training, checkpointing, slots):
    """Yields one `LayerReport` per layer, from the inputs on."""
    kept = activations if training else working
    settings = (run, training, slots)
    if plan.image:
        yield _row(settings, "encoder", parameters.encoder, operations.encoder, kept.encoder, (plan,))
        yield _row(settings, "tokens", parameters.tokens, operations.tokens, kept.tokens, (plan,))
    if plan.vocabulary:
        yield _row(settings, "embedding", parameters.embedding, operations.embedding, kept.embedding, (plan,))
    for i, block in enumerate(plan.pattern):
        arguments = (plan, *block)
        row = _row(
            settings, f"block_{i}", parameters.block, operations.block, kept.block, arguments, quantization.block
        )
        first = i == 0 and not (plan.image or plan.vocabulary)
        yield dataclasses.replace(
            row,
            kind=" + ".join(filter(None, block)),
            activations=row.activations - (activations.input_bytes(plan, run) if first and training else 0),
            flops_recomputed=row.flops_forward if training and checkpointing else 0,
            checkpoint=0 if first or not training else run.s * plan.d * run.computed,
            **({} if training else cache_bytes(plan, run, block[0])),
        )
    yield _row(settings, "final_norm", parameters.final_norm, operations.final_norm, kept.final_norm, (plan,))
    if plan.image:
        row = _row(settings, "readout", parameters.readout, operations.readout, kept.readout, (plan,))
        yield row if training else dataclasses.replace(row, counters=readout_bytes(plan, run))
    if plan.image or plan.vocabulary:
        # The image model's head is float32 under every policy.
        settings = (dataclasses.replace(run, stored=4), *settings[1:]) if plan.image else settings
        quantized = quantization.head if plan.vocabulary else quantization.none
        yield _row(settings, "head", parameters.head, operations.head, kept.head, (plan,), quantized)


def _row(settings, name, numbers, flops, kept, arguments, quantized=quantization.none):
    """Returns a `LayerReport`. The four functions take `arguments`; `flops` and `kept` also take the run."""
    run, training, slots = settings
    quantized = quantized(*arguments)
    numbers, flops, kept = numbers(*arguments), flops(run, *arguments), kept(run, *arguments)
    # Quantized weights are not trained.
    trained = run.stored * (numbers.parameters - quantized.parameters)
    return LayerReport(
        name=name,
        kind="",
        parameters=numbers.parameters,
        active_parameters=numbers.active,
        statistics=numbers.statistics,
        flops_forward=flops.forward,
        flops_backward=flops.backward if training else 0,
        flops_recomputed=0,
        # Statistics are float32 under every policy.
        weights=trained + quantized.stored + 4 * numbers.statistics,
        gradients=trained if training else 0,
        optimizer=slots * trained if training else 0,
        activations=kept,
        checkpoint=kept if training else 0,
        kv_cache=0,
        conv_cache=0,
        ssm_cache=0,
        counters=0,
    )
