"""Files of prompt states: damage that the checksum and the archive's own CRC do not tell is refused too."""

import io
import zipfile

import numpy as np
import pytest
from checks import once
from tamper.formats import language_model

from keras_jamba import _npz
from keras_jamba.generation import PromptState

# Independent of the backend.
pytestmark = once
LEAF = "cache/block_0/conv.npy"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    file = tmp_path_factory.mktemp("state") / "state"
    language_model().prefill([1, 2, 3]).save(file)
    return file


def rewritten(good, tmp_path, changed, without=()):
    """Returns a copy of an archive with fitting CRCs, whose entries are `changed(name, content)`."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "state", "w") as new:
        for info in old.infolist():
            if info.filename not in without:
                new.writestr(info.filename, changed(info.filename, old.read(info)))
    return tmp_path / "state"


def replaced(good, tmp_path, name, change):
    """Returns a copy without a checksum, with the array `change(array)` as the entry `name`."""

    def changed(entry, content):
        if entry != name:
            return content
        stream = io.BytesIO()
        np.save(stream, change(np.load(io.BytesIO(content))))
        return stream.getvalue()

    return rewritten(good, tmp_path, changed, without=("checksum.npy",))


def test_another_byte_order_is_refused(good, tmp_path):
    swapped = lambda name, x: x.replace(b"'<f4'", b"'>f4'") if name == LEAF else x  # noqa: E731
    file = rewritten(good, tmp_path, swapped)
    with pytest.raises(ValueError, match=r"Received: .*byte order of '>f4'.*Prefill again"):
        PromptState.load(file)


def test_another_order_of_the_axes_is_refused(good, tmp_path):
    swapped = lambda name, x: x.replace(b"'fortran_order': False", b"'fortran_order': True ")  # noqa: E731
    file = rewritten(good, tmp_path, swapped)
    with pytest.raises(ValueError, match="do not match their checksum"):
        PromptState.load(file)


@pytest.mark.parametrize(
    "change", [lambda x: x + 1e300, lambda x: x * 1j, lambda x: x.astype(str), lambda x: x > 0], ids=str
)
def test_values_that_are_no_finite_numbers_are_refused_without_a_checksum_too(good, tmp_path, change):
    file = replaced(good, tmp_path, LEAF, lambda x: change(x.astype("float64")))
    with pytest.raises(ValueError, match=r"must be finite. Received: .* in 'cache/block_0/conv' of .*Prefill again"):
        PromptState.load(file)


def test_integers_in_the_place_of_numbers_are_refused(good, tmp_path):
    state = PromptState.load(replaced(good, tmp_path, LEAF, lambda x: x.astype("int32")))
    with pytest.raises(ValueError, match=r"'block_0/conv', integers of shape \(1, .*the model has floats"):
        language_model().generate([1, 2, 3, 4], state=state)


def test_an_archive_that_lists_an_entry_twice_is_refused(good, tmp_path):
    with zipfile.ZipFile(good) as old, pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(tmp_path / "state", "w") as new:
            for info in (*old.infolist(), old.getinfo(LEAF)):
                new.writestr(info.filename, old.read(info))
    with pytest.raises(ValueError, match="listed twice"):
        _npz.read(tmp_path / "state")
