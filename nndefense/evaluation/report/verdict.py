"""The verdict: what a run found, in sentences that follow from its numbers.

Whether a difference counts is asked of the outcomes image by image (McNemar's exact test), never of two intervals: both
accuracies are over the same images.
"""

from __future__ import annotations

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.ladder import BARE, DEFENDED, INFORMED, WORST, Paired, paired
from nndefense.evaluation.report.records import Record, Results, at_headline, open_images
from nndefense.reporting.wording import budget, number, p_text, percent


def verdict(results: Results) -> str:
    """What the run of ``results`` found, in a sentence or two."""
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
    pair = paired(defended, bare)
    if pair.worse:
        before, after = "with the nearest-neighbour defence it gets only ", f": here the defence hurts{costs}."
    elif not pair.better:
        after = f", which may be chance ({_p(pair)}): this run does not show that the defence helps{costs}."
    return [
        ("", f"Under {threat_model}-box {attack} the bare classifier gets "),
        ("bare", f"{percent(bare['accuracy'])} %"),
        ("", f" of {number(bare['n'])} images right; {before}"),
        ("defended", f"{percent(defended['accuracy'])} %"),
        ("", after),
        *_against_who_knows(results),
    ]


def _against_who_knows(results: Results) -> list[tuple[str, str]]:
    """What is left against attackers who know the database, where any was run."""
    known = informed_record(results)
    if known is None:
        return []
    gain = gain_left(results)
    end = ", and is worse than no defence." if gain is not None and gain.worse else "."
    if known["threat_model"] == "exact" and not open_images(known):
        end = f", which no attack can lower{end}"
    left = f"{percent(known['accuracy'])} %"
    return [("", " Against attackers who know the database it gets "), ("defended", left), ("", end)]


def _clean_cost(results: Results) -> tuple[str, str]:
    """The price in clean accuracy, as it reads after good news (", at a cost of") and after bad ("; it costs")."""
    bare, defended = (at_headline(results, defense, "clean") for defense in (BARE, DEFENDED))
    if bare is None or defended is None:
        return "; its clean accuracy was not measured", "; its clean accuracy was not measured"
    points = 100 * (bare["accuracy"] - defended["accuracy"])
    pair = paired(defended, bare)
    chance = "" if pair.better or pair.worse else f" (which may be chance, {_p(pair)})"
    if abs(points) < 0.05:
        return ", at no cost in clean accuracy", "; clean accuracy stays the same"
    unit = f"{abs(points):.1f} points"
    if points > 0:
        return f", at a cost of {unit} of clean accuracy{chance}", f"; it costs {unit} of clean accuracy{chance}"
    return f", and {unit} more on clean images{chance}", f"; it gets {unit} more on clean images{chance}"


def informed_record(results: Results) -> Record | None:
    """The lowest accuracy of the defence at the headline budget under attackers who know the database.

    The exact one where an attack reaches it: it says more.
    """
    known = [at_headline(results, DEFENDED, name) for name in INFORMED]
    found = [record for record in known if record is not None]
    return min(found, key=lambda r: (float(r["accuracy"]), r["threat_model"] != "exact"), default=None)


def gain_left(results: Results) -> Paired | None:
    """The defence against no defence, each in its own worst case at the headline budget; None where one is missing."""
    bare, defended = (at_headline(results, defense, WORST) for defense in (BARE, DEFENDED))
    return paired(defended, bare) if bare is not None and defended is not None else None


def obscurity(results: Results, *, after: bool = False) -> str:
    """What becomes of the gain in ``results`` once the attacker knows of the retrieval; ``""`` where not measured.

    ``after`` is for a place behind the verdict, which has said already what is left.
    The gain is counted against the bare net's own worst case; part of it is obscurity where more images are lost from
    the gray box to the attackers who know the database than chance explains.
    """
    bare, gray = at_headline(results, BARE, WORST), at_headline(results, DEFENDED, "gray", any_attack=True)
    informed, left = informed_record(results), gain_left(results)
    if bare is None or gray is None or informed is None or left is None:
        return ""
    before, change = paired(gray, bare), paired(informed, gray)
    kept = (left.won - left.lost) / max(before.won - before.lost, 1)
    if left.worse:
        end = ": it is worse than no defence."
    elif not left.better:
        hidden = ", and what it gains under the gray-box attack is obscurity" if before.better else ""
        end = f": no gain is left that this run can show{hidden}."
    else:
        said = "mostly obscurity" if kept < 0.5 and change.worse else "not obscurity alone"
        end = f". That is {percent(kept, 0)} % of its gain under the gray-box attack: the gain is {said}."
    right = round(gray["accuracy"] * gray["n"])
    left_over = f"Attackers who know the database leave the defence {percent(informed['accuracy'])} %: of the"
    return (
        f"{'To them, of the' if after else left_over} {number(right)} "
        f"images that it gets right under the gray-box attack it loses {number(change.lost)}, and wins "
        f"{number(change.won)} others. Each in its own worst case, it gets {number(left.won)} images right that fall "
        f"without it, and loses {number(left.lost)} that stand without it ({_p(left)}){end}"
    )


def _p(pair: Paired) -> str:
    text = p_text(pair.p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
