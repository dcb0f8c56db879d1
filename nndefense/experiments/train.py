"""The trainings of a recipe, each opened again where it is finished and continued where it was stopped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nndefense.database.near_images import NearSearch
from nndefense.datasets import ImageDataset, concatenate
from nndefense.defenses import NearestNeighborDefense
from nndefense.experiments.data import Images
from nndefense.experiments.forms import defenses_of
from nndefense.experiments.recipe import TEACHER, ExperimentRecipe, Method
from nndefense.experiments.threat import Threat
from nndefense.models import Classifier, build_classifier, load_classifier
from nndefense.pipeline.finished import find_or_train
from nndefense.training import make_objective
from nndefense.training.batch import BatchAttack
from nndefense.training.labellers import Teacher
from nndefense.training.pseudo_job import write_pseudo_labels
from nndefense.training.pseudo_labels import label_accuracy
from nndefense.training.validation import CatastrophicOverfitting

# What a run's record takes over from the net's own.
_KEPT = ("objective", "settings", "attack", "data", "unlabelled", "selection", "best")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: how.
        threat: what the training attacks with; None where it does not attack.
        labels: number of labelled images; 0 for all.
        seed: of weights, order, labelled images and attacks.
    """

    method: Method
    threat: Threat | None
    labels: int
    seed: int

    @property
    def name(self) -> str:
        """Names the run, and its folder."""
        threat = [] if self.threat is None else [self.threat.name]
        labels = [f"n{self.labels}"] if self.labels else []
        return "-".join([self.method.name.replace(" ", "-"), *threat, *labels, f"seed{self.seed}"])

    @property
    def teacher(self) -> str | None:
        """The name of the run whose net gives the pseudo-labels, for a method that needs some."""
        if not self.method.unlabelled:
            return None
        return Run(Method(TEACHER, "standard"), None, self.labels, self.seed).name


def runs_of(recipe: ExperimentRecipe) -> list[Run]:
    """The runs of a recipe that are wanted, every teacher before its pupils."""
    methods = sorted(recipe.methods, key=lambda method: method.name != TEACHER)
    wanted = {
        (one.name, threat.name) for one in methods for threat in recipe.threats if recipe.wants(one.name, threat.name)
    }
    nets = {name for name, _ in wanted}
    if any(method.unlabelled and method.name in nets for method in methods):
        nets.add(TEACHER)
    return [
        Run(method, threat, labels, seed)
        for labels in recipe.labels
        for seed in range(recipe.seeds)
        for method in methods
        for threat in (recipe.threats if method.attacks else (None,))
        if (method.name in nets if threat is None else (method.name, threat.name) in wanted)
    ]


def threats_of(recipe: ExperimentRecipe, run: Run) -> tuple[Threat, ...]:
    """What a run's net is measured under: what it was trained for, or everything, as far as it is wanted."""
    threats = recipe.threats if run.threat is None else (run.threat,)
    return tuple(threat for threat in threats if recipe.wants(run.method.name, threat.name))


