"""Configuration of Sphinx. `make docs` builds the site into docs/_build/html."""

import importlib
import inspect
import os
import re
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras_jamba  # noqa: E402

project, author = "keras-jamba", "the keras-jamba contributors"
copyright = author  # noqa: A001
version = release = keras_jamba.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"keras-jamba {version}"
html_math_renderer = "mathml"
html_static_path, html_css_files = ["_static"], ["site.css"]
myst_enable_extensions, myst_heading_anchors = ["colon_fence", "dollarmath"], 3
nb_execution_mode, nb_execution_timeout, nb_execution_raise_on_error = "cache", 300, True
nb_output_stderr = "remove"

# Docstrings have single backticks for code.
default_role = "literal"
autodoc_member_order, autodoc_inherit_docstrings, autodoc_typehints = "bysource", False, "none"
# As a section of its own, "Returns" keeps its text in one piece.
napoleon_custom_sections = [("Call arguments", "params_style"), "Returns", "Reference"]

# Title of the page of each module, in the order of the reference.
MODULES = {
    "models": "Models",
    "layers": "Layers",
    "ops": "Operations",
    "training": "Training",
    "generation": "Generation",
    "tokenizers": "Tokenizers",
    "exporting": "Exporting",
    "estimation": "Estimation",
    "visualize": "Visualization",
    "presets": "Presets in Python",
}
# Modules without `__all__`.
NAMES = {"presets": ("list_presets",)}


def write_reference(folder=DOCS / "reference"):
    """Writes one page per public module, with an entry per public name."""
    for name, title in MODULES.items():
        module = importlib.import_module(f"keras_jamba.{name}")
        lines = [f"# {title}", "", f"`keras_jamba.{name}`: {module.__doc__.strip()}", ""]
        for public in NAMES.get(name) or module.__all__:
            path = f"keras_jamba.{name}.{public}"
            lines += [f"## {public}", "", "```{eval-rst}", *_directive(getattr(module, public), path), "```", ""]
        page = folder / f"{'presets_api' if name == 'presets' else name}.md"
        text = "\n".join(lines)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def _directive(value, path):
    if isinstance(value, type):
        return [f".. autoclass:: {path}", "   :members:"]
    if callable(value):
        return [f".. autofunction:: {path}"]
    return [f".. automodule:: {path}", "   :members:"]


def to_rst(lines):
    """Rewrites the Markdown of a docstring, code and links, as reStructuredText, in place."""
    parts = re.split(r"^( *)```(\w*)\n(.*?)^ *```$", "\n".join(lines), flags=re.MULTILINE | re.DOTALL)
    text = _inline(parts[0])
    for indent, language, code, rest in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4], strict=True):
        body = "\n".join(f"   {line}" if line.strip() else "" for line in code.splitlines())
        text += f"{indent}.. code-block:: {language or 'text'}\n\n{body}\n{_inline(rest)}"
    lines[:] = text.split("\n")


def _inline(text):
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``\\ ", text)
    return re.sub(r"\[([^\]\n]+)\]\((https?://[^)\s]+)\)", r"`\1 <\2>`__", text)


def without_links_to_code(app, name, source):
    """Turns links to files outside of docs, which work on a hosting site, into plain text. Pictures stay."""
    folder = (DOCS / name).parent

    def plain(match):
        target = (folder / match[2].split("#")[0]).resolve()
        return match[0] if target.is_relative_to(DOCS) else match[1]

    source[0] = re.sub(r"(?<!!)\[([^\]\n]+)\]\((\.\.?/[^)\s]+)\)", plain, source[0])


def signature_of_class(app, what, name, obj, options, signature, return_annotation):
    """Returns the signature of a class's constructor, which Keras' metaclass hides."""
    if what == "class" and obj.__init__ is not object.__init__:
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        return str(inspect.Signature([each.replace(annotation=each.empty) for each in parameters])), None


def visit_math(self, node):
    """Writes a formula as MathML, which browsers show without a script from the net."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app):
    write_reference()
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("autodoc-process-signature", signature_of_class)
    app.connect("source-read", without_links_to_code)
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: to_rst(lines), priority=100)
