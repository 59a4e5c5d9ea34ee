"""The runtimes of exported files. Each loads a file, and returns a function of named arrays."""

import importlib.util

import numpy as np

from keras_jamba import _backend


def load(format, path, precision="float32"):
    """Returns `function({name: array})`, which runs the file at `path` and returns `{name: array}`.

    Raises:
        ImportError: if a package of the runtime is missing.
        Exception: whatever the runtime raises for a damaged file.
    """
    if format in _LOADERS:
        return _LOADERS[format](str(path), precision)
    return _backend.exporting.load(format, str(path))


def missing(modules):
    """Returns the modules that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _onnx(path, precision):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(names, arrays), strict=True))


def _openvino(path, precision):
    import openvino

    kinds = {"float32": "f32", "float16": "f16"}
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": kinds[precision]})
    names = [x.any_name for x in compiled.outputs]

    def run(arrays):
        found = compiled(arrays)
        return {name: np.array(found[i]) for i, name in enumerate(names)}

    return run


def _litert(path, precision):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path)
    serve = interpreter.get_signature_runner("serving_default")
    return lambda arrays: {name: np.array(x) for name, x in serve(**arrays).items()}


_LOADERS = {"onnx": _onnx, "openvino": _openvino, "litert": _litert}
