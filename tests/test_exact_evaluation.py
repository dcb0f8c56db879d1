"""The exact accuracy beside the adaptive one: in records, ladder, report and audit, and on the command line."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from command import fails
from helpers import digits, trained

from index_build import build_database
from nndefense.attacks import registry
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, Recipe, Record, Rung, assemble, run, rungs_for, summary
from nndefense.evaluation.audit import audit_records
from nndefense.evaluation.ladder import bits, from_hex, to_hex
from nndefense.evaluation.report import accuracy_vs_eps, report_html, verdict
from nndefense.evaluation.report.records import accuracy_text, open_images
from nndefense.features import FeatureSpec
from nndefense.pipeline import DemoSettings, run_demo
from nndefense.pipeline.calibrating import Candidates

GRAY = AttackSettings(eps=(0.1, 0.15), steps=5)
ADAPTIVE = AttackSettings("adaptive", eps=(0.1, 0.15), steps=5)
RUNGS = (*rungs_for(("gray", "adaptive"), GRAY, ADAPTIVE), Rung("exact", AttackSettings("exact", eps=(0.1, 0.15))))
RECIPE = Recipe(
    dataset="digits:test",
    classifier="c",
    database="d",
    rungs=RUNGS,
    headline_norm="normalized-l2",
    headline_eps=0.15,
    sizes=False,
    audit=False,
    gallery=1,
    batch_size=16,
)


def made(folder: Path, layer: str) -> NearestNeighborDefense:
    feature = FeatureSpec(layer, "grid4", pca=48)
    database = build_database(digits("train").subset(range(600)), trained(), feature, folder, progress=False)
    return NearestNeighborDefense(trained(), database, 3, "uniform")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Records, audit and results of 24 digits."""
    defense, data = made(tmp_path_factory.mktemp("d"), "block1.0"), digits("test").subset(range(24))
    found = run(RECIPE, data, defense.classifier, defense, None, pictures=digits("train"))
    results = assemble(
        found.records,
        recipe=RECIPE,
        dataset=data,
        classifier=defense.classifier,
        surrogate=None,
        defense=defense,
        calibration=None,
        audit=found.audit,
        command="",
    )
    return found, results


def test_it_stands_beside_the_adaptive_attack(evaluated):
    found, results = evaluated
    cells = {(r.threat_model, r.eps): r for r in found.records if r.defense == "nearest-neighbor"}
    for eps in (0.1, 0.15):
        exact, adaptive = cells["exact", eps], cells["adaptive", eps]
        assert (exact.attack, exact.knowledge, exact.steps) == ("exact", "L3", 0)
        assert exact.certified == exact.correct
        assert not bool((bits(asdict(exact)) & ~bits(asdict(adaptive))).any())
        assert exact.queries > 0 < exact.attack_seconds
        assert exact.budget_excess <= 1e-6
    assert 0 < cells["exact", 0.15].accuracy < cells["exact", 0.1].accuracy
    assert {r.defense for r in found.records if r.threat_model == "exact"} == {"nearest-neighbor"}
    worst = {(r["defense"], r["eps"]): r for r in results["records"] if r["threat_model"] == "worst"}
    assert worst["nearest-neighbor", 0.15]["correct"] == cells["exact", 0.15].correct
    assert "certified" not in worst["nearest-neighbor", 0.15]


def test_the_report_says_so(evaluated):
    _, results = evaluated
    page = report_html(results, [])
    assert "what any attack within the budget can do, by proof" in page
    assert "The exact accuracy is that of this setting." in page
    assert "No attack is the strongest there is." not in page
    assert "which no attack can lower" in verdict(results)
    assert "exact" in summary(results).splitlines()[1]
    assert "defended, exact" in accuracy_vs_eps(results)
    assert "defended, worst" not in accuracy_vs_eps(results)


