"""The packages of the three backends have the files, names, parameters and defaults of the contract."""

import ast
from pathlib import Path

import keras
import pytest
from checks import once

import keras_jamba
from keras_jamba import _backend

BACKEND = Path(keras_jamba.__file__).parent / "_backend"
PACKAGES = ("jax", "tensorflow", "torch")


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def protocols(tree):
    """Returns `{module name: {name: definition}}` of the contract."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and is_protocol(node)]
    return {each.name.lower(): definitions(each) for each in classes}


def is_protocol(node):
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def definitions(node):
    return {each.name: each for each in node.body if isinstance(each, (ast.FunctionDef, ast.ClassDef))}


def exported(path):
    """Returns `{name: definition}` of a module, including definitions that it imports from `_backend`."""
    tree = parsed(path)
    found = {name: each for name, each in definitions(tree).items() if not name.startswith("_")}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_jamba._backend."):
            source = BACKEND.joinpath(*node.module.split(".")[2:])
            source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
            known = definitions(parsed(source))
            found |= {alias.asname or alias.name: known[alias.name] for alias in node.names if alias.name in known}
    return found


def parameters(function, method):
    """Returns names, kinds and defaults as text, without `self`."""
    given = function.args
    if method:
        given = ast.arguments(**{name: getattr(given, name) for name in given._fields} | {"args": given.args[1:]})
    return ast.unparse(given)


def differences(contract, module):
    """Returns the differences between a module of a backend and its Protocol."""
    found = []
    for name, expected in contract.items():
        actual = module.get(name)
        if type(actual) is not type(expected):
            found.append(f"{name} is missing")
        elif isinstance(expected, ast.FunctionDef):
            if parameters(actual, method=False) != parameters(expected, method=True):
                found.append(f"{name}({parameters(actual, False)}) is not {name}({parameters(expected, True)})")
        else:
            methods = definitions(actual)
            for method, each in definitions(expected).items():
                if method not in methods:
                    found.append(f"{name}.{method} is missing")
                elif parameters(methods[method], True) != parameters(each, True):
                    found.append(f"{name}.{method} has other parameters")
    return found


def extra(contract, tree):
    """Returns public definitions and assignments of a module that its Protocol does not name."""
    stored = {node.id for node in module_level(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return sorted(name for name in stored | set(definitions(tree)) if not name.startswith("_") and name not in contract)


def module_level(tree):
    """Yields the nodes of a module outside its functions and classes, including nodes under `if` and `try`."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node
            yield from module_level(node)


def refusing(path):
    """Returns `{name: (number of required arguments, keyword-only names)}` of the functions that only refuse."""
    found = {}
    for name, each in exported(path).items():
        only = ast.unparse(each.body[0])
        if isinstance(each, ast.FunctionDef) and len(each.body) == 1 and only.startswith("refuse("):
            given = each.args
            found[name] = len(given.args) - len(given.defaults), [arg.arg for arg in given.kwonlyargs]
    return found


CONTRACT = {}
for each in sorted((BACKEND / "contract").glob("*.py")):
    CONTRACT |= protocols(parsed(each))


@once
@pytest.mark.parametrize("package", PACKAGES)
def test_a_backend_has_exactly_one_public_module_per_protocol(package):
    files = {path.stem for path in (BACKEND / package).glob("*.py") if not path.stem.startswith("_")}
    assert files == set(CONTRACT)


@once
@pytest.mark.parametrize("module", CONTRACT)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_has_the_names_parameters_and_defaults_of_its_protocol(package, module):
    path = BACKEND / package / f"{module}.py"
    assert differences(CONTRACT[module], exported(path)) == []
    assert extra(CONTRACT[module], parsed(path)) == []
    # Only the contract has docstrings.
    assert [name for name, each in exported(path).items() if name in CONTRACT[module] and ast.get_docstring(each)] == []


@once
def test_the_comparison_finds_every_difference():
    contract = protocols(
        ast.parse(
            "class A(Protocol):\n def f(self, x, y=1): ...\n def g(self): ...\n"
            " class C(Protocol):\n  def m(self, x): ..."
        )
    )["a"]
    same = "def f(x, y=1): pass\ndef g(): pass\nclass C:\n def m(self, x): pass"
    assert differences(contract, definitions(ast.parse(same))) == []
    for old, new in [("y=1", "y=2"), ("y=1", "y"), ("x, y", "y, x"), ("def g", "def h"), ("(self, x)", "(self)")]:
        assert differences(contract, definitions(ast.parse(same.replace(old, new))))
    for more in ("def h(): pass", "h = 1", "if True:\n h = 1", "class H: pass"):
        assert extra(contract, ast.parse(f"{same}\n{more}"))
    assert extra(contract, ast.parse(f"{same}\n_h = 1")) == []


@once
def test_every_function_of_the_contract_is_documented():
    functions = [each for names in CONTRACT.values() for each in names.values()]
    assert [each.name for each in functions if not ast.get_docstring(each)] == []


def test_the_modules_of_the_active_backend_are_imported():
    prefix = f"keras_jamba._backend.{keras.backend.backend()}"
    assert {name: getattr(_backend, name).__name__ for name in CONTRACT} == {
        name: f"{prefix}.{name}" for name in CONTRACT
    }


@once
def test_the_package_itself_only_imports():
    text = (BACKEND / "__init__.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 60
    assert [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))] == []


REFUSING = [
    (module, name, *given)
    for module in CONTRACT
    for name, given in refusing(BACKEND / keras.backend.backend() / f"{module}.py").items()
]


@pytest.mark.parametrize(("module", "name", "count", "named"), REFUSING, ids=[f"{m}.{n}" for m, n, *_ in REFUSING])
def test_an_unavailable_function_refuses_with_its_reason(module, name, count, named):
    function = getattr(getattr(_backend, module), name)
    message = rf"{name} is not available here. Received: a call of it, though .*. Ask .* first"
    with pytest.raises(NotImplementedError, match=message):
        function(*[None] * count, **dict.fromkeys(named))


def test_unavailable_functions_are_reported_before_a_call():
    """Checks the functions that report availability, on the backends where they must give a reason."""
    backend = keras.backend.backend()
    refusing = {name for _, name, *_ in REFUSING}
    assert ("split_rows" in refusing) == (backend == "jax")
    assert ("fused_adamw" in refusing) == (not _backend.optimizer.has_fused_adamw()) == (backend != "torch")
    assert ("shard_map" in refusing) == (not _backend.sharding.supports_model_parallel()) == (backend != "jax")
    assert ("grouped_matmul" in refusing) == ("triton_launcher" in refusing) == (backend == "tensorflow")
    assert bool(_backend.numerics.why_no_grouped_matmul("cpu", "float32", (4, 4))) == (backend == "tensorflow")
    assert _backend.sharding.active_mesh() is None
    if backend == "tensorflow":
        assert _backend.kernels.why_no_triton() == _backend.kernels.why_no_triton_op((1, 1, 1)) is not None
        with pytest.raises(NotImplementedError, match="triton_op is not available here"):
            _backend.kernels.triton_op(None, None)((), ())
    if not _backend.optimizer.has_fused_adamw():
        with pytest.raises(NotImplementedError, match="HostStepCounter is not available here"):
            _backend.optimizer.HostStepCounter()
