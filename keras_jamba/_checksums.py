"""Checksums over everything in a file that decides numbers: configuration, tables of arrays, and arrays."""

import hashlib
import json

import numpy as np

KEY = "checksum"


def of_json(document):
    """Returns the sha256 of a dict as JSON, without its entry "checksum"."""
    # Written and read documents give the same text: JSON turns tuples into lists and keys into strings.
    try:
        plain = json.loads(json.dumps({name: value for name, value in document.items() if name != KEY}))
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(document):
    """Returns a dict with its checksum as the entry "checksum"."""
    return document | {KEY: of_json(document)}


def matches(document, required):
    """Returns whether a dict matches its checksum. Without one, it matches unless the checksum is `required`."""
    return document[KEY] == of_json(document) if KEY in document else not required


def of_arrays(arrays, document=None):
    """Returns the sha256 of the names, dtypes, shapes and values of `{name: NumPy array}`, and of a dict."""
    digest = hashlib.sha256(of_json(document or {}).encode())
    for name, x in sorted(arrays.items()):
        digest.update(json.dumps([name, x.dtype.name, list(x.shape)]).encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view("uint8"))
    return digest.hexdigest()
