"""The main table: accuracy of each defence, clean and under attack, at the headline budget."""

from __future__ import annotations

from dataclasses import dataclass

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.evaluation.report.records import (
    Results,
    at_headline,
    headline_raw,
    records_of,
    settings_text,
    under_attack,
)
from nndefense.reporting import Cell, Table, section
from nndefense.reporting.wording import budget, escape, interval, number, percent, weighting_name

THREAT_MODELS = ("clean", "gray", "black")


@dataclass(frozen=True)
class Accuracy:
    """An accuracy (fraction in [0, 1]) with its 95 % interval over ``n`` images, or None with the reason why not."""

    accuracy: float | None
    ci: tuple[float, float] | None
    n: int | None
    reason: str


@dataclass(frozen=True)
class Table2Row:
    """One defence of the main table. ``variant`` is the record's: what was varied, ``"calibrated"`` or ``""``."""

    defense: str
    variant: str
    label: str
    database_rows: int | None
    clean: Accuracy
    gray: Accuracy
    black: Accuracy

    @property
    def cells(self) -> tuple[Accuracy, Accuracy, Accuracy]:
        return self.clean, self.gray, self.black


def table2(results: Results) -> list[Table2Row]:
    """The main table, in the shape of Table 2 of Dubey et al. (2019): one row a defence, at the headline budget.

    Returns:
        no defence first, the calibrated defence second, then the variants in the order of their first record, kept
        together by what they vary and, for database sizes, ascending. A cell that was not run has accuracy None and
        says why.
    """
    variants: dict[str, str] = {BARE: "", DEFENDED: "calibrated"}
    for record in records_of(results):
        variants.setdefault(str(record["defense"]), str(record.get("variant") or ""))
    rows = [_table_row(results, defense, variant) for defense, variant in variants.items()]
    groups = list(dict.fromkeys(row.variant for row in rows[2:]))
    others = sorted(
        (row for row in rows[2:] if any(cell.accuracy is not None for cell in row.cells)),
        key=lambda row: (groups.index(row.variant), (row.database_rows or 0) if row.variant == "rows" else 0),
    )
    return [*rows[:2], *others]


def _table_row(results: Results, defense: str, variant: str) -> Table2Row:
    cells = {threat_model: _cell(results, defense, threat_model) for threat_model in THREAT_MODELS}
    sizes = [record.get("database_rows") for record in records_of(results) if record["defense"] == defense]
    rows = next((int(size) for size in sizes if size), None)
    inner = defense.partition("(")[2].rpartition(")")[0]
    if defense == BARE:
        label = "No defence"
    elif defense == DEFENDED:
        label = "Nearest neighbours" if results.get("calibration") is None else "Nearest neighbours, calibrated"
    elif variant == "rows" and rows is not None:
        label = f"{number(rows)} images"
    else:
        label = weighting_name(inner) or defense
    return Table2Row(defense, variant, label, rows if defense != BARE else None, **cells)


def _cell(results: Results, defense: str, threat_model: str) -> Accuracy:
    record = at_headline(results, defense, threat_model)
    if record is not None:
        interval = (float(record["ci_low"]), float(record["ci_high"]))
        return Accuracy(float(record["accuracy"]), interval, int(record["n"]), "")
    if threat_model == "black" and results.get("surrogate") is None:
        return Accuracy(None, None, None, "no surrogate given")
    if threat_model != "clean" and under_attack(results, defense, threat_model):
        return Accuracy(None, None, None, "not run at this budget")
    return Accuracy(None, None, None, "not run")


def table_section(results: Results) -> str:
    """The main table with its caption and key."""
    rows = table2(results)
    headline = results["headline"]
    surrogate = results.get("surrogate")
    transfer = (
        f"it is computed on another network, the surrogate ({escape(surrogate.get('source', ''))}), and carried over."
        if surrogate
        else "it would be computed on another network, a surrogate, and carried over; none was given."
    )
    headings = {
        "weighting": "Other weightings",
        "layer": "Other features",
        "rows": "Other database sizes",
        "k": "Other numbers of neighbours",
        "defense": "Other defences",
    }
    lines: list[tuple[str | Cell, ...]] = []
    kinds, group = [], ""
    for row in rows:
        kind = {BARE: "none", DEFENDED: "chosen"}.get(row.defense, "variant")
        if kind == "variant" and row.variant != group:
            group = row.variant
            lines.append((headings.get(group, group.capitalize() or "Other defences"),))
            kinds.append("group")
        below = settings_text(results) if row.defense == DEFENDED else ""
        lines.append((Cell(row.label, below=below), *map(_drawn, row.cells)))
        kinds.append(kind)
    table = Table(("", "Clean", "Gray box", "Black box"), tuple(lines), kinds=tuple(kinds))
    counts = sorted({cell.n for row in rows for cell in row.cells if cell.n is not None})
    if not counts:
        over = "no images"
    elif len(counts) == 1:
        over = f"all {number(counts[0])} images"
    else:
        over = f"{number(counts[0])} to {number(counts[-1])} images"
    attack = f"{attack_name(str(headline['attack']))}, {budget(headline['norm'], headline['eps'])}"
    caption = (
        f"Accuracy in % over {over}, also those that were wrong before the attack, with the Wilson 95\u00a0% interval. "
        f"Attack: {attack}{headline_raw(results)}."
    )
    key = f"""<p class="key"><b>Gray box:</b> the attack is computed on the classifier itself, with its weights, and
ignores the retrieval. <b>Black box:</b> {transfer} Where a cell was measured more than once, the lowest accuracy is
shown.</p>"""
    return section("Accuracy with and without the defence", f"{table.html('main', caption)}\n{key}", "accuracy")


def _drawn(cell: Accuracy) -> Cell:
    if cell.accuracy is None or cell.ci is None:
        return Cell(reason=cell.reason)
    low, high = (max(0.0, min(1.0, bound)) for bound in cell.ci)
    strip = f"--at:{100 * cell.accuracy:.2f}%;--lo:{100 * low:.2f}%;--to:{100 * (high - low):.2f}%"
    drawn = f'<span class="strip" style="{strip}" aria-hidden="true"></span>'
    return Cell(percent(cell.accuracy), interval(low, high), drawn=drawn)
