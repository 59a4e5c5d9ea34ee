"""The Python code of README and docs. `python tests/helpers/page_code.py PAGE...` runs the blocks of pages."""

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
    """Runs all blocks of a page in one namespace, in a folder. Returns the finished process."""
    program = Path(folder) / f"{page.stem}_page.py"
    program.write_text("\n".join(blocks(page.read_text(encoding="utf-8"))), encoding="utf-8")
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, program.name], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name).resolve()
        for sentence in long_sentences(page.read_text(encoding="utf-8")):
            print(f"{name}: more than 25 words: {sentence}")
        with tempfile.TemporaryDirectory() as folder:
            done = run(page, folder)
        print(done.stdout[-2000:] + (done.stderr[-3000:] if done.returncode else ""))
        print(f"{name}: {len(blocks(page.read_text(encoding='utf-8')))} blocks, exit {done.returncode}")
