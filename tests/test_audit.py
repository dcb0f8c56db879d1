"""The self-audit finds what it is for: each check passes on a sound run and fails on a fault that is planted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import digits, images, trained
from torch import Tensor, nn

from index_build import build_database
from nndefense.attacks import registry
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, CellStore, Recipe, Record, Rung, Subject, ThreatModel, evaluate, run
from nndefense.evaluation.audit import AuditLine, audit_records
from nndefense.evaluation.audit_runs import AuditSubject, _called, _noise, audit_runs, undefended_run
from nndefense.features import FeatureSpec

GRAY = AttackSettings(norm="linf", eps=(0.1, 0.2), steps=5)


@pytest.fixture(scope="module")
def defense(tmp_path_factory: pytest.TempPathFactory) -> NearestNeighborDefense:
    folder = tmp_path_factory.mktemp("audit") / "database"
    classifier = trained().eval()
    database = build_database(
        digits("train").subset(range(400)), classifier, FeatureSpec("block2", "grid4", pca=32), folder, progress=False
    )
    return NearestNeighborDefense(classifier, database, k=5, weighting="uniform")


@pytest.fixture(scope="module")
def records(defense: NearestNeighborDefense) -> list[Record]:
    data = digits("test").subset(range(40))
    subjects = [
        Subject("none", defense.classifier, "none"),
        Subject("nearest-neighbor", defense, "calibrated", "d", 400),
    ]
    maps = {name: defense.classifier.label_map(data.classes) for name in ("clean", "gray")}
    return evaluate(
        data,
        subjects,
        [ThreatModel("gray", defense.classifier, knowledge="L0")],
        AttackSettings(norm="linf", eps=(0.1, 0.3, 0.6), steps=10),
        headline_eps=0.3,
        classifier="c",
        label_maps=maps,
    )


def lines(found: list[AuditLine]) -> dict[str, bool | None]:
    return {line.name: line.passed for line in found}


def changed(records: list[Record], choose: Callable[[Record], bool], **values: Any) -> list[Record]:
    assert any(choose(record) for record in records)
    return [replace(record, **values) if choose(record) else record for record in records]


# -- checks on records -------------------------------------------------------------------------------------------------


def test_a_sound_run_passes_and_what_was_not_run_is_unknown(records: list[Record]) -> None:
    found = audit_records(records, 10)
    assert lines(found) == {
        "budget": True,
        "undefended net falls": True,
        "8-bit images": True,
        "larger budgets": True,
        "white box beats transfer": None,
        "adaptive is the strongest": None,
    }
    assert all(json.loads(json.dumps(line.to_json()))["text"].endswith(".") for line in found)
    assert set(lines(audit_records([r for r in records if r.threat_model == "clean"], 10)).values()) == {None}


@pytest.mark.parametrize(
    ("name", "choose", "values"),
    [
        ("budget", lambda r: r.eps == 0.3, {"budget_excess": 2e-6}),
        ("undefended net falls", lambda r: r.defense == "none" and r.eps > 0, {"accuracy": 0.9, "ci_low": 0.8}),
        ("8-bit images", lambda r: r.defense == "none" and r.eps == 0.3, {"accuracy_8bit": 0.99, "ci_high": 0.2}),
        ("larger budgets", lambda r: r.defense == "none" and r.eps == 0.6, {"accuracy": 1.0, "ci_low": 0.99}),
    ],
)
def test_planted_faults_are_found(records: list[Record], name: str, choose: Any, values: dict[str, Any]) -> None:
    assert lines(audit_records(changed(records, choose, **values), 10))[name] is False


def test_transfer_that_is_stronger_and_an_adaptive_attack_that_is_weaker(records: list[Record]) -> None:
    attacked = [r for r in records if r.eps == 0.3 and r.defense == "nearest-neighbor"]
    weak = {"accuracy": 0.9, "ci_low": 0.85, "ci_high": 0.95}
    strong = {"accuracy": 0.1, "ci_low": 0.05, "ci_high": 0.15}
    gray = [replace(r, **weak) for r in attacked]
    black = [replace(r, threat_model="black", **strong) for r in attacked]
    assert lines(audit_records([*gray, *black], 10))["white box beats transfer"] is False
    adaptive = [replace(r, threat_model="adaptive", **strong) for r in attacked]
    assert lines(audit_records([*gray, *black, *adaptive], 10))["white box beats transfer"] is True
    assert lines(audit_records([*gray, *adaptive], 10))["adaptive is the strongest"] is True
    blunt = [replace(r, threat_model="adaptive", **weak) for r in attacked]
    assert lines(audit_records([*black, *blunt], 10))["adaptive is the strongest"] is False


# -- checks that run something -----------------------------------------------------------------------------------------


def subject(defense: NearestNeighborDefense, **more: Any) -> AuditSubject:
    x, y = images("test", 24)
    threat = ThreatModel("gray", defense.classifier, knowledge="L0")
    return AuditSubject(defense, defense.classifier, x, y, threat, GRAY, 0.2, **more)


@pytest.mark.parametrize(
    ("threat", "attack", "words"),
    [
        ("gray", "pgd", "gray box, PGD, "),
        ("white", "pgd", "white box, PGD, "),
        ("adaptive", "adaptive", "adaptive, "),
        ("adaptive", "rank-margin", "adaptive, "),
    ],
)
def test_who_attacks_is_said_once(defense: NearestNeighborDefense, threat: str, attack: str, words: str) -> None:
    given = subject(defense)
    named = replace(given, threat=replace(given.threat, name=threat))
    if attack != "pgd":
        named = replace(named, attack=SimpleNamespace(name=attack))
    told = f"{_called(named)}, "
    assert told.startswith(words)
    assert told.count("adaptive") == words.count("adaptive")


def test_a_sound_defence_passes_its_runs(defense: NearestNeighborDefense) -> None:
    found = audit_runs(subject(defense), noise_draws=200)
    passed = lines(found)
    assert not any("e+00" in line.text for line in found)
    for name in ("zero gradients", "batch size", "evaluation mode", "determinism", "near-duplicates", "more steps"):
        assert passed[name] is True, [line.text for line in found if line.name == name]
    assert {"unbounded budget", "random noise", "other ways"} < set(passed)
    # Without a database the scores are logits, of which no power of e may be taken for a probability.
    bare = {line.name: line for line in audit_runs(replace(subject(defense), model=defense.classifier), noise_draws=24)}
    assert bare["batch size"].passed is True, bare["batch size"].text


def test_noise_around_few_images_comes_in_full_batches(defense: NearestNeighborDefense) -> None:
    sizes: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            near_the_second = (x - tried.images[1]).flatten(1).norm(dim=1) < 1.6
            return torch.eye(10)[torch.where(near_the_second, 0, 1)]

    whole = subject(defense, batch_size=50)
    tried = replace(whole, model=Watched(), images=whole.images[:3], labels=torch.tensor([1, 1, 1]))
    line = _noise(tried, torch.ones(3, dtype=torch.bool), 200)
    assert sizes == [50, 50, 50, 48]
    assert line.passed is False
    assert line.text == "198 random draws around 3 images that the attack left right break 1."


class Rounding(nn.Module):
    """A net behind a rounding of its input, and so without a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net((x * 4).round() / 4 + 0 * x)
        return found


