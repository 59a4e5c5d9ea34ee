"""Only `_keras_internals.py` and `_keras_optimizers.py` use private names of Keras, by access or by override."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import keras
from checks import once

import keras_jamba
from keras_jamba import _keras_internals, _keras_optimizers

# Names that objects of this package share with Keras by accident.
OURS = {"_config"}
HOOKS = (_keras_internals.__name__, _keras_optimizers.__name__)


def keras_private_names():
    """Returns the private names that files of Keras assign to objects or define in classes."""
    import keras.src as source

    found = set()
    for path in Path(source.__file__).parent.rglob("*.py"):
        if not path.name.endswith("_test.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
                elif isinstance(node, ast.ClassDef):
                    found |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                    targets = [target for each in node.body if isinstance(each, ast.Assign) for target in each.targets]
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - OURS


def private_accesses(tree, private):
    """Yields `line: access` for private names of Keras, except names that the file itself defines."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    own |= {node.attr for node in stored if ast.unparse(node.value) == "self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text == "keras.src" or node.attr in private - own:
                yield f"{node.lineno}: {text}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in private - own:
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from (f"{node.lineno}: imports {name}" for name in modules if name.startswith("keras.src"))


@once
def test_no_other_file_accesses_private_keras():
    package, private = Path(keras_jamba.__file__).parent, keras_private_names()
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    for name in ("_keras_internals.py", "_keras_optimizers.py"):
        trees.pop(package / name)
    ours = {n.name for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    found = [f"{path.name}:{line}" for path, tree in trees.items() for line in private_accesses(tree, private - ours)]
    assert found == []
    for source in (
        "layer._flatten_layers()",
        "from keras.src import tree",
        "import keras\nkeras.src.tree.flatten",
        "getattr(layer, '_layers')",
        "distribution._layout_map",
    ):
        assert list(private_accesses(ast.parse(source), private)), source


def overrides(classes):
    """Yields private names of Keras that a class of this package overrides, directly or in one of its bases."""
    for cls in classes:
        theirs = [base for base in cls.__mro__ if base.__module__.startswith("keras.")]
        ours = [base for base in cls.__mro__ if base.__module__.startswith("keras_jamba")]
        for base in ours if theirs else ():
            for name in vars(base):
                is_hook = name.startswith("_") and not name.startswith(("__", "_abc", "_tf"))
                if is_hook and base.__module__ not in HOOKS and any(name in vars(each) for each in theirs):
                    yield f"{base.__module__}.{base.__qualname__}.{name}"


def test_no_class_of_the_package_overrides_a_private_hook_of_keras():
    modules = [m.name for m in pkgutil.walk_packages(keras_jamba.__path__, "keras_jamba.")]
    others = tuple(f"keras_jamba.{name}" for name in ("_backend", "_triton", "_native"))
    found = []
    for module in map(importlib.import_module, (name for name in modules if not name.startswith(others))):
        found += [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    assert len(found) > 50
    assert sorted(set(overrides(found))) == []

    class Mixin:
        __module__ = "keras_jamba.models"

        def _symbolic_build(self, *given):
            pass

    class Model(Mixin, keras.Model):
        __module__ = "keras_jamba.models"

    assert list(overrides([Model]))
