"""Text that lies on every machine with Python: the topics of its help, and docstrings of installed packages."""

import ast
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

import keras
import numpy as np

_PACKAGES = {"numpy": Path(np.__file__).parent, "keras": Path(keras.__file__).parent}


def documents(limit=3_000_000):
    """`(training texts, test texts)`, `limit` characters at most; a twelfth of the documents are for the test.

    Where a text belongs depends on the text alone, so none is in both.
    """
    train, test, size = [], [], 0
    for text in dict.fromkeys(_texts()):
        size += len(text)
        if size > limit:
            break
        (test if zlib.crc32(text.encode()) % 12 == 0 else train).append(text)
    return train, test


def _texts():
    yield from (text.strip() for _, text in sorted(topics.items()))
    folders = [Path(sysconfig.get_paths()["stdlib"]), *_PACKAGES.values()]
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).parts
            if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
                yield from _docstrings(file)


def _docstrings(file):
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 100:
                yield text
