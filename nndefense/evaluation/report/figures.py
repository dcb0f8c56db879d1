"""The figures: accuracy against the budget of the attack and against the size of the database."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.ladder import BARE, DEFENDED, INFORMED
from nndefense.evaluation.report.records import (
    Record,
    Results,
    accuracy_cell,
    at_headline,
    lowest,
    other_defenses,
    records_of,
    under_attack,
)
from nndefense.reporting import Cell, Table, charts, figure, folded, section
from nndefense.reporting.charts import log_ticks, nice_ticks
from nndefense.reporting.wording import BLANK, count_text, norm_name, number, percent, raw_budget

# Colour stands for the defence, dashes and marker for the threat model; each line is labelled where it ends.
_COLORS = {"bare": charts.BARE, "defended": charts.DEFENDED}
_DASHES: dict[str, Any] = {
    "gray": "-", "black": (0, (3, 2)), "clean": (0, (0.75, 2)), "white": (0, (5, 1.5, 1, 1.5)),
    "adaptive": (0, (1.5, 1.25)), "exact": (0, (8, 1)), "worst": "-", "certified": (0, (1, 1)),
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of a figure: ``defense`` (``"bare"``, ``"defended"`` or a name) picks the colour, ``threat_model`` dashes.

    Its points are records by their place on the axis, ascending; a ``reference`` is a level drawn across the figure.
    """

    defense: str
    threat_model: str
    points: Mapping[float, Record]
    reference: bool = False

    @property
    def label(self) -> str:
        """What the line is called."""
        return f"{self.defense}, {self.threat_model}"


def accuracy_vs_eps(results: Results, *, others: bool = False, uid: str = "eps") -> str:
    """Inline SVG of accuracy against the budget of the headline attack; ``""`` when no attack was measured.

    Args:
        results: a ``results.json`` as a dict.
        others: one line for each defence, and not one for each attacker of the defence over the database.
        uid: start of the ids in the markup; give another one to show the figure twice in a page.
    """
    lines = defense_lines(results) if others else eps_lines(results)
    largest = max((x for line in lines for x in line.points), default=0.0)
    if largest <= 0:
        return ""
    headline = results["headline"]
    norm, eps = str(headline["norm"]), float(headline["eps"])
    ratio = _raw_per_eps(results)
    ticks = nice_ticks(0, largest, 5)
    raw, below = [""] * len(ticks), "pixels in [0, 1]"
    if norm == "linf":
        raw = [number(round(255 * tick, 1)) for tick in ticks]
        below = "second line: in steps of 1/255 of the pixel range"
    elif norm == "normalized-l2" and ratio is not None:
        raw = [f"{tick * ratio:.3g}" for tick in ticks]
        below = "second line: mean ℓ₂ radius, pixels in [0, 1]"
    unit = ": ‖x′ − x‖₂ / ‖x‖₂" if norm == "normalized-l2" else ""
    return _chart(
        lines,
        uid=uid,
        title=f"Accuracy against attack budget ({attack_name(str(headline['attack']))}, {norm_name(norm)})",
        ticks={tick: f"{number(tick)}\n{second}".rstrip() for tick, second in zip(ticks, raw, strict=True)},
        label=f"budget ε, {norm_name(norm)}{unit}\n{below}",
        mark=eps if 0 < eps <= largest else None,
        describe=lambda x: f"ε {number(x)}",
    )


def accuracy_vs_rows(results: Results, *, uid: str = "rows") -> str:
    """Inline SVG of accuracy in ``results`` against database size (log axis) at the headline budget; ``""`` without two
    sizes.

    Args as for :func:`accuracy_vs_eps`.
    """
    lines = rows_lines(results)
    if not lines:
        return ""
    sizes = sorted({x for line in lines for x in line.points})
    ticks = log_ticks(sizes[0], sizes[-1], 5)
    return _chart(
        lines,
        uid=uid,
        title="Accuracy against database size",
        ticks={tick: count_text(tick) for tick in (ticks if len(ticks) > 1 else (sizes[0], sizes[-1]))},
        label="images in the database (log scale)",
        log=True,
        describe=lambda x: f"{number(x)} images",
    )


