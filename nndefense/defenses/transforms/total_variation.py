"""Total variation minimisation of a whole batch to a duality gap: a relaxed primal-dual method in torch.

And as a transformation: drop pixels at random, and redraw them as plainly as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.checks import at_least
from nndefense.defenses.transformed import TransformDefense
from nndefense.defenses.transforms.tv_gradient import Minimised
from nndefense.defenses.transforms.tv_problem import Iterates, TvProblem, check_terms
from nndefense.errors import InputError, check_choice, warn
from nndefense.models import Classifier
from nndefense.modes import EvaluationOnly

MASKS = ("pixel", "entry")
#: Entries that are worked on together: on a CPU what stays in a core's cache.
_CPU_ENTRIES, _GPU_ENTRIES = 2**16, 2**27
#: Greatest gap, as a share of the objective, where only a direction is wanted; twice as fast, and as strong an attack.
_FOLLOWED = 1e-2


@dataclass(frozen=True)
class TvSolution:
    """Minimisers and what is proved of them.

    Attributes:
        images: N x C x H x W, each entry between the least and the greatest kept value of its channel.
        objective: the objective there, float64, N.
        gap: what the objective lies above the true minimum at most, float64, N.
        iterations: that each image took, int64, N.
        dual: the dual variables along x and y, each N x C x H x W, for a warm start.
    """

    images: Tensor
    objective: Tensor
    gap: Tensor
    iterations: Tensor
    dual: tuple[Tensor, Tensor]


@torch.no_grad()
def minimize_total_variation(
    images: Tensor,
    weight: float = 0.03,
    *,
    keep: Tensor | None = None,
    kind: str = "isotropic",
    data: str = "squared",
    tolerance: float | Tensor = 1e-4,
    max_iterations: int = 5000,
    start: TvSolution | Tensor | None = None,
) -> TvSolution:
    """Minimise the data term plus ``weight`` times the total variation, each image on its own.

    The problem and its readings stand in :mod:`nndefense.defenses.transforms.tv_problem`. The method is the primal-dual
    one of Chambolle & Pock (2011, algorithm 1), over-relaxed (Condat 2013). It is stopped for each image when the
    duality gap is proved to be at most ``tolerance`` of the objective, and finished images leave the batch. With the
    squared data term the channels are problems of their own and finish apart. What an image becomes does not depend on
    its batch, but for rounding.

    Args:
        images: N x C x H x W, float32 or float64, finite.
        weight: of the total variation, positive.
        keep: mask of kept pixels, zeros and ones or booleans, of a shape that broadcasts to the images'; None keeps
            all. A dropped pixel's value is never looked at.
        kind: ``isotropic``, ``anisotropic`` or ``lines``.
        data: ``squared`` or ``norm``.
        tolerance: greatest gap as a share of the objective, one number or one per image, at least 1e-6 for float32.
        max_iterations: after which an image is given back as it is, with a warning.
        start: where to begin: an earlier solution, or images; None begins at the images themselves, holes filled from
            their neighbours.

    Raises:
        InputError: images or settings that cannot be used.
    """
    check_terms(kind, data, weight)
    max_iterations = at_least("max_iterations", max_iterations)
    begin = start.images if isinstance(start, TvSolution) else start
    mask = _checked(images, keep, begin)
    each = _tolerances(images, tolerance)
    count, channels = images.shape[:2]
    # Each channel by itself where no term joins them.
    units = count * channels if data == "squared" else count
    shape = (units, count * channels // max(units, 1), *images.shape[2:])
    problem = TvProblem(images.contiguous().view(shape), None if mask is None else mask.view(shape), weight, kind, data)
    dual = (images.new_empty(shape), images.new_empty(shape))
    zeros = images.new_zeros(units, dtype=torch.float64)
    out = TvSolution(images.new_empty(shape), zeros, zeros.clone(), zeros.long(), dual)
    if begin is not None:
        out.images.copy_(begin.reshape(shape))
    if isinstance(start, TvSolution):
        dual[0].copy_(start.dual[0].reshape(shape))
        dual[1].copy_(start.dual[1].reshape(shape))
    each = each.repeat_interleave(units // max(count, 1))

    def solve(rows: slice) -> None:
        work = Iterates(problem.select(rows))
        pair = (dual[0][rows], dual[1][rows])
        warm = isinstance(start, TvSolution)
        work.begin(None if begin is None else out.images[rows], pair if warm else None)
        part = TvSolution(out.images[rows], out.objective[rows], out.gap[rows], out.iterations[rows], pair)
        _solve(work, each[rows], max_iterations, part)

    _in_parts(solve, problem.images)
    late = int((out.gap > each * out.objective + _floor(problem)).sum())
    if late:
        warn(
            f"total variation: {late} of {units} {'channels' if units != count else 'images'} did not reach the "
            f"tolerance in {max_iterations:,} iterations; the solution's gap says how far they are: "
            "raise max_iterations or tolerance",
            RuntimeWarning,
        )
    per_image = (count, units // max(count, 1))
    return TvSolution(
        out.images.view(images.shape),
        out.objective.view(per_image).sum(1),
        out.gap.view(per_image).sum(1),
        out.iterations.view(per_image).amax(1) if units else out.iterations,
        (dual[0].view(images.shape), dual[1].view(images.shape)),
    )


def _checked(images: Tensor, keep: Tensor | None, begin: Tensor | None) -> Tensor | None:
    """The keep mask in the images' shape and type."""
    if not isinstance(images, Tensor) or images.dim() != 4 or images.dtype not in (torch.float32, torch.float64):
        raise InputError("images must be a float32 or float64 tensor N x C x H x W")
    if 0 in images.shape[1:]:
        raise InputError(f"images have shape {tuple(images.shape)}, but need at least one channel, row and column")
    if begin is not None and begin.shape != images.shape:
        raise InputError(f"start has shape {tuple(begin.shape)}, but the images have {tuple(images.shape)}")
    if keep is None:
        return None
    try:
        mask = keep.to(images).expand_as(images).contiguous()
    except RuntimeError:
        raise InputError(f"keep has shape {tuple(keep.shape)}, which does not fit {tuple(images.shape)}") from None
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("keep must hold zeros and ones, or booleans")
    return mask


