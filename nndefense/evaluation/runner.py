"""From a recipe to records, audit and gallery, resuming where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nndefense.attacks.retrieval import check_exact
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.evaluation.abstention import Abstention, abstainers
from nndefense.evaluation.audit import UNDEFENDED, AuditLine, audit_records, strongest_on_bare
from nndefense.evaluation.audit_runs import AuditSubject, audit_runs, undefended_run
from nndefense.evaluation.cells import CellStore
from nndefense.evaluation.evaluate import Record, Subject, evaluate, starts_at_images
from nndefense.evaluation.floor import Floor, floor_line
from nndefense.evaluation.ladder import DEFENDED, INFORMED
from nndefense.evaluation.recipe import Recipe, Rung
from nndefense.evaluation.report import GalleryNeighbor, GalleryRow
from nndefense.evaluation.subjects import bare_subject, subjects_of, threats_of
from nndefense.evaluation.threats import AttackSettings, ThreatModel, attacks_by, run_attack
from nndefense.models import Classifier


@dataclass(frozen=True)
class Evaluated:
    """The records of an evaluation, its self-audit, the rows of its gallery, and what abstaining is worth."""

    records: list[Record]
    audit: list[AuditLine]
    gallery: list[GalleryRow]
    abstention: dict[str, Any] | None = None


def run(
    recipe: Recipe,
    dataset: ImageDataset,
    classifier: Classifier,
    defense: NearestNeighborDefense | None,
    surrogate: Classifier | None,
    *,
    others: Sequence[Subject] = (),
    pictures: ImageDataset | None = None,
    held: ImageDataset | None = None,
    cells: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluated:
    """Measure all that the recipe names.

    Args:
        recipe: what to run; the images, models and database that it names come opened.
        dataset: labelled images, already cut to the recipe's limit.
        classifier: the bare classifier.
        defense: the defence under test, which has the same classifier; None to measure the classifier alone.
        surrogate: of the black-box attacker, or None.
        others: more defences to compare, with what attackers who know them are given.
        pictures: the images that the database was built from, to show neighbours and to start attacks from.
        held: clean images for the thresholds of abstaining, where the recipe asks for that.
        cells: folder where finished cells are kept and found again; None for nowhere.
        progress: called with the images done and their total.

    Raises:
        DataError: a data set without images or labels.
        InputError: a recipe that does not fit what was opened.
    """
    device = classifier.device
    models = list(dict.fromkeys(rung.threat_model for rung in recipe.rungs))
    subjects = [bare_subject(classifier)]
    if defense is not None:
        informed = bool(set(INFORMED).intersection(models)) or bool(recipe.abstain)
        subjects = subjects_of(defense, sizes=recipe.sizes, seed=recipe.seed, informed=informed, pictures=pictures)
    subjects += others
    budgets = list(dict.fromkeys((rung.attack.norm, eps) for rung in recipe.rungs for eps in rung.attack.eps))
    floor = None
    if recipe.certify is not None:
        how = {"sigma": recipe.sigma, "draws": recipe.draws, "alpha": 0.001, "seed": recipe.seed}
        floor = Floor.of(recipe.certify, subjects, classifier, how, bool(set(INFORMED).intersection(models)))
        # What cannot be proven is said before the hours of work, not after them.
        floor.try_on(dataset.usable.batch(np.arange(1))[0].to(device), budgets)
        subjects += [] if floor.subject in subjects else [floor.subject]
    threats = threats_of(models, subjects, classifier, surrogate)
    for threat in threats:
        if threat.name == "exact":
            try:
                check_exact(threat.target, dataset.batch(np.arange(min(len(dataset), 8)))[0].to(device))
            except InputError as error:
                raise InputError(f"{error}, or leave --exact out") from None
    plan: dict[str, list[AttackSettings]] = {}
    for rung in recipe.rungs:
        plan.setdefault(rung.threat_model, []).append(rung.attack)
    maps = dict.fromkeys(("clean", *models), classifier.label_map(dataset.classes))
    if surrogate is not None:
        maps["black"] = surrogate.label_map(dataset.classes)
    cells_in_all = 1 + sum(len(settings.eps) for threat in threats for settings in attacks_by(threat, plan))
    store = CellStore(cells) if cells is not None else None
    abstention = None
    if recipe.abstain:
        if held is None:
            raise InputError("thresholds to abstain at are set on clean images that are held out: give held")
        abstention = Abstention(
            dataset.usable,
            held,
            abstainers(subjects, classifier, defense),
            threats,
            plan,
            maps["clean"],
            classifier.fingerprint,
            recipe.abstain,
            recipe.abstain_steps,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            device=device,
            store=store,
            progress=lambda images: step(images),
        )
        cells_in_all += len(abstention.abstaining) * len(abstention.budgets)
    total, done = cells_in_all * len(dataset), 0

    def step(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    records = evaluate(
        dataset,
        subjects,
        threats,
        plan,
        headline_eps=recipe.headline_eps,
        headline_norm=recipe.headline_norm,
        classifier=classifier.fingerprint,
        label_maps=maps,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        device=device,
        store=store,
        seen=abstention.see if abstention is not None and not abstention.finished else None,
        progress=step,
    )
    abstained = abstention.measure() if abstention is not None else None
    audit = audit_records(records, len(dataset.classes))
    if floor is not None:
        clean = next(one for one in records if (one.defense, one.threat_model) == (floor.subject.name, "clean"))
        records += floor.records(dataset.usable, maps["clean"], clean, budgets, store, device)
        audit.append(floor_line(records, floor.alpha))
    ours = {threat.name: threat for threat in threats if threat.subject in (None, DEFENDED)}
    strongest = _strongest(recipe, ours)
    if strongest is None:
        return Evaluated(records, audit, [], abstained)
    if recipe.audit:
        auditor = _Auditor(recipe, dataset, classifier, maps["clean"], store)
        audit = [auditor.settled(line, records) for line in audit]
        # A surrogate's class numbers are its own; the classifier is attacked in its place.
        threat = ours[strongest.threat_model] if strongest.threat_model != "black" else auditor.gray
        audit += auditor.runs(defense, threat, strongest.attack)
    if defense is None:
        return Evaluated(records, audit, [], abstained)
    draw = partial(
        illustrate,
        dataset,
        defense,
        eps=recipe.headline_eps,
        label_maps=maps,
        pictures=pictures,
        count=min(recipe.gallery, len(dataset)),
        seed=recipe.seed,
        device=device,
    )
    gallery = draw(ours[strongest.threat_model], strongest.attack)
    gray = _strongest(recipe, ours, ("gray",))
    if gray is not None and gray is not strongest:
        # The same images, so that it is seen what knowing of the database changes.
        rows = draw(ours["gray"], gray.attack)
        gallery += [row for row in rows if row.defended[0] == row.label != row.bare[0]][:_HELD]
    return Evaluated(records, audit, gallery, abstained)


def _strongest(
    recipe: Recipe, threats: Mapping[str, ThreatModel], names: Sequence[str] = ("adaptive", "white", "gray", "black")
) -> Rung | None:
    """The rung of the best informed attacker at the headline budget; of several attacks the first named."""
    at_headline = (
        rung
        for name in names
        for rung in recipe.rungs
        if rung.threat_model == name
        and name in threats
        and rung.attack.norm == recipe.headline_norm
        and recipe.headline_eps in rung.attack.eps
    )
    return next(at_headline, None)


@dataclass(frozen=True)
class _Auditor:
    """Makes the audit's own runs, on a few images drawn at random."""

    recipe: Recipe
    dataset: ImageDataset
    classifier: Classifier
    labels_of: Tensor
    store: CellStore | None

    @property
    def gray(self) -> ThreatModel:
        """The attacker who has the classifier."""
        return threats_of(["gray"], (), self.classifier, None)[0]

    def runs(
        self, defense: NearestNeighborDefense | None, threat: ThreatModel, attack: AttackSettings
    ) -> list[AuditLine]:
        """The runs on the strongest attack on the defence, or on the classifier alone."""
        key: list[Any] = [starts_at_images(threat)]
        key += [defense.database.fingerprint, defense.k, defense.weighting] if defense is not None else []
        # The rest of the rule where it is not the usual: older runs are found again.
        key += [] if defense is None else [*map(list, defense.rule.settings.items())][2:]
        model = self.classifier if defense is None else defense
        return self._kept("audit", key, lambda: audit_runs(self._subject(model, threat, attack)))

    def settled(self, line: AuditLine, records: Sequence[Record]) -> AuditLine:
        """A line on the records that runs of its own can settle: whether a net that does not fall is robust."""
        record = strongest_on_bare(records)
        if line.name != UNDEFENDED or line.passed is not False or record is None:
            return line
        cell = record.attack, record.norm, record.loss
        own = (rung.attack for rung in self.recipe.rungs if rung.threat_model == "gray")
        attack = next(one for one in own if (one.name, one.norm, one.loss) == cell and record.eps in one.eps)
        subject = self._subject(self.classifier, self.gray, attack, record.eps)
        chance = 1 / len(self.dataset.classes)
        (line,) = self._kept("audit of the net", [record.eps], lambda: [undefended_run(subject, chance)])
        return line

    def _subject(
        self, model: nn.Module, threat: ThreatModel, attack: AttackSettings, eps: float | None = None
    ) -> AuditSubject:
        order = np.random.default_rng(self.recipe.seed).permutation(len(self.dataset))
        images, labels = self.dataset.batch(np.sort(order[: self.recipe.audit_images]))
        device = self.classifier.device
        return AuditSubject(
            model,
            self.classifier,
            images.to(device),
            self.labels_of[labels].to(device),
            threat,
            attack,
            self.recipe.headline_eps if eps is None else eps,
            seed=self.recipe.seed,
            batch_size=self.recipe.batch_size,
        )

    def _kept(self, name: str, also: list[Any], make: Callable[[], list[AuditLine]]) -> list[AuditLine]:
        key = [self.dataset.fingerprint, self.classifier.fingerprint, self.recipe.sha256, *also]
        stored = self.store.get(name, key) if self.store is not None else None
        if stored is not None:
            return [AuditLine(**line) for line in stored]
        lines = make()
        if self.store is not None:
            self.store.put(name, key, [line.to_json() for line in lines])
        return lines


