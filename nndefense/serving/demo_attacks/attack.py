"""Attacks on a guard, picture by picture: what an attacker holds, and a watch that ends an attack early."""

from __future__ import annotations

import base64
import copy
import io
import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nndefense.attacks import distance, pgd, radius
from nndefense.attacks.retrieval import RetrievalSurface, adaptive
from nndefense.defenses import NearestNeighborDefense
from nndefense.guard import Guard

_LEVELS = 255
# Rounding of the size itself, relative and absolute.
_SLACK = 1e-6
_ATTEMPTS = 12
_NICE = (1, 2, 5)


def eight_bits(images: Tensor) -> Tensor:
    """Round images N x C x H x W in [0, 1] to multiples of 1/255, bit for bit what decoding their PNG gives."""
    return (images.float() * _LEVELS).round() / _LEVELS


def picture_within(images: Tensor, clean: Tensor, radii: Tensor, norm: str) -> Tensor:
    """Attacked images with 8 bits a channel that are still within their budget.

    Rounding may carry an image out of its ball by a little; its perturbation is then shrunk a little and rounded again,
    and in the end rounded towards the clean image, which no pixel survives farther away.

    Args:
        images: attacked, N x C x H x W in [0, 1].
        clean: the images they were made from, of the same shape, already with 8 bits.
        radii: N, in raw pixel units.
        norm: one of :data:`nndefense.attacks.NORMS`.

    Returns:
        N x C x H x W, multiples of 1/255.
    """
    rounded = eight_bits(images)
    share = torch.ones_like(radii)
    for _ in range(_ATTEMPTS):
        size = distance(clean, rounded, norm)
        over = size > radii * (1 + _SLACK) + _SLACK
        if not bool(over.any()):
            return rounded
        share = torch.where(over, share * (radii / size).clamp(max=1.0) * 0.995, share)
        rounded = eight_bits(clean + share.view(-1, 1, 1, 1) * (images - clean))
    towards = (clean * _LEVELS).round() + ((images - clean) * _LEVELS).trunc()
    over = distance(clean, rounded, norm) > radii * (1 + _SLACK) + _SLACK
    return torch.where(over.view(-1, 1, 1, 1), towards.clamp(0, _LEVELS) / _LEVELS, rounded)


def magnified(difference: Tensor) -> tuple[Tensor, int]:
    """Show a difference C x H x W in [-1, 1] on grey: ``0.5 + factor * difference`` in [0, 1].

    Returns:
        The picture, and the factor: the largest of 1, 2, 5, 10, 20, 50, ... up to 100 at which no pixel is clipped.
    """
    largest = float(difference.abs().max())
    room = 100.0 if largest == 0 else min(100.0, (0.5 + _SLACK) / largest)
    factor = 1
    if room >= 1:
        power = 10 ** math.floor(math.log10(room))
        factor = max(nice * power for nice in _NICE if nice * power <= room)
    return (0.5 + factor * difference).clamp(0, 1), factor


