"""The RP2 optimisation: one sticker for all views of an object, and where it works best (Eykholt et al., CVPR 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.checks import check_logits, check_model
from nndefense.attacks.door import widened
from nndefense.attacks.losses import Model
from nndefense.attacks.rp2.sticker import (
    MODES,
    Mode,
    Sticker,
    check_mask,
    check_palette,
    check_scene,
    default_palette,
    non_printability,
)
from nndefense.attacks.rp2.views import ViewChanges, as_photographed
from nndefense.errors import InputError, check_choice, make_plain, plain
from nndefense.images import shape_text

# Rectangles are looked for on a grid of at most so many cells a side: their number grows with the fourth power.
_GRID = 64


@dataclass(frozen=True)
class Settings:
    """The objective's weights and the optimiser's settings; the defaults are those of the road-sign attack.

    Attributes:
        mode: ``replace`` what is under the mask by the sticker, or ``add`` to it.
        norm: 1 or 2, the p of ``||M delta||_p``: 1 to find vulnerable regions, 2 for the final sticker.
        norm_weight: lambda.
        nps_weight: weight of the non-printability score; the paper has 1, its released runs 0.
        changes: synthetic view changes drawn for every photo in every step; None for the photos alone.
        steps: Adam steps.
        learning_rate: Adam's, falling to 0 as a half cosine.
        batch_size: photos per step, drawn anew for each; None for all.
        limit: with ``add`` the largest change of an entry; 1 can turn black into white.
        seed: of the start, the photos of each step and the view changes.

    Raises:
        InputError: a setting out of its range.
    """

    mode: Mode = "replace"
    norm: int = 2
    norm_weight: float = 0.02
    nps_weight: float = 1.0
    changes: ViewChanges | None = field(default_factory=ViewChanges)
    steps: int = 400
    learning_rate: float = 0.1
    batch_size: int | None = None
    limit: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        check_choice("mode", self.mode, MODES)
        if self.norm not in (1, 2):
            raise InputError(f"the norm is {self.norm}, but must be 1 (to find a mask) or 2 (for the final sticker)")
        for name in ("norm_weight", "nps_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}, but must be finite and at least 0")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}, but must be above 0")
        if self.steps < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise InputError("steps and batch_size must be at least 1")
        if not 0 < self.limit <= 1:
            raise InputError(f"limit is {self.limit}, but must be above 0 and at most 1")


@dataclass(frozen=True)
class Terms:
    """The terms of the objective, unweighted: norm, non-printability, cross-entropy to the target; and their sum."""

    norm: Tensor
    nps: Tensor
    loss: Tensor
    total: Tensor


@dataclass(frozen=True)
class Optimised:
    """A sticker and how it came to be.

    Attributes:
        sticker: the result.
        history: of about twenty steps and the last one: step, norm, nps, loss, total; each before its update.
        forwards: images shown to the model, each of which also went backward.
    """

    sticker: Sticker
    history: tuple[dict[str, float], ...]
    forwards: int


def rp2(
    model: Model,
    photos: Tensor,
    mask: Tensor,
    target: int,
    *,
    matrices: Tensor | None = None,
    light: Tensor | None = None,
    reference: Tensor | None = None,
    palette: Tensor | None = None,
    settings: Settings | None = None,
) -> Optimised:
    """Optimise one sticker so that every view of an object is taken for the target class.

    Minimises the paper's objective (its section 3.3) with Adam, from a seeded start (uniform colours with ``replace``,
    no change with ``add``)::

        lambda ||M delta||_p + w NPS(M delta) + E_i CE(model(view(x_i + T_i(M delta))), target)

    With ``reference`` the norm is that of the change, ``M (delta - reference)`` with ``replace``, and the score that of
    the colours to print, ``reference + delta`` with ``add``; without it both are of delta itself.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
        photos: of the object, N x C x H x W in [0, 1].
        mask: 1 x h x w of 0 and 1 in the canonical frame: where the sticker may be.
        target: the class to be seen.
        matrices: N x 3 x 3 homographies from the canonical frame to each photo's; identities if not given.
        light: N factors: how bright white paper is in each photo; 1 if not given.
        reference: the object without a sticker in the canonical frame, C x h x w in [0, 1].
        palette: P x 3 printable colours; :func:`default_palette` if not given.
        settings: weights and optimiser.

    Raises:
        InputError: an input that cannot be used, or a model in training mode, without a gradient, or of probabilities.
    """
    chosen = settings or Settings()
    check_model(model)
    matrices, light = check_scene(photos, matrices, light)
    (model, photos), target = widened(model, photos), plain(target)
    mask = check_mask(mask).to(photos)
    shape = (photos.shape[1], *mask.shape[1:])
    if reference is not None and reference.shape != shape:
        raise InputError(
            f"the reference is {shape_text(reference.shape)}, but the canonical frame is {shape_text(shape)}"
        )
    if chosen.nps_weight and photos.shape[1] != 3:
        raise InputError("printable colours are RGB, and these photos are not: set nps_weight to 0")
    colours = check_palette(default_palette() if palette is None else palette).to(photos.device)
    reference = None if reference is None else reference.to(photos)

    generator = torch.Generator().manual_seed(chosen.seed)
    delta = torch.zeros(shape, dtype=photos.dtype)
    if chosen.mode == "replace":
        delta.copy_(torch.rand(shape, generator=generator, dtype=torch.float64))
    delta = (delta.to(photos.device) * mask).requires_grad_(True)
    low = 0.0 if chosen.mode == "replace" else -chosen.limit
    high = 1.0 if chosen.mode == "replace" else chosen.limit

    optimiser = torch.optim.Adam([delta], lr=chosen.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / chosen.steps))
    history: list[dict[str, float]] = []
    every, forwards = max(1, chosen.steps // 20), 0
    for step in range(chosen.steps):
        rows = _draw_rows(len(photos), chosen.batch_size, generator)
        views = chosen.changes.draw(len(rows), generator) if chosen.changes else as_photographed(len(rows))
        seen = views(Sticker(delta, mask, chosen.mode).on(photos[rows], matrices[rows], light[rows]))
        logits = model(seen)
        if step == 0:
            check_logits(logits, logits.new_zeros(len(rows), dtype=torch.long))
        terms = objective(logits, delta, mask, target, chosen, colours, reference)
        (delta.grad,) = torch.autograd.grad(terms.total, delta)
        forwards += len(rows)
        if step % every == 0 or step == chosen.steps - 1:
            history.append({"step": step, **{k: float(v.detach()) for k, v in vars(terms).items()}})
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            delta.clamp_(low, high).mul_(mask)
    return Optimised(Sticker(delta.detach(), mask, chosen.mode), tuple(history), forwards)


def objective(
    logits: Tensor,
    delta: Tensor,
    mask: Tensor,
    target: int,
    settings: Settings,
    palette: Tensor,
    reference: Tensor | None = None,
) -> Terms:
    """The objective of :func:`rp2`; its gradient is 0 outside the mask.

    Args:
        logits: of the views, N x K.
        delta, mask: of the sticker: 3 x h x w, and where it is.
        target: the class to be seen.
        settings: with the weights of the terms.
        palette: printable colours, P x 3 in [0, 1].
        reference: the object's own picture, 3 x h x w in [0, 1], where there is one.

    Raises:
        InputError: the target is no class of the logits, or they carry no gradient.
    """
    if logits.dim() != 2 or not 0 <= target < logits.shape[1]:
        raise InputError(f"the target is class {target}, but the model's output has shape {shape_text(logits.shape)}")
    if not logits.requires_grad:
        raise InputError("the model's output carries no gradient to the images: RP2 needs a differentiable classifier")
    based = reference is not None and settings.mode == "replace"
    changed = mask * (delta - reference) if based and reference is not None else mask * delta
    norm = torch.linalg.vector_norm(changed, ord=settings.norm)
    nps = norm.new_zeros(())
    if settings.nps_weight:
        printed = delta if settings.mode == "replace" or reference is None else (reference + delta).clamp(0, 1)
        # The mask, not a selection, so that pixels beside it count for exactly nothing.
        nps = (non_printability(printed, palette) * mask[0]).sum().to(norm.dtype)
    loss = F.cross_entropy(logits, torch.full((len(logits),), target, device=logits.device))
    return Terms(norm, nps, loss, settings.norm_weight * norm + settings.nps_weight * nps + loss)


def _draw_rows(n: int, batch_size: int | None, generator: torch.Generator) -> Tensor:
    """The photos of one step, without repetition."""
    if batch_size is None or batch_size >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=generator)[:batch_size]


@dataclass(frozen=True)
class Found:
    """A mask, and the map that it was cut from.

    Attributes:
        mask: 1 x h x w of 0 and 1.
        saliency: h x w, at least 0: how much the l_1 perturbation changes each pixel.
        forwards: images shown to the model.
    """

    mask: Tensor
    saliency: Tensor
    forwards: int


def search_mask(
    model: Model,
    photos: Tensor,
    region: Tensor,
    target: int,
    *,
    area: float,
    rectangles: int | None = 4,
    matrices: Tensor | None = None,
    light: Tensor | None = None,
    settings: Settings | None = None,
) -> Found:
    """Find the regions in which a perturbation is worth most, and make a mask of them.

    The objective is optimised with the l_1 norm, which leaves most pixels alone, over the whole region and with
    ``add``, since only a change can be nothing; then :func:`cut_mask` keeps the most changed part.

    Args:
        model, photos, target, matrices, light: as for :func:`rp2`.
        region: 1 x h x w of 0 and 1 in the canonical frame: where a sticker may be at all, such as the whole sign.
        area: of the mask, as a share of the region.
        rectangles: the largest number of rectangles; None for the single pixels that are changed most.
        settings: as for :func:`rp2`; mode, norm and score are set here.

    Raises:
        InputError: an input that cannot be used, or a search that changed nothing.
    """
    region = check_mask(region)
    chosen = replace(settings or Settings(), mode="add", norm=1, nps_weight=0.0)
    found = rp2(model, photos, region, target, matrices=matrices, light=light, settings=chosen)
    saliency = found.sticker.delta.square().sum(0).sqrt()
    mask = cut_mask(saliency, region, area=area, rectangles=rectangles)
    return Found(mask.to(found.sticker.mask), saliency, found.forwards)


def cut_mask(saliency: Tensor, region: Tensor, *, area: float, rectangles: int | None = 4) -> Tensor:
    """Keep the most salient part of a region.

    Rectangles are taken one after the other, each the one with the largest sum of ``saliency - tau``, where tau is a
    price for every pixel: the lowest for which all of them together stay within the area.

    Args:
        saliency: h x w, at least 0.
        region: 1 x h x w of 0 and 1; the mask stays inside it.
        area: of the mask, as a share of the region, in (0, 1].
        rectangles: the largest number of rectangles; None for single pixels.

    Returns:
        1 x h x w of 0 and 1, float32, on the CPU.

    Raises:
        InputError: an area out of its range or of less than a pixel, or a saliency of 0 everywhere.
    """
    inside = check_mask(region)[0].cpu().float()
    if saliency.shape != inside.shape:
        raise InputError(f"a saliency of {tuple(saliency.shape)} does not fit a region of {tuple(inside.shape)}")
    values = saliency.detach().cpu().float() * inside
    if not 0 < area <= 1 or (rectangles is not None and rectangles < 1):
        raise InputError("the area must be a share above 0 and at most 1, and there must be at least one rectangle")
    budget = int(area * float(inside.sum()))
    if budget < 1:
        raise InputError(f"an area of {area:g} of the region is less than one pixel: allow more")
    if not bool(torch.isfinite(values).all()) or not float(values.max()) > 0:
        raise InputError("the search changed no pixel: lower norm_weight")
    if rectangles is None:
        kept = torch.zeros_like(values).flatten()
        kept[values.flatten().topk(budget).indices] = 1
        return (kept.view_as(values) * (values > 0))[None]

    factor = -(-max(values.shape) // _GRID)
    coarse = F.avg_pool2d(values[None, None], factor, ceil_mode=True, count_include_pad=False)[0, 0].double().numpy()
    # Cells outside the region cost more than any rectangle can win.
    open_cells = F.max_pool2d(1 - inside[None, None], factor, ceil_mode=True)[0, 0].numpy() == 0
    wall = float(coarse.sum()) + 1.0
    lowest, highest, best = 0.0, float(coarse.max()), None
    for _ in range(16):
        price = (lowest + highest) / 2
        drawn = _rectangles(np.where(open_cells, coarse - price, -wall), rectangles, wall)
        full = np.kron(drawn, np.ones((factor, factor)))[: values.shape[0], : values.shape[1]]
        if full.sum() > budget:
            lowest = price
        else:
            highest = price
            best = full if best is None or full.sum() >= best.sum() else best
    if best is None or best.sum() == 0:
        raise InputError(f"no rectangle fits into {area:g} of the region: allow more, or single pixels")
    return torch.from_numpy(best).float()[None]


def _rectangles(gains: NDArray[np.float64], count: int, wall: float) -> NDArray[np.float64]:
    """The cells of at most ``count`` rectangles, greedily of the largest sums above 0: 0 or 1, the shape of gains."""
    gains, cells = gains.copy(), np.zeros_like(gains)
    for _ in range(count):
        total, (top, bottom, left, right) = _best_rectangle(gains)
        if total <= 0:
            break
        cells[top:bottom, left:right] = 1
        # Neither in the next rectangle nor touching it, so that there are as many stickers as rectangles.
        gains[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = -wall
    return cells


def _best_rectangle(gains: NDArray[np.float64]) -> tuple[float, tuple[int, int, int, int]]:
    """The rectangle of the largest sum: for each pair of rows, the best run of the column sums (Kadane)."""
    height, width = gains.shape
    columns = np.vstack([np.zeros(width), np.cumsum(gains, 0)])
    best, place = -np.inf, (0, 0, 0, 0)
    for top in range(height):
        # All bottoms at once: (height - top) x (width + 1) running sums along the columns.
        sums = np.cumsum(columns[top + 1 :] - columns[top], 1)
        sums = np.hstack([np.zeros((len(sums), 1)), sums])
        lows = np.minimum.accumulate(sums[:, :-1], 1)
        runs = sums[:, 1:] - lows
        row, right = np.unravel_index(int(runs.argmax()), runs.shape)
        if runs[row, right] > best:
            left = int(sums[row, : right + 1].argmin())
            best, place = float(runs[row, right]), (top, top + int(row) + 1, left, int(right) + 1)
    return best, place
