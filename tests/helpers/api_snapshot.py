"""The public API as text: names, signatures with defaults, and the class members that the package itself defines.

    python tests/helpers/api_snapshot.py            prints the text
    python tests/helpers/api_snapshot.py --write    writes the text to tests/fixtures/public_api.txt

Public names are those in `__all__` of `keras_jamba`, of its public modules, and of packages inside them that define
`__all__`. A module without `__all__` contributes the names without underscore that it defines. Members inherited from
Keras are left out. So are members of `keras_jamba._backend`, whose model base classes differ per backend. Instance
attributes and annotations are left out too. The text is the same on every backend.
"""

import dataclasses
import inspect
import pkgutil
import sys
import types
from pathlib import Path

import keras_jamba

FILE = Path(__file__).parent.parent / "fixtures" / "public_api.txt"
SPECIAL = ("__call__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__")
WIDTH = 120


def listing():
    """Returns the text of the snapshot."""
    lines, reported = [], {}
    for module in modules(keras_jamba):
        lines += [f"module {module.__name__}"]
        for name in names(module):
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType):
                lines += [f"    {line}" for line in entry(name, value, f"{module.__name__}.{name}", reported)]
        lines += [""]
    model = keras_jamba.JambaCausalLM(vocab_size=8, d_model=8, num_layers=1, mamba_ratio=None, moe_frequency=0)
    state = type(model.prefill([1]))
    lines += ["what JambaCausalLM.prefill returns", *(f"    {line}" for line in described(state.__name__, state))]
    return "\n".join(lines) + "\n"


def modules(module):
    """Yields `module`, then each public module inside it, recursively."""
    yield module
    inside = {name for name in names(module) if isinstance(getattr(module, name), types.ModuleType)}
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        each = getattr(module, found.name, None)
        if found.ispkg and not found.name.startswith("_") and hasattr(each, "__all__"):
            inside.add(found.name)
    for name in sorted(inside):
        yield from modules(getattr(module, name))


def names(module):
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = {name: x for name, x in vars(module).items() if not name.startswith("_") and not inspect.ismodule(x)}
    return sorted(name for name, x in own.items() if getattr(x, "__module__", module.__name__) == module.__name__)


def entry(name, value, path, reported):
    """Returns the lines for a name, or one line that refers to the path listed before."""
    if not callable(value):
        return [f"{name} = {text_of(value)}"]
    if value in reported:
        return [f"{name} is {reported[value]}"]
    reported[value] = path
    return described(name, value)


def described(name, value):
    if not inspect.isclass(value):
        return signature(name, value)
    made = [cls for cls in value.__mro__ if is_ours(cls)]
    first = next((cls for cls in made if "__init__" in vars(cls)), None)
    head, *parameters = signature(name, first and first.__init__)
    lines, members = [f"class {head}", *parameters], {}
    for cls in reversed(made):
        members |= vars(cls)
    for member in sorted(members):
        if member in SPECIAL or not member.startswith("_"):
            lines += [f"    {line}" for line in attribute(member, members[member])]
    return lines


def is_ours(cls):
    parts = cls.__module__.split(".")
    return parts[0] == keras_jamba.__name__ and "_backend" not in parts


def attribute(name, value):
    kinds = {classmethod: "classmethod ", staticmethod: "staticmethod "}
    if isinstance(value, property):
        return [f"property {name}{' (may be set)' if value.fset else ''}"]
    if type(value) in kinds:
        lines = signature(name, value.__func__, skip=isinstance(value, classmethod))
        return [kinds[type(value)] + lines[0], *lines[1:]]
    if inspect.isfunction(value):
        return signature(name, value)
    return [f"{name} = {text_of(value)}"]


def signature(name, function, skip=None):
    """Returns `name(a, b=1)` on one line, or with one line per parameter if that line is too long."""
    if function is None:
        return [f"{name}()"]
    parameters = list(inspect.signature(function).parameters.values())
    skip = bool(parameters) and parameters[0].name == "self" if skip is None else skip
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in parameters[skip:]]
    shown = [str(each) if each.default is each.empty else f"{each.name}={text_of(each.default)}" for each in plain]
    shown = with_marks(plain, shown)
    line = f"{name}({', '.join(shown)})"
    return [line] if len(line) < WIDTH else [f"{name}(", *(f"    {each}," for each in shown), ")"]


def with_marks(parameters, shown):
    """Returns `shown` with `*` before the keyword-only parameters."""
    kinds = [each.kind for each in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        place = kinds.index(inspect.Parameter.KEYWORD_ONLY)
        return [*shown[:place], "*", *shown[place:]]
    return shown


def text_of(value):
    """Returns the text of a value without memory addresses and without the names of private functions."""
    if dataclasses.is_dataclass(value):
        fields = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(f'{name}={text_of(x)}' for name, x in fields)})"
    if callable(value):
        name = getattr(value, "__name__", "")
        return name if name.isidentifier() and not name.startswith("_") else "a function"
    shown = repr(value)
    return type(value).__name__ if " at 0x" in shown else shown


def main(*arguments):
    if arguments == ("--write",):
        FILE.write_text(listing(), "utf-8")
    else:
        print(listing(), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
