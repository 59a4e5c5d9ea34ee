"""The benchmark of models on many devices counts the real bytes per device, in a process with 8 devices."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from checks import full


@full()
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution.ModelParallel shards on JAX only")
def test_each_device_holds_as_many_bytes_as_the_benchmark_counts():
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick} --xla_force_host_platform_device_count=8"
    script = Path(__file__).parent / "subprocess" / "scale_on_devices.py"
    # XLA dumps no text for a program from the cache, because it does not compile it.
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all are equal" in done.stdout
