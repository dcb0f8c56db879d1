"""A wheel holds everything that stands beside the code, and says whose it is and on what terms."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = ("nndefense", "index_build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(source / "dist")], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files - set(wheel.namelist()) == set()


def test_the_wheel_names_its_licence_version_and_authors(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = message_from_bytes(wheel.read(name))
    assert said["License-Expression"] == "MIT"
    assert said["Author"] == "the nndefense authors"
    assert wheel.read(name.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()
    cited = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", cited, re.MULTILINE)[1] == said["Version"]
    assert re.search(r"^license: (.+)$", cited, re.MULTILINE)[1] == said["License-Expression"]


def asked_for(text: str) -> list[str]:
    """What each ``pip install`` of a text would fetch from an index: neither options nor this checkout."""
    name = r"[\w.\[\],=<>-]+"
    commands = re.findall(rf"pip3? install((?: +(?:'{name}'|\"{name}\"|{name}))+)", text)
    words = [word.strip("'\"") for command in commands for word in command.split()]
    return [word.rstrip(".,") for word in words if not word.startswith((".", "-")) and word != "constraints.txt"]


def test_a_small_machine_is_told_to_install_every_dependency_and_no_cuda():
    page = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8").partition("## A small machine")[2]
    told = asked_for(page.partition("\n## ")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=;]", name)[0] for name in project["dependencies"]} - {"faiss-gpu"}
    assert sorted(told) == sorted(needed)


def test_nobody_is_told_to_install_a_name_that_is_not_registered():
    assert asked_for("pip install -c constraints.txt '.[ray]' \"nndefense[ray]\"") == ["nndefense[ray]"]
    folders = [path for name in (*PACKAGES, "docs", "benchmarks", "oracle") for path in (ROOT / name).rglob("*")]
    texts = [path for path in folders + [ROOT / "README.md"] if path.suffix in (".py", ".md", ".service")]
    told = {re.split(r"[\[<>=]", name)[0] for path in texts for name in asked_for(path.read_text(encoding="utf-8"))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [name for names in (project["dependencies"], *project["optional-dependencies"].values()) for name in names]
    known = {re.split(r"[\[<>=;]", name)[0] for name in listed} - {"nndefense"}
    assert "pyarrow" in told
    assert told <= known | {"faiss-gpu", "faiss-cpu"}
