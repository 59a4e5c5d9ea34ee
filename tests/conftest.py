"""Shared by all tests: helper modules on the path, fixed seeds, cheap compilation, one store of what JAX compiled."""

import importlib.util
import mmap
import os
import sys
from pathlib import Path

# Most of the time on JAX is compilation: tests build the same small models again and again, and examples run
# in processes of their own. To be set before keras imports jax.
STORE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(STORE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Half the time to compile a drawing of random weights, which each new shape needs; the numbers are others.
os.environ.setdefault("JAX_THREEFRY_PARTITIONABLE", "0")


def cheap_compilation(package, library):
    """XLA's flags to optimise little: a third of the time to compile, for programs that run for milliseconds."""
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    # The older of its two ways to emit loops compiles faster; a version that no longer knows it ends the process.
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

    # A step that makes variables of optimizers and metrics when it is traced is traced twice, which is most of its
    # time. Examples, in processes of their own, make them there, as users do.
    make_train_function, build_metrics = keras.Model.make_train_function, CompileMetrics.build

    def of_a_built_optimizer(model, force=False):
        if model.built and model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        return make_train_function(model, force)

    def built_outside(metrics, y_true, y_pred):
        # In another thread nothing is traced.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(build_metrics, metrics, y_true, y_pred).result()

    keras.Model.make_train_function, CompileMetrics.build = of_a_built_optimizer, built_outside


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="of the test files, the first of two for example: 1/2")


def pytest_collection_modifyitems(config, items):
    """Leaves the files of one part, dealt out in turn."""
    part, parts = map(int, config.getoption("part").split("/"))
    files = {path: i % parts == part - 1 for i, path in enumerate(dict.fromkeys(item.path for item in items))}
    if parts > 1:
        config.hook.pytest_deselected(items=[item for item in items if not files[item.path]])
        items[:] = [item for item in items if files[item.path]]


@pytest.fixture(autouse=True)
def fixed_seeds():
    keras.utils.set_random_seed(0)
