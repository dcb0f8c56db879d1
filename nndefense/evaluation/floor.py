"""The floor beside the ceiling: what is certified of a defence, and that no attack of the run breaks that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from nndefense.certificates import Certified, SmoothedClassifier, SmoothedFeatures, registry
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.evaluation.audit import AuditLine
from nndefense.evaluation.cells import CellStore
from nndefense.evaluation.evaluate import Record, Subject
from nndefense.evaluation.ladder import BARE, CERTIFIED, DEFENDED, WORST, from_hex, to_hex
from nndefense.evaluation.subjects import known_of
from nndefense.models import Classifier
from nndefense.statistics import wilson_interval
from nndefense.versions import code_version

_CELL = 20
# What chance explains less often is taken for a bug.
_LEVEL = 1e-3


@dataclass(frozen=True)
class Floor:
    """What is certified in an evaluation.

    Attributes:
        method: of :mod:`nndefense.certificates.registry`.
        subject: the defence that the certificate is of; the smoothed one where the method draws noise.
        target: what the method is given.
        how: what the method is told, but for the budgets and the norm.
    """

    method: str
    subject: Subject
    target: Any
    how: dict[str, Any]

    @staticmethod
    def of(
        method: str, subjects: Sequence[Subject], classifier: Classifier, how: dict[str, Any], informed: bool
    ) -> Floor:
        """The floor of nearest neighbours where measured and the method takes them, else of the classifier alone.

        Raises:
            InputError: a method for defences that retrieve, where there is none.
        """
        chosen = registry.get(method)
        by_name = {subject.name: subject for subject in subjects}
        base = by_name[BARE] if chosen.bare else by_name.get(DEFENDED, by_name[BARE])
        surface = base.model.surface() if chosen.retrieval and base.name == DEFENDED else None  # type: ignore[operator]
        if chosen.retrieval and surface is None:
            raise InputError(f"{method} certifies nearest neighbours: name their database (--database)")
        target = base.model if surface is None else surface
        if not chosen.chance:
            return Floor(method, base, target, how)
        noise = {"draws": how["draws"], "alpha": how["alpha"], "seed": how["seed"] + 1}
        model: SmoothedFeatures | SmoothedClassifier
        if surface is not None:
            model = SmoothedFeatures(surface, how["sigma"], **noise)
        else:
            model = SmoothedClassifier(base.model, how["sigma"], follow=base.white, **noise)
        known = known_of(model, classifier) if informed else {}
        name = f"{base.name} ({method})" if base.name != BARE else method
        identity = repr(sorted({**how, "of": base.identity, "rule": getattr(base.model, "rule", None)}.items()))
        empty = {"white": None, "surface": None, "also": ()}
        shown = {"name": name, "model": model, "variant": "defense", "every_eps": True, "identity": identity}
        return Floor(method, replace(base, **{**shown, **empty, **known}), target, how)

    def try_on(self, image: Tensor, budgets: Sequence[tuple[str, float]]) -> None:
        """Certify one image, 1 x C x H x W, at the least budget: what a proof is not made for is said at once.

        A method that draws noise takes every defence, and is not tried.

        Raises:
            InputError: the defence, or all of the budgets' norms, are none that the method takes.
        """
        chosen = registry.get(self.method)
        known = [(eps, norm) for norm, eps in budgets if norm in chosen.norms]
        if not known:
            raise InputError(
                f"{self.method} certifies in {', '.join(chosen.norms)}, and no attack of the run is in such a norm: "
                "give another --norm (norm), or leave --certify (certify) out"
            )
        if not chosen.chance:
            eps, norm = min(known)
            chosen.run(self.target, image, **self.how, norm=norm, eps=(eps,))

    def records(
        self,
        dataset: ImageDataset,
        labels_of: Tensor,
        clean: Record,
        budgets: Sequence[tuple[str, float]],
        store: CellStore | None,
        device: str | torch.device,
    ) -> list[Record]:
        """The certified accuracy at each budget (norm and eps) of a norm that the method has, as records.

        Args:
            dataset: the images.
            labels_of: class number of the classifier for each class of the data set.
            clean: the subject's record on clean images.
            budgets: of the run.
            store: of finished cells, or None.
            device: where the nets are.
        """
        chosen, found = registry.get(self.method), []
        labels = labels_of[torch.as_tensor(dataset.labels)]
        for norm in dict.fromkeys(norm for norm, _ in budgets if norm in chosen.norms):
            eps = tuple(sorted(eps for other, eps in budgets if other == norm))
            parts = []
            for first in range(0, len(dataset), _CELL):
                part = dataset.subset(list(range(first, min(first + _CELL, len(dataset)))))
                key: list[Any] = [self.method, part.fingerprint, norm, eps, sorted(self.how.items()), clean.classifier]
                key += [clean.database, self.subject.identity, repr(getattr(self.subject.model, "rule", None))]
                key += [code_version("certificates")]
                kept = store.get(f"{CERTIFIED} {norm} {first}", key) if store is not None else None
                if kept is None:
                    pixels = part.batch(list(range(len(part))))[0].to(device)
                    made = chosen.run(self.target, pixels, **self.how, norm=norm, eps=eps).in_norm(norm, pixels)
                    if store is not None:
                        store.put(f"{CERTIFIED} {norm} {first}", key, made.to_json())
                else:
                    made = Certified.from_json(kept)
                parts.append(made)
            certified = Certified.joined(parts)
            found += [_record(clean, certified, labels, self.method, norm, one) for one in eps]
        return found

    @property
    def alpha(self) -> float:
        """The chance, for each image, that its certificate is wrong."""
        return float(self.how["alpha"]) if registry.get(self.method).chance else 0.0


def _record(clean: Record, certified: Certified, labels: Tensor, method: str, norm: str, eps: float) -> Record:
    bits = certified.stands(labels, eps).numpy()
    low, high = wilson_interval(int(bits.sum()), clean.n)
    return replace(
        clean, threat_model=CERTIFIED, attack=method, norm=norm, eps=eps, accuracy=float(bits.sum()) / clean.n,
        ci_low=low, ci_high=high, correct=to_hex(bits), accuracy_8bit=None, draw_seeds=[], refuted="",
    )  # fmt: skip


def floor_line(records: Sequence[Record], alpha: float = 0.0) -> AuditLine:
    """The check that no image is certified and yet broken by an attack within the budget.

    Args:
        records: of attacks and certificates. Where a defence is judged by draws, ``refuted`` says which images are
            beyond doubt of another class.
        alpha: the chance, for each image and each judgement, that it is wrong; 0: any broken one is a bug.
    """
    name, told, failed, seen = "no certified image falls", [], False, 0
    for floor in (record for record in records if record.threat_model == CERTIFIED):
        proven = from_hex(floor.correct, floor.n)
        attacks = [
            record
            for record in records
            if record.defense == floor.defense
            and record.threat_model not in (CERTIFIED, WORST)
            and (record.threat_model == "clean" or (record.norm == floor.norm and record.eps <= floor.eps))
        ]
        seen += int(proven.sum())
        broken = proven & False
        for record in attacks:
            fallen = from_hex(record.refuted, record.n) if record.refuted else ~from_hex(record.correct, record.n)
            if alpha == 0 or record.refuted:
                broken |= proven & fallen
        count, chance = int(broken.sum()), min(alpha * (1 + len(attacks)), 1.0)
        if not count:
            continue
        bug = chance == 0 or float(stats.binom.sf(count - 1, int(proven.sum()), chance)) < _LEVEL
        failed |= bug
        told.append(
            f"{count} of {int(proven.sum())} images of {floor.defense} that {floor.attack} certifies at {floor.norm} "
            f"{floor.eps:g} are broken by an attack within it"
            + (": the certificate or the attack has a bug" if bug else ", which chance allows")
        )
    if not seen:
        return AuditLine(name, None, "Nothing is certified.")
    return AuditLine(
        name, not failed, f"{'; '.join(told)}." if told else "No attack breaks an image that is certified."
    )
