"""Sphinx's configuration: Markdown pages, and an API reference from docstrings; `make docs` builds them."""

import re

from sphinx.util import logging

import pmf

project = "pixel-meanflow"
author = "The pixel-meanflow authors"
copyright = f"2026, {author}"
version = release = pmf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxcontrib.mermaid"]
html_theme = "furo"
# An unknown name in a reference is an error; types of other packages are not looked up.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|pathlib|collections|contextlib|PIL|pa|pyarrow|pmf\.packing)\..*|Tensor|pmf\.dual\.Kind")
]

myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

default_role = "code"  # single backticks in docstrings are code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_mock_imports = ["pyarrow", "xxhash"]  # packages of the extra `data`


def keep_tables_and_equations(app, what, name, obj, options, lines: list[str]) -> None:
    """Show paragraphs of docstrings in columns (tables, equations side by side) verbatim."""
    paragraphs = "\n".join(lines).split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        rows = paragraph.splitlines()
        if any(row.startswith(("|", "    ")) or "   " in row.strip() for row in rows):
            paragraphs[i] = "::\n\n" + "\n".join(f"    {row}" for row in rows)
    lines[:] = "\n\n".join(paragraphs).splitlines()


def separate_endings(app, what, name, obj, options, lines: list[str]) -> None:
    """Let code in single backticks end within a word: reStructuredText does not read `Dual`s otherwise."""
    text = re.sub(r"`([^`]+)`(?=(\w?))", lambda code: code[0] + ("\\ " if code[2] else ""), "\n".join(lines))
    lines[:] = text.splitlines()


def miss_no_public_name(app, env) -> None:
    """Warn of public names that no page lists."""
    public = [f"{home}.{name}" for home, names in pmf._HOMES.items() for name in names]
    for package in (pmf.layers, pmf.ops):
        public += [f"{package.__name__}.{name}" for name, value in vars(package).items() if callable(value)]
    for name in public:
        if name not in env.domains["py"].objects:
            logging.getLogger(__name__).warning("no page lists %s", name)


def setup(app) -> None:
    """Register the hooks."""
    app.connect("autodoc-process-docstring", keep_tables_and_equations)
    app.connect("autodoc-process-docstring", separate_endings)
    app.connect("env-check-consistency", miss_no_public_name)