def _tolerances(images: Tensor, tolerance: float | Tensor) -> Tensor:
    each = torch.as_tensor(tolerance, dtype=torch.float64, device=images.device)
    least = 1e-6 if images.dtype == torch.float32 else 1e-12
    if each.dim() > 1 or (each.dim() == 1 and len(each) != len(images)):
        raise InputError(f"tolerance has shape {tuple(each.shape)}, but must be one number or one per image")
    if not bool(((each >= least) & (each < 1)).all()):
        raise InputError(f"tolerance is {tolerance}, but must be from {least:g} (the type's rounding) to 1")
    return each.expand(len(images))


def _in_parts(solve: Callable[[slice], None], images: Tensor) -> None:
    """Solve slices of the batch: on a CPU as many at once as torch has threads, each on one.

    An operation on a part is too short to be shared by threads, who would spend their time waiting for one another.
    """
    on_cpu = images.device.type == "cpu"
    size = max(1, (_CPU_ENTRIES if on_cpu else _GPU_ENTRIES) // max(1, images[:1].numel()))
    parts = [slice(first, min(first + size, len(images))) for first in range(0, len(images), size)]
    threads = torch.get_num_threads()
    if not on_cpu or threads == 1:
        for part in parts:
            solve(part)
        return
    try:
        # The number of threads belongs to the thread that sets it, and to those that start later.
        workers = min(threads, max(1, len(parts)))
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(torch.no_grad()(solve), parts))
    finally:
        torch.set_num_threads(threads)


def _floor(problem: TvProblem) -> float:
    """A gap that is rounding's, for images whose objective is 0."""
    return torch.finfo(problem.images.dtype).eps * problem.weight * problem.images[:1].numel()


def _checkpoints(limit: int) -> Iterator[int]:
    """Iterations after which gaps are measured: soon, then ever more rarely."""
    done, stride = 5, 4.0
    while done < limit:
        yield done
        done += int(stride)
        stride *= 1.15
    yield limit


def _solve(work: Iterates, tolerance: Tensor, limit: int, out: TvSolution) -> None:
    """Solve a part of the batch, and write what comes out of it."""
    rows, floor = torch.arange(len(tolerance), device=tolerance.device), _floor(work.problem)
    for done in _checkpoints(limit):
        work.advance(done)
        objective, gap = work.certify(tolerance, floor)
        finished = gap <= tolerance * objective + floor
        if done == limit:
            finished = torch.ones_like(finished)
        ready = int(finished.sum())
        if not ready:
            continue
        values = (work.best(), work.px, work.py, objective, gap)
        for target, found in zip((out.images, *out.dual, out.objective, out.gap), values, strict=True):
            if ready == len(out.images):
                target.copy_(found)
            else:
                target[rows[finished]] = found[finished]
        out.iterations[rows[finished]] = done
        if ready == len(rows):
            return
        rows, tolerance = rows[~finished], tolerance[~finished]
        work.drop(finished)


