"""The figures: accuracy against the budget of the attack and against the size of the database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.report.records import (
    BARE,
    DEFENDED,
    Record,
    Results,
    at_headline,
    lowest,
    records_of,
    under_attack,
)
from nndefense.reporting import Cell, Table, charts, figure, folded, section
from nndefense.reporting.ticks import log_ticks, nice_ticks
from nndefense.reporting.wording import count_text, interval, norm_name, number, percent, raw_budget

# Colour stands for the defence, dashes and marker for the threat model; each line is labelled where it ends.
_COLORS = {"bare": charts.BARE, "defended": charts.DEFENDED}
_DASHES: dict[str, tuple[float, ...]] = {
    "gray": (), "black": (3, 2), "clean": (0.75, 2), "white": (5, 1.5, 1, 1.5), "adaptive": (1.5, 1.25), "worst": (),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One measured accuracy: ``x`` in the unit of the axis, the rest fractions in [0, 1]."""

    x: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A line of a figure: ``defense`` (``"bare"`` or ``"defended"``) picks the colour, ``threat_model`` the dashes."""

    defense: str
    threat_model: str
    points: tuple[Point, ...]
    reference: bool = False  # a level drawn across the figure, not a measurement at each x

    @property
    def label(self) -> str:
        """What the line is called."""
        return f"{self.defense}, {self.threat_model}"


def accuracy_vs_eps(results: Results, *, uid: str = "eps") -> str:
    """Inline SVG of accuracy against the budget of the headline attack; ``""`` when no attack was measured.

    Args:
        results: a ``results.json`` as a dict.
        uid: start of the ids in the markup; give another one to show the figure twice in a page.
    """
    lines = eps_lines(results)
    largest = max((point.x for line in lines for point in line.points), default=0.0)
    if largest <= 0:
        return ""
    headline = results["headline"]
    norm = str(headline["norm"])
    ratio = _raw_per_eps(results)
    ticks = nice_ticks(0, largest, 5)
    if norm == "linf":
        raw = [number(round(255 * tick, 1)) for tick in ticks]
        below = "second line: in steps of 1/255 of the pixel range"
    elif norm == "normalized-l2" and ratio is not None:
        raw = [f"{tick * ratio:.3g}" for tick in ticks]
        below = "second line: mean ℓ₂ radius, pixels in [0, 1]"
    else:
        raw = [""] * len(ticks)
        below = "pixels in [0, 1]"
    unit = ": ‖x′ − x‖₂ / ‖x‖₂" if norm == "normalized-l2" else ""
    headline_eps = float(headline["eps"])
    return _chart(
        lines,
        uid=uid,
        title=f"Accuracy against attack budget ({attack_name(str(headline['attack']))}, {norm_name(norm)})",
        ticks={tick: f"{number(tick)}\n{second}".rstrip() for tick, second in zip(ticks, raw, strict=True)},
        label=f"budget ε, {norm_name(norm)}{unit}\n{below}",
        mark=(headline_eps, f"table: {number(headline_eps)}") if 0 < headline_eps <= largest else None,
        describe=lambda x: f"ε {number(x)}",
    )


def accuracy_vs_rows(results: Results, *, uid: str = "rows") -> str:
    """Inline SVG of accuracy against database size (log axis) at the headline budget; ``""`` without two sizes.

    Args:
        results: a ``results.json`` as a dict.
        uid: start of the ids in the markup; give another one to show the figure twice in a page.
    """
    lines = rows_lines(results)
    if not lines:
        return ""
    sizes = sorted({point.x for line in lines for point in line.points})
    low, high = sizes[0], sizes[-1]
    ticks = log_ticks(low, high, 5)
    if len(ticks) < 2:
        ticks = [low, high]
    return _chart(
        lines,
        uid=uid,
        title="Accuracy against database size",
        ticks={tick: count_text(tick) for tick in ticks},
        label="images in the database (log scale)",
        log=True,
        describe=lambda x: f"{number(x)} images",
    )


def _chart(
    lines: Sequence[Line],
    *,
    uid: str,
    title: str,
    ticks: dict[float, str],
    label: str,
    describe: Callable[[float], str],
    log: bool = False,
    mark: tuple[float, str] | None = None,
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
    places = charts.spread([100 * line.points[-1].accuracy for line in lines], gap=13.5, low=4, high=96)
    tips = {}
    for line, place in zip(lines, places, strict=True):
        color, points, last = _COLORS[line.defense], line.points, line.points[-1]
        xs, low, high = ([100 * getattr(point, key) for point in points] for key in ("x", "low", "high"))
        xs = [point.x for point in points]
        style: dict[str, Any] = {
            "color": color, "linewidth": 1.25 if line.reference else 2,
            "alpha": 0.45 if line.threat_model == "worst" else 1,
            "dashes": _DASHES[line.threat_model] or (None, None),
        }  # fmt: skip
        ys = [100 * point.accuracy for point in points]
        axes.plot(xs, ys, zorder=3, **style)
        if not line.reference:
            if len(points) == 1:
                axes.vlines(xs, low, high, color=color, alpha=0.4, linewidth=5)
            axes.fill_between(xs, low, high, color=color, alpha=0.13, linewidth=0)
            inside = "#ffffff" if line.threat_model == "black" else color
            size = 4 if line.threat_model == "clean" else 6.8
            gid = f"{uid}-{line.label}"
            axes.plot(
                xs, ys, "o", color=color, markersize=size, markerfacecolor=inside, markeredgewidth=1.6, zorder=4,
                gid=gid, clip_on=False,
            )  # fmt: skip
            tips[gid] = [
                f"{line.label}: {percent(p.accuracy)} % ({percent(p.low)} to {percent(p.high)})" for p in points
            ]
        axes.annotate(
            line.label, (last.x, 100 * last.accuracy), (1.045, place), textcoords=("axes fraction", "data"),
            color=color, fontsize=13, fontweight="bold", va="bottom", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0)},
        )  # fmt: skip
        axes.annotate(
            f"{percent(last.accuracy)} %", (1.045, place), xycoords=("axes fraction", "data"), color=color, fontsize=13,
            va="top", annotation_clip=False,
        )  # fmt: skip
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=13)
    axes.minorticks_off()
    axes.set_xlabel(label, loc="left", fontsize=13)
    if mark is not None:
        axes.axvline(mark[0], color=charts.INK, alpha=0.4, linewidth=1, linestyle=(0, (2, 3)))
        axes.text(mark[0], 103, mark[1], fontsize=12, ha="right" if mark[0] > 0.8 * max(ticks) else "center")
    ends = "; ".join(
        f"{line.label} {percent(line.points[-1].accuracy)} % at {describe(line.points[-1].x)}" for line in lines
    )
    return charts.inline(drawn, title, f"Lines end at: {ends}. All values are in the table below.", name=uid, tips=tips)


def eps_lines(results: Results) -> list[Line]:
    """Accuracy against budget for every threat model; each line starts at the clean accuracy (budget 0).

    Without the defence white box is gray box, so that only its gray and black lines are drawn.
    """
    lines = []
    models = {DEFENDED: ("gray", "black", "white", "adaptive", "worst"), BARE: ("gray", "black")}
    attacked = {record["threat_model"] for record in records_of(results)}
    for defense, label in ((DEFENDED, "defended"), (BARE, "bare")):
        clean = at_headline(results, defense, "clean")
        for threat_model in models[defense]:
            if threat_model == "worst" and not attacked & {"white", "adaptive"}:
                continue
            records = _worst_by(under_attack(results, defense, threat_model), lambda record: float(record["eps"]))
            if records:
                start = [] if clean is None or 0.0 in records else [_point(0.0, clean)]
                points = start + [_point(eps, record) for eps, record in sorted(records.items())]
                lines.append(Line(label, threat_model, tuple(points)))
    return lines


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
        sized = [record for record in found if record is not None and (record.get("database_rows") or 0) > 0]
        by_rows = _worst_by(sized, lambda record: float(record["database_rows"]))
        if by_rows:
            points = tuple(_point(rows, record) for rows, record in sorted(by_rows.items()))
            lines.append(Line("defended", threat_model, points))
    sizes = sorted({point.x for line in lines for point in line.points})
    if len(sizes) < 2:
        return []
    for threat_model in ("gray", "black"):
        record = at_headline(results, BARE, threat_model)
        if record is not None:
            ends = (_point(sizes[0], record), _point(sizes[-1], record))
            lines.append(Line("bare", threat_model, ends, reference=True))
    return lines


def _worst_by(records: Sequence[Record], key: Callable[[Record], float]) -> dict[float, Record]:
    groups: dict[float, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return {x: lowest(group) for x, group in groups.items()}


def _point(x: float, record: Record) -> Point:
    accuracy, low, high = (float(record[key]) for key in ("accuracy", "ci_low", "ci_high"))
    return Point(x, accuracy, low, high)


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
    return section("How it changes", f'<div class="figures">\n{by_eps}\n{by_rows}\n</div>', "figures")


def _figure(title: str, caption: str, svg: str, absent: str, table: str) -> str:
    """A figure and its table; without ``svg`` the sentence ``absent`` stands in the figure's place."""
    return figure(svg or f'<p class="absent">{absent}</p>', title, caption if svg else "", table)


def _points_table(lines: Sequence[Line], x_name: str, describe: Callable[[float], str]) -> str:
    """The points of measured lines, folded away; ``describe`` writes the x of a row. ``""`` without such lines."""
    measured = [line for line in lines if not line.reference]
    if not measured:
        return ""
    at = [{point.x: point for point in line.points} for line in measured]
    rows: list[tuple[str | Cell, ...]] = []
    for x in sorted(set().union(*at)):
        found = [points.get(x) for points in at]
        cells = [Cell(percent(p.accuracy), interval(p.low, p.high)) if p else Cell("–") for p in found]
        rows.append((describe(x), *cells))
    table = Table((x_name, *(line.label for line in measured)), tuple(rows))
    return folded("The same as a table", table.html())
