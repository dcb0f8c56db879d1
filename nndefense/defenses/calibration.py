"""Choosing layer, pooling and rule on held-out images, never on those that are reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nndefense.database import WEIGHTINGS, ImageDatabase, Rule
from nndefense.database.rule import Ruled
from nndefense.defenses.halving import RUNGS, HalvingRung, Setting, halve
from nndefense.errors import InputError, plain
from nndefense.images import check_images
from nndefense.models import Classifier
from nndefense.statistics import mcnemar_p

#: The numbers of neighbours K that calibration tries.
DEFAULT_KS = (1, 3, 5, 10, 20, 50)
#: Whom calibration chooses against: an attacker who knows the retrieval, or one who knows the classifier alone.
OBJECTIVES = ("informed", "gray")
# Where the paired test calls a setting better than the bare classifier.
_LEVEL = 0.05


class InformedAttacker(Protocol):
    """Who knows the retrieval: images N x C x H x W and class numbers N -> attacked images, within the budget."""

    def on_defense(self, database: ImageDatabase, rule: Rule, images: Tensor, labels: Tensor, steps: int) -> Tensor:
        """With the adaptive attack, on the defence over this database."""

    def on_classifier(self, images: Tensor, labels: Tensor, steps: int) -> Tensor:
        """With as many gradients, on the bare classifier."""


@dataclass(frozen=True)
class Choice(Ruled):
    """One setting of the defence with its accuracies on the calibration images, as fractions.

    Attributes:
        layer, pooling, dimension: of the candidate.
        rule: how its neighbours decide.
        clean, attacked: on the clean images, and on those of the gray-box attack.
        worst: the share of ``images`` calibration images that it gets right clean, under the gray-box attack and under
            the adaptive one; None where it was not attacked by who knows it.
        images: how many these are, or None.
    """

    layer: str
    pooling: str
    dimension: int
    rule: Rule
    clean: float
    attacked: float
    worst: float | None = None
    images: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, those of the rule among them; ``worst`` and ``images`` only where they were measured."""
        met = {} if self.images is None else {"worst": self.worst, "images": self.images}
        feature = {"layer": self.layer, "pooling": self.pooling, "dimension": self.dimension}
        return {**feature, **self.rule.settings, "clean": self.clean, "attacked": self.attacked, **met}


@dataclass(frozen=True)
class PairedTest:
    """The exact McNemar test between the chosen setting and the bare classifier, on the calibration images.

    Attributes:
        only_chosen, only_bare: images that one of them alone gets right.
        p: two-sided.
        better: the setting is, at 5 %.
    """

    only_chosen: int
    only_bare: int
    p: float
    better: bool

    @classmethod
    def of(cls, chosen: Tensor, bare: Tensor) -> PairedTest:
        """The test on outcomes, N booleans each."""
        won, lost = int((chosen & ~bare).sum()), int((bare & ~chosen).sum())
        p = mcnemar_p(won, lost)
        return cls(won, lost, p, won > lost and p <= _LEVEL)


@dataclass(frozen=True)
class Calibration:
    """The table that a setting was chosen from, best first, and the choice.

    Attributes:
        objective: what was maximised, in words.
        by: the same by name, one of :data:`OBJECTIVES`.
        n: number of calibration images.
        bare_clean: the bare classifier's accuracy on the clean calibration images.
        bare_attacked: the same on the attacked ones.
        bare_worst: on the worst of both and an attack of its own with as many gradients as the adaptive one of the last
            rung; None for ``gray``.
        chosen: the best setting within the bound on lost clean accuracy; where none is within it, the one that
            loses least, and ``within_bound`` is false.
        candidate: which of the candidates that setting belongs to, counted from 0.
        table: all settings: those of later rungs first, admissible ones before the others, best first.
        rungs: what was attacked by who knows it, and how; empty for ``gray``.
        outcomes: ``chosen`` and ``bare``: under ``clean``, ``attacked`` and perhaps ``worst``, which images each gets
            right, as hexadecimal digits of one bit each.
        paired: the test between them, in the worst case, or for ``gray`` under the attack.
    """

    objective: str
    by: str
    n: int
    bare_clean: float
    bare_attacked: float
    bare_worst: float | None
    chosen: Choice
    candidate: int
    within_bound: bool
    table: tuple[Choice, ...]
    rungs: tuple[HalvingRung, ...]
    outcomes: dict[str, dict[str, str]]
    paired: PairedTest

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        choices = {"chosen": self.chosen.to_json(), "table": [choice.to_json() for choice in self.table]}
        return {**asdict(replace(self, table=())), **choices}


