"""The selective scan of Mamba: one function, several implementations."""

import functools
import os
from dataclasses import dataclass

from keras_jamba import _backend
from keras_jamba._typing import Tensor, Tensors
from keras_jamba.ops import _checks
from keras_jamba.ops._implementations import choose
from keras_jamba.ops._sharding import shard_map
from keras_jamba.ops.scan import associative, exported, native, portable, reference, triton

_BY_NAME = {
    "native": native,
    "triton": triton,
    "exported": exported,
    "portable": portable,
    "associative": associative,
    "reference": reference,
}
# A loop over tokens is fastest on a CPU (benchmarks/results). On an accelerator the tree is, because it has few steps.
_FASTEST_FIRST = {
    "cpu": ("native", "exported", "portable", "associative", "reference"),
    "gpu": ("triton", "exported", "associative", "portable", "reference"),
    "tpu": ("exported", "associative", "portable", "reference"),
}


@dataclass(frozen=True)
class _Call:
    """Properties of a call that `why_not` reads: the platform, the shape (b, t, e) and n; None for unknown sizes."""

    platform: str
    shape: tuple
    states: int | None

    @property
    def length(self):
        return self.shape[1]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    *,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    implementation: str | None = None,
) -> Tensors:
    """Computes the selective state-space recurrence of Mamba.

    For every row, channel and state, with `delta' = softplus(delta + delta_bias)` (the bias and the softplus are
    optional):

        h_t = exp(delta'_t * A) * h_{t-1} + delta'_t * B_t * u_t
        y_t = (sum over n of C_t * h_t + D * u_t) * silu(z_t)

    The state and all arithmetic are float32 for every input dtype. Differentiable in every tensor, including the
    initial and the last state.

    Args:
        u: `(b, t, e)`, the input.
        delta: `(b, t, e)`, the time step.
        A: `(e, n)`, negative.
        B: `(b, t, n)`, how the input enters the state.
        C: `(b, t, n)`, how the state is read.
        D: `(e,)` or None, the skip connection.
        z: `(b, t, e)` or None, the gate.
        delta_bias: `(e,)` or None.
        delta_softplus: whether to apply softplus to delta, after the bias.
        initial_state: `(b, e, n)`, h before the first token; None for zeros.
        return_last_state: whether to also return h after the last token.
        mask: `(b, t)` bool or None, False for padding. Padding keeps the state and has zero output.
        segment_ids: `(b, t)` integers or None: the document of each token. A change of the id begins a document, so
            0 1 0 are three documents. The first begins with the initial state, every other one with zeros.
        implementation: None for the fastest that can run, or a name of `implementations()`. If None, the environment
            variable `KERAS_JAMBA_SCAN` can name one.

    Returns:
        y `(b, t, e)` in the dtype of `u`. With `return_last_state`, `(y, last_state)`, where last_state is `(b, e, n)`
        float32.

    Raises:
        ValueError: if shapes do not match, if a dtype is not floating-point, or if the implementation is unknown or
            cannot run.

    Reference:
        [Gu and Dao (2023)](https://arxiv.org/abs/2312.00752), section 3 and algorithm 2.
    """
    tensors = dict(
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        initial_state=initial_state,
    )
    tensors = {k: v if v is None else _backend.tensors.as_tensor(v) for k, v in tensors.items()}
    _check(tensors)
    mask, segment_ids = _checks.check_tokens(mask, segment_ids, tensors["u"].shape)
    call = _Call(_backend.tensors.platform(tensors["u"]), tuple(tensors["u"].shape), tensors["A"].shape[1])
    requested = requested_scan(implementation)
    state = tensors["initial_state"]
    if call.length == 1 and not (requested or mask is not None or segment_ids is not None or state is None):
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        given = {"bias" if name == "delta_bias" else name: tensors[name] for name in names}
        if found := _backend.decoding.scan_step(**given, softplus=delta_softplus, state=state):
            return found if return_last_state else found[0]
    table = {name: _BY_NAME[name] for name in _FASTEST_FIRST[call.platform]}
    if call.length == 1 and requested is None and next(iter(table.values())).why_not(call):
        requested = "reference"  # nothing to loop over
    chosen = choose("selective_scan", table, requested, call)
    tensors |= dict(mask=mask, segment_ids=segment_ids)
    run = functools.partial(chosen.run, delta_softplus=delta_softplus)
    y, last_state = shard_map(run, tensors, _SHAPES | {"mask": "bt", "segment_ids": "bt"}, ("bte", "ben"))
    return (y, last_state) if return_last_state else y


def requested_scan(implementation):
    """Returns the name of the implementation that the caller or the environment requests, or None."""
    return implementation or os.environ.get("KERAS_JAMBA_SCAN") or None


def implementations() -> dict[str, str | None]:
    """Returns the implementations of `selective_scan` on this platform, fastest first.

    Returns:
        `{name: None, or the reason why the implementation cannot run}`.
    """
    platform = _backend.tensors.platform()
    call = _Call(platform, shape=(1, 1, 1), states=1)
    # Nobody can choose the form of exported graphs.
    names = [name for name in _FASTEST_FIRST[platform] if name != "exported"]
    return {name: _BY_NAME[name].why_not(call) for name in names}


_SHAPES = {
    "u": "bte",
    "delta": "bte",
    "A": "en",
    "B": "btn",
    "C": "btn",
    "D": "e",
    "z": "bte",
    "delta_bias": "e",
    "initial_state": "ben",
}


def _check(tensors):
    _checks.check_given(tensors, ("u", "delta", "A", "B", "C"))
    present = {name: x for name, x in tensors.items() if x is not None}
    _checks.check_floating(present)
    _checks.check_shapes(present, _SHAPES)
    if present["A"].shape[1] == 0:
        raise ValueError(
            f"There must be at least one state per channel. Received: A.shape={tuple(present['A'].shape)}. "
            "Give A the shape (e, n), B and C the shape (b, t, n)."
        )
