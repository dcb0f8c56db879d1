"""The files of a comparison: the table in Markdown, the figure, and one self-contained page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from nndefense.comparison.table import (
    Results,
    budgets,
    markdown_of,
    summary_of,
    table_at,
    table_of,
    unmatched,
    weaker_than_ignorant,
)
from nndefense.files import write_bytes
from nndefense.reporting import (
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
from nndefense.reporting.wording import budget, date_text, escape, number

TABLE, REPORT, FIGURE = "table.md", "report.html", "figure.png"
_SHOWS = "Accuracy of every defence, clean, under the attack that ignores it, and in the worst case"


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
        f"PGD, {scope['white_steps']} steps, {scope['draws']} draws a step where it is random; on retrieval: "
        f"{scope['adaptive_steps']} steps",
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
