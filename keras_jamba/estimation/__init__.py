"""Cost estimates of a model before it runs: parameters, floating-point operations and memory.

All estimates follow from the constructor arguments. Nothing is built, so a model too large for the machine has a report
too.
"""

from keras_jamba.estimation.caches import kv_cache_bytes
from keras_jamba.estimation.operations import scan_flops
from keras_jamba.estimation.report import LayerReport, ModelReport, model_report

__all__ = ["LayerReport", "ModelReport", "kv_cache_bytes", "model_report", "scan_flops"]
