"""Three thousand damaged files, each read in a process that may die: no code, no signals, bounded memory and time."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import records
from checks import once
from tamper.formats import FORMATS
from tamper.trials import EDITED, REFUSED, SAME

# Files are read alike on every backend.
pytestmark = once
TESTS = Path(__file__).parents[1]
CASES = int(os.environ.get("TAMPER_CASES", 3000))
FIRST = int(os.environ.get("TAMPER_SEED", 10_000))
# A case may take twice the memory of the good file, and this much for noise of the allocator.
ALLOWANCE = 64
# CPU seconds, which other processes of the machine do not change.
SECONDS = 5


def run(jobs, folder):
    """Returns the reports of the trials of all jobs; a new process follows one that died."""
    reports = []
    while jobs:
        file = folder / f"{len(reports)}.jsonl"
        command = [sys.executable, "-m", "tamper.child", json.dumps(jobs), str(file)]
        done = subprocess.run(command, cwd=TESTS, env=environment(), capture_output=True, text=True, errors="replace")
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        reports += [line for line in lines if "end" in line]
        if done.returncode == 0:
            break
        last = lines[-1] if lines else {"end": None}
        assert "end" not in last, f"the process failed outside of a trial: {last}\n{done.stderr[-2000:]}"
        reports.append(last | {"end": f"the process ended with {done.returncode}: {done.stderr[-300:]}", "ran": []})
        place = next(i for i, (kind, _, _) in enumerate(jobs) if kind == last["kind"])
        jobs = [[last["kind"], last["seed"] + 1, jobs[place][2]], *jobs[place + 1 :]]
    return reports


def environment():
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def faults_of(report, memory):
    if report["end"] not in (REFUSED, SAME, EDITED):
        yield report["end"]
    # The first reading imports and compiles.
    for event in report["ran"] if report["what"] != "good" else ():
        yield f"ran {event}"
    if report.get("seconds", 0) > SECONDS:
        yield f"{report['seconds']} s"
    if report.get("mib", 0) > 2 * memory + ALLOWANCE:
        yield f"{report['mib']} MiB, where the good file takes {memory}"


def test_three_thousand_damaged_files_do_no_harm(tmp_path):
    counts = {kind: CASES // len(FORMATS) + (i < CASES % len(FORMATS)) for i, kind in enumerate(FORMATS)}
    every = run([[kind, FIRST, FIRST + count] for kind, count in counts.items()], tmp_path)
    found, faults = {}, []
    for kind, count in counts.items():
        reports = [report for report in every if report["kind"] == kind]
        damaged = [report for report in reports if report["what"] != "good"]
        assert len(damaged) == count
        good = sorted(report["mib"] for report in reports if report["what"] == "good" and "mib" in report)
        memory = good[len(good) // 2]
        wrong = [(kind, r["seed"], r["what"], fault) for r in reports for fault in faults_of(r, memory)]
        faults += wrong
        found[kind] = {
            "cases": count,
            "ends": dict(Counter(r["end"] if r["end"] in (REFUSED, SAME, EDITED) else "fault" for r in damaged)),
            "faults": len(wrong),
            "most CPU seconds": max(r.get("seconds", 0) for r in damaged),
            "most MiB": max(r.get("mib", 0) for r in damaged),
            "MiB of the good file": memory,
        }
    records.write("tamper", {"seed": FIRST, "cases": CASES, "faults": list(map(list, faults)), "kinds": found})
    if faults:
        pytest.fail("\n".join(f"{kind}, case {seed}, {what}: {fault}" for kind, seed, what, fault in faults))
