"""Retired identifiers stay out of the code: each has a standard replacement."""

import tokenize
from pathlib import Path

import pytest
from checks import once

# Independent of the backend.
pytestmark = once
ROOT = Path(__file__).parent.parent
FOLDERS = ("keras_jamba", "tests", "benchmarks", "examples")
# `{retired identifier: replacements}`.
RETIRED = {
    "asked": "append_requested, requested",
    "told": "print_trainable_parameters, given",
    "goes_straight": "can_bypass_layer_call",
    "on_parts": "shard_map",
    "trail": "rollback_state",
    "return_trail": "return_rollback_state",
    "Holder": "SublayerQuantizationConfig",
    "Compact": "QuantizableWeights, LoraWeights",
    "Light": "EagerFastPath",
    "few_bits": "quantization, QuantizedTensor",
    "whole": "complete, full, jitted, fully_trained_variables, as_single_shard",
    "Job": "GenerationRequest",
}


def retired_identifiers(path):
    """Yields `line: word, write ...` of a file's name and its code; strings and comments are not identifiers."""
    if path.stem.strip("_") in RETIRED:
        yield f"0: {path.name}, write {RETIRED[path.stem.strip('_')]}"
    with path.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.NAME and token.string in RETIRED:
                yield f"{token.start[0]}: {token.string}, write {RETIRED[token.string]}"


def test_no_retired_identifier_is_used():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    assert [f"{path.relative_to(ROOT)}:{found}" for path in files for found in retired_identifiers(path)] == []


@pytest.mark.parametrize(
    "code", ["trail = 1", "def on_parts(): pass", "layer.few_bits", "f(whole=1)", "class Job: pass"]
)
def test_a_retired_identifier_is_found_with_its_replacement(tmp_path, code):
    (tmp_path / "file.py").write_text(f"# trail\n'whole'\n{code}\n")
    (found,) = retired_identifiers(tmp_path / "file.py")
    assert found.startswith("3: ") and ", write " in found
    (tmp_path / "_few_bits.py").write_text("")
    assert next(retired_identifiers(tmp_path / "_few_bits.py")).startswith("0: _few_bits.py")
