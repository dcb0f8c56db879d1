"""What abstaining is worth: thresholds, scores, and an attack that must be wrong and accepted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digits, images, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from index_build import build_database
from nndefense.attacks.retrieval.accepted import Accepted, Decision, hinged, selective
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.abstention import (
    AbstentionScore,
    answer_scores,
    disagreement_score,
    distance_score,
    margin_score,
    net_score,
    relaxed_answer,
)
from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, Recipe, Subject, ThreatModel, run, run_attack, rungs_for
from nndefense.evaluation import abstention as measured
from nndefense.evaluation.abstention import NOTHING, Abstainer, Abstention, Threshold, check_rates
from nndefense.evaluation.ladder import from_hex, worst_cases
from nndefense.evaluation.recipe import recipe_from
from nndefense.evaluation.report.abstention import abstention_section, abstention_text
from nndefense.features import FeatureSpec
from nndefense.pipeline.opening import held_out
from nndefense.statistics import conformal_threshold, values_needed

NORM = "linf"


@pytest.fixture(scope="module")
def defense(tmp_path_factory: pytest.TempPathFactory) -> NearestNeighborDefense:
    rows = digits("train").subset(range(300))
    folder = tmp_path_factory.mktemp("abstention") / "database"
    database = build_database(
        rows, trained(), FeatureSpec("block1", "grid4", pca=0), folder, specs=["digits:train"], progress=False
    )
    return NearestNeighborDefense(trained(), database, 3, "uniform")


# --- thresholds ---


def test_the_threshold_is_the_conformal_quantile_of_the_values() -> None:
    values = [float(i) for i in range(1, 100)]
    assert [conformal_threshold(values, rate) for rate in (0.01, 0.05, 0.1)] == [99, 95, 90]
    assert conformal_threshold(values[:98], 0.01) is None
    # Of ties none is beyond.
    assert conformal_threshold([0.0] * 15 + [1.0] * 4, 0.05) == 1
    assert conformal_threshold([0.0] * 18 + [1.0], 0.1) == 0


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.9]))
def test_a_threshold_rejects_no_more_than_the_rate_and_is_there_where_the_values_are_enough(
    values: list[int], rate: float
) -> None:
    found = conformal_threshold(sorted(map(float, values)), rate)
    assert (found is None) == (len(values) < values_needed(rate))
    if found is not None:
        assert sum(value > found for value in values) <= rate * (len(values) + 1)


def test_rates_that_the_held_out_images_are_too_few_for_are_refused() -> None:
    check_rates([0.05, 0.1], 19)
    with pytest.raises(InputError, match=r"1 % needs at least 99 held-out images, but there are 98: .*--abstain"):
        check_rates([0.1, 0.01], 98)


# --- scores ---


@given(st.integers(0, 1000))
def test_scores_agree_with_formulas_typed_again(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = 4 * torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    for z, q, said in zip(first.numpy(), second.numpy(), margin_score(first).tolist(), strict=True):
        a, b = np.sort(z)[::-1][:2]
        assert said == pytest.approx(b - a, abs=1e-9)
        del q
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (first.numpy(), second.numpy()))
    divergence = (p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)
    assert disagreement_score(first, second).numpy() == pytest.approx(divergence, abs=1e-6)
    assert disagreement_score(first, first + 3).abs().max() < 1e-9


def test_what_attackers_follow_has_the_true_values_and_a_gradient(defense: NearestNeighborDefense) -> None:
    x, _ = images("test", 12)
    net = defense.classifier
    scores = [net_score(net), *answer_scores("retrieval margin", net, defense, relaxed_answer(defense))]
    for score in [*scores, distance_score(defense)]:
        leaf = x.clone().requires_grad_()
        followed = score.followed(leaf)
        with torch.no_grad():
            true = score.of(x)
        torch.testing.assert_close(followed.detach(), true, atol=2e-3, rtol=1e-3)
        (gradient,) = torch.autograd.grad(followed.sum(), leaf)
        assert gradient.flatten(1).abs().amax(1).min() > 0, score.name
        if score.name in ("net margin", "distance"):
            # The true score falls along the gradient as it says; the relaxed ones are steps.
            step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
            with torch.no_grad():
                change = (score.of(x + step) - score.of(x - step)) / 2e-3
            torch.testing.assert_close(change, gradient.flatten(1).norm(dim=1), atol=0.05, rtol=0.05)


# --- both aims in one ---


def test_selective_raises_the_margin_until_the_answer_is_wrong_and_then_lowers_the_excess() -> None:
    raised, excess = torch.tensor([-1.0, 2.0, 2.0, -1.0]), torch.tensor([3.0, 3.0, -1.0, -1.0])
    assert selective(raised, raised > 0, excess).tolist() == [-1, -3, 2, -1]


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_hinges_are_at_rest_only_where_both_aims_are_met(raised: float, excess: float) -> None:
    found = float(hinged(torch.tensor(raised), torch.tensor(raised > 0), torch.tensor(excess)))
    assert (found == 0) == (raised >= 0.1 and excess <= -0.1) or abs(raised - 0.1) + abs(excess + 0.1) < 1e-5
    assert found <= 0


def test_an_objective_that_must_be_accepted_needs_a_rejection(defense: NearestNeighborDefense) -> None:
    surface = defense.surface()
    with pytest.raises(InputError, match="a surface with a rejection"):
        Decision(surface)
    rejection = net_score(defense.classifier).rejection(defense.classifier, 0.0, 1.0)
    Accepted(replace(surface, rejection=rejection), Decision(replace(surface, rejection=rejection)))


def test_a_surface_is_fooled_by_what_is_wrong_and_accepted(defense: NearestNeighborDefense) -> None:
    x, y = images("test", 6)
    score = AbstentionScore("brightness", lambda x: x.flatten(1).mean(1), lambda x: x.flatten(1).mean(1))
    middle = float(score.of(x).median())
    surface = replace(defense.surface(), rejection=score.rejection(defense.classifier, middle, 1.0))
    right = defense(x).argmax(1)
    assert not surface.fooled(x, right).any()
    assert surface.fooled(x, (right + 1) % 10).tolist() == (score.of(x) <= middle).tolist()
    assert len(y) == 6


# --- the measurement ---


def test_outcomes_are_the_worst_of_every_image_that_was_tried() -> None:
    rules = [Threshold("a", 0.1, 1.0), Threshold("a", 0.05, 2.0), Threshold(NOTHING, 0.0, float("inf"))]
    found = measured._Outcomes.of(3, 4)
    # Right and near, right and far, wrong and near, wrong and far; a tie is accepted.
    found.note(rules, np.array([False, False, True, True]), {"a": np.array([1.0, 1.5, 0.0, 9.0])})
    assert found.right.tolist() == [[True, False, False, False], [True, True, False, False], [True, True, False, False]]
    assert found.wrong.tolist() == [
        [False, False, True, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    again = found.copy()
    again.note(rules, np.array([True] * 4), {"a": np.full(4, 1.5)})
    assert again.wrong.tolist() == [[False, False, True, False], [True] * 4, [True] * 4]
    assert not again.right.any()
    assert found.right[0, 0]


def recipe(who: str = "defence", **changes: Any) -> Recipe:
    """Of the net alone, or of a defence over a database, too."""
    attack = AttackSettings("pgd", NORM, (0.1, 0.2), 4)
    models = ("gray",) if who == "net" else ("gray", "adaptive")
    return Recipe(
        dataset="digits:test",
        classifier="trained",
        rungs=rungs_for(models, attack, AttackSettings("adaptive", NORM, (0.2,), 3)),
        headline_norm=NORM,
        headline_eps=0.2,
        database=None if who == "net" else "database",
        sizes=False,
        audit=False,
        gallery=0,
        abstain=(0.1, 0.05),
        abstain_steps=4,
        batch_size=7,
        **changes,
    )


HELD, SHOWN = range(400, 440), range(12)


@dataclass(frozen=True)
class Measured:
    """An evaluation, and how to run it again."""

    who: str
    cells: Path
    defense: NearestNeighborDefense | None

    def again(self, held: Sequence[int] = HELD) -> Any:
        return run(
            recipe(self.who),
            digits("test").subset(SHOWN),
            trained(),
            self.defense,
            None,
            held=digits("train").subset(held),
            cells=self.cells,
        )


@pytest.fixture(scope="module", params=["net", pytest.param("defence", marks=pytest.mark.slow)])
def evaluated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Measured]:
    given = request.getfixturevalue("defense") if request.param == "defence" else None
    made = Measured(request.param, tmp_path_factory.mktemp("cells"), given)
    return made.again(), made


def by_rule(found: Any, attacker: str, eps: float) -> dict[tuple[str, str, float], dict[str, Any]]:
    return {
        (one["defense"], one["score"], one["rate"]): one
        for one in found.abstention["records"]
        if (one["attacker"], one["eps"]) == (attacker, eps)
    }


def test_the_attack_that_must_be_accepted_is_never_weaker_than_the_images_that_were_there(evaluated: Any) -> None:
    found, made = evaluated
    for eps in (0.1, 0.2):
        clean, unaware, aware = (by_rule(found, *cell) for cell in (("clean", 0.0), ("unaware", eps), ("aware", eps)))
        assert len(clean) == len(unaware) == len(aware) == (3 if made.who == "net" else 2 * (1 + 4 * 2))
        for rule in clean:
            weaker = clean[rule]
            for stronger in (unaware[rule], aware[rule]):
                for name, lower, upper in (
                    ("accepted_wrong", weaker, stronger),
                    ("accepted_right", stronger, weaker),
                ):
                    assert not (from_hex(lower[name], 12) & ~from_hex(upper[name], 12)).any(), (rule, name)
                assert stronger["right"] + stronger["wrong"] + stronger["rejected"] == pytest.approx(1)
                weaker = stronger
    smaller, larger = by_rule(found, "aware", 0.1), by_rule(found, "aware", 0.2)
    assert all(smaller[rule]["wrong"] <= larger[rule]["wrong"] for rule in smaller)
    # A laxer threshold accepts all that a stricter one does.
    for (name, score, rate), one in larger.items():
        if rate == 0.1:
            assert one["wrong"] <= larger[name, score, 0.05]["wrong"]


def test_without_abstention_it_is_the_worst_case_of_the_ladder(evaluated: Any) -> None:
    found, _ = evaluated
    worst = {(one["defense"], one["eps"]): one for one in worst_cases([record.to_json() for record in found.records])}
    for eps in (0.1, 0.2):
        for (name, score, _), one in by_rule(found, "unaware", eps).items():
            if score == NOTHING:
                assert one["right"] == pytest.approx(worst[name, eps]["accuracy"])
                assert one["rejected"] == 0


def test_the_clean_outcomes_are_counted_by_hand(evaluated: Any) -> None:
    found, made = evaluated
    x, y = images("test", len(SHOWN))
    model, score = (trained(), net_score(trained())) if made.who == "net" else (made.defense, None)
    score = score or distance_score(made.defense)
    with torch.no_grad():
        wrong, values = model(x).argmax(1) != y, score.of(x)
    for rate in (0.05, 0.1):
        name = "none" if made.who == "net" else "nearest-neighbor"
        one = by_rule(found, "clean", 0.0)[name, score.name, rate]
        accepted = values <= one["threshold"]
        assert one["wrong"] == pytest.approx(float((wrong & accepted).float().mean()))
        assert one["rejected"] == pytest.approx(float((~accepted).float().mean()))
        low, high = one["rejected_ci"]
        assert low <= one["rejected"] <= high


def test_finished_cells_are_found_again_and_attack_nothing(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = evaluated
    attacked = []
    whole = measured.run_adaptive
    monkeypatch.setattr(measured, "run_adaptive", lambda *a, **s: attacked.append(s["eps"]) or whole(*a, **s))
    assert made.again().abstention == found.abstention
    assert not attacked
    # One that is lost is measured again from images that are made again, and is the same.
    (lost,) = made.cells.glob(f"abstain-{'none' if made.who == 'net' else 'nearest-neighbor'}-linf-0.2-*")
    lost.unlink()
    assert made.again().abstention == found.abstention
    assert set(attacked) <= {0.2}
    assert lost.exists()
    # Other held-out images give other thresholds: nothing of the old ones is taken.
    before = len([*made.cells.glob("abstain-*")])
    other = made.again(range(500, 540))
    assert other.abstention["held_out"]["fingerprint"] != found.abstention["held_out"]["fingerprint"]
    assert len([*made.cells.glob("abstain-*")]) == 2 * before


def test_the_report_shows_the_table_and_what_it_means(evaluated: Any) -> None:
    found, made = evaluated
    results = {
        "headline": {"norm": NORM, "eps": 0.2, "attack": "pgd"},
        "abstention": found.abstention,
    }
    page, text = abstention_section(results), abstention_text(results)
    more = ("disagreement", "retrieval margin", "distance") if made.who == "defence" else ()
    for words in ("What abstention is worth", "net margin", "At the other budgets", "no abstention", *more):
        assert words in page
    assert "No defence:" in text
    assert "under the attack that must be accepted" in text
    (line,) = [line for line in text.splitlines() if line.startswith("net margin at 5")][:1]
    assert len(line.split("%")[1].split()) == 7
    assert abstention_section({"headline": results["headline"]}) == ""
    json.dumps(found.abstention)


def test_a_detector_that_looks_perfect_falls_to_an_attack_that_knows_it() -> None:
    """In every digit some pixels are 0; a step by signs moves them, and one that knows of the detector need not."""
    train, (x, y) = digits("train"), images("test", 40)
    blank = train.batch(np.arange(len(train)))[0].amax(0) == 0
    blank &= x.amax(0) == 0
    assert blank.sum() >= 3

    def score(images: Tensor) -> Tensor:
        return images[:, blank].sum(1)

    net = trained()
    judge = Subject("none", net, "none")
    one = Abstainer(judge, net, [AbstentionScore("ink where none is", score, score)])
    settings = AttackSettings("pgd", NORM, (0.2,), 10)
    threat = ThreatModel("gray", net)
    shown = digits("test").subset(range(40))
    measure = Abstention(
        shown, train.subset(range(100)), [one], [threat], settings, torch.arange(10), "net", (0.05,), 20
    )
    made = run_attack(settings, net, x, y, 0.2, torch.Generator().manual_seed(0)).images
    measure.see(threat, settings, 0.2, made)
    found = {(r["attacker"], r["score"]): r for r in measure.measure()["records"]}
    assert found["clean", "ink where none is"]["rejected"] == 0
    plain = found["unaware", NOTHING]["wrong"]
    assert plain > 0.5
    assert found["unaware", "ink where none is"]["wrong"] < 0.1
    assert found["aware", "ink where none is"]["wrong"] > 0.9 * plain


# --- which images the thresholds are set on ---


def test_held_out_images_are_neither_reported_nor_in_the_database(defense: NearestNeighborDefense) -> None:
    shown, net = digits("test"), defense.classifier
    found = held_out(shown, defense, net, named=("digits:test",))
    assert found.name.startswith("digits:train")
    assert len(found) == len(digits("train")) - 300
    assert not {*found.ids} & {*defense.database.ids(defense.database.row_numbers)}
    some = found.ids[:30]
    assert set(held_out(shown, defense, net, calibrated_on=some).ids) == set(some)
    for dataset, of, message in (
        (shown, None, "no clean images are at hand"),
        (digits("train"), None, "no clean images are at hand"),
    ):
        with pytest.raises(DataError, match=message):
            held_out(dataset, of, net)
    with pytest.raises(DataError, match="use other images"):
        held_out(shown, defense, net, "digits:test")
    with pytest.raises(DataError, match="use other images"):
        held_out(shown, defense, net, "digits:train[:50]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"abstain": (0.0,)}, "above 0 and below 1"),
        ({"abstain": (), "abstain_on": "digits:train"}, "leave it out"),
        ({"abstain_steps": 0}, "abstain_steps is 0"),
    ],
)
def test_recipes_of_abstention_that_cannot_be_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(recipe(), **changes)


def test_a_run_that_abstains_needs_held_out_images() -> None:
    with pytest.raises(InputError, match="give held"):
        run(recipe("net"), digits("test").subset(range(4)), trained(), None, None)


def test_a_recipe_says_it_in_a_table() -> None:
    values = {
        "data": {"dataset": "digits:test"},
        "models": {"classifier": "net"},
        "report": {"headline_norm": NORM, "headline_eps": 0.1},
        "attack": [{"threat_model": "gray", "norm": NORM, "eps": 0.1}],
        "abstain": {"rates": [0.05, "1/10"], "dataset": "digits:train[:200]", "steps": 7},
    }
    read = recipe_from(values)
    assert (read.abstain, read.abstain_on, read.abstain_steps) == ((0.05, 0.1), "digits:train[:200]", 7)
    assert read.sha256 != replace(read, abstain=(0.05,)).sha256
