"""The pages of docs/benchmarks: finds their tables, compares and rewrites them."""

import re
from pathlib import Path

from scripts.benchmark_tables.tables import TABLES

PAGES = Path(__file__).parents[2] / "docs" / "benchmarks"
BEGIN, END = "<!-- table {} -->", "<!-- end -->"
_LINE = re.compile(r"^<!-- (?:table (\w+)|end) -->$", re.MULTILINE)


def blocks(text, page):
    """Returns `[(name, start, end)]`: for each table, the positions of the text between its two lines."""
    found, opened = [], None
    for match in _LINE.finditer(text):
        name = match[1]
        if bool(name) == bool(opened):
            raise ValueError(f"{page}: each table needs one line to begin and one to end. Received: {match[0]}")
        if name and name not in TABLES:
            raise ValueError(f"{page}: the table must be one of {', '.join(sorted(TABLES))}. Received: {name}")
        if not name:
            found.append((*opened, match.start()))
        opened = (name, match.end()) if name else None
    if opened:
        raise ValueError(f"{page}: the table {opened[0]} must end with {END}")
    return found


def rendered(text, page="text"):
    """Returns the text with every table rendered anew."""
    for name, start, end in reversed(blocks(text, page)):
        text = f"{text[:start]}\n\n{TABLES[name]()}\n\n{text[end:]}"
    return text


def differing(text, page="text"):
    """Returns the names of the tables in a text that differ from what the results files render."""
    return [name for name, start, end in blocks(text, page) if text[start:end] != f"\n\n{TABLES[name]()}\n\n"]


def texts():
    """Returns `{page: text}` of all pages."""
    return {page: page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))}


def check():
    """Returns `{page: names of tables}` of the pages that differ."""
    found = {page: differing(text, page.name) for page, text in texts().items()}
    return {page: names for page, names in found.items() if names}


def rewrite():
    """Renders the tables of all pages and returns the pages that changed."""
    changed = []
    for page, text in texts().items():
        new = rendered(text, page.name)
        if new != text:
            page.write_text(new, encoding="utf-8")
            changed.append(page)
    return changed
