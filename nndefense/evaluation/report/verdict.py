"""What the numbers say in words."""

from __future__ import annotations

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.report.ladder import informed_record
from nndefense.evaluation.report.records import BARE, DEFENDED, Results, at_headline
from nndefense.reporting.wording import budget, number, percent


def verdict(results: Results) -> str:
    """What the run found, in one sentence that follows from the numbers.

    A difference counts only when the two 95 % intervals do not overlap. That is stricter than need be, as both
    accuracies are over the same images; it errs on the side of saying less.
    """
    return "".join(text for _, text in verdict_parts(results))


def verdict_parts(results: Results) -> list[tuple[str, str]]:
    """The verdict as (kind, text), where kind is ``"bare"`` or ``"defended"`` for its number, else ``""``."""
    headline = results["headline"]
    attack = f"{attack_name(str(headline['attack']))} at {budget(headline['norm'], headline['eps'])}"
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
        *_informed(results),
    ]


def _informed(results: Results) -> list[tuple[str, str]]:
    """What is left against attackers who know the database, where any was run."""
    found = informed_record(results)
    if found is None:
        return []
    return [
        ("", " Against attackers who know the database it gets "),
        ("defended", f"{percent(found['accuracy'])} %"),
        ("", "."),
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
