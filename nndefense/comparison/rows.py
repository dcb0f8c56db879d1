"""What a comparison found, from its results alone: its rows, measured and printed side by side, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nndefense.evaluation.ladder import BARE, WORST, Paired, bits, paired
from nndefense.reporting import Cell, Table
from nndefense.reporting.wording import interval, number, p_text, percent, rough

Results = Mapping[str, Any]

#: The measured columns: threat models, of several the strongest attack.
COLUMNS: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "gray": ("gray",),
    "black": ("black",),
    "informed": ("white", "adaptive"),
    "worst": (WORST,),
}
HEADS = ("clean", "gray box", "black box", "knows the defence", "worst case")
PUBLISHED_COLUMNS = ("clean", "gray", "black")
_ATTACKS = {
    "pgd": "PGD through it",
    "eot": "EOT-PGD through it",
    "adaptive": "attacks on retrieval",
    "apgd-square": "APGD-CE, APGD-T, Square",
}


@dataclass(frozen=True)
class Measured:
    """An accuracy in [0, 1] with its 95 % interval, or None with the reason why there is none.

    Attributes:
        accuracy, low, high: None where it was not measured; a printed accuracy has no interval.
        reason: why not.
        attack: which attack it was, where several were tried.
    """

    accuracy: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    attack: str = ""

    def cell(self) -> Cell:
        """As it stands in a table."""
        if self.accuracy is None:
            return Cell(reason=self.reason)
        about = "" if self.low is None or self.high is None else interval(self.low, self.high)
        return Cell(percent(self.accuracy), about, self.attack)


@dataclass(frozen=True)
class TableRow:
    """One defence.

    Attributes:
        name: of the recipe.
        cells: by the names of :data:`COLUMNS`.
        published: the printed figures of :data:`PUBLISHED_COLUMNS`, each with a reason where there is none.
        time: milliseconds of one prediction, by the clean images, as text.
        facts: of the defence, as text.
    """

    name: str
    cells: dict[str, Measured]
    published: dict[str, Measured]
    time: str
    facts: str


def table_of(results: Results, eps: float | None = None) -> list[TableRow]:
    """The rows of the table of ``results`` at one budget ``eps``, by default the headline's."""
    budget = results["headline"]["eps"] if eps is None else eps
    return [_row(results, row, budget) for row in results["rows"]]


def budgets(results: Results) -> list[float]:
    """The budgets that were run, the headline last."""
    headline = results["headline"]["eps"]
    found = {record["eps"] for record in results["records"] if record["norm"] == results["headline"]["norm"]}
    return sorted(eps for eps in found if eps != headline) + [headline]


def weaker_than_ignorant(results: Results) -> list[str]:
    """The defences against which attackers who know them did worse, by more than chance, than those who do not.

    An attacker who knows a defence can always ignore it. Where his accuracy stands above the other's interval, his
    attack is too weak, and only the worst case may be read.
    """
    found = []
    for row in table_of(results):
        informed, gray = row.cells["informed"], row.cells["gray"]
        if None not in (informed.accuracy, gray.high) and informed.accuracy > gray.high:  # type: ignore[operator]
            found.append(row.name)
    return found


def _row(results: Results, row: Mapping[str, Any], eps: float) -> TableRow:
    records = [record for record in results["records"] if record["defense"] == row["record"]]
    cells = {column: _cell(results, row, records, models, eps) for column, models in COLUMNS.items()}
    published = results["published"]["rows"].get(row["published"])
    took = [1000 * record["seconds"] / record["n"] for record in records if record["threat_model"] == "clean"]
    facts = ", ".join(f"{name} {_plain(value)}" for name, value in row["facts"].items() if name != "seconds to make")
    return TableRow(
        row["name"],
        cells,
        {column: _printed(published, column) for column in PUBLISHED_COLUMNS},
        rough(took[0]) if took else "",
        facts,
    )