def png(pixels: NDArray[Any]) -> bytes:
    """Encode uint8 pixels H x W x C (C 1 or 3) as PNG, grey for one channel."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()


def png_text(image: Tensor) -> str:
    """An image C x H x W in [0, 1] as a PNG in base64."""
    pixels = (image.detach().cpu() * _LEVELS).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return base64.b64encode(png(pixels)).decode("ascii")


NormName = Literal["normalized-l2", "linf"]
AttackName = Literal["classifier", "defense"]


class Stopped(Exception):
    """Nobody waits for this attack any more."""


class Late(Exception):
    """The attack took too long."""


class AttackWatch:
    """Ends an attack between two of its steps: when it is told to, or ``seconds`` after its first look."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._stopped, self._end = seconds, threading.Event(), float("inf")

    def stop(self) -> None:
        """End the attack at its next step; may be called from any thread."""
        self._stopped.set()

    def wanted(self) -> None:
        """Raise :class:`Stopped` where nobody waits any more; the time does not begin to run."""
        if self._stopped.is_set():
            raise Stopped

    def look(self) -> None:
        """Raise :class:`Stopped` or :class:`Late` where the attack has to end."""
        self.wanted()
        now = time.monotonic()
        if self._end == float("inf"):
            self._end = now + self._seconds
        if now > self._end:
            raise Late

    def over(self, called: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function ``called``, which looks first."""

        def watched(*given: Any, **named: Any) -> Tensor:
            self.look()
            return called(*given, **named)

        return watched


@dataclass(frozen=True)
class AttackJob:
    """One attack: a clean image 1 x C x H x W with 8 bits, the class to leave (or to reach), and how."""

    clean: Tensor
    label: int
    targeted: bool
    attack: AttackName
    norm: NormName
    eps: float
    steps: int


class AttackTarget:
    """A guard as an attacker sees it: a copy of its classifier, and the surface of the defence.

    The copy is needed because opening a surface traces the net, which for a moment changes its mode and its hooks:
    predictions that run meanwhile must not notice. Used in one thread.
    """

    def __init__(self, guard: Guard) -> None:
        self.classifier = copy.deepcopy(guard.classifier).eval()
        self.device = self.classifier.device
        self._guard = weakref.ref(guard)
        self._surface: RetrievalSurface | None = None

    def prepare(self) -> None:
        """Open the surface, which takes a while the first time: it holds all rows of the database."""
        if self._surface is None:
            guard = self._guard()
            assert guard is not None
            made = NearestNeighborDefense(self.classifier, guard.database, **guard.rule.to_json()).surface()
            assert made.rows is not None
            self._surface = replace(made, rows=replace(made.rows, images=_row_images(guard)))

    @property
    def surface(self) -> RetrievalSurface:
        """All that there is to know of the defence; with pictures of the rows, where the guard has them."""
        self.prepare()
        assert self._surface is not None
        return self._surface


def _row_images(guard: Guard) -> Callable[[Tensor], Tensor] | None:
    """Row numbers M -> images M x C x H x W, or None where the guard has no pictures of the rows."""
    numbers = guard.database.row_numbers
    if guard.neighbor_image(int(numbers[0])) is None:
        return None
    known = weakref.ref(guard)

    def fetch(rows: Tensor) -> Tensor:
        owner = known()
        assert owner is not None
        found = [owner.neighbor_image(int(numbers[row])) for row in rows.tolist()]
        return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in found if image is not None]) / 255

    return fetch


def attack_picture(target: AttackTarget, job: AttackJob, watch: AttackWatch) -> Tensor:
    """Run the ``job`` on the ``target``, watched by ``watch``, and round what it made: 1 x C x H x W with 8 bits,
    within the budget.

    Random starts are drawn from a fixed seed, so that the same request gives the same picture. The adaptive attack
    shows the true defence each candidate as it will be shown to people: rounded.
    """
    x, y = job.clean.to(target.device), torch.tensor([job.label], device=target.device)
    radii = radius(x, job.eps, job.norm)
    ball: dict[str, Any] = {"eps": job.eps, "norm": job.norm, "steps": job.steps}

    def within(images: Tensor) -> Tensor:
        return picture_within(images, x.expand_as(images), radii.expand(len(images)), job.norm)

    classify = watch.over(target.classifier)
    first = pgd(classify, x, y, **ball, targeted=job.targeted, generator=torch.Generator().manual_seed(0))
    if job.attack == "classifier":
        return within(first).cpu()
    whole = target.surface
    assert whole.features is not None
    watched = replace(
        whole,
        predict=watch.over(lambda images: whole.predict(within(images))),
        classify=classify,
        features=watch.over(whole.features),
    )
    made = adaptive(watched, x, y, **ball, start=first, generator=torch.Generator().manual_seed(0))
    return within(made).cpu()
