"""Export of models to files for other runtimes, compared with the model in their own runtime."""

from keras_jamba.exporting._export import check_export, export

__all__ = ["check_export", "export"]
