"""What abstaining is worth: how often an answer is accepted and right, or accepted and wrong, at a rejection rate.

Thresholds are set on clean images that are held out. Then an image is attacked by who must also be accepted, and counts
as accepted and wrong where any attacked image within the budget is: those that the evaluation made without a thought
of the rejection (``unaware``), and those of the attack that knows score and threshold (``aware``). It is accepted and
right where every one of them is, and rejected otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.attacks.retrieval import Knowledge, RetrievalSurface, run_adaptive
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.abstention import (
    AbstentionScore,
    Answer,
    answer_scores,
    distance_score,
    net_score,
    relaxed_answer,
)
from nndefense.errors import InputError
from nndefense.evaluation.cells import CellStore
from nndefense.evaluation.evaluate import Subject, identity_of, starts_at_images
from nndefense.evaluation.judging import is_random
from nndefense.evaluation.ladder import BARE, DEFENDED, from_hex, to_hex
from nndefense.evaluation.threats import AttackSettings, Plan, ThreatModel, attacks_by
from nndefense.models import Classifier
from nndefense.statistics import conformal_threshold, values_needed, wilson_interval

# What nothing is rejected by, for comparison.
NOTHING = "no abstention"
# Who attacks: nobody, the attacks of the evaluation, and the one that must be accepted.
ATTACKERS = ("clean", "unaware", "aware")

_Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Threshold:
    """Images with a ``score`` beyond the threshold are rejected: a share ``rate`` of clean ones at most."""

    score: str
    rate: float
    threshold: float
    spread: float = 1.0


@dataclass(frozen=True)
class Abstainer:
    """A subject that may abstain by each of several scores; ``answer`` is its own with a gradient to the images."""

    subject: Subject
    answer: Answer
    scores: Sequence[AbstentionScore]

    def surface(self, rule: Threshold) -> RetrievalSurface:
        """What the attacker who must be accepted holds."""
        score = next(score for score in self.scores if score.name == rule.score)
        rejection = score.rejection(self.answer, rule.threshold, rule.spread)
        own = self.subject.surface or RetrievalSurface(Knowledge.WHITE, self.subject.model, 1, classify=self.answer)
        return replace(own, rejection=rejection)


def abstainers(
    subjects: Sequence[Subject], classifier: Classifier, defense: NearestNeighborDefense | None
) -> list[Abstainer]:
    """The bare classifier, the defence under test and other defences that do not draw, with the scores that each has.

    With a defence over a database the net may abstain by all four scores, too: a detector beside an undefended net.
    """
    own = [net_score(classifier)]
    if defense is not None:
        followed = relaxed_answer(defense)
        own += [*answer_scores("retrieval margin", classifier, defense, followed), distance_score(defense)]
    found = []
    for subject in subjects:
        if subject.name == BARE:
            found.append(Abstainer(subject, classifier, own))
        elif subject.name == DEFENDED and defense is not None:
            found.append(Abstainer(subject, followed, own))
        elif subject.variant == "defense" and subject.white is not None and not is_random(subject.model):
            more = answer_scores("own margin", classifier, subject.model, subject.white)
            found.append(Abstainer(subject, subject.white, [own[0], *more]))
    return found


def check_rates(rates: Sequence[float], held: int) -> None:
    """Raise :class:`InputError` where held-out images are too few for a rate of clean rejections."""
    least = min(rates)
    if held < values_needed(least):
        raise InputError(
            f"a clean rejection rate of {100 * least:g} % needs at least {values_needed(least):,} held-out images, but "
            f"there are {held:,}: name more by --abstain-on, or leave small rates out of --abstain"
        )


@dataclass
class _Outcomes:
    """For each threshold and image: whether any attacked image is accepted and wrong, and every one accepted and
    right.
    """

    wrong: _Bools
    right: _Bools

    @classmethod
    def of(cls, thresholds: int, images: int) -> _Outcomes:
        return cls(np.zeros((thresholds, images), np.bool_), np.ones((thresholds, images), np.bool_))

    def copy(self) -> _Outcomes:
        return _Outcomes(self.wrong.copy(), self.right.copy())

    def note(self, rules: Sequence[Threshold], fooled: _Bools, scores: Mapping[str, NDArray[np.float64]]) -> None:
        """Take one more attacked image of each: whether its answer is wrong, N, and its scores, N each."""
        for number, rule in enumerate(rules):
            accepted = scores[rule.score] <= rule.threshold if rule.score in scores else np.ones_like(fooled)
            self.wrong[number] |= accepted & fooled
            self.right[number] &= accepted & ~fooled

    def to_json(self) -> dict[str, list[str]]:
        return {name: [to_hex(bits) for bits in getattr(self, name)] for name in ("wrong", "right")}

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[str]], n: int) -> _Outcomes:
        return cls(*(np.stack([from_hex(text, n) for text in value[name]]) for name in ("wrong", "right")))


# Attacked images in batches, by the number of the threat, attack and radius.
Attacks = dict[tuple[int, AttackSettings, float], list[Tensor]]


@dataclass
class Abstention:
    """Measures abstainers on a data set; :meth:`see` is shown what the evaluation attacks, before :meth:`measure`.

    Attributes:
        dataset: the reported images, labelled.
        held: clean images to set thresholds on, none of them reported.
        abstaining: see :func:`abstainers`.
        threats, plan: of the evaluation.
        truth: the class number for each class of the data set.
        classifier: its fingerprint.
        rates: of clean images that may be rejected.
        steps: of the attack that must be accepted; an image that stands costs up to three times as many gradients.
        progress: called with the images done.
    """

    dataset: ImageDataset
    held: ImageDataset
    abstaining: Sequence[Abstainer]
    threats: Sequence[ThreatModel]
    plan: Plan
    truth: Tensor
    classifier: str
    rates: Sequence[float]
    steps: int
    seed: int = 0
    batch_size: int = 128
    device: str | torch.device = "cpu"
    store: CellStore | None = None
    progress: Callable[[int], object] = lambda images: None
    _seen: Attacks = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rates(self.rates, len(self.held))
        self.rates = sorted(set(self.rates))

    @property
    def budgets(self) -> list[tuple[str, float]]:
        """Norms, and radii of each ascending."""
        attacks = [attack for threat in self.threats for attack in attacks_by(threat, self.plan)]
        found = dict.fromkeys((attack.norm, eps) for attack in attacks for eps in attack.eps)
        order = list(dict.fromkeys(norm for norm, _ in found))
        return sorted(found, key=lambda budget: (order.index(budget[0]), budget[1]))

    @property
    def finished(self) -> bool:
        """Whether all of it is in the store, so that no attacked image is needed."""
        cells = [(one, norm, eps) for one in self.abstaining for norm, eps in self.budgets]
        return self.store is not None and all(self.store.get(_name(*cell), self._key(*cell)) for cell in cells)

    def see(self, threat: ThreatModel, attack: AttackSettings, eps: float, images: Tensor) -> None:
        """Take a batch of attacked images, each of which is held in memory until the end."""
        number = next(i for i, one in enumerate(self.threats) if one is threat)
        self._seen.setdefault((number, attack, eps), []).append(images.cpu())

    def measure(self) -> dict[str, Any]:
        """Plain values for the results file: the held-out images, the attack, and a record for each threshold,
        budget and attacker.
        """
        records: list[dict[str, Any]] = []
        for one in self.abstaining:
            rules = self._thresholds(one)
            clean = _Outcomes.of(len(rules), len(self.dataset))
            batches = list(self.dataset.batches(self.batch_size))
            x, y = torch.cat([images for images, _, _ in batches]), self.truth[torch.cat([b for _, b, _ in batches])]
            clean.note(rules, *self._judged(one, x, y))
            records += [self._record(one, rule, clean, i, "clean", "none", 0.0) for i, rule in enumerate(rules)]
            norm = ""
            for here, eps in self.budgets:
                if here != norm:
                    norm, unaware, aware = here, clean.copy(), clean.copy()
                unaware, aware = self._cell(one, rules, x, y, norm, eps, unaware, aware)
                for who, found in (("unaware", unaware), ("aware", aware)):
                    records += [self._record(one, rule, found, i, who, norm, eps) for i, rule in enumerate(rules)]
        held = {"name": self.held.name, "n": len(self.held), "fingerprint": self.held.fingerprint}
        return {"held_out": held, "rates": list(self.rates), "steps": self.steps, "records": records}

    def _thresholds(self, one: Abstainer) -> list[Threshold]:
        """For each score and rate, and for none."""
        found = [Threshold(NOTHING, 0.0, float("inf"))]
        values: dict[str, list[float]] = {score.name: [] for score in one.scores}
        with torch.no_grad():
            for images, _, _ in self.held.batches(self.batch_size):
                for score in one.scores:
                    values[score.name] += score.of(images.to(self.device)).double().tolist()
        for name, each in values.items():
            spread = max(float(np.std(each)), 1e-6)
            for rate in self.rates:
                threshold = conformal_threshold(sorted(each), rate)
                assert threshold is not None
                found.append(Threshold(name, rate, threshold, spread))
        return found

    @torch.no_grad()
    def _judged(self, one: Abstainer, x: Tensor, y: Tensor) -> tuple[_Bools, dict[str, NDArray[np.float64]]]:
        """By the true pipeline: whether the answer to each of N images is wrong, and its scores, N each."""
        wrong, scores = [], {score.name: list[Tensor]() for score in one.scores}
        for images, truth in zip(torch.split(x, self.batch_size), torch.split(y, self.batch_size), strict=True):
            images = images.to(self.device)
            wrong.append(one.subject.model(images).argmax(1).cpu() != truth)
            for score in one.scores:
                scores[score.name].append(score.of(images).double().cpu())
        return torch.cat(wrong).numpy(), {name: torch.cat(parts).numpy() for name, parts in scores.items()}

    def _cell(
        self,
        one: Abstainer,
        rules: Sequence[Threshold],
        x: Tensor,
        y: Tensor,
        norm: str,
        eps: float,
        unaware: _Outcomes,
        aware: _Outcomes,
    ) -> tuple[_Outcomes, _Outcomes]:
        """The outcomes at a budget, from those at the next smaller one, which count here, too."""
        name, key = _name(one, norm, eps), self._key(one, norm, eps)
        stored = self.store.get(name, key) if self.store is not None else None
        if stored is not None:
            self.progress(len(x))
            return _Outcomes.from_json(stored["unaware"], len(x)), _Outcomes.from_json(stored["aware"], len(x))
        unaware, aware, starts = unaware.copy(), aware.copy(), []
        for (number, attack, budget), parts in self._seen.items():
            if (attack.norm, budget) != (norm, eps):
                continue
            starts.append(torch.cat(parts))
            found = self._judged(one, starts[-1], y)
            aware.note(rules, *found)
            if self.threats[number].subject in (None, one.subject.name):
                unaware.note(rules, *found)
        self._attack(one, rules, x, y, norm, eps, aware, starts)
        if self.store is not None:
            self.store.put(name, key, {"unaware": unaware.to_json(), "aware": aware.to_json()})
        self.progress(len(x))
        return unaware, aware

    def _attack(
        self,
        one: Abstainer,
        rules: Sequence[Threshold],
        x: Tensor,
        y: Tensor,
        norm: str,
        eps: float,
        aware: _Outcomes,
        starts: list[Tensor],
    ) -> None:
        """Attack what still stands under each threshold, and note every image that was made under all of them."""
        generator = torch.Generator().manual_seed(self.seed)
        # The strictest first: what is accepted there is accepted by the others of that score.
        for number in sorted(range(len(rules)), key=lambda i: (rules[i].score, -rules[i].rate)):
            rule, left = rules[number], torch.from_numpy(~aware.wrong[number]).nonzero()[:, 0]
            if rule.score == NOTHING or not len(left):
                continue
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                found = run_adaptive(
                    one.surface(rule),
                    x[left].to(self.device),
                    y[left].to(self.device),
                    eps=eps,
                    norm=norm,
                    steps=self.steps,
                    generator=generator,
                    start=[start[left] for start in starts],
                    batch_size=self.batch_size,
                )
            made = x.clone()
            made[left] = found.images.cpu()
            aware.note(rules, *self._judged(one, made, y))
            starts.append(made)

    def _key(self, one: Abstainer, norm: str, eps: float) -> dict[str, Any]:
        """All that the outcomes at a budget depend on."""
        attacks = [
            [threat.name, threat.surrogate, threat.knowledge, threat.subject, starts_at_images(threat), within]
            for threat in self.threats
            for attack in attacks_by(threat, self.plan)
            if attack.norm == norm and (within := _within(attack, eps))
        ]
        return {
            "data": [self.dataset.name, self.dataset.fingerprint],
            "held": [self.held.name, self.held.fingerprint],
            "classifier": self.classifier,
            "subjects": [identity_of(other.subject) for other in self.abstaining],
            "subject": one.subject.name,
            "scores": [score.name for score in one.scores],
            "rates": list(self.rates),
            "attacks": attacks,
            "steps": self.steps,
            "budget": [norm, eps],
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def _record(
        self, one: Abstainer, rule: Threshold, found: _Outcomes, number: int, attacker: str, norm: str, eps: float
    ) -> dict[str, Any]:
        n, wrong, right = len(self.dataset), found.wrong[number], found.right[number]
        record: dict[str, Any] = {
            "defense": one.subject.name,
            "score": rule.score,
            "rate": rule.rate,
            "threshold": rule.threshold if rule.score != NOTHING else None,
            "attacker": attacker,
            "norm": norm,
            "eps": eps,
            "n": n,
        }
        for name, bits in (("right", right), ("wrong", wrong), ("rejected", ~right & ~wrong)):
            record[name] = int(bits.sum()) / n
            record[f"{name}_ci"] = list(wilson_interval(int(bits.sum()), n))
        return {**record, "accepted_right": to_hex(right), "accepted_wrong": to_hex(wrong)}


def _name(one: Abstainer, norm: str, eps: float) -> str:
    return f"abstain {one.subject.name} {norm} {eps:g}"


def _within(attack: AttackSettings, eps: float) -> dict[str, Any] | None:
    """An attack as far as its radii go up to ``eps``; None where it has none."""
    radii = [one for one in attack.eps if one <= eps]
    return {**attack.to_json(), "eps": radii} if radii else None
