"""What abstaining is worth, as a table: accepted and right, accepted and wrong, and rejected."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nndefense.evaluation.abstention import NOTHING
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.evaluation.report.records import Record, Results
from nndefense.reporting import Cell, Table, folded, section
from nndefense.reporting.wording import budget, escape, interval, number, percent

_COLUMNS = ("", "clean: right", "wrong", "rejected", "unaware: wrong", "aware: right", "wrong", "rejected")


def abstention_section(results: Results) -> str:
    """The table at the headline budget, behind it those of the others; ``""`` where it was not measured."""
    if not results.get("abstention"):
        return ""
    headline = results["headline"]
    held = results["abstention"]["held_out"]
    about = (
        f"Thresholds are set on {number(held['n'])} clean images that are not reported ({held['name']}). An image "
        "counts as accepted and wrong where any attacked image within the budget is, the clean one included; as "
        "accepted and right where every one is; and as rejected otherwise. Unaware are the attacks of the ladder; "
        "the aware one knows score and threshold, starts from theirs, and must be accepted."
    )
    here = (str(headline["norm"]), float(headline["eps"]))
    others = [one for one in _budgets(results) if not _same(one, here)]
    more = "\n".join(_table(results, *one).html("plain abstention", _caption(*one)) for one in others)
    content = f"<p>{escape(about)}</p>\n<p>{escape(abstention_verdict(results))}</p>\n"
    content += _table(results, *here).html("plain abstention", _caption(*here))
    return section(
        "What abstention is worth", content + (folded("At the other budgets", more) if more else ""), "abstain"
    )


def abstention_text(results: Results) -> str:
    """The table at the headline budget for a terminal, and what follows from it; ``""`` where it was not measured."""
    if not results.get("abstention"):
        return ""
    headline = results["headline"]
    table = _table(results, str(headline["norm"]), float(headline["eps"]), intervals=False)
    lines = [row if len(row) > 1 else (*row, *("" for _ in _COLUMNS[1:])) for row in table.rows]
    title = "what abstention is worth, in % of all images: accepted and right, accepted and wrong, rejected"
    return f"{Table(_COLUMNS, tuple(lines), title).text()}\n{abstention_verdict(results)}"


def abstention_verdict(results: Results) -> str:
    """For each defence the score under which fewest wrong answers are accepted at the headline budget, and how many."""
    headline = results["headline"]
    said = []
    for name, label in _names(results).items():
        at = {
            who: _records(results, name, who, str(headline["norm"]), float(headline["eps"]))
            for who in ("unaware", "aware")
        }
        plain = next((one for one in at["unaware"] if one["score"] == NOTHING), None)
        rated = [one for one in at["aware"] if one["score"] != NOTHING]
        if plain is None or not rated:
            continue
        best = min(rated, key=lambda one: (float(one["wrong"]), float(one["rate"])))
        before = next(one for one in at["unaware"] if (one["score"], one["rate"]) == (best["score"], best["rate"]))
        said.append(
            f"{label[0].upper()}{label[1:]}: {percent(plain['wrong'])} % of the answers are wrong without abstention; "
            f"the best of these scores, {best['score']} at {100 * best['rate']:g} %, accepts "
            f"{percent(before['wrong'])} % wrong ones under attacks that ignore it, and {percent(best['wrong'])} % "
            "under the attack that must be accepted."
        )
    return " ".join(said)


def _same(one: tuple[str, float], other: tuple[str, float]) -> bool:
    return one[0] == other[0] and math.isclose(one[1], other[1], rel_tol=1e-6)


def _caption(norm: str, eps: float) -> str:
    return f"In % of all images (95\u00a0% interval), at {budget(norm, eps)}, by score and clean rejection rate."


def _names(results: Results) -> dict[str, str]:
    known = {BARE: "no defence", DEFENDED: "nearest neighbours"}
    names = dict.fromkeys(str(one["defense"]) for one in results["abstention"]["records"])
    return {name: known.get(name, name) for name in names}


def _budgets(results: Results) -> list[tuple[str, float]]:
    found = ((str(one["norm"]), float(one["eps"])) for one in results["abstention"]["records"] if one["eps"])
    return list(dict.fromkeys(found))


def _records(results: Results, name: str, attacker: str, norm: str, eps: float) -> list[Record]:
    records: Sequence[Record] = results["abstention"]["records"]
    return [
        one
        for one in records
        if (one["defense"], one["attacker"]) == (name, attacker)
        and (attacker == "clean" or _same((one["norm"], one["eps"]), (norm, eps)))
    ]


def _table(results: Results, norm: str, eps: float, *, intervals: bool = True) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for name, label in _names(results).items():
        rows.append((label,))
        at = [_records(results, name, who, norm, eps) for who in ("clean", "unaware", "aware")]
        for clean, unaware, aware in zip(*at, strict=True):
            rate = f" at {100 * clean['rate']:g}\u00a0%" if clean["score"] != NOTHING else ""
            numbers = [(clean, part) for part in ("right", "wrong", "rejected")] + [(unaware, "wrong")]
            numbers += [(aware, part) for part in ("right", "wrong", "rejected")]
            cells = (
                Cell(percent(one[part]), interval(*one[f"{part}_ci"]) if intervals else "") for one, part in numbers
            )
            rows.append((f"{clean['score']}{rate}", *cells))
    return Table(_COLUMNS, tuple(rows))
