"""The C library under sanitizers for long, and functions of `keras_jamba.ops` with wrong arguments on every backend."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import records
from checks import once

import hatch_build

ROOT = Path(__file__).parents[2]
SCALE = float(os.environ.get("FUZZ_SCALE", 1))
# `{sanitizers: (seeds, rounds per seed)}`. A thread sanitizer is ten times slower.
SANITIZERS = {"address,undefined": (range(1, 9), 1500), "thread": (range(1, 5), 150)}
CALLS = {"torch": 4000, "jax": 400, "tensorflow": 1000}


def built(folder, sanitizers):
    """Returns the program that checks the kernels, with sanitizers."""
    program = folder / "check"
    flags = [flag for flag in hatch_build.FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    flags += ["-O2", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    source = ROOT / "tests" / "native" / "check_kernels.c"
    command = [hatch_build.compiler(), *flags, str(source), "-o", str(program), "-lm", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@once
@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_the_kernels_pass_sanitizers_with_many_seeds(sanitizers, tmp_path):
    program, started = built(tmp_path, sanitizers), time.monotonic()
    seeds, rounds = SANITIZERS[sanitizers]
    rounds = max(1, round(rounds * SCALE))
    for seed in seeds:
        done = subprocess.run([program, str(rounds), str(seed)], capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, (seed, done.stdout[-1000:], done.stderr[-3000:])
        assert f"{rounds} random scans, convolutions and experts agree" in done.stdout
    figures = {"seeds": list(seeds), "rounds per seed": rounds, "calls": 3 * rounds * len(seeds), "faults": 0}
    records.write(f"c_{sanitizers.split(',')[0]}", figures | {"seconds": round(time.monotonic() - started)})


@once
@pytest.mark.parametrize("backend", CALLS)
def test_wrong_arguments_are_refused_and_strides_do_not_matter(backend, tmp_path):
    file, count, seed = tmp_path / "calls.jsonl", max(20, round(CALLS[backend] * SCALE)), 1
    command = [sys.executable, str(Path(__file__).with_name("wrong_calls.py")), str(seed), str(count), str(file)]
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert done.returncode == 0, (lines[-1], done.stderr[-2000:])
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    ends = Counter(end["end"].split(":")[0] for _, end in pairs)
    faults = [f"call {call['begins']}, {call['what']}: {end['end']}" for call, end in pairs if "FAULT" in end["end"]]
    figures = {"seed": seed, "calls": count, "ends": dict(ends), "faults": faults}
    records.write(f"wrong_calls_{backend}", figures, backend)
    assert len(pairs) == count and ends["refused"] > count // 4 and ends["same"] > count // 10
    assert not faults, "\n".join(faults[:40])
