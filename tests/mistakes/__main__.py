"""Writes the table of docs/guides/mistakes.md."""

from pathlib import Path

from mistakes import table

page = Path(__file__).parent.parent.parent / "docs" / "guides" / "mistakes.md"
page.write_text(page.read_text().split("| entry point")[0] + table())
