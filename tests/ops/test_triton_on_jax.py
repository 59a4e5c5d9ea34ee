"""Calls of the Triton kernels on JAX. A stand-in replaces the kernels, which require a GPU."""

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from checks import close

import keras_jamba
from keras_jamba import _backend
from keras_jamba._triton import Gpu
from keras_jamba._triton import scan as kernels
from keras_jamba.ops import selective_scan
from keras_jamba.ops.scan import reference, triton

if keras.backend.backend() != "jax":
    pytest.skip("about jax", allow_module_level=True)

import jax
from jax import numpy as jnp

from keras_jamba._backend.jax import _triton
from keras_jamba._backend.jax._c_kernels import differentiable

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "bias", "initial")


def scanned(*tensors, softplus=True):
    return reference.run(*tensors[:8], softplus, tensors[8], None, None)


def forward(gpu, tensors, options, train):
    y, last = scanned(*(tensors[name] for name in NAMES), softplus=bool(options["softplus"]))
    batch, length, channels, states = kernels._sizes(
        {name: x.shape for name, x in tensors.items() if x is not None}
    ).values()
    kept = jnp.full((batch, -(-length // kernels.every(length)), channels, states), 7.0)
    return y, last, kept if train else None


def backward(gpu, tensors, options):
    # The residuals of the forward pass arrive.
    assert tensors["checkpoints"].ndim == 4
    present = [name for name in NAMES if tensors[name] is not None]

    def function(*given):
        given = dict(zip(present, given, strict=True))
        return scanned(*(given.get(name) for name in NAMES), softplus=bool(options["softplus"]))

    _, pull = jax.vjp(function, *(tensors[name] for name in present))
    found = dict(zip(present, pull((tensors["grad_y"], tensors["grad_last"])), strict=True))
    return tuple(found.get(name) for name in NAMES)


@pytest.fixture(scope="module")
def stand_in():
    """Yields the scan with the lowering for GPUs and the reference as its kernel."""
    program = dataclasses.replace(
        kernels.SCAN, name="scan_stand_in", forward=forward, backward=backward, registers=None
    )
    before = _triton.launcher
    _triton.launcher = lambda: Gpu(None, None, None, 132)

    def lowered(*given):
        platform, rule = _triton.lowered_on_gpu(*given)
        assert platform == "cuda"
        return "cpu", rule

    function = differentiable(program, triton._portable, lowered)
    yield lambda *tensors: function((*tensors, None, None, None), (1,))
    _triton.launcher = before


def draw(length=5, channels=4, states=3):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype("float32"))  # noqa: E731
    tokens = [normal(2, length, channels), normal(2, length, channels) - 2, -jnp.exp(normal(channels, states))]
    tokens += [normal(2, length, states), normal(2, length, states), normal(channels), normal(2, length, channels)]
    return [*tokens, normal(channels), normal(2, channels, states)]


def loss(function):
    return lambda tensors: sum((x * jnp.cos(x)).sum() for x in function(*tensors))


def assert_equal(found, expected):
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, e, absolute=2e-5)


def test_outputs_and_gradients_match_the_reference(stand_in):
    tensors = draw()
    assert_equal(jax.jit(stand_in)(*tensors), scanned(*tensors))
    assert_equal(jax.jit(jax.grad(loss(stand_in)))(tensors), jax.grad(loss(scanned))(tensors))
    without_optional = [None if i in (5, 6, 8) else x for i, x in enumerate(tensors)]
    assert_equal(jax.jit(jax.grad(loss(stand_in)))(without_optional), jax.grad(loss(scanned))(without_optional))


def test_vmap_checkpoint_and_second_derivatives_match_the_reference(stand_in):
    tensors = draw(length=2)
    rows = [x[None] * jnp.arange(1, 3).reshape(-1, *[1] * x.ndim) for x in tensors]
    grads = jax.jit(jax.vmap(jax.grad(loss(stand_in))))(rows)
    assert_equal(grads, jax.vmap(jax.grad(loss(scanned)))(rows))
    assert_equal(jax.jit(jax.grad(loss(jax.checkpoint(stand_in))))(tensors), jax.grad(loss(scanned))(tensors))
    twice = lambda f: jax.grad(lambda ts: sum((g * g).sum() for g in jax.grad(loss(f))(ts)))  # noqa: E731
    assert_equal(jax.jit(twice(stand_in))(tensors), jax.jit(twice(scanned))(tensors))


def test_an_unavailable_kernel_is_refused_with_the_reason(monkeypatch):
    tensors = dict(zip(("u", "delta", "A", "B", "C"), draw(), strict=False))
    with pytest.raises(ValueError, match="must be one of.*'native'.*Received: implementation='triton'"):
        selective_scan(**tensors, implementation="triton")
    call = lambda **given: type("Call", (), dict(platform="gpu", shape=(1, 2, 3), states=4) | given)  # noqa: E731
    assert triton.why_not(call(platform="cpu")) == "it requires a GPU"
    assert "jax-triton" in triton.why_not(call()) or "capability 8.0" in triton.why_not(call())
    monkeypatch.setattr(_backend.kernels, "why_no_triton_op", lambda shape: None)
    assert triton.why_not(call(shape=(None, 2, 3))) == "it requires static shapes"
    assert triton.why_not(call(states=65)) == "it supports at most 64 states per channel"


def test_the_scan_works_in_shard_map_over_rows_and_channels():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    script = Path(__file__).parent.parent / "subprocess" / "sharded_scan.py"
    done = subprocess.run(
        [sys.executable, script], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("all are equal")


def test_a_launch_under_vmap_runs_one_element_after_the_other(monkeypatch):
    def triton_call(x, y, **given):
        assert x.shape == (3,)
        return [x + y]

    monkeypatch.setitem(sys.modules, "jax_triton", type("Module", (), {"triton_call": staticmethod(triton_call)}))
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)
    run = lambda x: _triton.launch(None, (1,), (x, y), [((3,), "float32")], {})[0]  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(run)(x), x + 1)
    np.testing.assert_array_equal(jax.vmap(jax.jit(run))(x), x + 1)


