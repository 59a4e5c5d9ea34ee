"""The Python code of README, pages and notebooks. `python tests/helpers/page_code.py PAGE...` runs it."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text):
    """Returns the Python blocks of a page."""
    return _BLOCK.findall(text)


def cells(notebook, kind):
    """Returns the sources of the cells of a notebook, of the kind "code" or "markdown"."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def code(page):
    """Returns the Python blocks of a page, or the code cells of a notebook without their lines for Jupyter (`%...`)."""
    if page.suffix == ".ipynb":
        return [re.sub(r"^%.*\n", "", cell, flags=re.MULTILINE) for cell in cells(page, "code")]
    return blocks(page.read_text(encoding="utf-8"))


def text(page):
    """Returns the Markdown of a page or a notebook."""
    if page.suffix == ".ipynb":
        return "\n\n".join(cells(page, "markdown"))
    return page.read_text(encoding="utf-8")


def execute(notebook):
    """Runs the code cells of a notebook in this process.

    Returns its variables, and the value of the last line of each cell, which is None if the line is no expression.
    """
    variables, values = {"__name__": notebook.stem}, []
    for number, cell in enumerate(code(notebook)):
        name, tree = f"{notebook.name}, code cell {number}", ast.parse(cell)
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), variables)
        values.append(None if last is None else eval(compile(last, name, "eval"), variables))
    return variables, values


def prose(text):
    """Returns the sentences of a page outside of code, tables, headings, links' addresses and directives."""
    text = re.sub(r"^(```+|:::+|~~~+).*?^\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    kept = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!\[|\[!\[)", line)]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(kept))
    sentences = []
    for paragraph in paragraphs:
        plain = re.sub(r"`[^`]*`", "Code", " ".join(paragraph.split()))
        sentences += [s for s in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`\[\"(])", plain) if s.strip()]
    return sentences


def long_sentences(text, words=25):
    """Returns the sentences with more than `words` words."""
    return [s for s in prose(text) if len(re.findall(r"[\w'’./%-]+", s)) > words]


def run(page, folder):
    """Runs all blocks or cells of a page in one namespace, in a folder. Returns the finished process."""
    program = Path(folder) / f"{page.stem}_page.py"
    program.write_text("\n".join(code(page)), encoding="utf-8")
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, program.name], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name).resolve()
        for sentence in long_sentences(text(page)):
            print(f"{name}: more than 25 words: {sentence}")
        with tempfile.TemporaryDirectory() as folder:
            done = run(page, folder)
        print(done.stdout[-2000:] + (done.stderr[-3000:] if done.returncode else ""))
        print(f"{name}: {len(code(page))} blocks, exit {done.returncode}")
