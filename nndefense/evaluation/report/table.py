"""The main table: accuracy of each defence, clean and under attack, at the headline budget."""

from __future__ import annotations

from dataclasses import dataclass

from nndefense.evaluation.report.records import BARE, DEFENDED, Results, at_headline, records_of, under_attack
from nndefense.evaluation.report.wording import (
    attack_name,
    escape,
    headline_raw,
    norm_name,
    number,
    percent,
    settings_text,
    weighting_name,
)

THREAT_MODELS = ("clean", "gray", "black")


@dataclass(frozen=True)
class Cell:
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
    clean: Cell
    gray: Cell
    black: Cell

    @property
    def cells(self) -> tuple[Cell, Cell, Cell]:
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


def _cell(results: Results, defense: str, threat_model: str) -> Cell:
    record = at_headline(results, defense, threat_model)
    if record is not None:
        interval = (float(record["ci_low"]), float(record["ci_high"]))
        return Cell(float(record["accuracy"]), interval, int(record["n"]), "")
    if threat_model == "black" and results.get("surrogate") is None:
        return Cell(None, None, None, "no surrogate given")
    if threat_model != "clean" and under_attack(results, defense, threat_model):
        return Cell(None, None, None, "not run at this budget")
    return Cell(None, None, None, "not run")


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
    }
    body, group = [], ""
    for row in rows:
        kind = {BARE: "none", DEFENDED: "chosen"}.get(row.defense, "variant")
        if kind == "variant" and row.variant != group:
            group = row.variant
            heading = headings.get(group, group.capitalize() or "Other defences")
            body.append(f'<tr class="group"><th colspan="4" scope="colgroup">{escape(heading)}</th></tr>')
        note = settings_text(results) if row.defense == DEFENDED else ""
        note = f'<span class="settings">{escape(note)}</span>' if note else ""
        cells = "".join(_cell_html(cell) for cell in row.cells)
        body.append(f'<tr class="{kind}"><th scope="row">{escape(row.label)}{note}</th>{cells}</tr>')
    counts = sorted({cell.n for row in rows for cell in row.cells if cell.n is not None})
    if not counts:
        over = "no images"
    elif len(counts) == 1:
        over = f"all {number(counts[0])} images"
    else:
        over = f"{number(counts[0])} to {number(counts[-1])} images"
    attack = f"{attack_name(str(headline['attack']))}, {norm_name(str(headline['norm']))} {number(headline['eps'])}"
    raw = headline_raw(results)
    return f"""<section id="accuracy">
<h2>Accuracy with and without the defence</h2>
<div class="scroll"><table class="main">
<caption>Accuracy in % over {over}, also those that were wrong before the attack, with the Wilson 95\u00a0% interval.
Attack: {escape(attack)}{escape(raw)}.</caption>
<thead><tr><td></td><th scope="col">Clean</th><th scope="col">Gray box</th><th scope="col">Black box</th></tr></thead>
<tbody>
{chr(10).join(body)}
</tbody></table></div>
<p class="key"><b>Gray box:</b> the attack is computed on the classifier itself, with its weights, and ignores the
retrieval. <b>Black box:</b> {transfer} Where a cell was measured more than once, the lowest accuracy is shown.</p>
</section>"""


def _cell_html(cell: Cell) -> str:
    if cell.accuracy is None or cell.ci is None:
        return f'<td class="blank"><span aria-hidden="true">–</span><span class="why">{escape(cell.reason)}</span></td>'
    low, high = (max(0.0, min(1.0, bound)) for bound in cell.ci)
    strip = f"--at:{100 * cell.accuracy:.2f}%;--lo:{100 * low:.2f}%;--to:{100 * (high - low):.2f}%"
    return (
        f'<td><span class="num">{percent(cell.accuracy)}</span>'
        f'<span class="ci">{percent(low)}–{percent(high)}</span>'
        f'<span class="strip" style="{strip}" aria-hidden="true"></span></td>'
    )
