"""The floor beside the ceiling: certified accuracy as a rung, and a false certificate is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import digits, trained

from index_build import build_database
from nndefense.certificates import Certified, registry
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, Recipe, assemble, run, rungs_for, summary, write_report
from nndefense.evaluation.evaluate import Record
from nndefense.evaluation.floor import floor_line
from nndefense.evaluation.ladder import CERTIFIED, from_hex, to_hex, worst_cases
from nndefense.features import FeatureSpec


def record(threat_model: str, right: list[bool], eps: float = 0.1, **changes: Any) -> Record:
    values: dict[str, Any] = dict.fromkeys(Record.__dataclass_fields__, 0) | {
        "dataset": "d", "defense": "x", "variant": "", "attack": "pgd", "loss": "", "threat_model": threat_model,
        "knowledge": "", "norm": "none" if threat_model == "clean" else "linf", "eps": eps, "n": len(right),
        "accuracy": float(np.mean(right)), "correct": to_hex(right), "accuracy_8bit": None, "classifier": "c",
        "database": None, "database_rows": None, "surrogate": None, "attack_sha256": "", "certified": "",
        "draw_seeds": [], "refuted": "", **changes,
    }  # fmt: skip
    return Record(**values)


RIGHT = [True, True, True, False]


def test_an_attack_that_breaks_a_certified_image_is_a_bug_and_named() -> None:
    floor = record(CERTIFIED, [True, True, False, False], attack="exact")
    sound = [record("clean", RIGHT, 0.0), record("gray", RIGHT), record("adaptive", [True, True, False, False])]
    assert floor_line([*sound, floor]).passed is True
    broken = record("white", [False, True, True, False], eps=0.05)
    line = floor_line([*sound, broken, floor])
    assert line.passed is False
    assert "1 of 2 images of x that exact certifies at linf 0.1" in line.text
    # Of another defence, a larger budget or another norm it says nothing.
    for other in (replace(broken, defense="y"), replace(broken, eps=0.2), replace(broken, norm="l2")):
        assert floor_line([*sound, other, floor]).passed is True
    assert floor_line(sound).passed is None
    assert floor_line([record("clean", [False] * 4, 0.0), floor]).passed is False


def test_a_certificate_by_chance_is_broken_where_more_images_are_refuted_than_chance_explains() -> None:
    n = 200
    floor, votes = record(CERTIFIED, [True] * n), [False] * n
    unsure = record("gray", votes, refuted=to_hex([False] * n))
    assert floor_line([unsure, floor], alpha=0.001).passed is True
    few = replace(unsure, refuted=to_hex([True] + [False] * (n - 1)))
    assert floor_line([few, floor], alpha=0.001).passed is True
    many = replace(unsure, refuted=to_hex([True] * 20 + [False] * (n - 20)))
    assert floor_line([many, floor], alpha=0.001).passed is False


def test_a_certificate_is_no_attack() -> None:
    plain = [
        one.to_json() for one in (record("clean", RIGHT, 0.0), record("gray", RIGHT), record(CERTIFIED, [False] * 4))
    ]
    (worst,) = worst_cases(plain)
    assert worst["correct"] == to_hex(RIGHT)


@pytest.fixture(scope="module")
def defense(tmp_path_factory: pytest.TempPathFactory) -> NearestNeighborDefense:
    rows = digits("train").subset(list(range(60)))
    built = build_database(
        rows, trained(), FeatureSpec("block1.0", "avg", 0), tmp_path_factory.mktemp("f"), progress=False
    )
    return NearestNeighborDefense(trained(), built, 1, "uniform")


def recipe(**changes: Any) -> Recipe:
    attack = AttackSettings("pgd", "l2", (0.05, 0.1), 3)
    return Recipe(
        dataset="digits:test", classifier="c", database="d", rungs=rungs_for(["gray"], attack), headline_norm="l2",
        headline_eps=0.1, sizes=False, audit=False, gallery=0, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"certify": "exact"},
        {"certify": "smoothing", "sigma": 0.1, "draws": 100},
        {"certify": "smoothed-features", "sigma": 0.05, "draws": 64},
    ],
)
def test_the_floor_stands_beside_the_attacks_in_results_summary_and_page(
    defense: NearestNeighborDefense, tmp_path: Path, changes: dict[str, Any]
) -> None:
    few = digits("test").subset(list(range(6)))
    asked = recipe(**changes)
    found = run(asked, few, trained(), defense, None, cells=tmp_path / "cells")
    floors = [one for one in found.records if one.threat_model == CERTIFIED]
    assert [(one.norm, one.eps) for one in floors] == [("l2", 0.05), ("l2", 0.1)]
    for floor in floors:
        attacked = [
            o for o in found.records if (o.defense, o.threat_model, o.eps) == (floor.defense, "gray", floor.eps)
        ]
        assert attacked
        assert not (from_hex(floor.correct, 6) & ~from_hex(attacked[0].correct, 6)).any()
    (line,) = [line for line in found.audit if line.name == "no certified image falls"]
    assert line.passed is not False
    results = assemble(
        found.records, recipe=asked, dataset=few, classifier=trained(), surrogate=None, defense=defense,
        calibration=None, audit=found.audit, command="",
    )  # fmt: skip
    assert "certified" in summary(results)
    write_report(results, found.gallery, tmp_path / "report.html")
    assert "certified" in (tmp_path / "report.html").read_text()
    again = run(asked, few, trained(), defense, None, cells=tmp_path / "cells")
    assert [one.correct for one in again.records] == [one.correct for one in found.records]


def test_a_false_certificate_is_found_by_the_run(
    defense: NearestNeighborDefense, monkeypatch: pytest.MonkeyPatch
) -> None:
    def false(surface: Any, images: Any, *, eps: Any, norm: str) -> Certified:
        answers = surface.predict(images).argmax(1)
        return Certified(answers, answers * 0 + max(eps), norm)

    method = registry.get("exact")
    monkeypatch.setitem(registry._METHODS, "exact", type(method)(**{**vars(method), "function": false}))
    asked = replace(recipe(certify="exact"), rungs=rungs_for(["gray"], AttackSettings("pgd", "l2", (0.1, 2.0), 10)))
    found = run(asked, digits("test").subset(list(range(6))), trained(), defense, None)
    (line,) = [line for line in found.audit if line.name == "no certified image falls"]
    assert line.passed is False
    assert "bug" in line.text


def test_a_proof_that_the_defence_is_not_made_for_is_refused_before_any_attack(
    defense: NearestNeighborDefense, tmp_path: Path
) -> None:
    rows = digits("train").subset(list(range(60)))
    deep = build_database(rows, trained(), FeatureSpec("block2", "avg", 0), tmp_path / "deep", progress=False)
    linf = rungs_for(["gray"], AttackSettings("pgd", "linf", (0.1,), 3))
    cases = [
        (recipe(certify="exact"), NearestNeighborDefense(trained(), deep, 1, "uniform"), "a feature that is affine"),
        (recipe(certify="bounds"), NearestNeighborDefense(trained(), deep, 3, temperature=1.0), "without a kernel"),
        (
            replace(recipe(certify="smoothing", sigma=0.1), rungs=linf, headline_norm="linf"),
            defense,
            "smoothing certifies in l2, normalized-l2, and no attack of the run is in such a norm",
        ),
    ]
    for asked, one, said in cases:
        with pytest.raises(InputError, match=said):
            run(asked, digits("test").subset(list(range(6))), trained(), one, None, progress=pytest.fail)
