"""The tables of measured figures in docs/benchmarks, rendered from benchmarks/results/*.json.

    python -m scripts.benchmark_tables            rewrites the tables of the pages
    python -m scripts.benchmark_tables --check    exits with status 1 and names the pages that differ

A page holds a table between the lines `<!-- table NAME -->` and `<!-- end -->`. NAME is a function of this package with
the decorator `table`. It reads results files with `read` and returns Markdown. To add a table, write the function in
the module of its page, put both lines into the page, and run the first command.
"""

from scripts.benchmark_tables import attention, decoding, experts, images, index, quantization, scaling, scan, training
from scripts.benchmark_tables.pages import check, rewrite
from scripts.benchmark_tables.tables import TABLES

__all__ = ["TABLES", "check", "rewrite"]
__all__ += ["attention", "decoding", "experts", "images", "index", "quantization", "scaling", "scan", "training"]
