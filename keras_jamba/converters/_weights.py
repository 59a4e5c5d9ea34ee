"""The mapping between variables of a model and tensors of a checkpoint."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Weight:
    """One variable of a model, and the checkpoint tensors that hold it.

    Attributes:
        path: path of the variable, without the model's name.
        names: names of the checkpoint tensors: one, or one per expert of a bank.
        shape: shape of each checkpoint tensor.
        form: layout of each checkpoint tensor: "same"; "transposed", `(out, in)`; or "convolution", `(e, 1, w)`.
    """

    path: str
    names: tuple
    shape: tuple
    form: str = "same"

    @property
    def is_bank(self):
        return len(self.names) > 1 or self.path.endswith("_bank")

    def ours(self, read):
        """Returns the value of the variable. `read(name)` returns a checkpoint tensor."""
        first = read(self.names[0])
        if not self.is_bank:
            return self._from_checkpoint_layout(first)
        # In the checkpoint's layout, because NumPy transposes slowly.
        bank = np.empty((len(self.names), *first.shape), first.dtype)
        for place, name in enumerate(self.names):
            bank[place] = read(name) if place else first
        return self._from_checkpoint_layout(bank)

    def theirs(self, value):
        """Returns `{name: array}`, the checkpoint tensors of a variable's value."""
        values = value if self.is_bank else value[None]
        values = map(self._to_checkpoint_layout, values)
        return {name: np.ascontiguousarray(x) for name, x in zip(self.names, values, strict=True)}

    def _from_checkpoint_layout(self, x):
        """Returns a view of one tensor or of a bank of tensors."""
        if self.form == "transposed":
            return x.swapaxes(-1, -2)
        return x[:, 0].T if self.form == "convolution" else x

    def _to_checkpoint_layout(self, x):
        if self.form == "transposed":
            return x.T
        return x.T[:, None] if self.form == "convolution" else x


def dense(path, name, inputs, outputs, bias=False):
    """Yields the weights of a projection."""
    yield Weight(f"{path}/kernel", (f"{name}.weight",), (outputs, inputs), "transposed")
    if bias:
        yield Weight(f"{path}/bias", (f"{name}.bias",), (outputs,))


def mamba_mixer(path, prefix, arguments):
    """Yields the weights of a Mamba mixer, which have the same names in Jamba and Mamba-1 checkpoints."""
    d, n, w = (arguments[name] for name in ("d_model", "d_state", "d_conv"))
    e, r, bias = arguments["expand"] * d, arguments["dt_rank"], arguments["proj_bias"]
    yield from dense(f"{path}/in_proj", f"{prefix}in_proj", d, 2 * e, bias)
    yield Weight(f"{path}/ssm/conv_kernel", (f"{prefix}conv1d.weight",), (e, 1, w), "convolution")
    if arguments["conv_bias"]:
        yield Weight(f"{path}/ssm/conv_bias", (f"{prefix}conv1d.bias",), (e,))
    yield from dense(f"{path}/ssm/x_proj", f"{prefix}x_proj", e, r + 2 * n)
    yield from dense(f"{path}/ssm/dt_proj", f"{prefix}dt_proj", r, e)
    yield Weight(f"{path}/ssm/dt_bias", (f"{prefix}dt_proj.bias",), (e,))
    yield Weight(f"{path}/ssm/A_log", (f"{prefix}A_log",), (e, n))
    yield Weight(f"{path}/ssm/D", (f"{prefix}D",), (e,))
    if arguments["mixer_rms_norm"]:
        for name, size in (("dt", r), ("b", n), ("c", n)):
            yield Weight(f"{path}/ssm/{name}_norm/scale", (f"{prefix}{name}_layernorm.weight",), (size,))
    yield from dense(f"{path}/out_proj", f"{prefix}out_proj", e, d, bias)
