"""Our parsers with random bytes and random JSON: an error in the form of the project, or a value, never a raw error."""

import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import records
from checks import once
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tamper.formats import FORMATS
from tamper.mutations import with_hostile_value
from tamper.trials import in_form

from keras_jamba import _files, _npz, presets
from keras_jamba.converters import jamba, mamba1
from keras_jamba.converters._fields import rank_and_alpha
from keras_jamba.converters.safetensors_folder import SafetensorsFolder
from keras_jamba.generation import PromptState, generation_config
from keras_jamba.models import _adapters
from keras_jamba.models._backbone_config import check_sizes
from keras_jamba.tokenizers import load_tokenizer
from keras_jamba.training.checkpointing import _saves
from keras_jamba.training.monitoring._writers import Table

# Files are read alike on every backend.
pytestmark = once
EXAMPLES = max(10, round(2000 * float(os.environ.get("FUZZ_SCALE", 1))))
SEED = 1
numbers = st.one_of(st.integers(), st.integers(-2, 300), st.floats(), st.sampled_from([10**9, 10**30, 2**63]))
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(["os", "../x", "</s>"]))
values = st.recursive(leaves, lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(st.text(), x, max_size=4)))


def fuzz(*strategies, examples=EXAMPLES):
    """Runs a test with random arguments, the same in every run."""

    def decorated(function):
        phases = (Phase.explicit, Phase.generate, Phase.shrink)
        slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        options = dict(max_examples=examples, deadline=None, database=None, phases=phases, suppress_health_check=slow)
        return seed(SEED)(settings(**options)(given(*strategies)(function)))

    return decorated


def refused_in_form(function, *arguments, kinds=ValueError):
    """Calls a parser; an error must be one of ours. A parser below the project's form raises one of `kinds`.

    Returns whether it was refused.
    """
    try:
        function(*arguments)
    except kinds as error:
        assert kinds is not ValueError or in_form(error), f"a raw {type(error).__name__}: {error}"
        return True
    return False


def header(document, rest=b""):
    text = document if isinstance(document, bytes) else json.dumps(document).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


FILES = {
    # `{name: (file name, reader of its folder)}`
    "safetensors": ("model.safetensors", lambda folder: SafetensorsFolder(folder, jamba.unstacked).__exit__()),
    "index": ("model.safetensors.index.json", lambda folder: SafetensorsFolder(folder, jamba.unstacked).__exit__()),
    "adapters": ("a.safetensors", lambda folder: _adapters._read_file(folder / "a.safetensors")),
    "prompt state": ("state", lambda folder: PromptState.load(folder / "state")),
    "preset": ("config.json", presets.read),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "bytes": ("byte_tokenizer.json", load_tokenizer),
    "generation config": ("generation_config.json", generation_config.read),
    "save": ("step_00000008/state.json", lambda folder: _saves.last(folder, 1)),
}


@pytest.mark.parametrize("name", FILES)
def test_random_bytes_are_refused_in_form(name, tmp_path):
    (file, read), refused = FILES[name], []
    (tmp_path / file).parent.mkdir(exist_ok=True)

    @fuzz(st.one_of(st.binary(max_size=300), values.map(lambda x: json.dumps(x).encode()), values.map(header)))
    def check(content):
        (tmp_path / file).write_bytes(content)
        refused.append(refused_in_form(read, tmp_path))

    check()
    # A reader that never reads the file would refuse none.
    assert sum(refused) > len(refused) / 2


STRUCTURED = ("preset", "save", "tokenizer", "generation config", "plans")


