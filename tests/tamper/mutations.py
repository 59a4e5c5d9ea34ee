"""Random damages of files: single bits, digits, runs of bytes, lengths, and missing files."""

import re
import shutil
from pathlib import Path


def damage(folder, rng):
    """Damages one file below a folder, and returns a description of the damage."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    file = files[rng.integers(len(files))]
    kinds = [_flip_bit, _flip_bit, _change_digit, _change_digit, _zero_run, _truncate, _append, _remove]
    kind = kinds[rng.integers(len(kinds))]
    return f"{kind.__name__} {kind(file, rng)} in {file.name}"


def copied(source, target):
    """Copies a folder to a new place and returns it."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


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
