"""What ``nndefense train`` does: open the data, put objective and attack together, train, and say how good it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nndefense.attacks import SpatialAttack
from nndefense.cli import output
from nndefense.datasets import ImageDataset, holdout, open_dataset
from nndefense.errors import InputError
from nndefense.models import build_classifier, load_classifier
from nndefense.training import OBJECTIVES, EnsembleAttack, InnerAttack, accuracy, make_objective, train_classifier
from nndefense.training.batch import Attack
from nndefense.training.launcher import leads
from nndefense.training.pools import complement
from nndefense.training.pseudo_labels import PseudoLabels

ENSEMBLE = "ensemble-adversarial"


@dataclasses.dataclass(frozen=True)
class AttackChoice:
    """The attack as it was asked for.

    Attributes:
        kind: ``pgd``, ``single-step``, ``fgsm``, ``r-fgsm`` or ``spatial``; None for ``fgsm`` where an ensemble
            attacks, else ``pgd``.
        norm, eps, steps, step_size, start, mode: as for :class:`InnerAttack`; None where nothing was said.
        check_steps: steps of the attack on the validation set, or None.
        start_scale, target: as for :class:`InnerAttack`; None where nothing was said.
        sources: where the static sources of an ensemble are.
        source_cache: the folder of what they attacked beforehand, or None.
    """

    kind: str | None
    norm: str
    eps: float | None
    steps: int
    step_size: float | None
    start: str | None
    mode: str
    check_steps: int | None
    start_scale: float | None = None
    target: str | None = None
    sources: Sequence[str] = ()
    source_cache: Path | None = None

    def made(self, objective: str, data_dir: Path | None = None) -> Attack | None:
        """The attack of the training; None where no budget was given to an objective that needs none."""
        if objective == ENSEMBLE:
            return self._ensemble(data_dir)
        if self.sources or self.source_cache is not None:
            raise InputError(f"static sources attack for the objective {ENSEMBLE} alone: leave --source out")
        if self.kind == "spatial":
            return SpatialAttack(draws=self.steps, mode=self.mode)
        if self.eps is None:
            if objective in OBJECTIVES and not OBJECTIVES[objective].attack:
                return None
            raise InputError(f"the objective {objective} attacks its images: give --eps, such as 0.3 or 8/255")
        return self._steps(objective, self.eps)

    def _ensemble(self, data_dir: Path | None) -> EnsembleAttack:
        if not self.sources:
            raise InputError(
                f"the objective {ENSEMBLE} attacks by static sources too: name trained classifiers by --source, once "
                "for each"
            )
        if self.eps is None or self.kind == "spatial":
            raise InputError(f"the objective {ENSEMBLE} attacks by gradient steps: give --eps, such as 0.3 or 8/255")
        step = self._steps(ENSEMBLE, self.eps)
        sources = [load_classifier(source, data_dir=data_dir) for source in self.sources]
        return EnsembleAttack(sources, step, cache=self.source_cache)

    def _steps(self, objective: str, eps: float) -> InnerAttack:
        """An attack by gradient steps, with whatever was said in the place of its own settings."""
        kind = self.kind or ("fgsm" if objective == ENSEMBLE else "pgd")
        if kind == "single-step":
            attack = InnerAttack.single_step(eps, self.norm, self.mode)
        elif kind == "fgsm":
            attack = InnerAttack.fgsm(eps, self.norm, self.mode)
        elif kind == "r-fgsm":
            if self.norm != "linf":
                raise InputError(f"R+FGSM is an attack in linf, not in {self.norm}: choose another --attack")
            attack = InnerAttack.r_fgsm(eps, self.start_scale, self.mode)
        else:
            start = "gaussian" if "trades" in objective else "uniform"
            attack = InnerAttack(eps=eps, norm=self.norm, steps=self.steps, start=start, mode=self.mode)
        if objective == "alp":
            attack = dataclasses.replace(attack, target="least-likely")
        elif objective == ENSEMBLE and attack.target == "label":
            attack = dataclasses.replace(attack, target="predicted")
        said: dict[str, Any] = {
            "step_size": self.step_size,
            "start": self.start,
            "start_scale": self.start_scale,
            "target": self.target,
        }
        return dataclasses.replace(attack, **{name: value for name, value in said.items() if value is not None})

    def checking(self, attack: Attack | None) -> Attack | None:
        """The attack on the validation set; None for the training's own choice."""
        if self.check_steps is None:
            return None
        if isinstance(attack, EnsembleAttack):
            attack = attack.step
        if not isinstance(attack, InnerAttack):
            raise InputError("--check-steps is the length of an attack by gradient steps: leave it out, or give --eps")
        return InnerAttack(eps=attack.eps, norm=attack.norm, steps=self.check_steps)