class TotalVariation(EvaluationOnly):
    """Total variation minimisation (Guo et al., ICLR 2018, section 4).

    Each pixel is kept with probability ``keep``, all of its channels or none (Athalye et al. 2018; ``mask="entry"``
    draws for each channel apart, as the authors' code does). The mask is drawn and handed to the solver as such: black
    pixels that were kept are never taken for dropped ones, nor the reverse. The image is the minimiser of
    ``1/2 |m (z - x)|_2^2 + weight TV(z)``, to a proved share of its objective; the other readings of the paper are
    options, see :mod:`nndefense.defenses.transforms.tv_problem`. The weight .03 is the authors'.

    Its gradient to the images is the implicit one of the converged problem
    (:mod:`nndefense.defenses.transforms.tv_gradient`); an attacker averages over masks besides (EOT).

    Args:
        weight, kind, data: as for :func:`minimize_total_variation`.
        keep: share of pixels that are kept, in (0, 1]; 1 draws no mask.
        mask: ``pixel`` or ``entry``.
        tolerance: greatest gap as a share of the objective.
        max_iterations: of the solver; an image that needs more is given back as it is then, with a warning.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(
        self,
        weight: float = 0.03,
        *,
        keep: float = 0.5,
        mask: str = "pixel",
        kind: str = "isotropic",
        data: str = "squared",
        tolerance: float = 1e-3,
        max_iterations: int = 2000,
    ) -> None:
        super().__init__()
        check_terms(kind, data, weight)
        max_iterations = at_least("max_iterations", max_iterations)
        if not 0 < keep <= 1:
            raise InputError(f"keep is {keep}, but must lie in (0, 1]: it is the share of pixels that stay")
        check_choice("mask", mask, MASKS)
        if not 1e-6 <= tolerance < 1:
            raise InputError(f"tolerance is {tolerance}, but must be from 1e-6 to 1")
        self.weight, self.keep, self.mask, self.kind, self.data = weight, keep, mask, kind, data
        self.tolerance, self.max_iterations = tolerance, max_iterations

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A mask of kept pixels for each image, by ``generator``: booleans N x 1 x H x W, or N x C x H x W with
        ``mask="entry"``.
        """
        count, channels, height, width = images.shape
        shape = (count, channels if self.mask == "entry" else 1, height, width)
        return torch.rand(shape, generator=generator).to(images.device) < self.keep

    def forward(self, images: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Images N x C x H x W in [0, 1] and masks of :meth:`draw` (drawn here by default) -> images in [0, 1]."""
        mask = self.draw(images) if drawn is None else drawn
        keep = None if self.keep == 1 else mask
        still = images.detach().contiguous()
        follows = torch.is_grad_enabled() and images.requires_grad
        found = minimize_total_variation(
            still,
            self.weight,
            keep=keep,
            kind=self.kind,
            data=self.data,
            tolerance=max(self.tolerance, _FOLLOWED) if follows else self.tolerance,
            max_iterations=self.max_iterations,
        ).images
        if not follows:
            return found
        kept = None if keep is None else keep.to(still).expand_as(still)
        moving: Tensor = Minimised.apply(images, found, TvProblem(still, kept, self.weight, self.kind, self.data))
        return moving

    def extra_repr(self) -> str:
        """The settings, for people."""
        return (
            f"weight={self.weight}, keep={self.keep}, mask={self.mask}, kind={self.kind}, data={self.data}, "
            f"tolerance={self.tolerance:g}"
        )


def tv_minimization(
    classifier: Classifier, *, draws: int = 1, attack_draws: int | None = None, seed: int | None = None, **settings: Any
) -> TransformDefense:
    """Total variation minimisation before the classifier; attacked with its implicit gradient and EOT over masks.

    Args:
        classifier: any classifier.
        draws: masks that a prediction averages; Guo et al. take one.
        attack_draws: masks per step of an attack; by default 10, or ``draws`` if that is more.
        seed: of the masks; None draws a secret one.
        settings: as for :class:`~nndefense.defenses.transforms.TotalVariation`.

    Raises:
        InputError: settings that cannot be used.
    """
    transform = TotalVariation(**settings)
    options: dict[str, Any] = {"draws": draws, "attack_draws": attack_draws, "seed": seed}
    return TransformDefense(classifier, transform, differentiable=True, random=transform.keep < 1, **options)
