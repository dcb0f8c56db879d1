"""The documentation site, for Sphinx: ``make docs``.

The whole repository is the source, so that a link is the same here and where the repository is browsed, and a link to a
file that is no page gives the file. The navigation is the list in ``docs/README.md``. In ``docs/reference`` a block
``{public} PACKAGE`` stands for everything in the package's ``__all__``, whose docstrings are read from the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "nndefense"
author = "the nndefense authors"
release = re.findall(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[0]

# myst_nb reads Markdown as myst_parser does, and notebooks.
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/*.md",
    "data/*.md",
    "docs/**.md",
    "docs/notebooks/*.ipynb",
)
include_patterns = list(PAGES)
exclude_patterns = [".*", "build", "data/*/**", "runs"]
nitpicky = True
# Names of other libraries stand in signatures, and the site fetches no lists of theirs.
nitpick_ignore_regex = [("py:.*", r"(?!nndefense|index_build).*")]

myst_heading_anchors = 4
# What a notebook shows is what is kept in it; tests/test_notebooks.py runs them.
nb_execution_mode = "off"
html_theme = "furo"
html_title = f"nndefense {release}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "tango"

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"


def navigation() -> dict[str, list[str]]:
    """Heading of ``docs/README.md`` -> the pages below it, as paths from the repository's root without suffix.

    A link to a part of a page is one of that list's lines, but no entry of the navigation.
    """
    sections: dict[str, list[str]] = {}
    for line in (ROOT / "docs/README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            sections[line[3:]] = []
        elif link := re.match(r"- \[[^]]+\]\(([^)#]+\.(?:md|ipynb))\)", line):
            page = (ROOT / "docs" / link[1]).resolve().relative_to(ROOT)
            sections[next(reversed(sections))].append(page.with_suffix("").as_posix())
    return sections


def packages() -> list[str]:
    """The packages that stand in the reference, in its order."""
    pages = [page for entries in navigation().values() for page in entries if page.startswith("docs/reference/")]
    blocks = [re.findall(r"\{public\} (\S+)", (ROOT / f"{page}.md").read_text(encoding="utf-8")) for page in pages]
    return [package for found in blocks for package in found]


@cache
def homes(package: str) -> dict[str, str]:
    """Public name of a package -> the module whose source has it: what ``from MODULE import NAME`` in its face says."""
    source = inspect.getsource(importlib.import_module(package))
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def object_home(package: str, name: str) -> tuple[str, str]:
    """The module that defines a package's public name, followed through the packages that pass it on."""
    home = homes(package).get(name)
    return (package, name) if home in (None, package) else object_home(str(home), name)


@cache
def shown_as() -> dict[tuple[str, str], str]:
    """Home of a public object -> the name that the reference shows it by, in the package nearest to that home."""
    found: dict[tuple[str, str], str] = {}
    for package in sorted(packages(), key=len):
        for name in importlib.import_module(package).__all__:
            home = object_home(package, name)
            if home not in found or home[0].startswith(f"{package}."):
                found[home] = f"{package}.{name}"
    return found


def comment(module: str, name: str) -> str:
    """What the comments ``#:`` above a module's name say of it."""
    lines = inspect.getsource(importlib.import_module(module)).splitlines()
    at = next((i for i, line in enumerate(lines) if re.match(rf"{name}\b[^=]*=", line)), 0)
    first = at
    while first and lines[first - 1].startswith("#:"):
        first -= 1
    return "\n".join(line[2:].strip() for line in lines[first:at])


def described(package: str, name: str) -> list[str]:
    """The lines of reStructuredText for one public name.

    Raises:
        LookupError: nothing describes it.
    """
    value = getattr(importlib.import_module(package), name)
    full, home = f"{package}.{name}", object_home(package, name)
    if isinstance(value, ModuleType):
        where = value.__name__ if value.__name__ in packages() else None
        said = str(value.__doc__).splitlines()[0]
        return [f":mod:`{where}`: {said}" if where else f"``{full}``: {said}", ""]
    if shown_as()[home] != full:
        role = "class" if inspect.isclass(value) else "func" if callable(value) else "data"
        return [f"``{name}`` is :{role}:`{shown_as()[home]}`.", ""]
    if inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "__wrapped__"):
        if not value.__doc__ or value.__doc__.startswith(f"{name}("):
            raise LookupError(f"{full} has no docstring")
        return [f".. auto{'class' if inspect.isclass(value) else 'function'}:: {full}", ""]
    text = comment(*home)
    if not text:
        raise LookupError(f"{full} has no comment #: above it in {home[0]}")
    shown = repr(value) if isinstance(value, (str, int, tuple)) and len(repr(value)) < 200 else ""
    return [f".. py:data:: {name}", f"   :module: {package}", *([f"   :value: {shown}"] if shown else []), "",
            *(f"   {line}" for line in text.splitlines()), ""]  # fmt: skip


def resolve(target: str) -> Any:
    """What a dotted name stands for: a module, or something in one; None where there is no such thing."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls: the navigation, the block ``{public}``, and links to names that have moved into a face."""
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective

    class Public(SphinxDirective):
        """A package's docstring and all its public names."""

        required_arguments = 1

        def run(self) -> list[nodes.Node]:
            package = self.arguments[0]
            module = importlib.import_module(package)
            lines = [f".. py:module:: {package}", "", *inspect.cleandoc(module.__doc__ or "").splitlines(), ""]
            try:
                lines += [line for name in module.__all__ for line in described(package, name)]
            except LookupError as missing:
                raise self.error(str(missing)) from None
            # The pages are Markdown, the docstrings reStructuredText.
            return self.parse_text_to_nodes("\n".join(["`````{eval-rst}", *lines, "`````"]))

    def with_navigation(app: Any, page: str, source: list[str]) -> None:
        if page == root_doc:
            for caption, pages in {"": ["docs/README"], **navigation()}.items():
                said = [f":caption: {caption}"] if caption else []
                source[0] += "\n".join(["\n```{toctree}", ":hidden:", *said, *(f"/{p}" for p in pages), "```\n"])

    def elsewhere(app: Any, env: Any, node: Any, text: Any) -> Any:
        """A name by the path of its file leads to where it is shown; one that is no public name stays words."""
        target = node.get("reftarget", "")
        if node.get("refdomain") != "py" or not target.startswith(("nndefense", "index_build")):
            return None
        for length in range(target.count(".") + 1, 0, -1):
            parts = target.split(".")
            home = ".".join(parts[: length - 1]), parts[length - 1]
            if home in shown_as():
                moved = ".".join([shown_as()[home], *parts[length:]])
                if moved != target:
                    python = env.domains["py"]
                    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], moved, node, text)
                break
        return text if resolve(target) is not None else None

    def with_entrance(app: Any, failed: Exception | None) -> None:
        if failed is None and app.builder.name == "html":
            shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")

    app.add_directive("public", Public)
    app.connect("source-read", with_navigation)
    app.connect("missing-reference", elsewhere)
    app.connect("build-finished", with_entrance)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
