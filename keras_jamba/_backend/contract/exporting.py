"""The contract of files for other runtimes."""

from typing import Protocol


class Exporting(Protocol):
    def formats(self):
        """Returns the names of the formats that the backend writes."""

    def write(self, format, program, path, precision):
        """Writes a program to `path` in one of the formats that the backend offers; see `keras_jamba.exporting`.

        Args:
            format: the name of the format.
            program: a `keras_jamba.exporting.programs.Program`.
            path: the path of the file or folder to write, in an existing folder.
            precision: of the stored numbers, "float32" or "float16".
        """

    def load(self, format, path):
        """Returns `function({name: array})`, which runs a file of one of the backend's own formats.

        PyTorch: "torch". JAX: "jax_export" and "tf_saved_model". TensorFlow: "tf_saved_model".
        """

    def run(self, program, arrays):
        """Returns the outputs of a program as NumPy arrays, computed by the model itself, which assigns no variable."""
