"""The table of a comparison, from its results alone: measured and published figures side by side, never mixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nndefense.evaluation.ladder import WORST
from nndefense.reporting import Cell, Table
from nndefense.reporting.wording import budget, interval, percent, rough

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
_ATTACKS = {"pgd": "PGD through it", "adaptive": "attacks on retrieval"}


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
    """The rows of the table at one budget, by default the headline's."""
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
        return Measured(least["accuracy"], least["ci_low"], least["ci_high"], attack=attack)
    if "black" in models and results["surrogate"] is None:
        return Measured(None, reason="no surrogate was given")
    if "white" in models and row["kind"] == "none":
        return Measured(None, reason="its gray box knows all there is")
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


def markdown_of(results: Results) -> str:
    """The table in Markdown, with the printed rows that have no counterpart and the caveats."""
    headline, dataset, printed = results["headline"], results["dataset"], results["published"]
    parts = [
        f"# {results['recipe']['title']}: {dataset['name']}\n",
        f"Accuracy in % on {dataset['n']:,} images with the Wilson 95 % interval, "
        f"{budget(headline['norm'], headline['eps'])}. *Printed*: {printed['title']}; {printed['setting']}: another "
        "experiment.\n",
        table_at(results).markdown(),
    ]
    if weak := weaker_than_ignorant(results):
        parts.append(
            f"Attackers who know it did worse than those who do not against {', '.join(weak)}: read the worst case "
            "there.\n"
        )
    parts += ["Printed rows without a counterpart here:\n", unmatched(results).markdown()]
    parts += ["Of the printed figures:\n", "".join(f"- {caveat}\n" for caveat in printed["caveats"])]
    return "\n".join(parts)


def summary_of(results: Results) -> str:
    """The measured accuracies for a terminal, without intervals."""
    rows: list[tuple[str, ...]] = []
    for row in table_of(results):
        reason = row.cells["clean"].reason
        shares = [percent(row.cells[column].accuracy) for column in COLUMNS]
        rows.append((row.name, *shares, f"({reason})" if reason else ""))
    return Table(("", *COLUMNS, ""), tuple(rows)).text()