@dataclass(frozen=True)
class Workshop:
    """Where a recipe's nets are trained.

    Attributes:
        recipe: what to train.
        images: opened.
        out: folder of the results; trainings stand in ``out/trainings``, pseudo-labels in ``out/pseudo-labels``.
        device: where to compute.
        progress: whether to show bars.
    """

    recipe: ExperimentRecipe
    images: Images
    out: Path
    device: torch.device
    progress: bool = True

    def folder(self, name: str) -> Path:
        """The folder of the training with this name."""
        return self.out / "trainings" / name

    def train(self, run: Run) -> tuple[Classifier, dict[str, Any]]:
        """Train one net, or open it where that was done.

        Returns:
            The net in evaluation mode, on its device, and plain values for the results.

        Raises:
            InputError: the folder holds a training with other settings.
            ModelError: the loss is no longer finite, or a file is damaged.
        """
        recipe = self.recipe
        labelled, unlabelled, pseudo = self._learned_from(run)
        options = recipe.options_of(run.method)
        chosen = recipe.settings_of(run.method, len(labelled), run.seed).keep_best
        first = None
        if recipe.start and run.threat is not None:
            easier = recipe.attack_of(run.method, run.threat, start=True)
            stage = recipe.start_options_of(run.method)
            first = self._net(run, f"{run.name}-start", labelled, unlabelled, stage, easier)
        attack = None if run.threat is None else recipe.attack_of(run.method, run.threat)
        finished = self._net(run, run.name, labelled, unlabelled, options, attack, initial=first, chosen=chosen)
        return finished, self._record(run, finished, first, pseudo)

    def defenses(self, run: Run, trained: Classifier) -> Iterator[tuple[str, NearestNeighborDefense]]:
        """What the recipe makes of a run's net; see :func:`~nndefense.experiments.forms.defenses_of`."""
        labelled, unlabelled, _ = self._learned_from(run)
        return defenses_of(
            self.recipe,
            run.method,
            trained,
            labelled if unlabelled is None else concatenate([labelled, unlabelled]),
            self.images.validation,
            self.out / "databases" / run.name,
            seed=run.seed,
            progress=self.progress,
        )

    def _learned_from(self, run: Run) -> tuple[ImageDataset, ImageDataset | None, dict[str, Any] | None]:
        """Labelled images, the pool with its pseudo-labels where the method takes one, and how good these are."""
        labelled, pool = self.images.labelled(run.labels, run.seed)
        if run.teacher is None:
            return labelled, None, None
        assert pool is not None
        return labelled, *self._pseudo_labelled(run, labelled, pool)

    def _net(
        self,
        run: Run,
        name: str,
        labelled: ImageDataset,
        unlabelled: ImageDataset | None,
        options: dict[str, Any],
        attack: BatchAttack | None,
        *,
        initial: Classifier | None = None,
        chosen: bool = False,
    ) -> Classifier:
        """A finished training: opened, continued, or begun.

        Args:
            run: whose it is.
            name: of its folder.
            labelled, unlabelled: to train on.
            options: training settings.
            attack: of the training.
            initial: the net to begin with; one with fresh weights by default.
            chosen: whether its weights are chosen on the validation images.
        """
        arch = run.method.architecture or self.recipe.architecture
        classifier = build_classifier(arch, input_shape=labelled.shape, classes=labelled.classes, seed=run.seed)
        if initial is not None:
            classifier.load_state_dict(initial.state_dict())
        with warnings.catch_warnings():
            # It is told in the results.
            warnings.simplefilter("ignore", CatastrophicOverfitting)
            return find_or_train(
                classifier,
                labelled,
                self.folder(name),
                objective=make_objective(run.method.objective, **run.method.weights),
                attack=attack,
                unlabelled=unlabelled,
                validation=self.images.validation if chosen else None,
                validation_attack=self.recipe.check_attack(run.threat) if chosen and run.threat is not None else None,
                device=self.device,
                progress=self.progress,
                **{**options, "seed": run.seed},
            )

    def _pseudo_labelled(
        self, run: Run, labelled: ImageDataset, pool: ImageDataset
    ) -> tuple[ImageDataset, dict[str, Any]]:
        """The pool with the teacher's labels, and what is known of them."""
        assert run.teacher is not None
        teacher = load_classifier(self.folder(run.teacher), device=self.device)
        # Images from elsewhere could be copies of test images; those left over from the training set are not.
        near = NearSearch(self.images.test, device=self.device) if self.images.extra is not None else None
        path = self.out / "pseudo-labels" / f"{run.teacher}.h5"
        found = write_pseudo_labels(Teacher(teacher), pool, path, exclude=near, progress=self.progress)
        truth = self.images.true_labels(pool)
        unlabelled = found.dataset(pool, like=labelled)
        record: dict[str, Any] = {
            "teacher": run.teacher,
            "teacher_fingerprint": teacher.fingerprint,
            "n": len(unlabelled),
            "near_test_images": len(found.excluded_ids),
        }
        if truth is not None:
            record |= label_accuracy(found, truth)["all"]
        return unlabelled, record

    def _record(
        self, run: Run, classifier: Classifier, first: Classifier | None, pseudo: dict[str, Any] | None
    ) -> dict[str, Any]:
        info = classifier.info
        history = info["history"]
        stages = [*(first.info["history"] if first is not None else []), *history]
        checks = [check for row in history for check in row.get("checks", [])]
        labels = run.labels or len(self.images.train)
        done = [(info["settings"], len(history))]
        done += [] if first is None else [(first.info["settings"], len(first.info["history"]))]
        return {
            "name": run.name,
            "method": run.method.name,
            "architecture": classifier.arch,
            "parameters": sum(weights.numel() for weights in classifier.parameters()),
            "threat": None if run.threat is None else run.threat.name,
            "labels": labels,
            "seed": run.seed,
            "folder": str(self.folder(run.name).relative_to(self.out)),
            "fingerprint": classifier.fingerprint,
            **{
                name: info[name]
                for name in ("objective", "settings", "attack", "data", "unlabelled", "selection", "best")
            },
            "start": None if first is None else {key: first.info[key] for key in ("settings", "attack")},
            "pseudo_labels": pseudo,
            "epochs_done": len(history),
            # Those of the first stage, too.
            "steps_done": sum(
                epochs * (settings["steps_per_epoch"] or -(-labels // settings["batch_size"]))
                for settings, epochs in done
            ),
            # Steps alone; checks and checkpoints come on top.
            "training_seconds": round(sum(row["seconds"] for row in stages), 1),
            "catastrophic_overfitting": any(check.get("catastrophic_overfitting") for check in checks),
        }
