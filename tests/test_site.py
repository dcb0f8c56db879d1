"""The documentation site: its navigation names every page, its reference every public name, and faults fail it."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import PUBLIC, REPOSITORY

CONF = runpy.run_path(str(REPOSITORY / "docs" / "conf.py"))


def test_the_navigation_names_every_page_once() -> None:
    listed = [page for pages in CONF["navigation"]().values() for page in pages]
    patterns = [pattern.replace("**", "**/*") for pattern in CONF["PAGES"]]
    found = {path.relative_to(REPOSITORY) for pattern in patterns for path in REPOSITORY.glob(pattern)}
    # The home page and the list itself stand above it.
    pages = {path.with_suffix("").as_posix() for path in found} - {"README", "docs/README"}
    assert sorted(listed) == sorted(pages)


def test_the_reference_names_every_public_package_once() -> None:
    assert sorted(CONF["packages"]()) == sorted(PUBLIC)


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_has_something_to_say_of_every_public_name(package: str) -> None:
    for name in importlib.import_module(package).__all__:
        assert any(line.strip() for line in CONF["described"](package, name)), f"{package}.{name}"


def test_a_name_that_several_packages_have_is_described_once_and_is_the_same_everywhere() -> None:
    passed_on = 0
    for package in PUBLIC:
        for name in importlib.import_module(package).__all__:
            shown = CONF["shown_as"]()[CONF["object_home"](package, name)]
            passed_on += shown != f"{package}.{name}"
            assert CONF["resolve"](shown) is CONF["resolve"](f"{package}.{name}")
    assert passed_on


def built(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(root / "docs"), "-d", str(out / "trees")]
    command = [sys.executable, "-m", "sphinx", *words, str(root), str(out / "site")]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


PAGE = "# A page\n\n## A part\n\n"
LISTED = "# All\n\n## Part\n\n- [A page](page.md): x\n- [A part](page.md#a-part)\n"
BROKEN = {
    "sound": ({}, ""),
    "a link to no file": ({"docs/page.md": PAGE + "[gone](gone.md)\n"}, "gone.md"),
    "a link to no part": ({"docs/page.md": PAGE + "[part](page.md#no-part)\n"}, "no-part"),
    "a link to no part of another page": ({"docs/page.md": PAGE + "[part](../README.md#no-part)\n"}, "no-part"),
    "a picture that is not there": ({"docs/page.md": PAGE + "![figure](gone.png)\n"}, "gone.png"),
    "a page that no navigation has": ({"docs/more.md": PAGE}, "more.md"),
    "a page of the navigation that is not there": (
        {"docs/README.md": LISTED + "- [Names](reference/tiny.md)\n- [Gone](gone.md)\n"},
        "gone",
    ),
    "a public function without a docstring": ({"tiny.py": '"""T."""\n__all__ = ["f"]\ndef f(): ...\n'}, "tiny.f"),
    "a public value without a comment": ({"tiny.py": '"""T."""\n__all__ = ["N"]\nN = 1\n'}, "tiny.N"),
    "a docstring that names what is not there": (
        {"tiny.py": '"""T."""\n__all__ = ["f"]\ndef f():\n    """As :func:`nndefense.attacks.gone`."""\n'},
        "nndefense.attacks.gone",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo")),
    reason="the documentation site needs Sphinx: pip install -c constraints.txt -e '.[dev]'",
)
@pytest.mark.parametrize("case", BROKEN)
def test_a_site_with_a_fault_is_not_built(case: str, tmp_path: Path) -> None:
    files, said = BROKEN[case]
    docs = REPOSITORY / "docs"
    house = {
        "pyproject.toml": 'version = "1"\n',
        "README.md": "# Home\n\n[A page](docs/page.md#a-part), [a file](LICENSE).\n",
        "LICENSE": "Free.\n",
        "docs/README.md": LISTED + "- [Names](reference/tiny.md)\n",
        "docs/page.md": PAGE + "[Home](../README.md)\n",
        "docs/reference/tiny.md": "# Names\n\n```{public} tiny\n```\n",
        "tiny.py": '"""T."""\n__all__ = ["N", "f"]\n#: How many.\nN = 1\ndef f():\n    """Do it."""\n',
        "docs/conf.py": (docs / "conf.py").read_text(encoding="utf-8"),
        "docs/site.css": (docs / "site.css").read_text(encoding="utf-8"),
    }
    for name, text in {**house, **files}.items():
        place = tmp_path / "root" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    done = built(tmp_path / "root", tmp_path)
    assert (done.returncode == 0) == (case == "sound"), done.stderr
    assert said in done.stderr
    if case == "sound":
        page = (tmp_path / "site" / "docs" / "reference" / "tiny.html").read_text(encoding="utf-8")
        assert "Do it." in page
        assert "How many." in page
        assert ".. " not in page
        assert 'id="tiny.f"' in page
        home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
        assert "docs/page.html#a-part" in home
        # Nothing is fetched from elsewhere: no script, style, font or picture.
        assert not [tag for tag in ('src="http', "src='http", 'stylesheet" href="http') if tag in home]
