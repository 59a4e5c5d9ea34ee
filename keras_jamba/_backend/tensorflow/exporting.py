"""SavedModel and LiteRT, on TensorFlow."""

import tempfile
from pathlib import Path

import tensorflow as tf

from keras_jamba._backend.common import saved_model
from keras_jamba._backend.common.exporting_state import exporting


def formats():
    return tuple(_WRITERS)


def write(format, program, path, precision):
    with exporting(for_other_runtime=format == "litert"):
        _WRITERS[format](program, Path(path))


def run(program, arrays):
    with exporting():
        outputs = program.function({name: tf.constant(x) for name, x in arrays.items()})
    return {name: x.numpy() for name, x in outputs.items()}


def load(format, path):
    return saved_model.load(path)


def _write_litert(program, path):
    with tempfile.TemporaryDirectory() as folder:
        saved_model.write(program, folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        path.write_bytes(converter.convert())


_WRITERS = {"tf_saved_model": saved_model.write, "litert": _write_litert}
