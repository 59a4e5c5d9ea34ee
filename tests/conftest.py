"""Shared by all tests: helper modules on the path, fixed seeds, fast compilation, one JAX compilation cache."""

import gc
import importlib.util
import mmap
import os
import sys
from pathlib import Path

# Compilation takes most of the time on JAX: tests rebuild the same small models, and examples run in their own
# processes. These variables must be set before keras imports jax.
STORE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(STORE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Halves the time to compile random initialisation, which each new shape needs. The random numbers differ.
os.environ.setdefault("JAX_THREEFRY_PARTITIONABLE", "0")


def cheap_compilation(package, library):
    """Returns XLA flags that cut compile time to a third by optimising less; programs run for milliseconds."""
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    # XLA's older loop emitter compiles faster. A version that does not know its flag ends the process.
    found = importlib.util.find_spec(package)
    for path in Path(found.origin).parent.glob(library) if found else ():
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"xla_cpu_use_fusion_emitters") >= 0:
                flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


LIBRARIES = {"jax": ("jaxlib", "libjax_common.*"), "tensorflow": ("tensorflow", "libtensorflow_framework.*")}
if (backend := os.environ.get("KERAS_BACKEND")) in LIBRARIES:
    os.environ.setdefault("XLA_FLAGS", cheap_compilation(*LIBRARIES[backend]))

import keras  # noqa: E402
import pytest  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("", "helpers", "subprocess")]

if backend == "tensorflow":
    from concurrent.futures import ThreadPoolExecutor

    from keras.src.trainers.compile_utils import CompileMetrics

    # TensorFlow traces a step twice if tracing creates optimizer or metric variables. Tracing takes most of the time.
    # Examples run in their own processes and create the variables while tracing, as users do.
    make_train_function, build_metrics = keras.Model.make_train_function, CompileMetrics.build

    def of_a_built_optimizer(model, force=False):
        if model.built and model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        return make_train_function(model, force)

    def built_outside(metrics, y_true, y_pred):
        # TensorFlow traces per thread: another thread runs eagerly.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(build_metrics, metrics, y_true, y_pred).result()

    keras.Model.make_train_function, CompileMetrics.build = of_a_built_optimizer, built_outside


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="the part of the test files to run; 1/2 is the first of two parts")


def pytest_collection_modifyitems(config, items):
    """Keeps the test files of the requested part; files are assigned to parts in turn.

    A file of scripts that take minutes each is assigned script by script.
    """
    part, parts = map(int, config.getoption("part").split("/"))
    unit = lambda item: item.nodeid if item.path.name == "test_triton.py" else item.path  # noqa: E731
    kept = {name: i % parts == part - 1 for i, name in enumerate(dict.fromkeys(map(unit, items)))}
    if parts > 1:
        config.hook.pytest_deselected(items=[item for item in items if not kept[unit(item)]])
        items[:] = [item for item in items if kept[unit(item)]]


@pytest.fixture(autouse=True, scope="module")
def small_garbage_collections():
    """Excludes what a finished test file leaves, such as compiled functions, from all later garbage collections.

    They are millions of objects, which each collection would visit.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds():
    keras.utils.set_random_seed(0)
