"""The gallery of the report: what the attack changed, what the classifier said, and what the neighbours said.

Pictures are embedded in the page as data URIs. Small ones (up to 64 pixels a side) keep their own pixels as PNG and
are enlarged by a whole number, crisp; larger ones are JPEG.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from nndefense.errors import InputError
from nndefense.evaluation.report.records import Results
from nndefense.reporting import section
from nndefense.reporting.wording import count_text, escape, number, percent, plural

Pixels = npt.NDArray[np.floating[Any]]

SMALL = 64  # pixels a side up to which a picture keeps its own pixels
ROW_BYTES = 96_000  # of base64 for one row, so that ten rows stay well under 1.5 MB
MOST_NEIGHBORS = 8
_TITLE = "What the defence sees"
_BOXES = ("gray", "black", "white")


@dataclass(frozen=True)
class GalleryNeighbor:
    """One retrieved image of the database.

    Attributes:
        image: C x H x W in [0, 1], or None when the picture is not at hand.
        id: identifier of the image in the database.
        label: class that the database holds for the image.
        weight: share of the total weight of all neighbours, in [0, 1].
        distance: Euclidean distance in feature space.
    """

    image: Pixels | None
    id: str
    label: str
    weight: float
    distance: float


@dataclass(frozen=True)
class GalleryRow:
    """One attacked image and what became of it.

    Attributes:
        clean, attacked: C x H x W in [0, 1].
        label: true class.
        bare_clean: class and probability of the bare classifier on the clean image.
        bare: the same on the attacked image.
        defended: class and probability of the defence on the attacked image.
        neighbors: neighbours of the attacked image, nearest first; the report draws the first eight.
        threat_model: ``"gray"`` or ``"black"``.
        eps: budget, in the unit of the headline norm.
        id: identifier of the image in its data set.
    """

    clean: Pixels
    attacked: Pixels
    label: str
    bare: tuple[str, float]
    bare_clean: tuple[str, float]
    defended: tuple[str, float]
    neighbors: tuple[GalleryNeighbor, ...]
    threat_model: str
    eps: float
    id: str


def gallery_section(results: Results, gallery: Sequence[GalleryRow]) -> str:
    """The pictures with their explanation; may be without pictures."""
    if not gallery:
        return section(_TITLE, '<p class="absent">This report was written without pictures.</p>', "gallery")
    # Behind a better informed attack come some that the defence holds: the counts are of the images drawn at random.
    apart = "gray" if gallery[0].threat_model != "gray" else None
    held_rows = [row for row in gallery if row.threat_model == apart]
    drawn_rows = [row for row in gallery if row.threat_model != apart]
    rescued = sum(row.bare[0] != row.label and row.defended[0] == row.label for row in drawn_rows)
    lost = sum(row.bare[0] == row.label and row.defended[0] != row.label for row in drawn_rows)
    both = sum(row.bare[0] != row.label and row.defended[0] != row.label for row in drawn_rows)
    k = (results.get("defense") or {}).get("k")
    factor = amplification(gallery)
    drawn = f"amplified {factor} times in every row" if factor > 1 else "not amplified"
    first, last = (
        "\n".join(_row_html(row, factor, int(k) if k else None) for row in rows) for rows in (drawn_rows, held_rows)
    )
    beside = (
        f'<p class="lead">And {number(len(held_rows))} of these images under the gray-box attack, which does not know '
        f"of the database: chosen because the defence holds there.</p>\n{last}"
    )
    body = f"""<p class="lead">Left, an image before and after the attack, with what the bare classifier says of each;