class Fickle(nn.Module):
    """Answers that change from call to call and with the place in the batch."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        answers = (torch.arange(len(x)) + self.calls) % 10
        return torch.nn.functional.one_hot(answers, 10).float().log_softmax(1)


def test_masked_gradients_are_found(defense: NearestNeighborDefense) -> None:
    masked = Rounding(defense.classifier).eval()
    threat = ThreatModel("gray", masked, knowledge="L0")
    tried = replace(subject(defense), classifier=masked, threat=threat)
    passed = lines(audit_runs(tried, noise_draws=24))
    assert passed["zero gradients"] is False
    # Steps along a zero gradient go nowhere, however large the budget is.
    assert passed["unbounded budget"] is False


def test_chance_modes_and_batches_are_found(defense: NearestNeighborDefense) -> None:
    fickle = Fickle()
    passed = lines(audit_runs(replace(subject(defense), model=fickle), noise_draws=24))
    assert passed["determinism"] is False
    assert passed["batch size"] is False
    assert passed["evaluation mode"] is False
    assert passed["random noise"] is False
    # It is no retrieval, so there is no database to look into.
    assert passed["near-duplicates"] is None


class OfItsBatch(nn.Module):
    """A net behind a normalisation by the batch's own mean."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net((x + 0.01 * (x.mean(0) - x)).clamp(0, 1))
        return found


