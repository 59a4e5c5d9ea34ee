"""The tables in docs/benchmarks are those that the results files render."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from checks import once

from scripts.benchmark_tables import TABLES, check, pages, rewrite, tables
from scripts.benchmark_tables.__main__ import main

# Independent of the backend.
pytestmark = once
ROOT = Path(__file__).parent.parent
NAMES = sorted(page.name for page in pages.PAGES.glob("*.md"))
# Prints the files that each table function opens, as JSON.
OPENED = """
import json, os, sys
from scripts.benchmark_tables import TABLES

found, current = {}, None
def record(event, arguments):
    if event == "open" and current and isinstance(arguments[0], str):
        found[current].append(os.path.realpath(arguments[0]))

sys.addaudithook(record)
for name, function in TABLES.items():
    found[name] = []
    current = name
    function()
current = None
print(json.dumps(found))
"""


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Returns a folder with copies of the pages and results, which the script uses instead of the originals."""
    shutil.copytree(pages.PAGES, tmp_path / "pages")
    (tmp_path / "results").mkdir()
    for file in tables.RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path / "results")
    monkeypatch.setattr(pages, "PAGES", tmp_path / "pages")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return tmp_path


def committed():
    """Returns the paths of the committed results files."""
    command = ["git", "ls-files", "benchmarks/results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip("needs a git repository")
    return {(ROOT / line).resolve() for line in done.stdout.splitlines()}


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_of_a_page_are_those_that_the_script_renders(name):
    text = (pages.PAGES / name).read_text(encoding="utf-8")
    found = pages.blocks(text, name)
    assert found
    for table, start, end in found:
        assert text[start:end].strip() == TABLES[table](), f"{name}, {table}: run python -m scripts.benchmark_tables"
    assert pages.rendered(text, name) == text


def test_every_registered_table_stands_once_in_a_page():
    found = [name for page, text in pages.texts().items() for name, *_ in pages.blocks(text, page.name)]
    assert Counter(found) == Counter(TABLES.keys())


def test_a_table_has_titles_and_full_rows():
    for name, function in TABLES.items():
        titles, line, *rows = [row.strip("| ").split(" | ") for row in function().splitlines()]
        assert rows and all(titles) and set(line) == {"---"}, name
        assert {len(row) for row in rows} == {len(titles)}, name


def test_every_table_reads_committed_results_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", OPENED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    opened = {name: {Path(file) for file in files} for name, files in json.loads(done.stdout).items()}
    assert set(opened) == set(TABLES)
    known = committed()
    for name, files in opened.items():
        assert files, f"{name} reads no file"
        assert files <= known, f"{name} reads {sorted(map(str, files - known))}"


def test_the_pictures_are_committed_and_each_stands_in_a_page():
    found = set()
    for page, text in pages.texts().items():
        found |= {(page.parent / link).resolve() for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)}
    assert found == {path for path in committed() if path.suffix == ".png"}


def test_a_results_file_that_the_text_names_exists():
    for page, text in pages.texts().items():
        for name in re.findall(r"`([a-z0-9_]+\.json)`", text):
            assert (tables.RESULTS / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_number_in_each_table_of_a_page_is_found_and_mended(copies, capsys, name):
    page = copies / "pages" / name
    original = page.read_text(encoding="utf-8")
    for table, start, end in pages.blocks(original, name):
        titles, line, rows = original[start:end].strip().split("\n", 2)
        # The last digit of the table becomes another one.
        changed = re.sub(r"\d(?=\D*$)", lambda match: str((int(match[0]) + 1) % 10), rows)
        assert changed != rows
        block = f"\n\n{titles}\n{line}\n{changed}\n\n"
        page.write_text(original[:start] + block + original[end:], encoding="utf-8")
        assert main(["--check"]) == 1
        assert capsys.readouterr().out.startswith(f"{name}: differs in {table}. Run ")
        assert main([]) == 0 and capsys.readouterr().out == f"{name}: rewritten\n"
        assert page.read_text(encoding="utf-8") == original
    assert main(["--check"]) == 0 and capsys.readouterr().out == ""


def test_a_new_figure_in_a_results_file_changes_its_page_alone(copies):
    file = copies / "results" / "gpu_sharding.json"
    results = json.loads(file.read_text())
    results["training"]["rows"]["milliseconds a step"] = 77.7
    file.write_text(json.dumps(results))
    assert {page.name: names for page, names in check().items()} == {"scaling.md": ["sharding"]}
    assert [page.name for page in rewrite()] == ["scaling.md"]
    assert "| 4x1 | 77.7 |" in (copies / "pages" / "scaling.md").read_text(encoding="utf-8")
    assert check() == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table unknown -->\n<!-- end -->\n", "must be one of .* Received: unknown"),
        ("<!-- table decode -->\n", "table decode must end with <!-- end -->"),
        ("<!-- table decode -->\n<!-- table speculative -->\n<!-- end -->\n", "one line to begin and one to end"),
        ("<!-- end -->\n", "one line to begin and one to end"),
    ],
)
def test_wrong_lines_are_refused_with_the_page(text, message):
    with pytest.raises(ValueError, match=f"page.md: .*{message}"):
        pages.rendered(text, "page.md")


@pytest.mark.parametrize("value, text", [(0.0228, "0.0228"), (0.12, "0.120"), (1254.4, "1,254"), (2, "2.00"), (0, "0")])
def test_numbers_have_significant_digits(value, text):
    assert tables.number(value) == text
