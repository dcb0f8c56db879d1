"""A line chart of accuracies as inline SVG, written by hand so that it follows the page's colours and type.

It takes its text colour from ``currentColor`` and its line colours from CSS variables with a fallback, so the same
markup reads well on a light and on a dark page. Colour stands for the defence (a colour-blind safe orange and blue),
the dash pattern and the marker for the threat model, and each line is labelled where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nndefense.evaluation.report.wording import escape, percent

_WIDTH, _HEIGHT = 452, 342
_LEFT, _RIGHT, _TOP, _BOTTOM = 32, 110, 24, 84
_COLORS = {"bare": "var(--bare, #b34a00)", "defended": "var(--defended, #0b62a8)"}
_DASHES = {
    "gray": "",
    "black": ' stroke-dasharray="6 4"',
    "clean": ' stroke-dasharray="1.5 4"',
    "white": ' stroke-dasharray="10 3 2 3"',
    "adaptive": ' stroke-dasharray="3 2.5"',
    "worst": ' stroke-opacity=".45"',
}


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
        return f"{self.defense}, {self.threat_model}"


def chart(
    lines: Sequence[Line],
    *,
    uid: str,
    title: str,
    scale: Callable[[float], float],
    ticks: Sequence[tuple[float, str, str]],
    label: str,
    below: str,
    mark: tuple[float, str] | None,
    describe: Callable[[float], str],
) -> str:
    """A line chart with accuracy from 0 to 100 % upwards; ``scale`` takes the domain to [0, 1]."""
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return left + 8 + (right - left - 16) * scale(x)

    def up(accuracy: float) -> float:
        return bottom - (bottom - top) * accuracy

    ends = "; ".join(
        f"{line.label} {percent(line.points[-1].accuracy)} % at {describe(line.points[-1].x)}" for line in lines
    )
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{escape(uid)}-title {escape(uid)}-desc" font-size="13">',
        f'<title id="{escape(uid)}-title">{escape(title)}</title>',
        f'<desc id="{escape(uid)}-desc">{escape(f"Lines end at: {ends}. All values are in the table below.")}</desc>',
        '<g fill="currentColor" stroke="none">',
    ]
    for tick in (0, 25, 50, 75, 100):
        y = up(tick / 100)
        strength = ".45" if tick == 0 else ".13"
        parts.append(
            f'<path d="M{left} {y:.1f}H{right}" fill="none" stroke="currentColor" stroke-opacity="{strength}"/>'
            f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end" font-size="12" opacity=".7">{tick}</text>'
        )
    parts.append(f'<text x="0" y="{top - 12}" font-size="12" opacity=".7">accuracy, %</text>')
    for x, text, second in ticks:
        parts.append(
            f'<path d="M{across(x):.1f} {bottom}v5" stroke="currentColor" stroke-opacity=".45"/>'
            f'<text x="{across(x):.1f}" y="{bottom + 19}" text-anchor="middle">{escape(text)}</text>'
        )
        if second:
            parts.append(
                f'<text x="{across(x):.1f}" y="{bottom + 35}" text-anchor="middle" font-size="12" opacity=".7">'
                f"{escape(second)}</text>"
            )
    y = bottom + (58 if any(second for _, _, second in ticks) else 43)
    parts.append(f'<text x="{left}" y="{y}">{escape(label)}</text>')
    if below:
        parts.append(f'<text x="{left}" y="{y + 17}" font-size="12" opacity=".7">{escape(below)}</text>')
    if mark is not None:
        x, text = across(mark[0]), mark[1]
        anchor = "end" if scale(mark[0]) > 0.8 else "middle"
        parts.append(
            f'<path d="M{x:.1f} {top - 6}V{bottom}" stroke="currentColor" stroke-opacity=".4" stroke-dasharray="2 3"/>'
            f'<text x="{x + (4 if anchor == "end" else 0):.1f}" y="{top - 12}" text-anchor="{anchor}" font-size="12" '
            f'opacity=".7">{escape(text)}</text>'
        )
    parts.append("</g>")
    parts += [_band(line, across, up) for line in lines if not line.reference]
    parts += [_stroke(line, across, up, (left, right)) for line in lines]
    parts += _end_labels(lines, across, up, right)
    parts.append("</svg>")
    return "\n".join(parts)


def _band(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """The confidence band; a single point has no width, so it gets a whisker."""
    color = _COLORS[line.defense]
    if len(line.points) == 1:
        only = line.points[0]
        return (
            f'<path d="M{across(only.x):.1f} {up(only.low):.1f}V{up(only.high):.1f}" '
            f'style="stroke:{color}" stroke-opacity=".4" stroke-width="5"/>'
        )
    upper = [f"{across(point.x):.1f} {up(point.high):.1f}" for point in line.points]
    lower = [f"{across(point.x):.1f} {up(point.low):.1f}" for point in reversed(line.points)]
    return f'<path d="M{"L".join(upper + lower)}Z" style="fill:{color}" fill-opacity=".13"/>'


def _stroke(
    line: Line, across: Callable[[float], float], up: Callable[[float], float], ends: tuple[float, float]
) -> str:
    color, dashes = _COLORS[line.defense], _DASHES[line.threat_model]
    if line.reference:
        y = up(line.points[0].accuracy)
        return (
            f'<path d="M{ends[0]} {y:.1f}H{ends[1]}" fill="none" style="stroke:{color}" stroke-width="1.25"{dashes}/>'
        )
    path = "L".join(f"{across(point.x):.1f} {up(point.accuracy):.1f}" for point in line.points)
    parts = [
        f'<path d="M{path}" fill="none" style="stroke:{color}" stroke-width="2" stroke-linejoin="round" '
        f'stroke-linecap="round"{dashes}/>'
    ]
    radius = 2 if line.threat_model == "clean" else 3.4
    fill = "var(--paper, Canvas)" if line.threat_model == "black" else color
    for point in line.points:
        tip = f"{line.label}: {percent(point.accuracy)} % ({percent(point.low)} to {percent(point.high)})"
        parts.append(
            f'<circle cx="{across(point.x):.1f}" cy="{up(point.accuracy):.1f}" r="{radius}" '
            f'style="fill:{fill};stroke:{color}" stroke-width="1.6"><title>{escape(tip)}</title></circle>'
        )
    return "".join(parts)


def _end_labels(
    lines: Sequence[Line], across: Callable[[float], float], up: Callable[[float], float], right: float
) -> list[str]:
    """Each line's name and last value beside its end, pushed apart where two lines end together."""
    targets = [up(line.points[-1].accuracy) for line in lines]
    places = spread(targets, gap=33, low=_TOP + 2, high=_HEIGHT - _BOTTOM - 8)
    parts = []
    for line, target, place in zip(lines, targets, places, strict=True):
        color = _COLORS[line.defense]
        start = right if line.reference else across(line.points[-1].x) + 5
        parts.append(
            f'<path d="M{start:.1f} {target:.1f}L{right + 10} {place:.1f}" fill="none" '
            f'style="stroke:{color}" stroke-opacity=".5"/>'
            f'<text x="{right + 14}" y="{place - 1:.1f}" style="fill:{color}" font-weight="600">'
            f"{escape(line.label)}</text>"
            f'<text x="{right + 14}" y="{place + 14:.1f}" style="fill:{color}">'
            f"{percent(line.points[-1].accuracy)} %</text>"
        )
    return parts


def spread(targets: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Places near ``targets``, in the same order, at least ``gap`` apart and inside [low, high] where that fits."""
    order = sorted(range(len(targets)), key=lambda index: targets[index])
    if order and gap * (len(order) - 1) > high - low:
        gap = (high - low) / max(1, len(order) - 1)
    places = [min(max(target, low), high) for target in targets]
    for before, after in pairwise(order):
        places[after] = max(places[after], places[before] + gap)
    limit = high
    for index in reversed(order):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places