def test_probabilities_that_depend_on_the_batch_are_found(defense: NearestNeighborDefense) -> None:
    planted = replace(subject(defense), model=OfItsBatch(defense.classifier).eval())
    found = {line.name: line for line in audit_runs(planted, noise_draws=24)}["batch size"]
    assert found.passed is False
    # The classes are the same: it is the probabilities that tell.
    assert found.text.startswith("16 images give the same classes")


def stays(target: Any, x: Tensor, y: Tensor) -> Tensor:
    """An attack whose objective is stuck where it starts."""
    return x


@pytest.mark.parametrize("on_retrieval", [False, True])
def test_an_attack_that_is_stuck_is_found_by_other_ways(defense: NearestNeighborDefense, on_retrieval: bool) -> None:
    stuck = registry.Attack("stuck", stays, needs=("surface",) if on_retrieval else ("gradient",), effort="steps",
                            standard=20)  # fmt: skip
    name = registry.register(stuck)
    try:
        surface = defense.surface(images=digits("train").subset(range(400)))
        threat = ThreatModel("adaptive", surface) if on_retrieval else ThreatModel("gray", defense.classifier)
        model = defense if on_retrieval else defense.classifier
        settings = AttackSettings(name, "linf", (0.2,))
        tried = replace(subject(defense), model=model, threat=threat, attack=settings)
        found = {line.name: line for line in audit_runs(tried, noise_draws=24)}
        # It does as well with twice the steps.
        assert found["more steps"].passed is True
        assert found["other ways"].passed is False
        assert "the attack is stuck" in found["other ways"].text
        # It draws nothing, so that it has no other start; other classes and objectives break nearly all.
        assert "starts" not in found["other ways"].text
        broken = re.search(r"other classes break (\d+), other objectives (\d+)", found["other ways"].text)
        assert broken
        assert min(map(int, broken.groups())) > 12
        if not on_retrieval:
            line = undefended_run(tried, 0.1)
            assert line.passed is False
            assert "the attack is weak" in line.text
    finally:
        registry.unregister(name)


def test_an_attack_that_leaves_nothing_needs_no_other_way(defense: NearestNeighborDefense) -> None:
    strong = AttackSettings("pgd", "linf", (0.6,), steps=10)
    tried = replace(subject(defense), model=defense.classifier, attack=strong, eps=0.6)
    found = {line.name: line for line in audit_runs(tried, noise_draws=24)}["other ways"]
    assert (found.passed, found.text) == (True, "pgd left no image right for other ways to try.")


def test_a_net_that_is_robust_is_told_from_one_that_hides_its_gradient(defense: NearestNeighborDefense) -> None:
    small = replace(subject(defense), model=defense.classifier, eps=0.01)
    robust = undefended_run(small, 0.1)
    assert robust.passed is True
    assert robust.text.endswith("the net is robust there.")
    masked = Rounding(defense.classifier).eval()
    hidden = undefended_run(replace(small, model=masked, classifier=masked, threat=ThreatModel("gray", masked)), 0.1)
    assert hidden.passed is False
    assert hidden.text.endswith("something hides its gradient.")


def test_an_evaluation_settles_whether_its_net_is_robust(defense: NearestNeighborDefense, tmp_path: Path) -> None:
    attack = AttackSettings("pgd", "linf", (0.01,), steps=5)
    recipe = Recipe("digits:test", "net", (Rung("gray", attack),), "linf", 0.01, audit_images=8, gallery=0)
    data = digits("test").subset(range(20))
    first = run(recipe, data, defense.classifier, None, None, cells=tmp_path)
    found = {line.name: line for line in first.audit}["undefended net falls"]
    assert found.passed is True
    assert found.text.endswith("the net is robust there.")
    # Found again, and as it was on the records alone where no runs are made.
    assert run(recipe, data, defense.classifier, None, None, cells=tmp_path).audit == first.audit
    alone = run(replace(recipe, audit=False), data, defense.classifier, None, None, cells=tmp_path)
    line = {line.name: line for line in alone.audit}["undefended net falls"]
    assert line.passed is False
    assert "Either it is robust there or the attack is weak" in line.text


