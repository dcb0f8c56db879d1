"""Attacks on a guard, picture by picture: what an attacker holds, and a watch that ends an attack early."""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nndefense.attacks import pgd, radius
from nndefense.attacks.retrieval import RetrievalSurface, adaptive
from nndefense.defenses import NearestNeighborDefense
from nndefense.guard import Guard
from nndefense.serving.demo_attacks.pixels import picture_within

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
        """The same function, which looks first."""

        def watched(*given: Any, **named: Any) -> Tensor:
            self.look()
            return called(*given, **named)

        return watched


@dataclass(frozen=True)
class AttackJob:
    """One attack: a clean image 1 x C x H x W with 8 bits, the class to leave, and how."""

    clean: Tensor
    label: int
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
            made = NearestNeighborDefense(self.classifier, guard.database, guard.k, guard.weighting).surface()
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
    """Run one attack, and round what it made: 1 x C x H x W with 8 bits, within the budget.

    Random starts are drawn from a fixed seed, so that the same request gives the same picture. The adaptive attack
    shows the true defence each candidate as it will be shown to people: rounded.
    """
    x, y = job.clean.to(target.device), torch.tensor([job.label], device=target.device)
    radii = radius(x, job.eps, job.norm)
    ball: dict[str, Any] = {"eps": job.eps, "norm": job.norm, "steps": job.steps}

    def within(images: Tensor) -> Tensor:
        return picture_within(images, x.expand_as(images), radii.expand(len(images)), job.norm)

    classify = watch.over(target.classifier)
    first = pgd(classify, x, y, **ball, generator=torch.Generator().manual_seed(0))
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
