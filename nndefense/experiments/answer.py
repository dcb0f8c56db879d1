"""What a study of retrieval found, in plain sentences that follow from its numbers."""

from __future__ import annotations

from typing import Any

from nndefense.experiments.spread import Results
from nndefense.reporting.wording import points

QUESTION = "Does retrieval defend?"


def answer(results: Results) -> str:
    """The answer to :data:`QUESTION`, for an experiment with forms; each difference is first less second of a pair.

    A form defends where robust accuracy is higher by an interval above 0, and clean accuracy not lower by one below 0.
    """
    compared = results["differences"]
    if not compared:
        return "Nothing is compared in this run, so it has no answer."
    titles = {threat["name"]: threat["title"] for threat in results["threats"]}
    gains = [one for one in compared if one["robust"]["low"] > 0]
    paid = [one for one in gains if one["standard"]["high"] < 0]
    losses = [one for one in compared if one["robust"]["high"] < 0]
    free = [one for one in gains if one not in paid]
    of = f"of {len(compared)} comparisons" if len(compared) > 1 else "of the one comparison"
    if not free:
        head = (
            f"Not here: in none {of} does it add robust accuracy by an interval above 0 at no loss of clean accuracy."
        )
    else:
        head = f"In {len(free)} {of}: {_listed(free, titles)}."
    rest = []
    if paid:
        rest.append(f"At a loss of clean accuracy it adds robust accuracy in {len(paid)}: {_listed(paid, titles)}.")
    if losses:
        rest.append(f"It is less robust than what it is compared with in {len(losses)}: {_listed(losses, titles)}.")
    if len(compared) > 1 and gains:
        by_chance = 0.025 * len(compared)
        rest.append(f"Of so many intervals of 95 %, {by_chance:.2g} would lie above 0 by chance.")
    return " ".join([head, *rest])


def _listed(found: list[dict[str, Any]], titles: dict[str, str]) -> str:
    return "; ".join(
        f"{one['first']} against {one['second']} at {titles[one['threat']]}, "
        f"{points(one['robust']['mean'], one['robust']['low'], one['robust']['high'])} points"
        for one in found
    )
