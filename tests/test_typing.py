"""Public signatures have annotations, and mypy checks a user's program with them."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import api_snapshot
from checks import full, once

import keras_jamba

# Independent of the backend.
pytestmark = once
CONSUMER = Path(__file__).parent / "annotations" / "consumer.py"


def functions(name, value):
    """Yields `(name, function)` of a public name, or of its public members that the package defines."""
    if not inspect.isclass(value):
        yield name, value
        return
    members = {}
    for cls in reversed([cls for cls in value.__mro__ if api_snapshot.is_ours(cls)]):
        members |= vars(cls)
    for member, found in members.items():
        if member.startswith("_") and member not in ("__init__", *api_snapshot.SPECIAL):
            continue
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if inspect.isfunction(found) and found.__module__.startswith(keras_jamba.__name__):
            yield f"{name}.{member}", inspect.unwrap(found)


def missing(function):
    """Returns the parameters of a function without an annotation, and "return"."""
    signature = inspect.signature(function)
    given = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    found = [each.name for each in given if each.annotation is each.empty]
    return found + ["return"] * (signature.return_annotation is signature.empty)


def test_all_public_signatures_are_annotated():
    seen, found = 0, {}
    for module in api_snapshot.modules(keras_jamba):
        for name in api_snapshot.names(module):
            value = getattr(module, name)
            if not callable(value):
                continue
            for path, function in functions(f"{module.__name__}.{name}", value):
                # A dataclass generates its methods from annotated fields.
                if inspect.isfunction(function) and function.__code__.co_filename != "<string>":
                    seen += 1
                    if names := missing(function):
                        found[path] = names
    assert seen > 500
    assert found == {}


def test_a_missing_annotation_is_found():
    def function(x: int, y=1): ...

    assert missing(function) == ["y", "return"]


@full()
def test_mypy_accepts_a_program_and_reports_its_mistakes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, CONSUMER],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=CONSUMER.parent.parent.parent,
    )
    lines = CONSUMER.read_text("utf-8").splitlines()
    expected = {i: line.split("# expect: ")[1] for i, line in enumerate(lines, 1) if "# expect: " in line}
    errors = re.findall(r"consumer\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)
    assert {int(line): code for line, code in errors} == expected, done.stdout + done.stderr