@pytest.mark.parametrize(
    "versions, expected",
    [
        (("0.3.1", "3.6.0"), None),
        (("0.3.10", "3.6.0"), 'jax-triton 0.3.10 with triton 3.6.0 was not tried: install "jax-triton==0.3.1"'),
        (("0.4.1", "3.6.0"), 'jax-triton 0.4.1 with triton 3.6.0 was not tried: install "jax-triton==0.3.1"'),
        (("0.3.1", "3.7.0"), 'jax-triton 0.3.1 with triton 3.7.0 was not tried: install "jax-triton==0.3.1"'),
    ],
)
def test_a_pair_of_versions_that_was_not_tried_is_named_and_the_next_form_runs(versions, expected, monkeypatch, caplog):
    found = dict(zip(("jax-triton", "triton"), versions, strict=True))
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_triton, "_version", found.__getitem__)
    monkeypatch.setattr(_triton.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_triton.jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    _triton.why_not_here.cache_clear()
    try:
        reason = _triton.why_not_here()
        assert reason == expected or reason.startswith(expected)
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == (expected is not None) and (not expected or expected in warnings[0].message)
        monkeypatch.undo()
        u = np.ones((1, 5, 4), "float32")
        y = selective_scan(u, u, -np.ones((4, 2), "float32"), *[np.ones((1, 5, 2), "float32")] * 2)
        assert np.isfinite(np.asarray(y)).all()
    finally:
        _triton.why_not_here.cache_clear()


def test_the_extra_for_gpus_installs_the_pair_that_was_tried():
    text = (Path(keras_jamba.__file__).parents[1] / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["jax-gpu"]
    pins = dict(each.split("==") for each in extra if "==" in each)
    assert pins == _triton._TRIED