_NEIGHBORS = 8
_HELD = 2  # gray-box rows of the gallery where the defence holds, beside a better informed attack


def illustrate(
    dataset: ImageDataset,
    defense: NearestNeighborDefense,
    threat: ThreatModel,
    attack: AttackSettings,
    *,
    eps: float,
    label_maps: dict[str, Tensor],
    pictures: ImageDataset | None,
    count: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[GalleryRow]:
    """Attack ``count`` images drawn at random (so the gallery is a fair sample, failures included).

    Args as for :func:`~nndefense.evaluation.evaluate.evaluate`, and:
        defense: the defence to explain, with its classifier.
        threat, attack, eps: whom to attack, how, and at which radius.
        pictures: the images that the database was built from, to show the neighbours; None where not at hand.
        count: number of rows.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count])
    if not len(drawn):
        return []
    images, labels = dataset.batch(drawn)
    clean = images.to(device)
    generator = torch.Generator().manual_seed(seed)
    attacked = run_attack(
        attack, threat.target, clean, label_maps[threat.name][labels].to(device), eps, generator
    ).images
    with torch.no_grad():
        bare_clean = defense.classifier(clean).softmax(1).cpu()
        bare = defense.classifier(attacked).softmax(1).cpu()
    why = defense.explain(attacked)
    names = defense.classifier.classes
    rows = []
    for i, index in enumerate(drawn):
        neighbors = []
        for j in range(min(_NEIGHBORS, defense.k)):
            label = int(why.labels[i, j])
            name = names[label if label >= 0 else int(why.posteriors[i, j].argmax())]
            neighbors.append(
                GalleryNeighbor(
                    image=pictures[pictures.index_of(why.ids[i][j])][0].numpy() if pictures is not None else None,
                    id=why.ids[i][j],
                    label=name,
                    weight=float(why.weights[i, j]),
                    distance=float(why.distances[i, j]),
                )
            )
        rows.append(
            GalleryRow(
                clean=images[i].numpy(),
                attacked=attacked[i].cpu().numpy(),
                label=names[int(label_maps["clean"][labels[i]])],
                bare=_top(bare[i], names),
                bare_clean=_top(bare_clean[i], names),
                defended=_top(why.log_probabilities[i].exp(), names),
                neighbors=tuple(neighbors),
                threat_model=threat.name,
                eps=eps,
                id=dataset.ids[int(index)],
            )
        )
    return rows


def _top(probabilities: Tensor, names: tuple[str, ...]) -> tuple[str, float]:
    best = int(probabilities.argmax())
    return names[best], float(probabilities[best])