def _chart(
    lines: Sequence[Line],
    *,
    uid: str,
    title: str,
    ticks: Mapping[float, str],
    label: str,
    describe: Callable[[float], str],
    log: bool = False,
    mark: float | None = None,
) -> str:
    """Lines of accuracies from 0 to 100 % with their bands, as inline SVG; ``describe`` writes an x in words."""
    drawn = Figure(figsize=(6.28, 4.75))
    axes = drawn.add_axes((0.075, 0.25, 0.66, 0.68))
    charts.plain(axes, "y")
    axes.spines["left"].set_visible(False)
    axes.set(xscale="log" if log else "linear", ylim=(0, 100))
    axes.set_yticks((0, 25, 50, 75, 100))
    axes.tick_params(axis="y", length=0)
    axes.text(-0.075, 1.05, "accuracy, %", transform=axes.transAxes, fontsize=12)
    ends = [list(line.points.items())[-1] for line in lines]
    places = charts.spread([100 * float(record["accuracy"]) for _, record in ends], gap=13.5, low=4, high=96)
    named = dict.fromkeys(line.defense for line in lines if line.defense not in _COLORS)
    colors = {**_COLORS, **dict(zip(named, itertools.cycle(charts.COLOURS), strict=False))}
    tips = {}
    for count, (line, (end, record), place) in enumerate(zip(lines, ends, places, strict=True)):
        color, xs = colors[line.defense], list(line.points)
        ys, low, high = ([100 * one[key] for one in line.points.values()] for key in ("accuracy", "ci_low", "ci_high"))
        alpha, width = (0.45 if line.threat_model == "worst" else 1), (1.25 if line.reference else 2)
        axes.plot(xs, ys, color=color, linestyle=_DASHES[line.threat_model], alpha=alpha, linewidth=width, zorder=3)
        if not line.reference:
            if len(xs) == 1:
                axes.vlines(xs, low, high, color=color, alpha=0.4, linewidth=5)
            axes.fill_between(xs, low, high, color=color, alpha=0.13, linewidth=0)
            inside = "#ffffff" if line.threat_model == "black" else color
            size = 4 if line.threat_model == "clean" else 6.8
            gid = f"{uid}-line-{count}"
            axes.plot(xs, ys, "o", color=color, ms=size, mfc=inside, mew=1.6, zorder=4, gid=gid, clip_on=False)
            tips[gid] = [
                f"{line.label}: {percent(one['accuracy'])} % ({percent(one['ci_low'])} to {percent(one['ci_high'])})"
                for one in line.points.values()
            ]
        arrow = {"arrowstyle": "-", "color": color, "alpha": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0)}
        beside: dict[str, Any] = {
            "textcoords": ("axes fraction", "data"),
            "color": color,
            "fontsize": 13,
            "parse_math": False,
        }
        text, at = f"{percent(record['accuracy'])} %", (1.045, place)
        axes.annotate(line.label, (end, ys[-1]), at, fontweight="bold", va="bottom", arrowprops=arrow, **beside)
        axes.annotate(text, (end, ys[-1]), at, va="top", **beside)
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=13)
    axes.minorticks_off()
    axes.set_xlabel(label, loc="left", fontsize=13)
    if mark is not None:
        axes.axvline(mark, color=charts.INK, alpha=0.4, linewidth=1, linestyle=(0, (2, 3)))
        side = "right" if mark > 0.8 * max(ticks) else "center"
        axes.text(mark, 103, f"table: {number(mark)}", fontsize=12, ha=side)
    told = "; ".join(
        f"{line.label} {percent(record['accuracy'])} % at {describe(end)}"
        for line, (end, record) in zip(lines, ends, strict=True)
    )
    return charts.inline(drawn, title, f"Lines end at: {told}. All values are in the table below.", name=uid, tips=tips)


def eps_lines(results: Results) -> list[Line]:
    """Accuracy against budget for every threat model; each line starts at the clean accuracy (budget 0).

    Without the defence white box is gray box, so that only its gray and black lines are drawn.
    """
    lines: list[Line] = []
    models = {DEFENDED: ("gray", "black", "white", "adaptive", "exact", "worst", "certified"), BARE: ("gray", "black")}
    attacked = {record["threat_model"] for record in records_of(results)}
    for defense, label in ((DEFENDED, "defended"), (BARE, "bare")):
        for threat_model in models[defense]:
            # Where the exact accuracy stands, the worst case is that.
            if threat_model != "worst" or (attacked & {*INFORMED} and "exact" not in attacked):
                lines += _by_eps(results, defense, label, threat_model)
    return lines


def _by_eps(results: Results, defense: str, label: str, threat_model: str) -> list[Line]:
    """The line of a defence under one threat model, from its clean accuracy on; none where nobody attacked it so."""
    clean = at_headline(results, defense, "clean")
    points = _worst_by(under_attack(results, defense, threat_model), "eps")
    start = {} if clean is None else {0.0: clean}
    return [Line(label, threat_model, {**start, **points})] if points else []


