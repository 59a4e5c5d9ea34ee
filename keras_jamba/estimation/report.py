"""The report on a model: a row a layer, and the totals."""

import dataclasses
import os
from dataclasses import dataclass

import keras

from keras_jamba import _backend
from keras_jamba.estimation import activations, operations, parameters, quantization, working
from keras_jamba.estimation._plan import Run, bytes_of, plan_of, sizes_of
from keras_jamba.estimation.caches import cache_bytes, readout_bytes
from keras_jamba.ops import _checks, implementations
from keras_jamba.ops.scan import _FASTEST_FIRST


@dataclass(frozen=True)
class LayerReport:
    """One layer. Numbers are counts, operations of one step, and bytes.

    Attributes:
        name: "encoder", "tokens", "embedding", "block_0", ..., "final_norm", "readout" or "head".
        kind: of a block its mixer and feed-forward part, else empty.
        parameters: numbers that are trained; in few bits, that were.
        active_parameters: those of them that one token goes through: k of x experts.
        statistics: numbers that are kept and not trained: of batch norms, and of the last routing.
        flops_forward, flops_backward: see `scan_flops` for what counts.
        flops_recomputed: of the forward pass a second time, where it is checkpointed.
        weights, gradients, optimizer: bytes.
        activations: bytes that the backward pass needs, were nothing checkpointed; without training, bytes alive
            at once while the layer runs.
        checkpoint: bytes kept of the layer where blocks are checkpointed: of a block its input.
        kv_cache, conv_cache, ssm_cache, counters: bytes of the states of `init_cache` after the context; the sums
            of a stream's readout are counters too.
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
    """What a model costs: a row a layer, and totals as attributes.

    `print(report)` shows a table; `to_dict()` is for JSON. Every number of a `LayerReport` is an attribute here
    too, the sum over the layers, with the exception of `activations`.

    Attributes:
        layers: a `LayerReport` a layer.
        batch_size, context: sequences, and tokens of each.
        training: whether a step is a training step, or one pass over the context.
        dtype: name of the dtype policy.
        gradient_checkpointing: whether blocks are computed again for the gradient.
        platform, scan: what it runs on, and which implementation of the scan.
        working: bytes of a training step that are neither weights, gradients, optimizer nor kept activations.
    """

    layers: tuple
    batch_size: int
    context: int
    training: bool
    dtype: str
    gradient_checkpointing: bool
    platform: str
    scan: str
    working: int

    def __getattr__(self, name):
        """The sum over the layers."""
        if name not in _SUMS:
            raise AttributeError(f"A ModelReport has no attribute {name!r}. It has {_SUMS} besides its fields.")
        return self._sum(name)

    def _sum(self, name):
        return sum(getattr(layer, name) for layer in self.layers)

    @property
    def flops_per_step(self):
        """Operations of the model in one step, whatever is computed twice: what MFU divides by time and peak speed.

        [Chowdhery et al. (2022)](https://arxiv.org/abs/2204.02311), appendix B.
        """
        return self.flops_forward + self.flops_backward

    @property
    def activations_plain(self):
        """Bytes that the backward pass needs with nothing checkpointed."""
        return self._sum("activations")

    @property
    def activations_checkpointed(self):
        """Bytes with every block checkpointed: the blocks' inputs, and all of the one that is computed again."""
        blocks = [layer.activations for layer in self.layers if layer.kind]
        return self._sum("checkpoint") + max(blocks)

    @property
    def activations(self):
        """Bytes as the model is; without training, of the layer that needs most."""
        if not self.training:
            return max(layer.activations for layer in self.layers)
        return self.activations_checkpointed if self.gradient_checkpointing else self.activations_plain

    @property
    def cache(self):
        """Bytes of the states of all layers."""
        return self.kv_cache + self.conv_cache + self.ssm_cache + self.counters

    @property
    def peak(self):
        """Bytes at most at one time.

        In training everything is there at the end of the forward pass, the gradients of the step before included:
        Keras forgets them only then.
        """
        total = self.weights + self.activations
        return total + (self.gradients + self.optimizer + self.working if self.training else self.cache)

    def to_dict(self):
        """Everything as plain dicts, lists and numbers."""
        totals = [*_SUMS, "flops_per_step", "activations_plain", "activations_checkpointed", "cache", "peak"]
        return dataclasses.asdict(self) | {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "totals": {name: getattr(self, name) for name in totals},
        }

    def __str__(self):
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
    """The names to the left, numbers to the right."""
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _count(number):
    return _scaled(number, 1000, ("", " K", " M", " G", " T", " P", " E"))


def _bytes(number):
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(number, step, units):
    """Four digits and a unit."""
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
    model,
    *,
    batch_size=1,
    context=None,
    image_size=None,
    training=True,
    dtype=None,
    gradient_checkpointing=None,
    optimizer_slots=2,
    platform=None,
    scan=None,
):
    """What a model costs, without building it.

    Args:
        model: a `JambaBackbone`, a `DHCJamba`, or a dict of constructor arguments of one of the two. A dict with
            `vocab_size` is a language model: a backbone between an embedding `(v, d)` and a head `(d, v)` without
            bias, which are one with `tie_embeddings=True`. With `quantization` weights are counted in the bits that
            they are stored in; adapters are not counted.
        batch_size: sequences or images b.
        context: tokens t of a sequence. Of an image model the image decides, or the clip: None.
        image_size: `(H, W)` for an image model that takes any, `(T, H, W)` for one of clips.
        training: whether a step trains, or runs forward over the whole context at once.
        dtype: a dtype policy or its name: "float32", "mixed_bfloat16", "bfloat16", ... None is the model's.
        gradient_checkpointing: None is the model's.
        optimizer_slots: numbers that the optimizer keeps for each trained one: 2 for Adam, 1 for momentum.
        platform: "cpu", "gpu" or "tpu"; None is the one here.
        scan: name of the scan's implementation; None is the fastest on the platform.

    Returns:
        A `ModelReport`. Memory is that of PyTorch run eagerly; parameters, operations and caches are those of all
        backends.

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
    run = Run(
        batch_size,
        context,
        bytes_of(policy.variable_dtype),
        bytes_of(policy.compute_dtype),
        *_implementations(platform, scan),
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
    behind = report.activations - layers[0].activations
    return dataclasses.replace(report, working=working.backward(run, plan, freed, behind))


def _sizes(plan, context, image_size):
    """Tokens of a sequence; sizes of an image before and after each convolution, and frames of a clip."""
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
            f"An image decides how many tokens it has. Received: context={context!r}. Leave it out; image_size is "
            "for models that take images of any size."
        )
    return sizes_of(plan, image_size)


def _implementations(platform, scan):
    """`(platform, scan, convolution)`, the fastest on the platform where none is named."""
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
    """A `LayerReport` a layer, from the inputs on."""
    kept = activations if training else working
    settings = (run, training, slots)
    if plan.image:
        yield _row(settings, "encoder", parameters.encoder, operations.encoder, kept.encoder, (plan,))
        yield _row(settings, "tokens", parameters.tokens, operations.tokens, kept.tokens, (plan,))
    if plan.vocabulary:
        yield _row(settings, "embedding", parameters.embedding, operations.embedding, kept.embedding, (plan,))
    for i, block in enumerate(plan.pattern):
        what = (plan, *block)
        row = _row(settings, f"block_{i}", parameters.block, operations.block, kept.block, what, quantization.block)
        first = i == 0 and not (plan.image or plan.vocabulary)
        yield dataclasses.replace(
            row,
            kind=" + ".join(filter(None, block)),
            activations=row.activations - (activations.given(plan, run) if first and training else 0),
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
        few = quantization.head if plan.vocabulary else quantization.none
        yield _row(settings, "head", parameters.head, operations.head, kept.head, (plan,), few)


def _row(settings, name, numbers, flops, kept, what, few=quantization.none):
    """A row; `what` are arguments of the four functions, besides the run."""
    run, training, slots = settings
    few = few(*what)
    numbers, flops, kept = numbers(*what), flops(run, *what), kept(run, *what)
    # What is in few bits is not trained.
    trained = run.stored * (numbers.parameters - few.parameters)
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
        weights=trained + few.stored + 4 * numbers.statistics,
        gradients=trained if training else 0,
        optimizer=slots * trained if training else 0,
        activations=kept,
        checkpoint=kept if training else 0,
        kv_cache=0,
        conv_cache=0,
        ssm_cache=0,
        counters=0,
    )
