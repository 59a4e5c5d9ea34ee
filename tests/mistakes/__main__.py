"""Writes the tables of docs/guides/mistakes.md."""

from pathlib import Path

from mistakes import tables

page = Path(__file__).parent.parent.parent / "docs" / "guides" / "mistakes.md"
page.write_text(page.read_text().split("## ")[0] + tables())
