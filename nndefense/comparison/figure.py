"""The figure of a comparison: what a defence keeps against attackers who ignore it, and against those who know it."""

from __future__ import annotations

from matplotlib.figure import Figure

from nndefense.comparison.table import Results, table_of
from nndefense.reporting import charts
from nndefense.reporting.wording import budget


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