between them the change, {drawn}, where mid-grey means none. Right, the database images nearest to the attacked image in
feature space. The defence never asks what the classifier says of the attacked image: its answer is the weighted mean of
what the classifier says of these neighbours. A <span class="key-bar same"></span> solid bar is a neighbour of the true
class, a <span class="key-bar other"></span> hollow one is of another; its length is the neighbour's weight.</p>
<p class="lead">Of these {len(drawn_rows)} images, the defence mends {rescued}, fails together with the bare classifier
on {both} and breaks {lost} that the bare classifier gets right. They were drawn at random; the rates are in the
table above.</p>
{first}{beside if last else ""}"""
    return section(_TITLE, body, "gallery")


def amplification(rows: Sequence[GalleryRow]) -> int:
    """How much the perturbations are amplified: one round factor for all rows, so that rows can be compared.

    The largest of 1, 2, 3, 5, 10, 20, ... at which 99 % of the changed values still fit around mid-grey; at least 1.

    Raises:
        InputError: an attacked image of another shape than its clean one.
    """
    for row in rows:
        if np.shape(row.clean) != np.shape(row.attacked):
            raise InputError(f"gallery row {row.id!r} has a clean and an attacked image of two different shapes")
    changes = [np.abs(np.asarray(row.attacked) - np.asarray(row.clean)).ravel() for row in rows]
    typical = max((float(np.quantile(change, 0.99)) for change in changes if change.size), default=0.0)
    if typical <= 0:
        return 1
    factors = [1, 2, 3, 5, 10, 20, 30, 50, 100]
    return max(factor for factor in factors if factor == 1 or factor * typical <= 0.5)


def picture(image: Pixels, alt: str, *, display: int, side: int = 224) -> str:
    """``image`` (C x H x W in [0, 1]) as an ``<img>`` with its data inside, about ``display`` CSS pixels wide.

    Args:
        side: longest side at which a picture larger than 64 pixels is embedded.

    Raises:
        InputError: ``image`` is not C x H x W.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise InputError(f"a picture of the gallery has shape {pixels.shape}, but must be C x H x W")
    if pixels.shape[0] not in (1, 3):
        pixels = pixels.mean(axis=0, keepdims=True)
    values = np.clip(np.rint(np.nan_to_num(pixels) * 255), 0, 255).astype(np.uint8)
    drawn = Image.fromarray(values[0]) if values.shape[0] == 1 else Image.fromarray(values.transpose(1, 2, 0))
    small = max(drawn.size) <= SMALL
    buffer = io.BytesIO()
    if small:
        drawn.save(buffer, format="PNG", optimize=True)
        # A whole number of screen pixels for each pixel of the picture, or some would look wider than others.
        scale = max(1, round(display / max(drawn.size)))
        width, height = drawn.width * scale, drawn.height * scale
    else:
        drawn.thumbnail((side, side), Image.Resampling.LANCZOS)
        drawn.save(buffer, format="JPEG", quality=85, optimize=True)
        scaled = display / max(drawn.size)
        width, height = max(1, round(drawn.width * scaled)), max(1, round(drawn.height * scaled))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind, look = ("png", ' class="crisp"') if small else ("jpeg", "")
    return (
        f'<img{look} src="data:image/{kind};base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}" decoding="async">'
    )


def answer_html(answer: tuple[str, float], label: str) -> str:
    """A prediction with its probability, marked right or wrong by a sign and a word as well as by colour."""
    right = answer[0] == label
    kind, sign, word = ("right", "✓", "right") if right else ("wrong", "✗", "wrong")
    long = " long" if len(answer[0]) > 14 else ""
    return (
        f'<span class="answer {kind}{long}"><b title="{escape(answer[0])}">{escape(answer[0])}</b> '
        f'<span class="probability">{percent(answer[1], 0)} %</span> '
        f'<span class="mark"><span aria-hidden="true">{sign}</span> {word}</span></span>'
    )


def _row_html(row: GalleryRow, factor: int, k: int | None) -> str:
    for side in (224, 160, 112, 80):
        markup = _draw_row(row, factor, k, side)
        if len(markup) <= ROW_BYTES:
            break
    return markup


