"""Settings of the site: python -m sphinx -W --keep-going docs build/site."""

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import get_origin

from docutils.nodes import SkipNode, math
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # pages are only text: they need no device, and none may change them

from dia_lightning import __version__ as release  # noqa: E402  # the path comes first

project = "dia-lightning"
author = "The dia-lightning authors"
copyright = author
version = release

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = "dia-lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # shows the stored outputs; tests/test_notebooks.py runs the notebooks

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False  # one page per package instead of one per name
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80

PACKAGES = ("attention", "models", "tasks", "datamodules", "callbacks", "analysis", "drawing", "loggers")
#: Pages that are in the root of the repository, where GitHub looks for them.
IN_ROOT = {name: f"{name.upper()}.md" for name in ("changelog", "contributing", "releasing", "security")}
#: Links that work on GitHub, and where they lead on the site.
MOVED = {
    "(../SECURITY.md": "(security.md",
    "(SECURITY.md": "(security.md",
    "(CONTRIBUTING.md": "(contributing.md",
    "(RELEASING.md": "(releasing.md",
    "(../notebooks/": "(notebooks/",
    "(docs/": "(",
}


def _copy_notebooks(app: Sphinx, config: Config) -> None:
    """Copy the notebooks below the pages, where Sphinx can find them."""
    copies = ROOT / "docs" / "notebooks"
    copies.mkdir(exist_ok=True)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        copy = copies / notebook.name
        if not copy.is_file() or copy.read_bytes() != notebook.read_bytes():
            copy.write_bytes(notebook.read_bytes())


def _take_from_root(app: Sphinx, name: str, source: list[str]) -> None:
    """Read the pages from the root, and redirect links to pages of the site."""
    if name in IN_ROOT:
        app.env.note_dependency(str(ROOT / IN_ROOT[name]))
        source[0] = (ROOT / IN_ROOT[name]).read_text(encoding="utf-8")
    for on_github, here in MOVED.items():
        source[0] = source[0].replace(on_github, here)
    source[0] = source[0].replace("\n\n```\n", "\n```\n")  # drop the empty line that ends an example for doctest


def _formula(writer: HTML5Translator, node: math, *, environment: str = "") -> None:
    """Write a formula as MathML, which browsers render natively, instead of loading a script."""
    text = rf"\begin{{{environment}}}{node.astext()}\end{{{environment}}}" if environment else node.astext()
    writer.body.append(tex2mathml(text, as_block=bool(environment)))
    raise SkipNode


def _public_bases(app: Sphinx, name: str, obj: type, options: object, bases: list[type]) -> None:
    """Show in place of a private base the first above it that is public."""
    shown = (
        base if _is_public(kind) else next(filter(_is_public, kind.__mro__))
        for base in bases
        for kind in [get_origin(base) or base]
    )
    bases[:] = [base for base in dict.fromkeys(shown) if base is not object] or [object]


def _is_unexplained(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out fields of named tuples that only have a number: the signature shows them."""
    return (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") or None


def _is_public(kind: type) -> bool:
    package = ".".join(kind.__module__.split(".")[:2])
    return not package.startswith("dia_lightning") or kind.__name__ in import_module(package).__all__


def _warn_of_missing_names(app: Sphinx, error: Exception | None) -> None:
    """Fail a build with -W if a public name is on no page."""
    described = set(app.env.domains.python_domain.objects)
    for package in PACKAGES:
        path = f"dia_lightning.{package}"
        missing = {f"{path}.{name}" for name in import_module(path).__all__} - described
        if missing and error is None and app.builder.name == "html":
            logging.getLogger(__name__).warning("no page describes %s", ", ".join(sorted(missing)))


def setup(app: Sphinx) -> None:
    """Connect these functions to Sphinx."""
    app.add_html_math_renderer("mathml", (_formula, None), (partial(_formula, environment="aligned"), None))
    app.connect("config-inited", _copy_notebooks)
    app.connect("source-read", _take_from_root)
    app.connect("autodoc-process-bases", _public_bases)
    app.connect("autodoc-skip-member", _is_unexplained)
    app.connect("build-finished", _warn_of_missing_names)
