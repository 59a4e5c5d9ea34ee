"""Distribution of tensors over shard files."""

import json
import sys
import weakref

import numpy as np
import pytest
from checks import once
from safetensors.numpy import load_file

from keras_jamba.converters import safetensors_folder

# Independent of the backend.
pytestmark = once
# Bytes per tensor. One is larger than a shard, and one is as large as a shard.
SIZES = {"a": 24, "b": 40, "c": 8, "large": 200, "d": 16, "full": 64, "e": 60}
LIMIT = 64


def arrays():
    return ((name, np.full(size, index, "uint8")) for index, (name, size) in enumerate(SIZES.items()))


@pytest.mark.parametrize("limit", [LIMIT, 10, 211])
def test_a_file_holds_at_most_the_limit_or_one_tensor(tmp_path, limit):
    safetensors_folder.write(tmp_path, SIZES, arrays(), limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(list(tmp_path.iterdir())) == len(files) + 1
    assert index["metadata"] == {"total_size": sum(SIZES.values())} and set(index["weight_map"]) == set(SIZES)
    found = {file.name: load_file(file) for file in files}
    for tensors in found.values():
        assert sum(x.nbytes for x in tensors.values()) <= limit or len(tensors) == 1
    for name, x in arrays():
        np.testing.assert_array_equal(found[index["weight_map"][name]].pop(name), x)
    assert not any(found.values())


def test_a_single_file_has_no_index(tmp_path):
    safetensors_folder.write(tmp_path, SIZES, arrays(), sum(SIZES.values()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(SIZES)


def test_writing_holds_at_most_one_shard_and_one_larger_tensor(tmp_path):
    made = []

    def watched_arrays():
        for name, x in arrays():
            made.append(weakref.ref(x))
            assert sum(ref().nbytes for ref in made if ref() is not None) <= LIMIT + SIZES["large"]
            yield name, x

    safetensors_folder.write(tmp_path, SIZES, watched_arrays(), LIMIT)
    assert len(made) == len(SIZES)


@pytest.mark.parametrize("library", ["safetensors.numpy", "huggingface_hub"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=library.split(".")[0] + ".*Received: .*Install it"):
        safetensors_folder.write(tmp_path, SIZES, arrays(), LIMIT)
    assert not list(tmp_path.iterdir())
