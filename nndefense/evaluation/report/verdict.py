"""What the numbers say in words: the verdict, and whether the attack was strong enough to support it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from nndefense.evaluation.report.records import BARE, DEFENDED, Record, Results, at_headline, under_attack
from nndefense.evaluation.report.wording import attack_name, norm_name, number, percent


def verdict(results: Results) -> str:
    """What the run found, in one sentence that follows from the numbers.

    A difference counts only when the two 95 % intervals do not overlap. That is stricter than need be, as both
    accuracies are over the same images; it errs on the side of saying less.
    """
    return "".join(text for _, text in verdict_parts(results))


def verdict_parts(results: Results) -> list[tuple[str, str]]:
    """The verdict as (kind, text), where kind is ``"bare"`` or ``"defended"`` for its number, else ``""``."""
    headline = results["headline"]
    attack = f"{attack_name(str(headline['attack']))} at {norm_name(str(headline['norm']))} {number(headline['eps'])}"
    for threat_model in ("gray", "black"):
        bare, defended = (at_headline(results, defense, threat_model) for defense in (BARE, DEFENDED))
        if bare is not None and defended is not None:
            break
    else:
        unknown = (
            f"This run has no accuracy under {attack} both with and without the defence, "
            "so it does not show whether the defence helps."
        )
        return [("", unknown)]
    cost, costs = _clean_cost(results)
    before, after = "the nearest-neighbour defence gets ", f" right{cost}."
    if defended["ci_high"] < bare["ci_low"]:
        before, after = "with the nearest-neighbour defence it gets only ", f": here the defence hurts{costs}."
    elif defended["ci_low"] <= bare["ci_high"]:
        after = f", and the 95 % intervals overlap: this run does not show that the defence helps{costs}."
    return [
        ("", f"Under {threat_model}-box {attack} the bare classifier gets "),
        ("bare", f"{percent(bare['accuracy'])} %"),
        ("", f" of {number(bare['n'])} images right; {before}"),
        ("defended", f"{percent(defended['accuracy'])} %"),
        ("", after),
    ]


def _clean_cost(results: Results) -> tuple[str, str]:
    """The price in clean accuracy, as it reads after good news (", at a cost of") and after bad ("; it costs")."""
    bare, defended = (at_headline(results, defense, "clean") for defense in (BARE, DEFENDED))
    if bare is None or defended is None:
        return "; its clean accuracy was not measured", "; its clean accuracy was not measured"
    points = 100 * (bare["accuracy"] - defended["accuracy"])
    overlap = defended["ci_low"] <= bare["ci_high"] and bare["ci_low"] <= defended["ci_high"]
    within = " (within the intervals)" if overlap else ""
    if abs(points) < 0.05:
        return ", at no cost in clean accuracy", "; clean accuracy stays the same"
    unit = f"{abs(points):.1f} points"
    if points > 0:
        return (
            f", at a cost of {unit} of clean accuracy{within}",
            f"; it costs {unit} of clean accuracy{within}",
        )
    return f", and {unit} more on clean images{within}", f"; it gets {unit} more on clean images{within}"


@dataclass(frozen=True)
class Check:
    """A sign that the attack was, or was not, strong enough; ``passed`` is None where the run cannot tell."""

    passed: bool | None
    text: str


def attack_checks(results: Results) -> list[Check]:
    """Signs of an attack that is too weak, which would flatter any defence (after Carlini et al. 2019)."""
    gray = under_attack(results, BARE, "gray")
    checks = [_reaches_chance(results, gray[-1])] if gray else []
    return [*checks, _falls_with_budget(results), _gray_beats_black(results)]


def _reaches_chance(results: Results, strongest: Record) -> Check:
    classes = len(results["dataset"].get("classes") or ())
    chance = 1 / classes if classes else 0.0
    text = (
        f"At the largest budget, ε {number(strongest['eps'])}, the gray-box attack leaves the bare classifier "
        f"{percent(strongest['accuracy'])} % (guessing: {percent(chance)} %)."
    )
    return Check(bool(strongest["ci_low"] <= chance), text)


def _falls_with_budget(results: Results) -> Check:
    rises = []
    for defense, name in ((BARE, "bare"), (DEFENDED, "defended")):
        for threat_model in ("gray", "black"):
            records = [record for record in under_attack(results, defense, threat_model) if record["eps"] > 0]
            for before, after in pairwise(records):
                if after["eps"] > before["eps"] and after["ci_low"] > before["ci_high"]:
                    rises.append(f"{name}, {threat_model} box, ε {number(before['eps'])} to {number(after['eps'])}")
    if rises:
        return Check(False, f"A larger budget raises an accuracy beyond its interval: {'; '.join(rises)}.")
    if len({record["eps"] for record in under_attack(results, BARE, "gray")}) > 1:
        return Check(True, "A larger budget never raises an accuracy beyond its interval.")
    return Check(None, "Whether a larger budget ever raises an accuracy: one budget was run.")


def _gray_beats_black(results: Results) -> Check:
    gray, black = (at_headline(results, BARE, threat_model) for threat_model in ("gray", "black"))
    if gray is None or black is None:
        return Check(None, "Whether gray box is at least as strong as black box: both were not run.")
    if gray["ci_low"] > black["ci_high"]:
        text = (
            f"Against the bare classifier the black-box attack is stronger ({percent(black['accuracy'])} %) than "
            f"the gray-box one ({percent(gray['accuracy'])} %): the gray-box attack is not converging."
        )
        return Check(False, text)
    text = (
        f"Against the bare classifier the gray-box attack is at least as strong as the black-box one: "
        f"{percent(gray['accuracy'])} % against {percent(black['accuracy'])} %."
    )
    return Check(True, text)