@dataclasses.dataclass(frozen=True)
class DataChoice:
    """The images beside the training set, as they were asked for.

    Attributes:
        labels: how many images keep their labels, or None for all.
        unlabelled: spec of the pool, or None for the images that lost their labels.
        pseudo_labels: the file with the pool's labels.
        validation, holdout: spec of the validation set, or how many images to hold out for it.
        data_dir: the folder of the data sets.
    """

    labels: int | None
    unlabelled: str | None
    pseudo_labels: Path | None
    validation: str | None
    holdout: int | None
    data_dir: Path | None

    def opened(self, spec: str, seed: int) -> tuple[ImageDataset, ImageDataset | None, ImageDataset | None]:
        """The labelled set, the pool and the validation set."""
        images, pool = open_dataset(spec, data_dir=self.data_dir), None
        if self.labels is not None:
            images, pool = complement(images, self.labels, seed)
        if self.unlabelled is not None:
            size, channels = images.shape[1:], images.shape[0]
            pool = open_dataset(self.unlabelled, data_dir=self.data_dir, size=size, channels=channels)
        unlabelled = self._labelled(pool, images)
        if self.holdout is None:
            held = open_dataset(self.validation, data_dir=self.data_dir) if self.validation else None
            return images, unlabelled, held
        if self.validation is not None:
            raise InputError("the validation set is either named or held out: give --validation or --holdout, not both")
        kept, out = holdout(images, self.holdout, seed)
        return images.subset(kept), unlabelled, images.subset(out)

    def _labelled(self, pool: ImageDataset | None, images: ImageDataset) -> ImageDataset | None:
        """The pool under its pseudo-labels."""
        if self.pseudo_labels is None:
            if self.unlabelled is not None:
                raise InputError(
                    f"{self.unlabelled} has no labels to learn from: write some with nndefense pseudo-label, and give "
                    "--pseudo-labels"
                )
            # Images that lost their labels are simply left out.
            return None
        if pool is None:
            raise InputError("--pseudo-labels are those of a pool: name it with --unlabelled, or give --labels")
        return PseudoLabels.open(self.pseudo_labels).dataset(pool, images)


def train(
    spec: str,
    out: Path,
    arch: str,
    *,
    objective: tuple[str, Sequence[str]],
    attack: AttackChoice,
    data: DataChoice,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Train a classifier and say where it is and how good."""
    name, words = objective
    loss = make_objective(name, **dict(map(_weight, words)))
    inner = attack.made(name, data.data_dir)
    images, unlabelled, held = data.opened(spec, options["seed"])
    net = build_classifier(arch, input_shape=images.shape, classes=images.classes, seed=options["seed"])
    classifier = train_classifier(
        net,
        images,
        objective=loss,
        attack=inner,
        unlabelled=unlabelled,
        validation=held,
        validation_attack=attack.checking(inner),
        out=out,
        **options,
    )
    if not leads():
        return
    rows = classifier.info["history"]
    robust = next((row["robust_accuracy"] for row in _last_checks(rows, classifier.info["best"])), None)
    collapsed = any(row.get("catastrophic_overfitting") for row in rows)
    found = {
        "classifier": str(out),
        "arch": arch,
        "objective": classifier.info["objective"],
        "fingerprint": classifier.fingerprint,
        "epochs": len(rows),
        "training_accuracy": accuracy(classifier, images),
        "validation_accuracy": accuracy(classifier, held) if held else None,
        "robust_validation_accuracy": robust if held else None,
        "catastrophic_overfitting": collapsed,
        "best": classifier.info["best"],
    }
    text = f"{out}: {arch}, training accuracy {found['training_accuracy']:.4f}"
    if held is not None:
        text += f", accuracy on {held.name} {found['validation_accuracy']:.4f}"
        if robust is not None:
            text += f", {robust:.4f} under attack (on {min(len(held), options['check_images'])} of them)"
    if collapsed:
        text += "; catastrophic overfitting was found"
    output.show(found, text, as_json)


def _last_checks(rows: list[dict[str, Any]], best: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The check that the final weights were kept for, or the last one; none where there was none."""
    if best is not None:
        rows = rows[: best["epoch"]]
    checks = rows[-1].get("checks", [])
    kept = [check for check in checks if best is not None and check["step"] == best["step"]]
    return kept or checks[-1:]


def _weight(word: str) -> tuple[str, float | str]:
    """Read ``beta=6`` or ``mix=loss``."""
    name, sign, value = word.partition("=")
    if not sign:
        raise InputError(f"--weight is {word!r}, but must be a name and a value such as beta=6")
    try:
        return name.strip().replace("-", "_"), float(value)
    except ValueError:
        return name.strip().replace("-", "_"), value.strip()
