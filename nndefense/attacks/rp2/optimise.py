"""The RP2 optimisation: one sticker for all views of an object (Eykholt et al., CVPR 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.checks import check_logits, check_model
from nndefense.attacks.objective import Model
from nndefense.attacks.rp2.printing import check_palette, default_palette, non_printability
from nndefense.attacks.rp2.sticker import MODES, Mode, Sticker, check_mask, check_scene
from nndefense.attacks.rp2.views import ViewChanges, as_photographed
from nndefense.errors import InputError
from nndefense.images import shape_text


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
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}, but must be one of {', '.join(MODES)}")
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
    """The objective of :func:`rp2`, from the logits N x K of the views; its gradient is 0 outside the mask.

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
