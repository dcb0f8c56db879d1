"""The table of a comparison, from its results alone: measured and published figures side by side, never mixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nndefense.evaluation.ladder import WORST

Results = Mapping[str, Any]

#: The measured columns: threat models, of several the strongest attack.
COLUMNS: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "gray": ("gray",),
    "black": ("black",),
    "informed": ("white", "adaptive"),
    "worst": (WORST,),
}
PUBLISHED_COLUMNS = ("clean", "gray", "black")
_ATTACKS = {"pgd": "PGD through it", "adaptive": "attacks on retrieval"}


@dataclass(frozen=True)
class Cell:
    """An accuracy in [0, 1] with its 95 % interval, or None with the reason why there is none.

    Attributes:
        accuracy, low, high: None where it was not measured.
        reason: why not.
        attack: which attack it was, where several were tried.
    """

    accuracy: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    attack: str = ""


@dataclass(frozen=True)
class TableRow:
    """One defence.

    Attributes:
        name, kind: of the recipe.
        cells: by the names of :data:`COLUMNS`.
        published: the printed figures of :data:`PUBLISHED_COLUMNS`, each with a reason where there is none.
        note: on the printed row.
        milliseconds: of one prediction, by the clean images.
        facts: of the defence, as text.
    """

    name: str
    kind: str
    cells: dict[str, Cell]
    published: dict[str, Cell]
    note: str
    milliseconds: float | None
    facts: str

    @property
    def time(self) -> str:
        """The milliseconds as text, with two digits that count."""
        return "" if self.milliseconds is None else f"{float(f'{self.milliseconds:.2g}'):,.10g}"


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
    clean = next((record for record in records if record["threat_model"] == "clean"), None)
    facts = ", ".join(f"{name} {_plain(value)}" for name, value in row["facts"].items() if name != "seconds to make")
    return TableRow(
        row["name"],
        row["kind"],
        cells,
        {column: _printed(published, column) for column in PUBLISHED_COLUMNS},
        published["note"] if published else "",
        1000 * clean["seconds"] / clean["n"] if clean else None,
        facts,
    )


def _cell(results: Results, row: Mapping[str, Any], records: list[Any], models: tuple[str, ...], eps: float) -> Cell:
    if row["reason"]:
        return Cell(None, reason=row["reason"])
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
        return Cell(least["accuracy"], least["ci_low"], least["ci_high"], attack=attack)
    if "black" in models and results["surrogate"] is None:
        return Cell(None, reason="no surrogate was given")
    if "white" in models and row["kind"] == "none":
        return Cell(None, reason="its gray box knows all there is")
    if row["informed"]:
        return Cell(None, reason="not run at this budget")
    return Cell(None, reason="not run for this row")


def _printed(published: Mapping[str, Any] | None, column: str) -> Cell:
    if published is None:
        return Cell(None, reason="not in the table")
    if published[column] is None:
        return Cell(None, reason="blank in the table")
    return Cell(published[column])


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown_of(results: Results) -> str:
    """The table in Markdown, with the printed rows that have no counterpart and the caveats."""
    headline, dataset = results["headline"], results["dataset"]
    lines = [f"# {results['recipe']['title']}: {dataset['name']}", ""]
    lines += [
        f"Accuracy in % on {dataset['n']:,} images with the Wilson 95 % interval, {headline['norm']} "
        f"{headline['eps']:g}. *Printed*: {results['published']['title']}; {results['published']['setting']}: another "
        "experiment.",
        "",
        "| defence | clean | gray box | black box | knows the defence | worst case | ms an image "
        "| printed: clean | gray | black |",
        "| " + " | ".join(["---"] * 10) + " |",
    ]
    for row in table_of(results):
        cells = [_text(row.cells[column]) for column in COLUMNS]
        printed = [_short(row.published[column]) for column in PUBLISHED_COLUMNS]
        lines.append("| " + " | ".join([row.name, *cells, row.time, *printed]) + " |")
    weak = weaker_than_ignorant(results)
    if weak:
        lines += ["", f"Attackers who know it did worse than those who do not against {', '.join(weak)}: read the "
                      "worst case there."]  # fmt: skip
    lines += ["", "Printed rows without a counterpart here:", ""]
    lines += [f"- {_printed_row(row)}" for row in unmatched(results)]
    lines += ["", "Of the printed figures:", ""]
    lines += [f"- {caveat}" for caveat in results["published"]["caveats"]]
    return "\n".join(lines) + "\n"


def unmatched(results: Results) -> list[Mapping[str, Any]]:
    """The printed rows beside which nothing was measured."""
    taken = {row["published"] for row in results["rows"]}
    return [row for name, row in results["published"]["rows"].items() if name not in taken]


def _printed_row(row: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{column} {_short(_printed(row, column))}" for column in PUBLISHED_COLUMNS)
    return f"{row['name']}: {figures}"


def _text(cell: Cell) -> str:
    if cell.accuracy is None or cell.low is None or cell.high is None:
        return f"– ({cell.reason})"
    return f"{100 * cell.accuracy:.1f} ({100 * cell.low:.1f}-{100 * cell.high:.1f})"


def _short(cell: Cell) -> str:
    return f"– ({cell.reason})" if cell.accuracy is None else f"{100 * cell.accuracy:.1f}"
