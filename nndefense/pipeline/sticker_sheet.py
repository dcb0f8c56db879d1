"""Pictures of what a sticker does: the sheet of photos, and the search for its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from nndefense.files import write_atomically

_COLUMNS = 8
# Okabe and Ito's blue and vermilion: told apart by colour-blind readers; the words differ too.
_KINDS = {"target": "#d55e00", "truth": "#0072b2", "other": "#555555"}
_BACKGROUND = (0.62, 0.72, 0.66)
Answer = tuple[str, float, str]
"""A class, its probability, and which kind it is: target, truth or other."""


def sheet(
    names: Sequence[str],
    rows: Sequence[tuple[str, Tensor, Sequence[Answer]]],
    printed: Tensor,
    mask: Tensor,
    title: str,
) -> Figure:
    """Draw the sheet.

    Args:
        names: of the photos.
        rows: what each row shows, its images N x C x H x W, and the classifier's answers, N.
        printed: the sticker's colours, C x h x w.
        mask: 1 x h x w.
        title: over the sheet.
    """
    shown = np.unique(np.linspace(0, len(names) - 1, min(_COLUMNS, len(names))).round().astype(int))
    width, height = 1.45 * (len(shown) + 1), 1.75 * len(rows) + 0.7
    figure = Figure(figsize=(max(width, 7.0), height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(rows), len(shown) + 1, squeeze=False)
    for line, (label, images, answers) in enumerate(rows):
        axes[line, 0].axis("off")
        if line:
            axes[line, 0].text(1, 0.5, label, ha="right", va="center", fontsize=8, transform=axes[line, 0].transAxes)
        for column, photo in enumerate(shown, 1):
            place = axes[line, column]
            place.imshow(_pixels(images[photo]), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            name, probability, kind = answers[photo]
            for spine in place.spines.values():
                spine.set_color(_KINDS[kind])
                spine.set_linewidth(2)
            place.set_xlabel(f"{_short(name)}\n{100 * probability:.0f} %", fontsize=7, color=_KINDS[kind])
            if line == 0:
                place.set_title(_short(names[photo]), fontsize=7)
    corner = axes[0, 0]
    alpha = mask.cpu().permute(1, 2, 0).numpy()
    # Neither white nor black nor red, so that every part of a sticker can be seen.
    corner.imshow(np.full((*alpha.shape[:2], 3), _BACKGROUND), interpolation="nearest")
    corner.imshow(np.dstack([_pixels(printed), alpha]), interpolation="nearest")
    corner.set_title("the sticker", fontsize=8)
    corner.text(0.5, -0.12, rows[0][0] + " →", ha="center", va="top", fontsize=8, transform=corner.transAxes)
    return figure


def search_picture(reference: Tensor, saliency: Tensor, mask: Tensor) -> Figure:
    """Draw the object C x h x w, where the l_1 perturbation changed it (h x w), and the mask 1 x h x w on it."""
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    covered = reference * (1 - mask) + mask * torch.tensor(_BACKGROUND).view(3, 1, 1).to(reference)
    grey = (saliency / saliency.max()).expand(3, -1, -1)
    titles = ("the photos' mean", "size of the $l_1$ perturbation", f"the mask: {int(mask.sum())} pixels")
    for axes, title, image in zip(figure.subplots(1, 3), titles, (reference, grey, covered), strict=True):
        axes.imshow(_pixels(image), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    return figure


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=130, metadata={"Software": None}))


def _pixels(image: Tensor) -> NDArray[Any]:
    values: NDArray[Any] = image.detach().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return values


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
