"""A comparison shown, from its results alone.

Tables of measured and printed figures side by side, never mixed; the figure of what a defence keeps against whom; and
one self-contained page with both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nndefense.evaluation.ladder import WORST, bits
from nndefense.files import write_bytes
from nndefense.locks import writes
from nndefense.reporting import (
    Cell,
    Table,
    charts,
    facts_list,
    figure,
    folded,
    inline,
    limits_list,
    page,
    paragraphs,
    picture,
    section,
)
from nndefense.reporting.wording import budget, date_text, escape, interval, number, percent, rough

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


TABLE, REPORT, FIGURE = "table.md", "report.html", "figure.png"
_SHOWS = "Accuracy of every defence, clean, under the attack that ignores it, and in the worst case"


@writes("out")
def write_comparison(results: Results, out: Path) -> list[Path]:
    """Write ``table.md``, ``figure.png`` and ``report.html`` into an existing folder; all follows from the results."""
    contents = {
        out / TABLE: markdown_of(results).encode(),
        out / FIGURE: picture(figure_of(results), "png"),
        out / REPORT: page_of(results).encode(),
    }
    for path, content in contents.items():
        write_bytes(path, content)
    return list(contents)


def page_of(results: Results) -> str:
    """The page as text: no script, no connection, style and figure inside it."""
    recipe, dataset, headline = results["recipe"], results["dataset"], results["headline"]
    printed, at = results["published"], budget(headline["norm"], headline["eps"])
    about = (
        f"Accuracy in % with the Wilson 95\u00a0% interval, at {at}. Gray box: the attack is computed on the bare net "
        "and ignores the defence. Black box: on a net that was trained apart. Knows the defence: computed through the "
        "defence itself, the strongest of the attacks. Worst case: images that survive all of them. The printed "
        f"figures ({printed['title']}: {printed['setting']}) are another experiment."
    )
    others = "".join(
        folded(budget(headline["norm"], eps), table_at(results, eps, published=False).html("plain dense wide"))
        for eps in budgets(results)[:-1]
        if eps > 0
    )
    left = unmatched(results)
    matched = f"<p>Printed rows that have no counterpart here:</p>{left.html('plain dense wide')}" if left.rows else ""
    defences = Table((), tuple((row.name, row.facts or row.cells["clean"].reason) for row in table_of(results)))
    sections = (
        section("", paragraphs(recipe["about"])),
        section("", figure(inline(figure_of(results), _SHOWS, summary_of(results)))),
        section("Measured", f"<p>{escape(about)}</p>{table_at(results).html('plain dense wide')}"),
        section("Where the informed attack is too weak", _weak(results)),
        section("Reading the printed figures", matched + limits_list(("", caveat) for caveat in printed["caveats"])),
        section("Other budgets", others),
        section("The defences", defences.html("plain dense wide")),
        section("What was run", _facts(results)),
    )
    title = f"{recipe['title']}: {dataset['name']}"
    facts = (f"{number(dataset['n'])} images of {dataset['name']}", at, date_text(results["created"]))
    return page(title, sections, facts=facts)


def _weak(results: Results) -> str:
    weak = weaker_than_ignorant(results)
    if not weak:
        return ""
    return paragraphs(
        f"Against {', '.join(weak)} the attack that knows the defence did worse than the one that ignores it, by more "
        "than chance. It could have ignored it too: only the worst case may be read there, and a stronger attack be "
        "tried."
    )


def _facts(results: Results) -> str:
    scope = results["recipe"]["scope"]
    rows = {
        "command": results["command"],
        "recipe": results["recipe"]["sha256"],
        "reported on": _images(results["dataset"]),
        "made from": _images(results["training_set"]),
        "classifier": _net(results["classifier"]),
        "surrogate": _net(results["surrogate"]) if results["surrogate"] else "none given",
        "attacks": f"gray and black box: PGD, {scope['steps']} steps, {scope['restarts']} start; through the defence: "
        f"PGD, {scope['white_steps']} steps, {scope['draws']} draws a step where it is random, and on a trained net "
        f"APGD-CE, APGD-T and Square; on retrieval: {scope['adaptive_steps']} steps",
        "seconds": f"{results['seconds']:,.0f} in the last process",
        "versions": ", ".join(f"{name} {value}" for name, value in results["versions"].items()),
    }
    return facts_list((name, escape(value)) for name, value in rows.items())


def _images(found: Results) -> str:
    return f"{found['name']}, {found['n']:,} images, {found['fingerprint']}"


def _net(found: Results) -> str:
    return f"{found['source']}, {found['arch']}, {found['fingerprint']}"


def figure_of(results: Results) -> Figure:
    """One line a defence: clean, gray box and worst case, with 95 % intervals."""
    rows = [row for row in table_of(results) if row.cells["clean"].accuracy is not None]
    figure, (axes,) = charts.panels(1, width=8.5, height=1.6 + 0.42 * len(rows), grid="x")
    for place, row in enumerate(reversed(rows)):
        gray, worst, clean = row.cells["gray"], row.cells["worst"], row.cells["clean"]
        if gray.accuracy is not None and worst.accuracy is not None:
            axes.plot([100 * worst.accuracy, 100 * gray.accuracy], [place, place], color=charts.GRID, lw=2, zorder=1)
        for cell, color, marker, label in (
            (clean, charts.CLEAN, "|", "clean images"),
            (gray, charts.DEFENDED, "o", "attack that ignores the defence"),
            (worst, charts.BARE, "D", "worst of all attacks on the defence"),
        ):
            if cell.accuracy is None or cell.low is None or cell.high is None:
                continue
            axes.errorbar(
                100 * cell.accuracy,
                place,
                xerr=charts.reaches([(cell.accuracy, cell.low, cell.high)]),
                fmt=marker,
                color=color,
                ms=9 if marker == "|" else 6,
                mew=2 if marker == "|" else 1,
                elinewidth=1,
                capsize=2,
                label=label,
                zorder=2,
            )
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set_xlim(-2, 102)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    headline = results["headline"]
    axes.set_xlabel(f"accuracy in %, {results['dataset']['n']:,} images, {budget(headline['norm'], headline['eps'])}")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(list(once.values()), list(once), loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure
