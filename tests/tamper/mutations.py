"""Random damages of files: bits, digits, runs of bytes, lengths, missing files, and hostile values in JSON."""

import json
import re
import shutil
import zipfile
from pathlib import Path

# Values of wrong types and sizes, and texts that some reader might evaluate or follow.
HOSTILE = (
    *(None, True, -1, 0, 10**9, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 1000, [], {}, [[]], [None]),
    *("os", "builtins", "../../../etc/passwd", "{{ ''.__class__.__mro__ }}", "\ud800", {"module": "os"}, ["a", 1]),
)
DEEP = "[" * 5000 + "]" * 5000


def damage(folder, rng):
    """Damages one file below a folder, and returns a description of the damage."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    file = files[rng.integers(len(files))]
    kinds = [_flip_bit, _flip_bit, _change_digit, _change_digit, _zero_run, _truncate, _append, _remove]
    kinds += [_change_value, _change_value]
    kind = kinds[rng.integers(len(kinds))]
    return f"{kind.__name__} {kind(file, rng)} in {file.name}"


def copied(source, target):
    """Copies a folder to a new place and returns it."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def with_hostile_value(content, rng):
    """Returns JSON with one of its values, at a random place, replaced by a hostile one."""
    document = json.loads(content)
    places = [(None, None)]

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(document)
    node, key = places[rng.integers(len(places))]
    value = (*HOSTILE, DEEP)[rng.integers(len(HOSTILE) + 1)]
    marked = "a value that is nested deeply" if value is DEEP else value
    if node is None:
        document = marked
    else:
        node[key] = marked
    return json.dumps(document).replace(json.dumps("a value that is nested deeply"), DEEP).encode()


def _flip_bit(file, rng):
    content = bytearray(file.read_bytes())
    place, bit = rng.integers(len(content)), rng.integers(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return place, bit


def _change_digit(file, rng):
    """Replaces one digit of a text by another; flips a bit of a binary file without digits."""
    content = bytearray(file.read_bytes())
    places = [match.start() for match in re.finditer(rb"[0-9]", bytes(content[:100_000]))]
    if not places:
        return _flip_bit(file, rng)
    place = places[rng.integers(len(places))]
    digit = (content[place] - ord("0") + rng.integers(1, 10)) % 10
    content[place] = ord("0") + digit
    file.write_bytes(content)
    return place, digit


def _change_value(file, rng):
    """Replaces a value in JSON, also in the header of safetensors; in an archive changes one entry and its CRC.

    Changes a digit of any other file.
    """
    content = file.read_bytes()
    if file.suffix == ".json":
        file.write_bytes(with_hostile_value(content, rng))
        return "of JSON"
    if file.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = with_hostile_value(content[8 : 8 + size], rng)
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
        return "of a header"
    return _change_entry(file, rng) if zipfile.is_zipfile(file) else _change_digit(file, rng)


def _change_entry(file, rng):
    """Damages one entry of an archive, with a checksum that fits.

    JSON keeps its sizes within a factor of ten: whoever writes a configuration with its checksum may name any size.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = sorted(entries)[rng.integers(len(entries))]
    inner = file.with_name("entry")
    inner.write_bytes(entries[name])
    (_flip_bit, _change_digit, _zero_run, _truncate, _append)[rng.integers(5)](inner, rng)
    entries[name] = inner.read_bytes()
    inner.unlink()
    with zipfile.ZipFile(file, "w") as archive:
        for other, content in entries.items():
            archive.writestr(other, content)
    return f"of {name}"


def _zero_run(file, rng):
    content = bytearray(file.read_bytes())
    place, count = rng.integers(len(content)), rng.integers(1, 64)
    content[place : place + count] = bytes(len(content[place : place + count]))
    file.write_bytes(content)
    return place, count


def _truncate(file, rng):
    size = rng.integers(file.stat().st_size)
    file.write_bytes(file.read_bytes()[:size])
    return size


def _append(file, rng):
    count = rng.integers(1, 4096)
    file.write_bytes(file.read_bytes() + rng.bytes(count))
    return count


def _remove(file, rng):
    file.unlink()
    return ""
