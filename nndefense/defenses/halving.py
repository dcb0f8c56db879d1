"""Successive halving: settings meet the attacker who knows them, cheaply at first, and the best of them in earnest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nndefense.database import Rule
from nndefense.errors import InputError, make_plain


@dataclass(frozen=True)
class HalvingRung:
    """A rung of successive halving (Jamieson and Talwalkar, AISTATS 2016).

    Attributes:
        settings: how many are attacked on it, at most.
        images: on how many of the calibration images, drawn once for all rungs; None: on all.
        steps: of the adaptive attack.
        each: how many of them may be of one candidate (layer and pooling).
    """

    settings: int
    images: int | None
    steps: int
    each: int = 1

    def __post_init__(self) -> None:
        make_plain(self)
        if min(self.settings, self.steps, self.each, 1 if self.images is None else self.images) < 1:
            raise InputError(f"a rung needs at least 1 setting, image, step and setting of each candidate: {self}")


#: All candidates cheaply; then a few settings; then three of them on all images.
RUNGS = (HalvingRung(24, 24, 3), HalvingRung(6, 60, 6, each=2), HalvingRung(3, None, 12, each=2))


@dataclass(eq=False)
class Setting:
    """One setting while it is compared, and which of the N calibration images it gets right (booleans).

    Attributes:
        candidate: the number of its database.
        feature: layer, pooling and dimension.
        rule: how the neighbours decide.
        clean, gray: right on the clean images, and on those of the gray-box attack.
        worst: right on both, and on every image that was made by who knows a setting of the same candidate.
        rung: the last rung that it was attacked on itself; -1: none.
        images: how many images that was on, the first of the order that they are drawn in.
    """

    candidate: int
    feature: dict[str, Any]
    rule: Rule
    clean: Tensor
    gray: Tensor
    worst: Tensor = field(init=False)
    rung: int = -1
    images: int = 0

    def __post_init__(self) -> None:
        self.worst = self.clean & self.gray


def halve(
    settings: Sequence[Setting],
    rungs: Sequence[HalvingRung],
    order: Tensor,
    attack: Callable[[Setting, Tensor, int], None],
) -> list[Setting]:
    """Attack ever fewer settings on ever more images, each rung in earnest the best of the one before.

    On the first rung each candidate is attacked through its best setting under the gray-box attack, on the second any
    setting of a candidate that was, and from then on settings that were. Where there are no more than the last rung
    takes, they meet that one alone.

    Args:
        settings: those within the bounds; ties go to the first.
        rungs: from the cheapest to the last.
        order: a permutation of the N images: a rung's images are the first of it.
        attack: called with a setting, the numbers of images and the steps; updates ``worst`` of the settings of that
            candidate.

    Returns:
        The settings of the last rung, which met it on the same images; best first.
    """
    if not rungs:
        raise InputError("successive halving needs at least one rung")
    pool, seen = list(settings), len(order)
    first = len(rungs) - 1 if len(pool) <= rungs[-1].settings else 0
    for number, rung in enumerate(rungs[first:]):
        entrants = _best(pool, rung, order[:seen])
        index = order[: rung.images]
        seen = len(index)
        for setting in entrants:
            attack(setting, index, rung.steps)
            setting.rung, setting.images = first + number, seen
        candidates = {setting.candidate for setting in entrants}
        pool = entrants if number else [setting for setting in settings if setting.candidate in candidates]
    return ranked(entrants, order[:seen])


def ranked(settings: Sequence[Setting], index: Tensor) -> list[Setting]:
    """Best first: right in the worst case on these images, on all images so far, clean; then fewer neighbours."""
    scores = {id(each): (int(each.worst[index].sum()), *map(int, (each.worst.sum(), each.clean.sum())), -each.rule.k)
              for each in settings}  # fmt: skip
    return sorted(settings, key=lambda each: scores[id(each)], reverse=True)


def _best(pool: Sequence[Setting], rung: HalvingRung, index: Tensor) -> list[Setting]:
    """As many of the best as the rung takes, of each candidate and in all; of those that did alike so far the first."""
    taken: list[Setting] = []
    for setting in ranked(pool, index):
        same = [other for other in taken if other.candidate == setting.candidate]
        alike = any(torch.equal(a, b) for a, b in ((_outcomes(setting), _outcomes(other)) for other in same))
        if not alike and len(same) < rung.each and len(taken) < rung.settings:
            taken.append(setting)
    return taken


def _outcomes(setting: Setting) -> Tensor:
    return torch.stack([setting.clean, setting.gray, setting.worst])
