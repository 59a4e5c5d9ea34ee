"""The C library: results per instruction set, sanitizers, threads, and what runs without the library."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import oracles
import pytest
from checks import close, full, gradients, numpy, once
from keras import ops
from test_scan import NAMES, draw, outputs_and_gradients

import keras_jamba
from keras_jamba import _native
from keras_jamba.ops import causal_depthwise_conv, expert_mlp, grouped_query_attention, implementations, selective_scan

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
import hatch_build  # noqa: E402

BACKEND = keras.backend.backend()


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("KERAS_JAMBA_ISA", request.param)
    return request.param


@pytest.mark.parametrize(
    ("batch", "length", "channels", "state"),
    [(1, 1, 1, 1), (2, 33, 17, 3), (3, 40, 5, 8), (1, 70, 33, 32), (2, 35, 18, 64)],
)
def test_every_instruction_set_computes_the_recurrence_and_gradients(instruction_set, batch, length, channels, state):
    inputs = draw(batch, length, channels, state)
    outputs, actual, weights = outputs_and_gradients(inputs, "native")
    expected = oracles.selective_scan(**inputs, delta_softplus=True)
    grads = oracles.selective_scan_gradients(*weights, *(inputs[name] for name in NAMES))
    for a, e in zip([*numpy(outputs), *actual], [*expected, *grads], strict=True):
        assert np.abs(a - e).max() <= 1e-5 * np.abs(e).max()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "channels", "state"), [(1, 1, 1), (3, 17, 3), (2, 130, 16), (1, 33, 40)])
def test_a_single_token_updates_the_states_like_the_recurrence(instruction_set, batch, channels, state, masked):
    inputs = draw(batch, 1, channels, state)
    mask = np.arange(batch)[:, None] > 0 if masked else None
    actual = selective_scan(**inputs, delta_softplus=True, return_last_state=True, mask=mask, implementation="native")
    y, last = oracles.selective_scan(**inputs, delta_softplus=True)
    if masked:  # the first row has no real token
        y[0], last[0] = 0, inputs["initial_state"][0]
    for a, e in zip(numpy(actual), (y, last), strict=True):
        assert np.abs(a - e).max() <= 1e-5 * np.abs(e).max()


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_few_tokens_match_the_oracle_per_instruction_set(instruction_set, dtype, swiglu):
    rng = np.random.default_rng(0)
    normal = lambda *shape: ops.cast(rng.standard_normal(shape), dtype)  # noqa: E731
    # Wide enough for the library to use several threads.
    tokens, banks = normal(5, 70), [normal(4, 70, 1000), normal(4, 1000, 70), normal(4, 70, 1000)]
    weights, indices = rng.random((5, 2), "float32"), np.array([[0, 3], [3, 1], [0, 1], [3, 0], [1, 3]], "int32")
    given = dict(tokens=tokens, weights=weights, indices=indices, up_bank=banks[0], down_bank=banks[1])
    given |= {"gate_bank": banks[2]} if swiglu else {}
    actual = expert_mlp(**given, implementation="native")
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    single = lambda x: numpy(ops.cast(x, "float32"))  # noqa: E731
    expected = oracles.expert_mlp(**{name: x if name == "indices" else single(x) for name, x in given.items()})
    error = np.abs(single(actual) - expected).max() / np.abs(expected).max()
    assert error <= (1e-5 if dtype == "float32" else 4e-3)


@pytest.mark.parametrize(
    "queries, keys, heads, groups, width", [(1, 1, 1, 1, 1), (3, 2500, 6, 2, 20), (2, 130, 4, 4, 64)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_of_few_queries_matches_the_oracle(instruction_set, dtype, queries, keys, heads, groups, width):
    rng = np.random.default_rng(0)
    normal = lambda *shape: ops.cast(rng.standard_normal(shape), dtype)  # noqa: E731
    given = [normal(2, queries, heads, width), normal(2, keys, groups, width), normal(2, keys, groups, width)]
    filled = rng.random((2, keys)) < 0.8
    filled[:, 64:192] = False  # complete blocks
    for causal, window in [(False, None), (True, 100)]:
        options = dict(key_mask=filled, causal=causal, window=window, offset=keys - queries)
        actual = grouped_query_attention(*given, **options, implementation="native")
        assert keras.backend.standardize_dtype(actual.dtype) == dtype
        positions = np.cumsum(filled, axis=1) - filled
        distance = (keys - queries + np.arange(queries))[None, :, None] - positions[:, None]
        seen = filled[:, None] & (~causal | (distance >= 0)) & (window is None or np.abs(distance) < (window or 0))
        single = [numpy(ops.cast(x, "float32")) for x in given]
        tolerance = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}[dtype]
        close(ops.cast(actual, "float32"), oracles.attention(*single, seen), relative=tolerance, absolute=tolerance)


def test_subnormal_queries_of_float16_are_not_zero(instruction_set):
    query = np.full((1, 1, 1, 4), 5e-5, "float16")
    key = np.repeat(np.array([6e4, -6e4], "float16"), 4)[None, :, None, None] * np.ones(4, "float16")
    value = np.repeat(np.array([1, 0], "float16"), 4)[None, :, None, None] * np.ones(4, "float16")
    found = grouped_query_attention(query, key, value, implementation="native")
    seen = np.ones((1, 1, 8), bool)
    close(ops.cast(found, "float32"), oracles.attention(query, key, value, seen), relative=1e-3)


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1e-3), (1, 20)])
def test_time_steps_from_a_millionth_to_twenty_keep_their_precision(instruction_set, low, high):
    inputs = draw(2, 50, 9)
    delta = np.exp(np.random.default_rng(2).uniform(np.log(low), np.log(high), (2, 50, 9)))
    inputs |= {"delta": np.log(np.expm1(delta)).astype("float32"), "delta_bias": np.zeros(9, "float32")}
    outputs, actual, weights = outputs_and_gradients(inputs, "native")
    expected = oracles.selective_scan(**inputs, delta_softplus=True)
    grads = oracles.selective_scan_gradients(*weights, *(inputs[name] for name in NAMES))
    for a, e in zip([*numpy(outputs), *actual], [*expected, *grads], strict=True):
        assert np.abs(a - e).max() <= 1e-5 * np.abs(e).max()


def test_65536_tokens_match_the_recurrence():
    inputs = draw(1, 65536, 3, 2)
    outputs, actual, weights = outputs_and_gradients(inputs, "native")
    expected = oracles.selective_scan(**inputs, delta_softplus=True)
    grads = oracles.selective_scan_gradients(*weights, *(inputs[name] for name in NAMES))
    for a, e in zip([*numpy(outputs), *actual], [*expected, *grads], strict=True):
        assert np.abs(a - e).max() <= 1e-5 * np.abs(e).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_inputs_are_computed_in_float32(instruction_set, dtype):
    short = {"u", "delta", "B", "C", "z"}
    inputs = {k: ops.cast(x, dtype) if k in short else ops.convert_to_tensor(x) for k, x in draw(2, 40, 19).items()}
    exact = {k: numpy(ops.cast(x, "float32")) for k, x in inputs.items()}
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, implementation="native")
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    expected_y, expected_last = oracles.selective_scan(**exact, delta_softplus=True)
    close(last, expected_last, absolute=2e-5)
    close(ops.cast(y, "float32"), expected_y, relative=2**-8 if dtype == "bfloat16" else 2**-10, absolute=1e-4)


@full("jax")
@pytest.mark.parametrize("implementation", implementations())
def test_an_empty_batch_gives_an_empty_batch(implementation):
    inputs = draw(0, 5, 6)
    y, last = selective_scan(**inputs, return_last_state=True, implementation=implementation)
    assert (tuple(y.shape), tuple(last.shape)) == ((0, 5, 6), (0, 6, 16))
    grads = gradients(
        lambda A, u: ops.sum(selective_scan(**(inputs | {"A": A, "u": u}), implementation=implementation)),
        [inputs["A"], inputs["u"]],
    )
    np.testing.assert_array_equal(grads[0], 0)
    assert grads[1].shape == (0, 5, 6)


@full("jax")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_the_convolution_and_gradients_match_the_portable_implementation(instruction_set, width, activation):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    arrays = [normal(3, 20, 19), normal(width, 19), normal(19), normal(3, width - 1, 19)]
    mask = ops.convert_to_tensor(rng.random((3, 20)) > 0.3)
    segment_ids = ops.convert_to_tensor(np.sort(rng.integers(0, 4, (3, 20)), axis=1).astype("int32"))
    weight = ops.convert_to_tensor(normal(3, 20, 19))
    if width == 1:
        arrays = arrays[:3]  # there is nothing before the first token

    def convolve(implementation, tensors):
        return causal_depthwise_conv(
            *tensors, mask=mask, segment_ids=segment_ids, activation=activation, implementation=implementation
        )

    def loss(implementation):
        return lambda *tensors: ops.sum(convolve(implementation, tensors) * weight)

    close(convolve("native", arrays), numpy(convolve("portable", arrays)), absolute=1e-5)
    for a, e in zip(gradients(loss("native"), arrays), gradients(loss("portable"), arrays), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_masked_tokens_may_be_nan():
    inputs, mask = draw(2, 40, 5), np.random.default_rng(0).random((2, 40)) > 0.4
    holed = dict(inputs)
    for name in ("u", "delta", "B", "C", "z"):
        holed[name] = np.where(mask[..., None], inputs[name], np.nan).astype("float32")
    run = lambda x: numpy(selective_scan(**x, mask=mask, delta_softplus=True, implementation="native"))  # noqa: E731
    np.testing.assert_array_equal(run(holed), run(inputs))


def test_slices_of_wider_tensors_are_read_in_place():
    wide = np.random.default_rng(0).standard_normal((2, 37, 40)).astype("float32")
    A = -np.ones((12, 4), "float32")

    def loss(implementation):
        def function(wide):
            u, delta, z, C = wide[..., :12], wide[..., 12:24], wide[..., 24:36], wide[..., 36:]
            y = selective_scan(u, delta, A, wide[..., 1:5], C, z=z, delta_softplus=True, implementation=implementation)
            return ops.sum(y * y)

        return function

    (actual,), (expected,) = gradients(loss("native"), [wide]), gradients(loss("portable"), [wide])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_two_models_train_in_two_threads_as_they_train_alone():
    def model(seed):
        keras.utils.set_random_seed(seed)
        layers = [keras.Input((24, 8)), keras_jamba.layers.MambaLayer(8), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.05), "mse")
        return model

    x = np.random.default_rng(0).standard_normal((16, 24, 8)).astype("float32")
    train = lambda model: [float(model.train_on_batch(x, x[..., :1])) for _ in range(6)]  # noqa: E731
    alone = [train(model(seed)) for seed in (1, 2)]
    models = [model(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(train, models))
    np.testing.assert_allclose(together, alone, rtol=1e-6)


@full()
@once
def test_the_kernels_pass_address_and_undefined_behaviour_sanitizers(tmp_path):
    program = tmp_path / "check"
    source = ROOT / "tests" / "native" / "check_kernels.c"
    flags = [flag for flag in hatch_build.FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    # -g1: reports give line numbers. Locations of variables take half of the compile time.
    flags += ["-O2", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror"]
    command = [hatch_build.compiler(), *flags, str(source), "-o", str(program), "-lm", "-pthread"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, "400"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "400 random scans, convolutions, experts and attentions agree" in done.stdout


@full("jax", "tensorflow")
def test_without_the_library_the_portable_implementation_runs_and_logs_why(tmp_path):
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from pathlib import Path; import keras_jamba._native as native\n"
        "import numpy as np\n"
        "native._library = 'its C library is not built: with a C compiler there, install the package again'\n"
        "from keras_jamba.ops import implementations, selective_scan\n"
        "x = np.ones((1, 3, 2), 'float32')\n"
        "print(implementations())\n"
        "print(np.asarray(selective_scan(x, x, -np.ones((2, 2), 'float32'), x, x)).shape)\n"
    )
    environment = os.environ | {"KERAS_BACKEND": BACKEND}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "'native': 'its C library is not built" in done.stdout
    assert "selective_scan runs as 'portable'; not as 'native': its C library is not built" in done.stderr


@once
def test_an_installation_without_a_compiler_succeeds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=_copy_of_the_sources(tmp_path / "sources"),
        env=os.environ | {"CC": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "without its C library: 'no-such-compiler' cannot be run" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def _copy_of_the_sources(folder):
    import shutil

    folder.mkdir()
    for name in ("keras_jamba", "presets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_an_unknown_instruction_set_is_refused_with_the_known_names(monkeypatch):
    monkeypatch.setenv("KERAS_JAMBA_ISA", "avx9")
    with pytest.raises(Exception, match="KERAS_JAMBA_ISA must name one of.*Received: KERAS_JAMBA_ISA='avx9'"):
        numpy(selective_scan(**draw(1, 3, 2), implementation="native"))
