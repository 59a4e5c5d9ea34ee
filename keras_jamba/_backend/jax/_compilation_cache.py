"""JAX's persistent compilation cache, which spares a second process the compilation of generation."""

import functools
import hashlib
import importlib.util
import logging
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_logger = logging.getLogger("keras_jamba")
# `{option: (default of JAX, value)}`: the bytes of the cache, and the seconds of a compilation that is stored. JAX
# deletes the entries that were read least recently.
_OPTIONS = {
    "jax_compilation_cache_max_size": (-1, 2**30),
    "jax_persistent_cache_min_compile_time_secs": (1.0, 0.3),
}


def check_setting():
    """Raises ValueError if KERAS_JAMBA_JAX_CACHE is set to anything but "off"."""
    setting = os.environ.get("KERAS_JAMBA_JAX_CACHE")
    if setting not in (None, "off"):
        raise ValueError(
            f"KERAS_JAMBA_JAX_CACHE must be 'off' or unset. Received: {setting!r}. Set 'off' to compile in every "
            "process, or JAX_COMPILATION_CACHE_DIR to choose the folder of JAX's cache."
        )


@functools.cache
def use():
    """Sets the cache for this process at the first call, unless the user has set or disabled one."""
    reason = _why_not()
    if reason is not None:
        _logger.debug("JAX's compilation cache is not set: %s", reason)
        return
    home = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")
    folder = Path(home) / "keras_jamba" / f"jax_cache_{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        _logger.info("JAX's compilation cache is not set: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, (default, value) in _OPTIONS.items():
        if getattr(jax.config, name) == default:
            jax.config.update(name, value)
    # JAX decides at its first compilation whether it has a cache.
    compilation_cache.reset_cache()
    _logger.info("JAX stores compiled programs in %s. KERAS_JAMBA_JAX_CACHE=off disables it.", folder)


def _why_not():
    if os.environ.get("KERAS_JAMBA_JAX_CACHE") == "off":
        return "KERAS_JAMBA_JAX_CACHE is off"
    if jax.config.jax_compilation_cache_dir is not None:
        return "it is set already"
    if not jax.config.jax_enable_compilation_cache:
        return "JAX's option jax_enable_compilation_cache is off"
    if importlib.util.find_spec("filelock") is None:
        return "JAX bounds its size with the package filelock, which is not installed"
    return None


def _processor():
    """Returns a short name of the processor's instruction sets. Programs for one may fail on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}_{hashlib.sha256(features.encode()).hexdigest()[:8]}"
