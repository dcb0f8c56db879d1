"""The notebooks of docs/notebooks: small, run from first cell to last, by public names, and to the same figures.

``make notebooks`` runs this file, which runs them and keeps what comes out.
"""

from __future__ import annotations

import ast
import base64
import importlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_house import PUBLIC

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# By how much numbers of the cells tagged key-figures may differ: images, and per cent of them. On another number of
# threads the same training gives another net.
WITHIN = {"defend-your-own-images": 10.0, "measure-a-defence-honestly": 10.0, "the-tradeoff-in-one-spline": 1e-3}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
FIGURE_BYTES, NOTEBOOK_BYTES = 60_000, 150_000


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def key_figures(code: list[dict[str, Any]]) -> list[str]:
    """What the cells tagged so print, in their order."""
    tagged = [cell for cell in code if "key-figures" in cell["metadata"].get("tags", ())]
    return ["".join("".join(output.get("text", "")) for output in cell["outputs"]) for cell in tagged]


def differing(kept: str, fresh: str, within: float) -> list[str]:
    """Where two texts differ: in their words, or by more than that in a number."""
    if NUMBER.sub("#", kept).split() != NUMBER.sub("#", fresh).split():
        return [f"other words: {fresh}"]
    pairs = zip(NUMBER.findall(kept), NUMBER.findall(fresh), strict=True)
    return [f"{one} -> {other}" for one, other in pairs if abs(float(one) - float(other)) > within]


def executed(path: Path, folder: Path) -> Any:
    """The notebook, run from its first cell to its last in a folder."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=place).execute()
    return notebook


def test_there_are_notebooks_and_each_has_key_figures() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(WITHIN)
    for path in NOTEBOOKS:
        assert all(NUMBER.search(text) for text in key_figures(cells(path)) or [""])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran_and_small(path: Path) -> None:
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size <= NOTEBOOK_BYTES
    figures = 0
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] in ("stream", "display_data")
        assert output.get("name", "stdout") == "stdout"
        assert not re.search(r"/(?:home|root|tmp|work)/", json.dumps(output.get("text", "")))
        if picture := output.get("data", {}).get("image/png"):
            assert len(base64.b64decode(picture)) <= FIGURE_BYTES
            figures += 1
    assert figures
    assert not any("execution" in cell["metadata"] for cell in code), "when it ran"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_takes_public_names_alone(path: Path) -> None:
    taken = 0
    for node in ast.walk(ast.parse("\n".join(map(source, cells(path))))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("nndefense", "index_build")):
            names = {alias.name for alias in node.names} - set(importlib.import_module(str(node.module)).__all__)
            assert {f"{node.module}.{name}" for name in names} <= set(PUBLIC)
            taken += 1
    assert taken


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    links = [link for cell in cells(path, "markdown") for link in re.findall(r"\]\(([^)#\s]+)", source(cell))]
    assert links
    assert all((path.parent / link).exists() for link in links)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_comes_to_what_it_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PYTHONPATH": ROOT, "IPYTHONDIR": tmp_path, "JUPYTER_RUNTIME_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    fresh = [cell for cell in executed(path, tmp_path).cells if cell.cell_type == "code"]
    pairs = zip(key_figures(cells(path)), key_figures(fresh), strict=True)
    assert [found for kept, new in pairs for found in differing(kept, new, WITHIN[path.stem])] == []


def test_what_differs_would_be_seen() -> None:
    kept = "defended,  attacked  83.3 %  [75.1, 89.9]\n"
    assert differing(kept, "defended, attacked 80.1 % [71.0, 87.7]", 10) == []
    assert differing(kept, "defended, attacked 13.3 % [7.1, 19.9]", 10) == [
        "83.3 -> 13.3", "75.1 -> 7.1", "89.9 -> 19.9",
    ]  # fmt: skip
    assert differing(kept, "defended, clean 83.3 % [75.1, 89.9]", 10)
    assert differing("p = 1e-05", "p = 0.5", 0.1) == ["1e-05 -> 0.5"]


if __name__ == "__main__":
    for notebook in NOTEBOOKS if len(sys.argv) == 1 else map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as place:
            ran = executed(notebook, Path(place))
        ran.metadata = {name: value for name, value in ran.metadata.items() if name == "kernelspec"}
        notebook.write_text(f"{json.dumps(ran, indent=1, ensure_ascii=False)}\n", encoding="utf-8")
