"""Text on every machine with Python: its help topics, and docstrings of installed packages."""

import ast
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

import keras
import numpy as np

_PACKAGES = {"numpy": Path(np.__file__).parent, "keras": Path(keras.__file__).parent}


def documents(limit=3_000_000):
    """Returns `(training texts, test texts)` of at most `limit` characters. A twelfth of the documents are test texts.

    The split depends on the text alone, so no text is in both lists.
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
