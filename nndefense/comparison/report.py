"""A comparison shown, from its results alone.

Tables of measured and printed figures side by side, never mixed; the figure of what a defence keeps against whom; and
one self-contained page with both.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from nndefense.comparison.rows import (
    COLUMNS,
    Results,
    budgets,
    table_at,
    table_of,
    unmatched,
    verdict_parts,
    weaker_than_ignorant,
)
from nndefense.files import write_bytes
from nndefense.locks import writes
from nndefense.reporting import (
    Table,
    charts,
    facts_list,
    figure,
    fingerprint,
    folded,
    inline,
    limits_list,
    page,
    paragraphs,
    picture,
    section,
)
from nndefense.reporting.wording import budget, date_text, escape, number, percent


def markdown_of(results: Results) -> str:
    """The table of ``results`` in Markdown, with the printed rows that have no counterpart and the caveats."""
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
    """The measured accuracies of ``results`` for a terminal, without intervals."""
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
    """Write ``table.md``, ``figure.png`` and ``report.html`` into the folder ``out``; all follows from the results."""
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
        folded(budget(headline["norm"], eps), table_at(results, eps, published=False).html("plain dense wide stacked"))
        for eps in budgets(results)[:-1]
        if eps > 0
    )
    left = unmatched(results)
    matched = f"<p>Printed rows that have no counterpart here:</p>{left.html('plain dense wide')}" if left.rows else ""
    defences = Table((), tuple((row.name, row.facts or row.cells["clean"].reason) for row in table_of(results)))
    sections = (
        section("", paragraphs(recipe["about"])),
        section("", figure(_drawn(results))),
        section("Measured", f"<p>{escape(about)}</p>{table_at(results).html('plain dense wide stacked')}"),
        section("Where the informed attack is too weak", _weak(results)),
        section("Reading the printed figures", matched + limits_list(("", caveat) for caveat in printed["caveats"])),
        section("Other budgets", others),
        section("The defences", defences.html("plain dense wide")),
        section("What was run", _facts(results)),
    )
    title = f"{recipe['title']}: {dataset['name']}"
    facts = (f"{number(dataset['n'])} images of {dataset['name']}", at, date_text(results["created"]))
    lead = (
        "".join(
            f'<strong class="{kind}">{escape(text)}</strong>' if kind else escape(text)
            for kind, text in verdict_parts(results)
        )
        .replace(" %", "\u00a0%")
        .replace("p = ", "p\u00a0=\u00a0")
    )
    return page(title, sections, facts=facts, lead=f'<p class="verdict">{lead}</p>' if lead else "")


def _drawn(results: Results) -> str:
    """The figure for a page, and again for a narrow one."""
    wide, narrow = (
        inline(figure_of(results, narrow=one), _SHOWS, summary_of(results), name="narrow" if one else "figure")
        for one in (False, True)
    )
    return f'<div class="wide-only">{wide}</div><div class="narrow">{narrow}</div>'


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
        "command": escape(results["command"]),
        "recipe": fingerprint(results["recipe"]["sha256"]),
        "reported on": _images(results["dataset"]),
        "made from": _images(results["training_set"]),
        "classifier": _net(results["classifier"]),
        "surrogate": _net(results["surrogate"]) if results["surrogate"] else "none given",
        "attacks": f"gray and black box: PGD, {scope['steps']} steps, {scope['restarts']} start; through the defence: "
        f"PGD, {scope['white_steps']} steps, {scope['draws']} draws a step where it is random, and on a trained net "
        f"APGD-CE, APGD-T and Square; on retrieval: {scope['adaptive_steps']} steps",
        "seconds": f"{results['seconds']:,.0f} in the last process",
        "versions": escape(", ".join(f"{name} {value}" for name, value in results["versions"].items())),
    }
    return facts_list(rows.items())


def _images(found: Results) -> str:
    return f"{escape(found['name'])}, {found['n']:,} images, {fingerprint(found['fingerprint'])}"


def _net(found: Results) -> str:
    return f"{escape(found['source'])}, {escape(found['arch'])}, {fingerprint(found['fingerprint'])}"


def figure_of(results: Results, *, narrow: bool = False) -> Figure:
    """One line a defence: clean, gray box and worst case, with 95 % intervals; ``narrow``: names above the lines."""
    rows = [row for row in table_of(results) if row.cells["clean"].accuracy is not None]
    width, pitch = (4.4, 0.52) if narrow else (8.5, 0.42)
    figure, (axes,) = charts.panels(1, width=width, height=1.6 + pitch * len(rows), grid="x")
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
    names = [row.name for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), [""] * len(rows) if narrow else names)
    for place, name in enumerate(names if narrow else ()):
        axes.text(-2, place + 0.3, name, fontsize=9, va="center", parse_math=False)
    axes.set_xlim(-2, 102)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    headline = results["headline"]
    at = f"{results['dataset']['n']:,} images, {budget(headline['norm'], headline['eps'])}"
    axes.set_xlabel("accuracy in %" + ("\n" if narrow else ", ") + at)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(once.values()), list(once), loc="outside upper left", ncols=1 if narrow else 3, frameon=False, fontsize=9
    )
    return figure