def defense_lines(results: Results) -> list[Line]:
    """Accuracy against budget for every defence, in the worst case where there is one, else under the gray box.

    Returns:
        no line at all where no defence but the one over the database was measured.
    """
    others = other_defenses(results)
    lines: list[Line] = []
    for name, label in ((BARE, "bare"), (DEFENDED, "defended"), *((name, name) for name in others)):
        lines += _by_eps(results, name, label, "worst") or _by_eps(results, name, label, "gray")
    return lines if others else []


def rows_lines(results: Results) -> list[Line]:
    """Accuracy of the calibrated settings against database size at the headline budget, and the bare levels.

    Returns:
        no line at all unless two or more sizes were measured.
    """
    records = records_of(results)
    names = [DEFENDED, *sorted({r["defense"] for r in records if r.get("variant") == "rows"} - {DEFENDED})]
    lines = []
    for threat_model in ("clean", "gray", "black"):
        found = [at_headline(results, name, threat_model) for name in names]
        points = _worst_by([one for one in found if one is not None and one.get("database_rows")], "database_rows")
        if points:
            lines.append(Line("defended", threat_model, points))
    sizes = sorted({x for line in lines for x in line.points})
    if len(sizes) < 2:
        return []
    for threat_model in ("gray", "black"):
        record = at_headline(results, BARE, threat_model)
        if record is not None:
            lines.append(Line("bare", threat_model, {sizes[0]: record, sizes[-1]: record}, reference=True))
    return lines


def _worst_by(records: Sequence[Record], key: str) -> dict[float, Record]:
    """The record of lowest accuracy for every value of a key, in the order of the values."""
    values = sorted({float(record[key]) for record in records})
    return {value: lowest([record for record in records if record[key] == value]) for value in values}


def _raw_per_eps(results: Results) -> float | None:
    """Raw budget per unit of eps under the headline norm: for normalised l2 the mean of ``||x||_2``, else 1."""
    for record in records_of(results):
        if record["norm"] == results["headline"]["norm"] and record.get("eps") and record.get("eps_raw"):
            return float(record["eps_raw"]) / float(record["eps"])
    return None


def figure_section(results: Results) -> str:
    """Both figures, each with its numbers as a table."""
    norm, eps = str(results["headline"]["norm"]), results["headline"]["eps"]
    raw = {record["eps"]: record.get("eps_raw") for record in records_of(results) if record["norm"] == norm}

    def budget(x: float) -> str:
        eps_raw = raw.get(x)
        return number(x) + (f" (raw {raw_budget(norm, eps_raw)})" if x > 0 and eps_raw else "")

    by_eps = _figure(
        "As the attack grows",
        "Each line is labelled where it ends. Bands: 95\u00a0% intervals.",
        accuracy_vs_eps(results),
        "Not drawn: no attack was run.",
        _points_table(eps_lines(results), "budget ε", budget),
    )
    by_rows = _figure(
        f"As the database grows, at ε {number(eps)}",
        "The same, with clean dotted. Level lines: no defence.",
        accuracy_vs_rows(results),
        "Not drawn: the database was run at one size only.",
        _points_table(rows_lines(results), "images in the database", number),
    )
    drawn = [by_eps, by_rows]
    if lines := defense_lines(results):
        drawn.append(
            _figure(
                "Every defence as the attack grows",
                "The worst case over all attacks; gray box where nobody who knows it attacked a defence.",
                accuracy_vs_eps(results, others=True, uid="defenses"),
                "",
                _points_table(lines, "budget ε", budget),
            )
        )
    return section("How it changes", '<div class="figures">\n' + "\n".join(drawn) + "\n</div>", "figures")


def _figure(title: str, caption: str, svg: str, absent: str, table: str) -> str:
    """A figure and its table; without ``svg`` the sentence ``absent`` stands in the figure's place."""
    return figure(svg or f'<p class="absent">{absent}</p>', title, caption if svg else "", table)


def _points_table(lines: Sequence[Line], x_name: str, describe: Callable[[float], str]) -> str:
    """The points of measured lines, folded away; ``describe`` writes the x of a row. ``""`` without such lines."""
    measured = [line for line in lines if not line.reference]
    if not measured:
        return ""
    rows: list[tuple[str | Cell, ...]] = []
    for x in sorted({x for line in measured for x in line.points}):
        found = [line.points.get(x) for line in measured]
        rows.append((describe(x), *(accuracy_cell(one, "") if one else BLANK for one in found)))
    table = Table((x_name, *(line.label for line in measured)), tuple(rows))
    return folded("The same as a table", table.html())