def _draw_row(row: GalleryRow, factor: int, k: int | None, side: int) -> str:
    change = np.asarray(row.attacked, dtype=np.float64) - np.asarray(row.clean, dtype=np.float64)
    length = float(np.linalg.norm(np.asarray(row.clean, dtype=np.float64)))
    largest = float(np.abs(change).max(initial=0.0))
    size, short = f"largest change of a value {number(round(largest, 3))}", f"ℓ∞ {largest:.2f}"
    # Of a black image there is no share.
    if length > 0:
        share = float(np.linalg.norm(change)) / length
        size, short = f"‖x′ − x‖₂ / ‖x‖₂ = {share:.3f}, {size}", f"relative ℓ₂ {share:.2f}"
    # The clean image is on the page beside the change, so its own range needs no rescaling: grey means no change.
    amplified = np.clip(0.5 + factor * change, 0, 1)
    strength = f"× {factor}"
    threat = f"{row.threat_model} box" if row.threat_model in _BOXES else row.threat_model
    pictures = (
        f"<figure>{picture(row.clean, f'clean image of class {row.label}', display=104, side=side)}"
        f"<figcaption><span>clean</span>{answer_html(row.bare_clean, row.label)}</figcaption></figure>"
        f"<figure>{picture(amplified, f'perturbation, {strength}, grey means no change', display=104, side=side)}"
        f'<figcaption title="{escape(size)}"><span>change {escape(strength)}</span>'
        f'<span class="size">{escape(short)}</span></figcaption></figure>'
        f"<figure>{picture(row.attacked, f'attacked image of class {row.label}', display=104, side=side)}"
        f"<figcaption><span>attacked</span>{answer_html(row.bare, row.label)}</figcaption></figure>"
    )
    shown = row.neighbors[:MOST_NEIGHBORS]
    heaviest = max((neighbor.weight for neighbor in shown), default=0.0)
    neighbors = "".join(_neighbor_html(neighbor, row.label, heaviest, min(side, 128)) for neighbor in shown)
    weight = sum(neighbor.weight for neighbor in shown)
    counted = plural(len(shown), "neighbour")
    if k is not None and k > len(shown):
        counted = f"{len(shown)} of {count_text(k)} neighbours"
    carried = f"{counted}, {percent(weight, 0)} % of the weight" if shown else "no neighbours at hand"
    agree = sum(neighbor.label == row.label for neighbor in shown)
    return (
        '<article class="case">'
        f'<header><h3 title="{escape(row.label)}">{escape(row.label)}</h3>'
        f'<p><span class="id">{escape(row.id)}</span> <span>{escape(threat)}, ε {escape(number(row.eps))}</span></p>'
        "</header>"
        f'<div class="seen">{pictures}</div>'
        f'<div class="retrieved"><ol class="neighbors">{neighbors}</ol>'
        f'<p class="says"><span>the defence says</span>{answer_html(row.defended, row.label)}'
        f'<span class="share">{escape(carried)}; {agree} of the true class</span></p></div>'
        "</article>"
    )


def _neighbor_html(neighbor: GalleryNeighbor, label: str, heaviest: float, side: int) -> str:
    same = neighbor.label == label
    about = (
        f"neighbour {neighbor.id}: class {neighbor.label}, weight {percent(neighbor.weight)} %, "
        f"distance {number(round(neighbor.distance, 4))}"
    )
    drawn = (
        f'<span class="missing" role="img" aria-label="{escape(about)}, no picture at hand">no picture</span>'
        if neighbor.image is None
        else picture(neighbor.image, about, display=56, side=side)
    )
    width = 100 * neighbor.weight / heaviest if heaviest > 0 else 0.0
    return (
        f'<li class="{"same" if same else "other"}" title="{escape(about)}">{drawn}'
        f'<span class="bar" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'
        f'<span class="label">{escape(neighbor.label)}</span>'
        f'<span class="weight">{percent(neighbor.weight)} %</span></li>'
    )
