"""Rules on the source text: allowed imports, knowledge of the backend, file lengths and names."""

import ast
from pathlib import Path

import pytest
from checks import once

# Independent of the backend.
pytestmark = once
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_jamba"
FILES = sorted(PACKAGE.rglob("*.py"))

# `{part: parts of the package that it may import}`. A part without a row fails the test.
MAY_IMPORT = {
    "_keras": {"_keras"},
    "_keras_internals": {"_keras_internals"},
    "_keras_optimizers": {"_keras_optimizers"},
    "_signature": {"_signature"},
    "_typing": {"_typing"},
    "_files": {"_files"},
    "_checksums": {"_checksums"},
    "_npz": {"_npz"},
    "_padding": {"_padding"},
    "_native": {"_native", "_signature"},
    "_triton": {"_triton", "_signature", "_files", "_checksums"},
    "_backend": {"_backend", "_native", "_triton", "_keras_internals"},
    "ops": {"ops", "_backend", "_native", "_triton"},
    "presets": {"presets", "_files", "_checksums", "_keras_internals"},
    "tokenizers": {"tokenizers", "_files", "_padding"},
    "generation": {"generation", "ops", "_backend", "_files", "_padding", "_checksums", "_npz"},
    "converters": {"converters", "presets", "_files"},
    "layers": {"layers", "ops", "_backend", "_keras_internals"},
    "models": {
        *("models", "layers", "ops", "presets", "converters", "tokenizers", "generation"),
        *("_backend", "_keras_internals", "_files", "_padding", "_checksums"),
    },
    "visualize": {"visualize", "models", "layers", "ops", "_backend", "_files"},
    "exporting": {"exporting", "models", "ops", "tokenizers", "_backend", "_files"},
    "estimation": {"estimation", "models", "layers", "ops", "_backend"},
    "training": {
        *("training", "models", "layers", "ops", "presets", "converters", "tokenizers"),
        *("_backend", "_keras_internals", "_keras_optimizers", "_files", "_checksums", "_npz"),
    },
}
# Parts that every part may import, and that import none.
ANYWHERE = {"_typing"}
# `{framework: package of _backend that may import it}`.
FRAMEWORKS = {"jax": "jax", "jaxlib": "jax", "tensorflow": "tensorflow", "torch": "torch"}
# `{file: framework}` for formulas that are written in a framework's operations.
FORMULAS = {"ops/scan/torch_chunks.py": "torch"}
# This file stores the backend on which a model was compiled.
KEEPS_BACKEND = {"models/_saved_state.py"}
MAX_LINES = 400