@pytest.mark.parametrize("kind", STRUCTURED)
def test_hostile_values_in_good_json_are_refused_in_form(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    form = FORMATS[kind]
    form.write(tmp_path)
    files = sorted(tmp_path.rglob("*.json"))
    good, refused = {file: file.read_bytes() for file in files}, []

    @fuzz(st.integers(0, 2**32 - 1), examples=min(EXAMPLES, 400))
    def check(number):
        rng = np.random.default_rng(number)
        file = files[rng.integers(len(files))]
        file.write_bytes(with_hostile_value(good[file], rng))
        refused.append(refused_in_form(form.read, tmp_path))
        file.write_bytes(good[file])

    check()
    assert any(refused)


@pytest.mark.parametrize("kind", [jamba, mamba1], ids=["jamba", "mamba1"])
def test_fields_of_a_foreign_configuration_are_refused_in_form(kind):
    names = sorted({field for field, _ in kind._SIZES.values()})
    names += ["rms_norm_eps", "layer_norm_epsilon", "router_aux_loss_coef", "mamba_dt_rank", "time_step_rank"]
    names += ["num_key_value_heads", "attn_layer_period", "expert_layer_offset", "hidden_act", "head_dim"]
    names += ["quantization_config", "pad_token_id", "eos_token_id", "num_local_experts", "tie_word_embeddings"]

    @fuzz(st.dictionaries(st.sampled_from(names), values, max_size=4))
    def check(config):
        refused_in_form(kind.arguments, config)

    check()


@fuzz(values, values)
def test_ranks_and_alphas_are_refused_in_form(rank, alpha):
    refused_in_form(rank_and_alpha, rank, alpha)


@fuzz(st.dictionaries(st.sampled_from(["d_model", "num_layers", "d_ff", "vocab_size", "expand", "mixer"]), values))
def test_sizes_are_refused_in_form(arguments):
    refused_in_form(check_sizes, arguments, 1000, "source")


def test_options_of_generation_are_refused_in_form():
    names = ["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams"]
    names += ["length_penalty", "early_stopping", "no_repeat_ngram_size", "guidance_scale", "bad_words_ids"]

    @fuzz(st.dictionaries(st.sampled_from(names), values, max_size=3))
    def check(config):
        refused_in_form(generation_config.sampler_of_config, config)

    check()


@fuzz(st.one_of(st.binary(max_size=400), values.map(lambda x: json.dumps(x).encode())))
def test_readers_below_the_form_raise_value_errors_only(content):
    folder = Path(os.environ["FUZZ_FOLDER"])
    (folder / "file").write_bytes(content)
    refused_in_form(_npz.read, folder / "file", kinds=(ValueError,))
    refused_in_form(_files.read_json, folder / "file", kinds=(ValueError,))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUZZ_FOLDER", str(tmp_path))


def test_headers_of_arrays_are_refused(tmp_path):
    names = st.text("{}()[]'\",: <f0123456789descrshapofTunb_L", max_size=80)
    good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    edits = st.tuples(st.integers(0, len(good)), st.integers(0, 12), names).map(
        lambda e: good[: e[0]] + e[2][:8] + good[e[0] + e[1] :]
    )

    @fuzz(st.one_of(names, edits), st.binary(max_size=40))
    def check(text, rest):
        content = text.encode()
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content + rest)
        refused_in_form(_npz.read, tmp_path / "a.npz", kinds=(ValueError,))

    check()


@fuzz(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda x: x.encode("utf-8", "surrogatepass"))))
def test_a_table_is_written_beside_whatever_is_there(content):
    folder = Path(os.environ["FUZZ_FOLDER"])
    for old in folder.glob("log*"):
        old.unlink()
    (folder / "log.csv").write_bytes(content)
    table = Table(folder / "log.csv")
    table.write(1, 0, {"loss": 0.5})
    table.close()
    assert any(b"0.5" in file.read_bytes() for file in folder.glob("log*"))


def test_the_results_are_recorded(request):
    """Runs last in this file; counts the failed tests of the session."""
    own = [item for item in request.session.items if item.path == request.path]
    faults = request.session.testsfailed
    records.write("parsers", {"seed": SEED, "examples per test": EXAMPLES, "tests": len(own) - 1, "failed": faults})
