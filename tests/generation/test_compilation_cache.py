"""JAX's persistent compilation cache, which the first generation sets."""

import logging
import os
import subprocess
import sys

import keras
import pytest

import keras_jamba

if keras.backend.backend() != "jax":
    pytest.skip("about jax", allow_module_level=True)

import jax
from jax.experimental.compilation_cache import compilation_cache

from keras_jamba._backend.jax import _compilation_cache

OPTIONS = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERAS_JAMBA_JAX_CACHE", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_max_size", -1)
    # The user's own, which stores every program.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _compilation_cache.use.cache_clear()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    _compilation_cache.use.cache_clear()


def generated():
    model = keras_jamba.JambaCausalLM(16, d_model=8, num_layers=1, mamba_ratio=1, moe_frequency=0)
    return model.generate([1, 2], max_new_tokens=3)


def test_the_first_generation_stores_programs_in_the_home_of_keras_and_says_so_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "keras_jamba"):
        generated()
        generated()
    (folder,) = (tmp_path / "home" / "keras_jamba").glob("jax_cache_*")
    assert any(folder.iterdir()) and jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == 2**30
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    assert sum("JAX stores compiled programs in" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("reason", ["off", "set", "disabled", "no filelock"])
def test_the_settings_of_the_user_are_kept(tmp_path, monkeypatch, reason):
    own = None
    if reason == "off":
        monkeypatch.setenv("KERAS_JAMBA_JAX_CACHE", "off")
    elif reason == "set":
        own = str(tmp_path / "own")
        jax.config.update("jax_compilation_cache_dir", own)
    elif reason == "disabled":
        monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", False)
    else:
        monkeypatch.setattr(_compilation_cache.importlib.util, "find_spec", lambda name: None)
    generated()
    assert jax.config.jax_compilation_cache_dir == own and not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "home").write_text("a file")
    with caplog.at_level(logging.INFO, "keras_jamba"):
        generated()
    assert jax.config.jax_compilation_cache_dir is None
    assert "JAX's compilation cache is not set" in caplog.text


def test_an_unknown_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("KERAS_JAMBA_JAX_CACHE", "on")
    with pytest.raises(ValueError, match="KERAS_JAMBA_JAX_CACHE must be 'off' or unset. Received: 'on'"):
        generated()


def test_the_import_sets_no_cache():
    code = "import keras_jamba, jax; print(jax.config.jax_compilation_cache_dir)"
    environment = {name: x for name, x in os.environ.items() if "JAX" not in name}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip().splitlines()[-1] == "None"