def module_name(path):
    """Returns the dotted name of a module: `keras_jamba.ops.scan` for `keras_jamba/ops/scan/__init__.py`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name):
    """Returns the part of a dotted name: `ops` for `keras_jamba.ops.scan`, an empty string for the package itself."""
    return (name.split(".") + [""])[1]


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree, path):
    """Yields `(line, dotted name)` of every import, including relative imports and imports inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                # `from .` in a/b.py means a; in a/b/__init__.py it means a.b.
                drop = node.level - (path.name == "__init__.py")
                base = ".".join(package[: len(package) - drop] + ([base] if base else []))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def dotted(node):
    """Returns a chain of names as text, such as `keras.backend.backend`, or None for any other node."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return None


def disallowed_imports(tree, path):
    part = part_of(module_name(path))
    # The package's own __init__ collects the public names and may import every part.
    allowed = ANYWHERE | (MAY_IMPORT.get(part, set()) if part else set(MAY_IMPORT))
    return [
        f"{line}: imports {name}"
        for line, name in imports(tree, path)
        if name.split(".")[0] == PACKAGE.name and part_of(name) not in allowed
    ]


def framework_of(path):
    """Returns the framework that a file may import: that of its package in `_backend`, or of its formula."""
    relative = path.relative_to(PACKAGE)
    if relative.parts[0] == "_backend" and len(relative.parts) == 3:
        return relative.parts[1]
    return FORMULAS.get(relative.as_posix())


def backend_knowledge(tree, path):
    """Returns the imports of a framework and the queries for the active backend, under any alias of `keras`."""
    found = []
    local = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                local[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for line, name in imports(tree, path):
        if (framework := FRAMEWORKS.get(name.split(".")[0])) and framework != framework_of(path):
            found.append(f"{line}: imports {name}")
    if part_of(module_name(path)) == "_backend":
        return found
    for node in ast.walk(tree):
        # A name without a call counts too: it may be called later.
        name = dotted(node) if isinstance(node, ast.Attribute | ast.Name) else None
        head, _, rest = (name or "").partition(".")
        full = local.get(head, head) + (f".{rest}" if rest else "")
        if full in {"keras.backend.backend", "keras.config.backend"}:
            found.append(f"{node.lineno}: uses {full}")
        elif isinstance(node, ast.Call) and ast.unparse(node).startswith(("importlib.import_module('", "__import__('")):
            framework = FRAMEWORKS.get(node.args[0].value.split(".")[0])
            if framework and framework != framework_of(path):
                found.append(f"{node.lineno}: imports {node.args[0].value}")
        elif full == "keras_jamba._backend.name" and path.relative_to(PACKAGE).as_posix() not in KEEPS_BACKEND:
            found.append(f"{node.lineno}: reads {full}")
        elif isinstance(node, ast.Constant) and node.value == "KERAS_BACKEND" and path.name != "_keras.py":
            found.append(f"{node.lineno}: reads KERAS_BACKEND")
    return found


def violations(rule):
    """Returns `path:line: violation` for every violation of one rule in the package."""
    return [f"{path.relative_to(ROOT).as_posix()}:{found}" for path in FILES for found in rule(tree_of(path), path)]


def test_every_part_imports_only_allowed_parts():
    assert FILES
    assert violations(disallowed_imports) == []


def test_every_part_has_a_row_of_allowed_imports():
    parts = {part_of(module_name(path)) for path in FILES} - {""}
    assert parts <= MAY_IMPORT.keys()


def test_only_backend_packages_know_the_framework_and_the_backend():
    assert violations(backend_knowledge) == []


def test_the_package_has_no_assert_statement():
    assert (
        violations(
            lambda tree, path: [f"{node.lineno}: assert" for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        )
        == []
    )


def test_every_file_is_under_400_lines():
    long = {p.name: n for p in FILES if (n := p.read_text(encoding="utf-8").count("\n")) >= MAX_LINES}
    assert long == {}


def test_no_public_function_shares_its_modules_name():
    assert (
        violations(
            lambda tree, path: [
                f"{node.lineno}: {node.name}"
                for node in tree.body
                if isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and node.name == module_name(path).split(".")[-1]
            ]
        )
        == []
    )


@pytest.mark.parametrize(
    "where, source",
    [
        ("ops/rotary.py", "from keras_jamba.layers import MambaLayer"),
        ("ops/rotary.py", "from keras_jamba import layers"),
        ("ops/scan/portable.py", "from ...layers import mamba"),
        ("layers/moe.py", "def f():\n    import keras_jamba.models.dhc_jamba"),
        ("presets.py", "from keras_jamba.models import DHCJamba"),
        ("_backend/jax/tensors.py", "from keras_jamba import ops"),
        ("layers/moe.py", "import keras_jamba"),
    ],
)
def test_the_import_rule_finds_every_form_of_import(where, source):
    assert disallowed_imports(ast.parse(source), PACKAGE / where)


@pytest.mark.parametrize(
    "where, source",
    [
        ("layers/moe.py", "import torch.nn as nn"),
        ("layers/moe.py", "from jax import numpy"),
        ("layers/moe.py", "import keras\nkeras.backend.backend()"),
        ("layers/moe.py", "import keras as k\nk.config.backend()"),
        ("ops/rotary.py", "from keras import backend\nbackend.backend()"),
        ("ops/rotary.py", "from keras.config import backend as which\nwhich()"),
        ("ops/rotary.py", "import keras\nask = keras.backend.backend"),
        ("ops/rotary.py", "import importlib\nimportlib.import_module('torch')"),
        ("ops/rotary.py", "__import__('torch')"),
        ("ops/rotary.py", "import os\nos.environ['KERAS_BACKEND']"),
        ("ops/rotary.py", "from keras_jamba import _backend\n_backend.name"),
        ("ops/scan/torch_chunks.py", "import jax"),
        ("_backend/__init__.py", "import torch"),
        ("_backend/common/trainer.py", "import torch"),
        ("_backend/jax/tensors.py", "import torch"),
    ],
)
def test_the_backend_rule_finds_every_form_of_query(where, source):
    assert backend_knowledge(ast.parse(source), PACKAGE / where)


@pytest.mark.parametrize(
    "where, source",
    [
        ("ops/scan/torch_chunks.py", "import torch"),
        ("_backend/jax/_loops.py", "def f():\n    from jax import numpy"),
        ("_backend/__init__.py", "import keras\nkeras.backend.backend()"),
    ],
)
def test_the_backend_rule_accepts_backend_packages(where, source):
    assert backend_knowledge(ast.parse(source), PACKAGE / where) == []
