"""The figure of an experiment, as a matplotlib figure; whoever asked for it decides where it is saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from nndefense.experiments.spread import Results, Spread, accuracy_of, clean_of, subjects_of
from nndefense.reporting import charts


def figure_of(results: Results) -> Figure:
    """Draw what the recipe of ``results`` asks for: ``bars`` of every threat, curves over ``labels``, or the ``gap``
    over labels.
    """
    return {"bars": _bars, "labels": _labels, "gap": _gap, "retrieval": _retrieval}[results["recipe"]["figure"]](
        results
    )


def _bars(results: Results) -> Figure:
    """Clean and robust accuracy of every method, side by side for every threat."""
    threats = results["threats"]
    methods = [method["name"] for method in results["recipe"]["methods"]]
    count = results["runs"][0]["labels"]
    figure, panels = charts.panels(2, width=max(7.2, 1.0 + 1.3 * len(threats) * 2))
    width = 0.8 / len(methods)
    for axes, of, title in zip(panels, (clean_of, accuracy_of), ("Standard accuracy", "Robust accuracy"), strict=True):
        for number, method in enumerate(methods):
            found = [of(results, method, count, threat["name"]) for threat in threats]
            places = np.arange(len(threats)) + (number - (len(methods) - 1) / 2) * width
            shown = [(place, one) for place, one in zip(places, found, strict=True) if one is not None]
            axes.bar(
                [place for place, _ in shown],
                [100 * one.mean for _, one in shown],
                width,
                yerr=charts.reaches([(one.mean, one.low, min(one.high, 1)) for _, one in shown]),
                label=method,
                color=charts.COLOURS[number % len(charts.COLOURS)],
                error_kw={"linewidth": 1, "capsize": 2},
            )
        axes.set_xticks(range(len(threats)), [threat["title"].replace(", ", ",\n") for threat in threats])
        axes.set(ylabel="%", title=title, ylim=(0, 100))
        axes.grid(axis="x", visible=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    return figure


def _labels(results: Results) -> Figure:
    """Standard and robust accuracy of every method against the number of labels."""
    counts = _counts(results)
    figure, panels = charts.panels(2)
    threat = results["threats"][0]
    for axes, of, title in zip(panels, (clean_of, accuracy_of), ("Standard accuracy", "Robust accuracy"), strict=True):
        for number, method in enumerate(results["recipe"]["methods"]):
            found = [of(results, method["name"], count, threat["name"]) for count in counts]
            _curve(axes, counts, found, number, method["name"])
        axes.set(xscale="log", xlabel="labelled images", ylabel="%", title=title)
        _count_ticks(axes, counts)
    figure.suptitle(f"Attack: {threat['title']}", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _gap(results: Results) -> Figure:
    """Standard error of the compared methods, and its difference in points, against the number of labels."""
    counts = _counts(results)
    first, second = results["recipe"]["compare"][0]
    figure, (left, right) = charts.panels(2)
    standard = [clean_of(results, first, count, results["threats"][0]["name"]) for count in counts]
    _curve(left, counts, [_error(one) for one in standard], 0, first)
    for number, threat in enumerate(results["threats"], 1):
        found = [_error(clean_of(results, second, count, threat["name"])) for count in counts]
        _curve(left, counts, found, number, f"{second}, {threat['title']}")
        rows = {
            row["labels"]: row["standard"]
            for row in results["differences"]
            if (row["first"], row["second"], row["threat"]) == (first, second, threat["name"])
        }
        gaps = [Spread(**{**rows[count], "values": tuple(rows[count]["values"])}) if count in rows else None
                for count in counts]  # fmt: skip
        _curve(right, counts, gaps, number, threat["title"])
    left.set(xscale="log", yscale="log", xlabel="labelled images", ylabel="%", title="Standard error")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="labelled images", ylabel="points", title=f"Standard error: {second} − {first}")
    left.legend(frameon=False)
    right.legend(frameon=False)
    for axes in (left, right):
        _count_ticks(axes, counts)
    # Errors seldom span a decade, and without a power of ten in sight a log axis has no numbers.
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    left.yaxis.set_major_formatter("{x:g}")
    return figure


def _retrieval(results: Results) -> Figure:
    """A line for each net and form, from robust to clean accuracy at the first threat; and accuracies over rows."""
    threat, count = results["threats"][0], results["runs"][0]["labels"]
    sizes = {rows for form in results["recipe"]["forms"] for rows in form["rows"]}
    names = [name for name in subjects_of(results) if not name.endswith(" rows)")]
    figure, panels = charts.panels(2 if len(sizes) > 1 else 1, height=1.4 + 0.32 * len(names), grid="x")
    axes = panels[0]
    for place, name in enumerate(reversed(names)):
        clean, robust = (of(results, name, count, threat["name"]) for of in (clean_of, accuracy_of))
        if clean is None or robust is None:
            continue
        colour = charts.DEFENDED if " + " in name else charts.BARE
        axes.plot([100 * robust.mean, 100 * clean.mean], [place, place], color=charts.CLEAN, linewidth=1)
        for one, marker in ((clean, "o"), (robust, "s")):
            low, high = charts.reaches([(one.mean, one.low, min(one.high, 1))])
            axes.errorbar(100 * one.mean, place, xerr=[low, high], fmt=marker, markersize=5, color=colour, capsize=2,
                          markerfacecolor="white" if marker == "o" else colour)  # fmt: skip
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set(xlim=(0, 102), xlabel=f"%; filled: worst under {threat['title']}, hollow: clean")
    if len(sizes) > 1:
        _over_rows(panels[1], results, threat["name"], count)
    return figure


def _over_rows(axes: Axes, results: Results, threat: str, count: int) -> None:
    """Robust and clean accuracy of every form that has several sizes, against the number of rows."""
    recipe, number = results["recipe"], 0
    shown: set[int] = set()
    for form in recipe["forms"]:
        if len(form["rows"]) < 2:
            continue
        for method in form["of"] or [one["name"] for one in recipe["methods"]]:
            base = f"{method} + {form['name']}"
            titles = {rows or count: base + (f" ({rows:,} rows)" if rows else "") for rows in form["rows"]}
            rows = sorted(titles)
            found = [accuracy_of(results, titles[one], count, threat) for one in rows]
            # A little apart, so that no interval hides another.
            _curve(axes, [one * 1.03**number for one in rows], found, number, base)
            shown.update(rows)
            number += 1
    axes.grid(axis="y", color=charts.GRID, linewidth=0.7)
    axes.set(xscale="log", xlabel="rows of the database", ylabel="worst case, %")
    _count_ticks(axes, sorted(shown))
    axes.legend(frameon=False, fontsize=8)


def _curve(axes: Axes, counts: Sequence[float], found: list[Spread | None], number: int, label: str) -> None:
    """A line with its intervals; single seeds as faint points."""
    shown = [(count, one) for count, one in zip(counts, found, strict=True) if one is not None]
    charts.curve(
        axes, [count for count, _ in shown], [(one.mean, one.low, one.high) for _, one in shown], number, label
    )
    for count, one in shown:
        if len(one.values) > 1:
            axes.plot(
                [count] * len(one.values), [100 * v for v in one.values], ".", color=charts.COLOURS[number], alpha=0.4
            )


def _error(one: Spread | None) -> Spread | None:
    if one is None:
        return None
    # A logarithmic axis has no room for an error of 0.
    mean, low, high, *values = (max(1 - value, 1e-4) for value in (one.mean, one.high, one.low, *one.values))
    return Spread(mean, low, high, tuple(values), one.over)


def _counts(results: Results) -> list[int]:
    return sorted({run["labels"] for run in results["runs"]})


def _count_ticks(axes: Axes, counts: list[int]) -> None:
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
