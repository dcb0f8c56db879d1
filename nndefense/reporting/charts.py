"""How figures look, what they have in common, and how matplotlib's drawings become part of a page."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nndefense.reporting.wording import escape

INK = "#1c1e21"
# The two sides of a comparison: a colour-blind safe orange and blue.
BARE, DEFENDED, CLEAN = "#b34a00", "#0b62a8", "#8a8f96"
# Colours of many lines that colour-blind readers can tell apart (Okabe and Ito, 2008); markers and lines differ too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", "-", "--")
GRID = "#dfdbd3"
# On a page these follow its colours, light or dark.
_THEME = {
    INK: "currentColor", "#000000": "currentColor", "#ffffff": "var(--paper)", BARE: "var(--bare)",
    DEFENDED: "var(--defended)", CLEAN: "var(--muted)", GRID: "var(--rule)",
}  # fmt: skip

Interval = tuple[float, float, float]
"""A value with the ends of its interval."""


def panels(count: int, *, width: float = 9.6, height: float = 4.4, grid: str = "both") -> tuple[Figure, list[Axes]]:
    """A figure of so many axes side by side; width and height in inches, ``grid`` as for :func:`plain`."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    found = list(drawn.subplots(1, count, squeeze=False)[0])
    for axes in found:
        plain(axes, grid)
    return drawn, found


def plain(axes: Axes, grid: str = "both") -> None:
    """Axes with a quiet grid behind and no frame; ``grid`` is ``both``, ``x`` or ``y``."""
    axes.grid(axis=grid, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def reaches(values: Sequence[Interval]) -> list[list[float]]:
    """How far intervals reach below and above their values, in percent, as matplotlib's error bars take them."""
    return [
        [100 * max(mean - low, 0.0) for mean, low, _ in values],
        [100 * max(high - mean, 0.0) for mean, _, high in values],
    ]


def curve(axes: Axes, xs: Sequence[float], values: Sequence[Interval], number: int, label: str) -> None:
    """A line of fractions in percent with their intervals; ``number`` picks colour, marker and dashes."""
    axes.errorbar(
        xs,
        [100 * mean for mean, _, _ in values],
        reaches(values),
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        linestyle=LINES[number % len(LINES)],
        capsize=3,
        linewidth=1.6,
        label=label,
    )


def spread(targets: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Places near ``targets``, in the same order, at least ``gap`` apart and inside [low, high] where that fits."""
    order = sorted(range(len(targets)), key=lambda index: targets[index])
    if order and gap * (len(order) - 1) > high - low:
        gap = (high - low) / max(1, len(order) - 1)
    places = [min(max(target, low), high) for target in targets]
    for before, after in itertools.pairwise(order):
        places[after] = max(places[after], places[before] + gap)
    limit = high
    for index in reversed(order):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def picture(figure: Figure, kind: str, salt: str = "nndefense", dpi: int = 150) -> bytes:
    """A figure as the bytes of a file of the ``kind`` png (at ``dpi``) or svg (ids from ``salt``), always the same."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Software" if kind == "png" else "Date": None})
    return buffer.getvalue()


def inline(
    figure: Figure, title: str, about: str, *, name: str = "figure", tips: Mapping[str, Sequence[str]] | None = None
) -> str:
    """A figure as part of a page: in its colours and type, without an address, an id or a script that could clash.

    Args:
        figure: whose colours are those of this module.
        title, about: for readers who cannot see it; plain text.
        name: begins every id; unlike that of any other figure on the page.
        tips: for a line with one of these gids the text of each of its markers.
    """
    with mpl.rc_context({"svg.fonttype": "none"}):
        text = picture(figure, "svg", salt=name).decode()
    text = re.sub(r"^.*?<svg|<metadata>.*?</metadata>|<clipPath.*?</clipPath>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', text)
    body = re.sub(r' clip-path="[^"]*"', "", text[text.index(">") + 1 :]).replace("xlink:href", "href")
    for colour, variable in _THEME.items():
        body = body.replace(colour, variable)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    for gid, told in (tips or {}).items():
        before, mark, rest = body.partition(f'id="{gid}"')
        marks = re.split(r"(<use [^>]*)/>", rest, maxsplit=len(told))
        for at, tip in enumerate(told):
            marks[2 * at + 1] += f"><title>{escape(tip)}</title></use>"
        body = "".join([before, mark, *marks])
    # Only what is drawn again by reference needs its id.
    used = set(re.findall(r'href="#([^"]*)"', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    return (
        f'<svg class="chart" viewBox="{box[1] if box else ""}" role="img" fill="currentColor" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(about)}</desc>{body}'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, evenly spaced by 1, 2 or 5 times a power of ten.

    Args:
        low, high: ends of the axis, low < high, finite.
        count: how many intervals to aim at (1 or more); there are never more than ``count`` of them.

    Returns:
        ascending multiples of the spacing inside [low, high].
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high and count >= 1):
        raise ValueError(f"an axis needs finite ends in ascending order, not {low} and {high}")
    rough = (high - low) / count
    exponent = math.floor(math.log10(rough))
    # The exponent may round down, hence 10 and 20 beside 1, 2 and 5.
    factor = next(factor for factor in (1, 2, 5, 10, 20) if factor * 10.0**exponent >= rough * (1 - 1e-9))
    step = factor * 10.0**exponent
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    # Rounding to the digits of the spacing turns 3 * 0.1 into 0.3.
    digits = max(0, -math.floor(math.log10(step)))
    return [min(max(round(index * step, digits), low), high) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers on a logarithmic axis: 1, 2, 5 times powers of ten, or only powers of ten on a long axis.

    Args:
        low, high: ends of the axis, 0 < low < high, finite.
        count: the most ticks that have room.

    Returns:
        ascending numbers inside [low, high]; may be empty on an axis shorter than a step.
    """
    if not (math.isfinite(high) and 0 < low < high and count >= 1):
        raise ValueError(f"a logarithmic axis needs positive ends in ascending order, not {low} and {high}")
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors, stride in [((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6), ((1,), 12)]:
        ticks = [factor * 10.0**exponent for exponent in exponents if exponent % stride == 0 for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= count:
            return ticks
    return ticks[:: math.ceil(len(ticks) / count)]
