"""What defences are made of: images, nets, and databases, made once and found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nndefense import recipes
from nndefense.attacks import NORMS
from nndefense.database import WEIGHTINGS, ImageDatabase, Rule
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError, check_choice
from nndefense.evaluation import AttackSettings
from nndefense.features import FeatureSpec
from nndefense.models import Classifier, build_classifier
from nndefense.pipeline.calibrating import Candidates, Chosen, attacked_images, choose
from nndefense.pipeline.finished import find_or_build, find_or_train
from nndefense.training.progress import TrainingFolder

Say = Callable[[str], object]


# Stands for the layer where that is calibrated.
_CALIBRATED = "calibrated"


def _silent(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class MaterialSettings:
    """How much is made, which differs between data sets.

    Attributes:
        norm, headline, steps: of the attack that settings are chosen for.
        draws: averaged at every step of an attack on a defence that is random.
        classifier, surrogate: training settings of the nets, where none are given; ``arch`` and options of
            :func:`~nndefense.training.train_classifier`.
        training: settings of the trained defences: ``eps`` and ``norm`` of their attacks, ``steps``, ``epochs``, ...;
            empty: they are not trained.
        layer, k, weighting: of every nearest-neighbour defence that names none; empty and None: calibrated.
        layers: candidate layers of the nearest-neighbour defence, spread over the net.
        holdout: images to calibrate on, held out of the training set; 0 where nothing is calibrated.
        candidate_rows: rows that settings are compared on.
        pca: dimensions of stored features.
        crop: side of the crop ensemble's crops as a share of the image's; nets for small images that were not trained
            on crops know nothing of 90/224 of them.
        patches: patches for quilting.
        batch_size: images per forward pass.
    """

    norm: str = "normalized-l2"
    headline: float = 0.06
    steps: int = 20
    draws: int = 10
    classifier: Mapping[str, Any] = field(default_factory=dict)
    surrogate: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""
    k: int | None = None
    weighting: str = ""
    layers: int = 4
    holdout: int = 300
    candidate_rows: int = 5000
    pca: int = 256
    crop: float = 90 / 224
    patches: int = 100_000
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        if self.weighting:
            check_choice("weighting", self.weighting, WEIGHTINGS)
        recipes.check_least(self, 1, "steps", "draws", "layers", "batch_size", "patches", "k")
        recipes.check_least(self, 0, "pca")
        calibrated = not (self.layer and self.k and self.weighting)
        recipes.check_least(self, 20, "candidate_rows", *(["holdout"] if calibrated else []))
        recipes.check_least(self, 0, "holdout")


@dataclass
class Materials:
    """Everything that defences are made from.

    Attributes:
        scope: how much is made.
        train: labelled images; they fill databases, train nets and give patches. None of them is reported. None: there
            are none, and only defences can be made that need none.
        out: folder of what is made.
        device: where to compute.
        seed: of everything drawn.
        given: a ready classifier, or None to train one.
        given_surrogate: a ready surrogate of the black-box attacker, or None to train one.
        specs: names of the training images, recorded with databases.
        say: called with a line for people before everything that takes long.
        progress: whether to show bars.
    """

    scope: MaterialSettings
    train: ImageDataset | None
    out: Path
    device: torch.device
    seed: int = 0
    given: Classifier | None = None
    given_surrogate: Classifier | None = None
    specs: tuple[str, ...] = ()
    say: Say = field(default_factory=lambda: _silent)
    progress: bool = True
    _choices: dict[FeatureSpec, Chosen] = field(default_factory=dict)

    @property
    def held(self) -> ImageDataset:
        """Images to calibrate on: they train nothing and stand in no database."""
        return self._halves[1]

    @property
    def rows(self) -> ImageDataset:
        """The training images without those to calibrate on."""
        return self._halves[0]

    @cached_property
    def _halves(self) -> tuple[ImageDataset, ImageDataset]:
        train, count = self.train, self.scope.holdout
        if train is None:
            raise InputError("a defence of these is made of training images: name them by --train-set")
        if len(train) < 2 * count:
            raise InputError(
                f"{train.name} has {len(train):,} images, but {count} are to be held out to calibrate on: give "
                "more images by --train-set, or lower holdout in the [materials] of a --recipe"
            )
        order = np.random.default_rng(self.seed).permutation(len(train))
        return train.subset(np.sort(order[count:])), train.subset(order[:count])

    @cached_property
    def classifier(self) -> Classifier:
        """The net that is defended."""
        if self.given is not None:
            return self.given
        return self.net("classifier", self.scope.classifier, seed=self.seed)

    @cached_property
    def surrogate(self) -> Classifier | None:
        """The net that the black-box attacker follows, trained apart; None where there is none."""
        if self.given_surrogate is not None:
            return self.given_surrogate
        if self.given is not None or not self.scope.surrogate:
            return None
        return self.net("surrogate", self.scope.surrogate, seed=self.seed + 1)

    def net(self, name: str, settings: Mapping[str, Any], *, seed: int, **options: Any) -> Classifier:
        """A net with the architecture ``settings["arch"]``, trained on :attr:`rows`; opened where that was done.

        Args:
            name: of its folder under ``out/nets``.
            settings: ``arch``, and training settings.
            seed: of its weights and batches.
            **options: more arguments of the training, such as its objective.

        Raises:
            InputError: there are no settings to train with, or some that cannot be used.
        """
        if "arch" not in settings:
            raise InputError(f"{self.rows.name} has no settings to train a net with: give --classifier")
        chosen = {"lr": 2e-3, **settings, "seed": seed, **options}
        net = build_classifier(
            str(chosen.pop("arch")), input_shape=self.rows.shape, classes=self.rows.classes, seed=seed
        )
        folder = self.out / "nets" / name
        if not TrainingFolder(folder).is_finished():
            self.say(f"training {name} ({settings['arch']})")
        return find_or_train(net, self.rows, folder, device=self.device, progress=self.progress, **chosen)

    @cached_property
    def attacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """The held-out images, the same under the gray-box attack at the headline budget, and their classes."""
        return attacked_images(
            self.classifier,
            self.held,
            self._attack,
            self.scope.headline,
            batch_size=self.scope.batch_size,
            seed=self.seed + 1,
            progress=self.progress,
        )

    @property
    def _attack(self) -> AttackSettings:
        return AttackSettings("pgd", self.scope.norm, (self.scope.headline,), self.scope.steps)

    def chosen(
        self, pooling: str, *, layer: str = "", pca: int | None = None, k: int | None = None, weighting: str = ""
    ) -> Chosen:
        """Layer, K and weighting for a pooling: those that are named here or in the settings, and the others chosen
        once on the held-out images. Where all are named nothing is calibrated, and ``calibration`` is empty.

        Args:
            pooling: of the features.
            layer, weighting: by name; empty for what the settings say.
            pca: dimensions that are kept, 0 for all; None for what the settings say.
            k: neighbours, at least 1; None for what the settings say.

        Raises:
            InputError: something is to be calibrated, and no images are held out.
        """
        scope = self.scope
        layer, k, weighting = layer or scope.layer, k or scope.k, weighting or scope.weighting
        wanted = FeatureSpec(layer or _CALIBRATED, pooling, pca=scope.pca if pca is None else pca)
        if layer and k and weighting:
            return Chosen(wanted, Rule(k, weighting), {}, (wanted,))
        if wanted not in self._choices:
            if scope.holdout == 0:
                raise InputError(
                    "no images are held out to calibrate on: raise holdout, or name layer, k and weighting"
                )
            self.say(f"calibrating nearest neighbours, {pooling}: {layer or f'{scope.layers} layers'}")
            self._choices[wanted] = choose(
                self.classifier,
                self.rows,
                self.held,
                self._attack,
                scope.headline,
                Candidates(
                    (layer,) if layer else None,
                    (pooling,),
                    pca=wanted.pca,
                    rows=scope.candidate_rows,
                    count=scope.layers,
                    objective="gray",
                ),
                attacked=self.attacked,
                folder=self.out / "candidates" / self._place(wanted),
                batch_size=scope.batch_size,
                seed=self.seed,
                progress=self.progress,
                say=self.say,
            )
        found = self._choices[wanted]
        return replace(found, rule=found.rule.changed(k=k, weighting=weighting or None))

    def _place(self, feature: FeatureSpec) -> str:
        """Names a folder: the pooling, with layer and dimensions where they were named."""
        own = [] if feature.layer == _CALIBRATED else [feature.layer]
        own += [] if feature.pca == self.scope.pca else [f"pca{feature.pca}"]
        return "-".join([feature.pooling, *own])

    def database(self, feature: FeatureSpec, name: str) -> ImageDatabase:
        """The database of all rows for one ``feature``, in the folder ``name`` of those that are kept."""
        folder = self.out / "databases" / name
        if not folder.exists():
            self.say(f"building the database {name}: {len(self.rows):,} rows of {feature}")
        return find_or_build(
            self.rows,
            self.classifier,
            {folder: feature},
            specs=list(self.specs),
            batch_size=self.scope.batch_size,
            seed=self.seed,
            progress=self.progress,
        )[0]
