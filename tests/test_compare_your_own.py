"""docs/compare-your-own.md, run as it stands: its file, its commands and its Python, on digits."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import nndefense

from nndefense.attacks import registry
from nndefense.pipeline import defenses

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "compare-your-own.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.slow
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the page's blocks ran, one after another."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for kind, text in BLOCKS:
            if kind == "sh":
                for line in text.replace("\\\n", " ").splitlines():
                    words = shlex.split(line)
                    assert words[0] == "nndefense"
                    done = nndefense(*words[1:])
                    assert done.code == 0, done.err
            elif text.startswith("# mine.py"):
                (folder / "mine.py").write_text(text)
            else:
                assert text.count("\n") < 10, "In Python the same takes under ten lines"
                exec(compile(text, "compare-your-own.md", "exec"), {})
        yield folder
    sys.modules.pop("mine", None)
    defenses.unregister("rounded")
    registry.unregister("corners")


def records(folder: Path, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    results = json.loads((folder / "runs" / name / "results.json").read_text())
    return {(r["defense"], r["threat_model"]): r for r in results["records"] if r["eps"] in (0, 0.2)}


def test_the_own_defence_is_measured_beside_others(folder: Path) -> None:
    found = records(folder, "mine")
    for defense in ("none", "rounded (mine.py)", "jpeg"):
        for threat_model in ("clean", "gray", "worst"):
            assert found[defense, threat_model]["n"] == 60
    for defense in ("rounded (mine.py)", "jpeg"):
        assert found[defense, "white"]["knowledge"] == "L3"
    # Who knows the rounding does not do worse than who ignores it.
    own = {threat: found["rounded (mine.py)", threat]["accuracy"] for threat in ("clean", "gray", "worst")}
    assert own["clean"] > 0.8
    assert own["worst"] <= own["gray"] < own["clean"]
    page = (folder / "runs" / "mine" / "report.html").read_text()
    for words in ("Other defences", "Every defence as the attack grows", "rounded (mine.py), worst"):
        assert words in page


def test_made_of_images_and_beside_the_nearest_neighbours(folder: Path) -> None:
    found = records(folder, "compared")
    assert found["nearest-neighbor", "adaptive"]["database_rows"] > 1000
    assert found["nearest-neighbor", "clean"]["variant"] == "calibrated"
    assert ("rounded (mine.py)", "white") in found
    assert ("rounded (mine.py)", "adaptive") not in found


def test_the_own_attack_is_run_on_every_rung_of_a_model(folder: Path) -> None:
    found = records(folder, "corners")
    for threat_model in ("gray", "white"):
        assert found["rounded (mine.py)", threat_model]["attack"].startswith("python:mine.py:corners")
        assert found["rounded (mine.py)", threat_model]["budget_excess"] <= 1e-6


def test_python_comes_to_the_same(folder: Path) -> None:
    ours, theirs = records(folder, "python"), records(folder, "corners")
    for threat_model in ("clean", "gray", "white"):
        assert ours["rounded", threat_model]["correct"] == theirs["rounded (mine.py)", threat_model]["correct"]


def test_the_table_is_the_registry() -> None:
    assert defenses.table() in PAGE
