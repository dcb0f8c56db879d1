"""The figures: accuracy against the budget of the attack and against the size of the database."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nndefense.evaluation.report.chart import Line, Point, chart
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
from nndefense.evaluation.report.ticks import log_ticks, nice_ticks
from nndefense.evaluation.report.wording import attack_name, count_text, escape, norm_name, number, percent, raw_budget


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
    return chart(
        lines,
        uid=uid,
        title=f"Accuracy against attack budget ({attack_name(str(headline['attack']))}, {norm_name(norm)})",
        scale=lambda x: x / largest,
        ticks=[(tick, number(tick), second) for tick, second in zip(ticks, raw, strict=True)],
        label=f"budget ε, {norm_name(norm)}{unit}",
        below=below,
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
    return chart(
        lines,
        uid=uid,
        title="Accuracy against database size",
        scale=lambda x: math.log(x / low) / math.log(high / low),
        ticks=[(tick, count_text(tick), "") for tick in ticks],
        label="images in the database (log scale)",
        below="",
        mark=None,
        describe=lambda x: f"{number(x)} images",
    )


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

    by_eps = _figure_html(
        "As the attack grows",
        "Each line is labelled where it ends. Bands: 95\u00a0% intervals.",
        accuracy_vs_eps(results),
        "Not drawn: no attack was run.",
        _points_table(eps_lines(results), "budget ε", budget),
    )
    by_rows = _figure_html(
        f"As the database grows, at ε {number(eps)}",
        "The same, with clean dotted. Level lines: no defence.",
        accuracy_vs_rows(results),
        "Not drawn: the database was run at one size only.",
        _points_table(rows_lines(results), "images in the database", number),
    )
    return (
        '<section id="figures">\n<h2>How it changes</h2>\n'
        f'<div class="figures">\n{by_eps}\n{by_rows}\n</div>\n</section>'
    )


def _figure_html(title: str, caption: str, svg: str, absent: str, table: str) -> str:
    """A figure and its table; without ``svg`` the sentence ``absent`` stands in the figure's place."""
    about = f"<p>{escape(caption)}</p>" if svg else ""
    drawn = svg or f'<p class="absent">{absent}</p>'
    return f"<figure><figcaption><h3>{escape(title)}</h3>{about}</figcaption>\n{drawn}\n{table}</figure>"


def _points_table(lines: Sequence[Line], x_name: str, describe: Callable[[float], str]) -> str:
    """The points of measured lines, folded away; ``describe`` writes the x of a row. ``""`` without such lines."""
    measured = [line for line in lines if not line.reference]
    if not measured:
        return ""
    xs = sorted({point.x for line in measured for point in line.points})
    head = "".join(f'<th scope="col">{escape(line.label)}</th>' for line in measured)
    body = []
    for x in xs:
        cells = []
        for line in measured:
            point = next((point for point in line.points if point.x == x), None)
            interval = f" <small>{percent(point.low)}–{percent(point.high)}</small>" if point else ""
            cells.append(f"<td>{percent(point.accuracy)}{interval}</td>" if point else "<td>–</td>")
        body.append(f'<tr><th scope="row">{escape(describe(x))}</th>{"".join(cells)}</tr>')
    return (
        '<details><summary>The same as a table</summary><div class="scroll"><table class="plain">'
        f'<thead><tr><th scope="col">{escape(x_name)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></details>"
    )