def calibrate(
    classifier: Classifier,
    candidates: Iterable[ImageDatabase],
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    *,
    informed: InformedAttacker | None = None,
    rungs: Sequence[HalvingRung] = RUNGS,
    seed: int = 0,
    ks: Sequence[int] = DEFAULT_KS,
    weightings: Sequence[str] = WEIGHTINGS,
    votes: Sequence[str] = ("posteriors",),
    temperatures: Sequence[float | None] = (None,),
    alphas: Sequence[float] = (0.0,),
    max_clean_loss: float = 0.02,
    batch_size: int = 256,
    progress: Callable[[Iterable[ImageDatabase]], Iterable[ImageDatabase]] = iter,
) -> Calibration:
    """Measure every setting and choose one: the best subject to a bound on lost clean accuracy.

    The best is who keeps most images, each under the worst of the gray-box attack and an attack by who knows the
    retrieval, as successive halving finds it (:func:`~nndefense.defenses.halving.halve`); without ``informed``, who
    keeps most under the gray-box attack. A setting that is better than the bare classifier by the paired test goes
    before all that are not.

    The neighbours of each image are found once per candidate, for the largest K; every smaller K is a prefix of
    them. The databases must not hold the calibration images: an image would find itself.

    Args:
        classifier: the classifier that all candidates were made with.
        candidates: one database per layer and pooling.
        clean: calibration images, N x C x H x W in [0, 1].
        attacked: the same images under the gray-box attack that the defence is chosen for.
        labels: N class numbers of the classifier.
        informed: the attacker who knows the retrieval, such as
            :class:`~nndefense.defenses.informed.AdaptiveAttacker`; None: the gray-box attack alone.
        rungs: how he is sent against the settings.
        seed: draws the order in which the images come on the rungs.
        ks: numbers of neighbours to try; those beyond a candidate's rows are left out.
        weightings, votes, temperatures, alphas: of the rule, to try in every combination, as for
            :func:`rules_to_try`.
        max_clean_loss: how much clean accuracy may be lost against the bare classifier, as a fraction.
        batch_size: images per forward pass.
        progress: wraps the candidates, to show how far it has come, and those of the settings of each rung.

    Raises:
        InputError: no candidate, no usable k, settings that no rule can have, labels that should vote where there are
            none, or images and labels that do not fit.
    """
    for images, name in ((clean, "clean images"), (attacked, "attacked images")):
        check_images(images, channels=classifier.input_shape[0], name=name)
        if len(images) != len(labels) or not len(labels):
            raise InputError(
                f"{len(images)} {name} and {len(labels)} labels were given to calibrate on: give N of each"
            )
    classifier.eval()
    databases, settings = list[ImageDatabase](), list[Setting]()
    for number, database in enumerate(progress(candidates)):
        databases.append(database)
        usable = sorted({plain(k) for k in ks if 1 <= k <= len(database)})
        scales = None
        if usable and set(temperatures) != {None}:
            scales = kernel_scales(classifier, database, torch.split(clean, batch_size), usable[-1])
        rules = rules_to_try(usable, weightings, votes, temperatures, alphas, scales)
        if rules:
            if "labels" in votes:
                Rule.fitting(database, usable[0], votes="labels")
            right = [_right(classifier, database, x, labels, rules, batch_size) for x in (clean, attacked)]
            feature = {name: getattr(database.feature, name) for name in ("layer", "pooling")}
            feature |= {"dimension": database.dimension}
            settings += [Setting(number, feature, rule, *bits) for rule, *bits in zip(rules, *right, strict=True)]
    if not settings:
        raise InputError("there is nothing to calibrate: give candidate databases with at least as many rows as a k")

    def bare_right(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([classifier(part) for part in torch.split(images, batch_size)])
        return (logits.argmax(1) == labels.to(logits.device)).cpu()

    bare = {"clean": bare_right(clean, labels), "attacked": bare_right(attacked, labels)}
    # A small slack, so that a bound of exactly n images is not missed by rounding.
    floor = float(bare["clean"].double().mean()) - max_clean_loss - 1e-9
    settings.sort(key=lambda s: (_share(s.clean) >= floor, *_rank(s)), reverse=True)
    admissible = [setting for setting in settings if _share(setting.clean) >= floor]
    within = admissible or [max(settings, key=lambda s: (_share(s.clean), _share(s.gray), -s.rule.k))]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if informed is None:
        finalists = within[:1]
        verdict = PairedTest.of(finalists[0].gray, bare["attacked"])
    else:
        attacker = informed

        def attack(setting: Setting, index: Tensor, steps: int) -> None:
            """Show what is made against one setting to all of its candidate."""
            standing = index[setting.worst[index]]
            if not len(standing):
                return
            database, aims = databases[setting.candidate], labels[standing.to(labels.device)]
            found = attacker.on_defense(database, setting.rule, clean[standing.to(clean.device)], aims, steps)
            family = [other for other in settings if other.candidate == setting.candidate]
            rules = [other.rule for other in family]
            for other, right in zip(family, _right(classifier, database, found, aims, rules, batch_size), strict=True):
                other.worst[standing] &= right

        finalists = halve(within, rungs, order, attack)
        bare["worst"] = bare["clean"] & bare["attacked"]
        standing = bare["worst"].nonzero()[:, 0]
        if len(standing):
            aims = labels[standing.to(labels.device)]
            found = informed.on_classifier(clean[standing.to(clean.device)], aims, rungs[-1].steps)
            bare["worst"][standing] &= bare_right(found, aims)
        tests = {id(each): PairedTest.of(each.worst, bare["worst"]) for each in finalists}
        finalists.sort(key=lambda each: not tests[id(each)].better)
        verdict = tests[id(finalists[0])]
        place = {id(each): number for number, each in enumerate(finalists)}
        settings.sort(key=lambda s: (place.get(id(s), len(place)), -s.rung, -_share(s.worst[order[: s.images]])))
    chosen = finalists[0]
    bits = {"clean": chosen.clean, "attacked": chosen.gray, "worst": chosen.worst}
    lost = f"with at most {100 * max_clean_loss:g} points of clean accuracy lost"
    worst = "best accuracy in the worst case of the attack and one that knows the retrieval"
    return Calibration(
        objective=f"{'best attacked accuracy' if informed is None else worst} {lost}",
        by="gray" if informed is None else "informed",
        n=len(labels),
        bare_clean=_share(bare["clean"]),
        bare_attacked=_share(bare["attacked"]),
        bare_worst=_share(bare["worst"]) if "worst" in bare else None,
        chosen=_choice(chosen, order),
        candidate=chosen.candidate,
        within_bound=bool(admissible),
        table=tuple(_choice(setting, order) for setting in settings),
        rungs=() if informed is None else tuple(rungs),
        outcomes={
            "chosen": {name: _hex(bits[name]) for name in bare},
            "bare": {name: _hex(found) for name, found in bare.items()},
        },
        paired=verdict,
    )


def _share(right: Tensor) -> float:
    return float(right.double().mean()) if len(right) else 0.0


def _hex(right: Tensor) -> str:
    """As records of an evaluation have their outcomes."""
    return np.packbits(right.numpy()).tobytes().hex()


def _rank(setting: Setting) -> tuple[float, float, int]:
    return _share(setting.gray), _share(setting.clean), -setting.rule.k


def _choice(setting: Setting, order: Tensor) -> Choice:
    met = setting.images or None
    worst = _share(setting.worst[order[:met]]) if met else None
    return Choice(
        **setting.feature, rule=setting.rule, clean=_share(setting.clean), attacked=_share(setting.gray),
        worst=worst, images=met,
    )  # fmt: skip


def rules_to_try(
    ks: Iterable[int],
    weightings: Sequence[str],
    votes: Sequence[str],
    temperatures: Sequence[float | None],
    alphas: Sequence[float],
    scales: Sequence[float] | None = None,
) -> list[Rule]:
    """Every combination of settings of a rule, those that decide alike once: a kernel changes nothing of one neighbour,
    and neighbours nothing of the classifier alone.

    Args:
        ks, weightings, votes, alphas: of the :class:`~nndefense.database.Rule`.
        temperatures: of its kernel, as multiples of ``scales``; None: no kernel.
        scales: for each K from 1 up, as :func:`kernel_scales` has them; None: 1 for every K. Where it is 0 there is
            nothing that a kernel could tell apart, and none is tried.

    Raises:
        InputError: a setting that no rule can have, or nothing to try of one of them.
    """
    tried = dict[Any, Rule]()
    for name, values in (("weightings", weightings), ("votes", votes), ("temperatures", temperatures),
                         ("alphas", alphas)):  # fmt: skip
        if not len(values):
            raise InputError(f"there are no {name} to try: give at least one, or leave {name} out")
    for width in map(plain, temperatures):
        if width is not None and not (isinstance(width, (int, float)) and 0 < width < math.inf):
            raise InputError(
                f"a temperature to try is {width!r}, but must be above 0 and finite, as a multiple of the squared "
                "distance to the K-th row, or none for no kernel"
            )
    for k, weighting, vote, width, alpha in product(ks, weightings, votes, temperatures, alphas):
        scale = 1.0 if scales is None else scales[k - 1]
        if width is not None and not scale:
            continue
        rule = Rule(k, weighting, votes=vote, temperature=None if width is None else width * scale, alpha=alpha)
        if k == 1:
            rule = replace(rule, temperature=None)
        tried.setdefault("classifier" if rule.alpha == 1 else rule, rule)
    return list(tried.values())


@torch.no_grad()
def kernel_scales(classifier: Classifier, database: ImageDatabase, batches: Iterable[Tensor], k: int) -> list[float]:
    """For each K up to k the median squared distance of images to their K-th row: what kernels are measured in.

    Args:
        classifier, database: of the defence.
        batches: images N x C x H x W that do not stand in the database.
        k: at most as many as rows.
    """
    extractor = database.extractor(classifier)
    distances = torch.cat([database.search(extractor(batch), k)[0] for batch in batches])
    found: list[float] = distances.square().median(0).values.tolist()
    return found


@torch.no_grad()
def _right(
    classifier: Classifier,
    database: ImageDatabase,
    images: Tensor,
    labels: Tensor,
    rules: Sequence[Rule],
    batch_size: int,
) -> list[Tensor]:
    """For each rule, which images the defence over one candidate gets right: N booleans."""
    extractor, most = database.extractor(classifier), max(rule.k for rule in rules)
    found, mixed = [list[Tensor]() for _ in rules], any(rule.alpha for rule in rules)
    for batch, truth in zip(torch.split(images, batch_size), torch.split(labels.cpu(), batch_size), strict=True):
        vectors, logits = extractor.with_answer(batch) if mixed else (extractor(batch), None)
        own = None if logits is None else logits.float().softmax(1).cpu()
        distances, rows = database.search(vectors, most)
        voters: dict[Rule, tuple[Tensor, Tensor]] = {}
        for rule, right in zip(rules, found, strict=True):
            shared = replace(rule, k=most, temperature=None, alpha=0.0)
            if shared not in voters:
                voters[shared] = rule.voters(database, rows)
            votes, weights = (each[:, : rule.k] for each in voters[shared])
            right.append(rule.probabilities(votes, weights, distances[:, : rule.k], own).argmax(1) == truth)
    return [torch.cat(right) for right in found]
