"""Sphinx's configuration: Markdown pages, and an API reference from docstrings; `make docs` builds them."""

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
    ("py:.*", r"(torch|numpy|pathlib|collections|contextlib|PIL|pa|pyarrow|pmf\.packing)\..*|Tensor")
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


def setup(app) -> None:
    """Register the hook."""
    app.connect("autodoc-process-docstring", keep_tables_and_equations)