def _cell(
    results: Results, row: Mapping[str, Any], records: list[Any], models: tuple[str, ...], eps: float
) -> Measured:
    if row["reason"]:
        return Measured(None, reason=row["reason"])
    found = [
        record
        for record in records
        if record["threat_model"] in models
        and (record["threat_model"] == "clean" or math.isclose(record["eps"], eps, rel_tol=1e-9))
    ]
    if found:
        least = min(found, key=lambda record: float(record["accuracy"]))
        # Of the gray and the black box there is one attack; the informed have several.
        attack = _ATTACKS.get(least["attack"], least["attack"]) if "white" in models else ""
        if least.get("draw_seeds") and least["threat_model"] != WORST:
            most = f"right on most draws: {percent(float(bits(least).mean()))}"
            attack = f"{attack}; {most}" if attack else most
        return Measured(least["accuracy"], least["ci_low"], least["ci_high"], attack=attack)
    if "black" in models and results["surrogate"] is None:
        return Measured(None, reason="no surrogate was given")
    if row["informed"]:
        return Measured(None, reason="not run at this budget")
    return Measured(None, reason="not run for this row")


def _printed(published: Mapping[str, Any] | None, column: str) -> Measured:
    if published is None:
        return Measured(None, reason="not in the table")
    if published[column] is None:
        return Measured(None, reason="blank in the table")
    return Measured(published[column])


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table_at(results: Results, eps: float | None = None, *, published: bool = True) -> Table:
    """The table at one budget, by default the headline's, with or without the printed figures."""
    printed = PUBLISHED_COLUMNS if published else ()
    rows: list[tuple[str | Cell, ...]] = []
    for row in table_of(results, eps):
        measured = (row.cells[column].cell() for column in COLUMNS)
        rows.append((row.name, *measured, row.time, *(row.published[column].cell() for column in printed)))
    return Table(("defence", *HEADS, "ms an image", *(f"printed: {column}" for column in printed)), tuple(rows))


def unmatched(results: Results) -> Table:
    """The printed rows beside which nothing was measured."""
    taken = {row["published"] for row in results["rows"]}
    rows = [row for name, row in results["published"]["rows"].items() if name not in taken]
    return Table(
        ("printed row", *PUBLISHED_COLUMNS),
        tuple((row["name"], *(_printed(row, column).cell() for column in PUBLISHED_COLUMNS)) for row in rows),
    )


def verdict_parts(results: Results) -> list[tuple[str, str]]:
    """What the table shows, as (kind, text): kind is ``"bare"`` or ``"defended"`` for a number, else ``""``.

    The row that keeps most under the attack that ignores it and the one that keeps most in its own worst case, beside
    the bare net and by a paired test; empty where the worst case of the bare net or of all others was not measured.
    """
    rows = [row for row in table_of(results) if row.cells["worst"].accuracy is not None]
    records = {row["name"]: row["record"] for row in results["rows"]}
    bare = next((row for row in rows if records[row.name] == BARE), None)
    others = [row for row in rows if row is not bare]
    if bare is None or not others:
        return []
    held, best = (max(others, key=lambda row: row.cells[column].accuracy or 0) for column in ("gray", "worst"))
    pair = _in_the_worst_case(results, records[best.name])
    most = ", too, it keeps the most:" if best is held else f", {best.name} keeps the most:"
    none = " no defence is shown to keep more than the bare net: at most"
    return [
        ("", f"Under the attack that ignores it {held.name} keeps "),
        ("defended", f"{percent(held.cells['gray'].accuracy)} %"),
        ("", f" of {number(results['dataset']['n'])} images and the bare net "),
        ("bare", f"{percent(bare.cells['gray'].accuracy)} %"),
        ("", f". In the worst case of all attacks{most if pair.better else none} "),
        ("defended", f"{percent(best.cells['worst'].accuracy)} %"),
        ("", ", and the bare net "),
        ("bare", f"{percent(bare.cells['worst'].accuracy)} %"),
        ("", "." if pair.better else f" (p = {p_text(pair.p)})."),
    ]


def _in_the_worst_case(results: Results, name: str) -> Paired:
    """A defence against the bare net, each in its own worst case at the headline budget."""
    headline = results["headline"]
    found = {
        record["defense"]: record
        for record in results["records"]
        if record["threat_model"] == WORST and math.isclose(record["eps"], headline["eps"], rel_tol=1e-9)
    }
    return paired(found[name], found[BARE])
