"""Where a weight of ours stands in a checkpoint of others."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Weight:
    """One variable of ours, and the tensors that hold it elsewhere.

    Attributes:
        path: of the variable, without the model's own name.
        names: of their tensors: one, or one each of the experts of a bank.
        shape: of each of these.
        form: how one of them lies there: "same"; "transposed", `(out, in)`; or "convolution", `(e, 1, k)`.
    """

    path: str
    names: tuple
    shape: tuple
    form: str = "same"

    @property
    def is_bank(self):
        return len(self.names) > 1 or self.path.endswith("_bank")

    def ours(self, read):
        """The value of our variable; `read` gives a tensor of theirs by its name."""
        if not self.is_bank:
            return self._turned(read(self.names[0]))
        first = self._turned(read(self.names[0]))
        bank = np.empty((len(self.names), *first.shape), first.dtype)
        bank[0] = first
        for place, name in enumerate(self.names[1:], 1):
            bank[place] = self._turned(read(name))
        return bank

    def theirs(self, value):
        """`{name: array}` of our value."""
        values = value if self.is_bank else value[None]
        return {name: np.ascontiguousarray(self._back(x)) for name, x in zip(self.names, values, strict=True)}

    def _turned(self, x):
        if self.form == "transposed":
            return x.T
        return x[:, 0].T if self.form == "convolution" else x

    def _back(self, x):
        if self.form == "transposed":
            return x.T
        return x.T[:, None] if self.form == "convolution" else x


def dense(path, name, inputs, outputs, bias=False):
    """The weights of a projection."""
    yield Weight(f"{path}/kernel", (f"{name}.weight",), (outputs, inputs), "transposed")
    if bias:
        yield Weight(f"{path}/bias", (f"{name}.bias",), (outputs,))


def mamba_mixer(path, prefix, arguments):
    """The weights of a Mamba mixer, which Jamba's and Mamba's own checkpoints name alike."""
    d, n, k = (arguments[name] for name in ("d_model", "d_state", "d_conv"))
    e, r, bias = arguments["expand"] * d, arguments["dt_rank"], arguments["proj_bias"]
    yield from dense(f"{path}/in_proj", f"{prefix}in_proj", d, 2 * e, bias)
    yield Weight(f"{path}/ssm/conv_kernel", (f"{prefix}conv1d.weight",), (e, 1, k), "convolution")
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