def test_open_images_are_a_range(evaluated):
    found, results = evaluated
    record = next(r for r in results["records"] if r["threat_model"] == "exact" and r["eps"] == 0.1)
    right = from_hex(record["correct"], 24)
    assert accuracy_text(record) == f"{100 * right.mean():.1f}"
    first = np.flatnonzero(right)[:2]
    fewer = right.copy()
    fewer[first] = False
    opened = {**record, "certified": to_hex(fewer)}
    assert accuracy_text(opened) == f"{100 * fewer.mean():.1f}–{100 * right.mean():.1f}"
    others = [r for r in results["records"] if r["threat_model"] != "exact"]
    changed = {**results, "records": [*others, {**opened, "eps": 0.15}]}
    assert accuracy_text(opened) in summary(changed)
    assert accuracy_text(opened) in report_html(changed, [])
    assert "which no attack can lower" not in verdict(changed)
    assert found.records


def test_the_audit_measures_the_attack_by_it(evaluated):
    records = evaluated[0].records

    def line(changed: list[Record]):
        return next((line for line in audit_records(changed, 10) if line.name == "exact accuracy"), None)

    said = line(records)
    assert said is not None
    assert "more than what is possible" in said.text
    assert line([r for r in records if r.threat_model != "exact"]) is None
    weak = [replace(r, accuracy=r.accuracy + 0.2) if r.threat_model == "adaptive" else r for r in records]
    assert line(weak).passed is False
    equal = [r for r in records if r.threat_model != "adaptive"]
    equal += [replace(r, threat_model="adaptive", certified="") for r in records if r.threat_model == "exact"]
    assert line(equal).passed is True
    proven = to_hex(np.ones(24, dtype=bool))
    wrong = [replace(r, certified=proven) if r.threat_model == "exact" else r for r in records]
    assert line(wrong).passed is False
    assert "proven to stand" in line(wrong).text


def test_the_interval_begins_at_what_is_certified(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._ATTACKS, "exact", replace(registry.get("exact"), settings={"limit": 1}))
    rungs = (Rung("exact", AttackSettings("exact", eps=0.15)),)
    defense, data = made(tmp_path, "block1.0"), digits("test").subset(range(24))
    found = run(replace(RECIPE, rungs=rungs), data, defense.classifier, defense, None)
    exact = next(r for r in found.records if r.threat_model == "exact")
    certified = from_hex(exact.certified, 24)
    assert not bool((certified & ~bits(asdict(exact))).any())
    assert exact.ci_low <= certified.mean() < exact.accuracy <= exact.ci_high


def test_it_is_refused_before_anything_is_attacked(tmp_path):
    defense, data = made(tmp_path, "block1.2"), digits("test").subset(range(16))
    done = []
    with pytest.raises(InputError, match=r"affine in the pixels.*leave --exact out"):
        run(RECIPE, data, defense.classifier, defense, None, progress=lambda *given: done.append(given))
    assert not done
    with pytest.raises(InputError, match="name its database"):
        replace(RECIPE, database=None, defenses=("jpeg",))
    with pytest.raises(InputError, match="takes no restarts"):
        AttackSettings("exact", restarts=2)
    assert rungs_for(("gray", "exact"), replace(GRAY, restarts=2))[1].attack.restarts == 1
    fails(2, "leave --exact out", "evaluate", "--dataset", "digits:test", "--classifier", "c", "--exact", "--out", "o")


@pytest.mark.slow
def test_the_demo(tmp_path):
    attack = AttackSettings(eps=(0.1, 0.2, 0.3))
    results = run_demo(
        DemoSettings(
            database_sets=["digits:train"],
            test="digits:test",
            out=tmp_path,
            attack=attack,
            adaptive=AttackSettings("adaptive", eps=attack.eps, steps=20),
            exact=True,
            headline_eps=0.2,
            audit=False,
            candidates=Candidates(
                layers=("block1.0",), poolings=("grid8",), ks=(3,), weightings=("uniform",), objective="gray"
            ),
            gallery=0,
            device="cpu",
            progress=False,
        )
    )
    ours = [r for r in results["records"] if r["defense"] == "nearest-neighbor"]
    exact = {r["eps"]: r for r in ours if r["threat_model"] == "exact"}
    # As found by hand with another solver; the nets are trained anew, and other machines train others.
    for eps, known in ((0.1, 0.846), (0.2, 0.378), (0.3, 0.008)):
        assert exact[eps]["accuracy"] == pytest.approx(known, abs=0.04)
        assert open_images(exact[eps]) == 0
        for other in (r for r in ours if r["threat_model"] != "clean" and r["eps"] <= eps):
            assert not bool((bits(exact[eps]) & ~bits(other)).any())
