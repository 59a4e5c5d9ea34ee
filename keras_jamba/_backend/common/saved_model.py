"""SavedModels, which Keras writes on JAX and TensorFlow."""

import importlib

import keras


def write(program, path, **options):
    sizes = lambda shape: tuple(None if isinstance(size, str) else size for size in shape)  # noqa: E731
    signature = {
        name: keras.InputSpec(shape=sizes(x.shape), dtype=x.dtype, name=name) for name, x in program.inputs.items()
    }
    archive = keras.export.ExportArchive()
    archive.track(program.model)
    archive.add_endpoint("serve", program.function, input_signature=[signature], **options)
    archive.write_out(str(path), verbose=False)


def load(path):
    # Keras itself imports TensorFlow to write a SavedModel on JAX.
    tensorflow = importlib.import_module("tensorflow")
    graph = tensorflow.saved_model.load(path)
    serve = graph.signatures["serving_default"]

    # The graph must live as long as its function.
    def run(arrays, graph=graph):
        outputs = serve(**{name: tensorflow.constant(x) for name, x in arrays.items()})
        return {name: x.numpy() for name, x in outputs.items()}

    return run