def test_a_test_image_in_the_database_is_found(defense: NearestNeighborDefense) -> None:
    x, y = images("train", 3)
    mixed = replace(subject(defense), images=torch.cat([images("test", 5)[0], x]), labels=torch.cat([y, y, y[:2]]))
    found = {line.name: line for line in audit_runs(mixed, noise_draws=10)}["near-duplicates"]
    assert found.passed is False
    assert found.text.startswith("3 of 8")


# -- going on after an end ---------------------------------------------------------------------------------------------


class Killed(Exception):
    """The end of a process, in the middle of a cell."""


def measured(defense: NearestNeighborDefense, store: CellStore | None, stop_after: int | None = None) -> list[Record]:
    data = digits("test").subset(range(30))
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if stop_after is not None and done > stop_after:
            raise Killed

    return evaluate(
        data,
        [Subject("none", defense.classifier, "none"), Subject("nearest-neighbor", defense, "calibrated", "d", 400)],
        [ThreatModel("gray", defense.classifier, knowledge="L0")],
        {"gray": [GRAY, AttackSettings("apgd", "l2", (0.5,), steps=5)]},
        headline_eps=0.2,
        headline_norm="linf",
        classifier=defense.classifier.fingerprint,
        label_maps={n: defense.classifier.label_map(data.classes) for n in ("clean", "gray")},
        batch_size=10,
        store=store,
        progress=progress,
    )


def timeless(records: list[Record]) -> list[dict[str, Any]]:
    times = ("seconds", "attack_seconds", "peak_memory_mb")
    return [{name: value for name, value in r.to_json().items() if name not in times} for r in records]


@pytest.mark.parametrize("stop_after", [5, 30, 45, 95, 115])
def test_an_evaluation_goes_on_where_it_stood(
    defense: NearestNeighborDefense, stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(defense, None)
    store = CellStore(tmp_path)
    with pytest.raises(Killed):
        measured(defense, store, stop_after)
    finished = len(list(tmp_path.iterdir()))
    assert finished == stop_after // 30
    # The package has a function of the same name as the module.
    module = sys.modules["nndefense.evaluation.evaluate"]
    made: list[int] = []
    real = module.run_attack
    monkeypatch.setattr(module, "run_attack", lambda *given: made.append(1) or real(*given))
    again = measured(defense, store)
    assert timeless(again) == timeless(whole)
    # Three batches for each of the attacked cells that were not finished, and none for the others.
    assert len(made) == 3 * (4 - max(finished, 1))
    # The finished ones keep even their times.
    assert measured(defense, store) == again


def test_a_changed_setting_is_measured_again(defense: NearestNeighborDefense, tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    measured(defense, store)
    files = set(tmp_path.iterdir())
    other = NearestNeighborDefense(defense.classifier, defense.database, k=1, weighting="uniform")
    measured(other, store)
    assert len(set(tmp_path.iterdir()) - files) == 4


def test_a_changed_attack_of_the_library_is_measured_again(
    defense: NearestNeighborDefense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CellStore(tmp_path)
    first = measured(defense, store)
    assert {record.attack_version for record in first} == {1}
    files = set(tmp_path.iterdir())
    monkeypatch.setitem(registry._ATTACKS, "apgd", replace(registry.get("apgd"), version=2))
    again = measured(defense, store)
    # Of the four cells the one of the changed attack, which says so.
    assert len(set(tmp_path.iterdir()) - files) == 1
    assert {record.attack for record in again if record.attack_version == 2} == {"apgd"}
    assert [r for r in again if r.attack != "apgd"] == [r for r in first if r.attack != "apgd"]
    monkeypatch.undo()
    assert measured(defense, store) == first


def test_a_threat_model_needs_attacks_and_its_subject(defense: NearestNeighborDefense) -> None:
    data = digits("test").subset(range(3))
    maps = {name: defense.classifier.label_map(data.classes) for name in ("clean", "gray")}
    options: dict[str, Any] = {"headline_eps": 0.1, "classifier": "c", "label_maps": maps}
    bare = [Subject("none", defense.classifier, "none")]
    with pytest.raises(InputError, match="no attack is given"):
        evaluate(data, bare, [ThreatModel("gray", defense.classifier)], {"gray": []}, **options)
    with pytest.raises(InputError, match="no subject"):
        evaluate(data, bare, [ThreatModel("gray", defense.classifier, subject="x")], GRAY, **options)
