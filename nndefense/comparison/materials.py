"""What the rows of a comparison are made of: images, nets, and databases, made once and found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from index_build import build_databases
from nndefense.comparison.recipe import ComparisonRecipe, Scope
from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.defenses import Calibration, calibrate
from nndefense.errors import DatabaseError, InputError
from nndefense.evaluation import AttackSettings, attack_all
from nndefense.features import WIDEST, FeatureSpec, spatial_layers, spread, vector_widths
from nndefense.models import Classifier, build_classifier
from nndefense.training import train_classifier
from nndefense.training.progress import TrainingFolder

Say = Callable[[str], object]
_KS = (1, 3, 5, 10, 20, 50)


def _silent(text: str) -> None:
    """Say nothing."""


@dataclass
class Materials:
    """Everything that rows are made from.

    Attributes:
        recipe: the comparison.
        train: labelled images; they fill databases, train nets and give patches. None of them is reported.
        test: labelled images to report on.
        out: folder of what is made.
        device: where to compute.
        given: a ready classifier, or None to train one.
        given_surrogate: a ready surrogate of the black-box attacker, or None to train one.
        specs: names of the training images, recorded with databases.
        say: called with a line for people before everything that takes long.
        progress: whether to show bars.
    """

    recipe: ComparisonRecipe
    train: ImageDataset
    test: ImageDataset
    out: Path
    device: torch.device
    given: Classifier | None = None
    given_surrogate: Classifier | None = None
    specs: tuple[str, ...] = ()
    say: Say = field(default_factory=lambda: _silent)
    progress: bool = True
    _choices: dict[str, tuple[FeatureSpec, Calibration]] = field(default_factory=dict)

    @property
    def scope(self) -> Scope:
        """How much is done."""
        return self.recipe.scope

    @property
    def seed(self) -> int:
        """Of everything drawn."""
        return self.recipe.seed

    @cached_property
    def held(self) -> ImageDataset:
        """Images to calibrate on: they train nothing and stand in no database."""
        return self.train.subset(self._order[: self.scope.holdout])

    @cached_property
    def rows(self) -> ImageDataset:
        """The training images without those to calibrate on."""
        return self.train.subset(np.sort(self._order[self.scope.holdout :]))

    @cached_property
    def _order(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if len(self.train) < 2 * self.scope.holdout:
            raise InputError(
                f"{self.train.name} has {len(self.train):,} images, but {self.scope.holdout} are to be held out to "
                "calibrate on: lower holdout, or give more images"
            )
        return np.random.default_rng(self.seed).permutation(len(self.train))

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

    def net(
        self,
        name: str,
        settings: Mapping[str, Any],
        *,
        seed: int,
        **options: Any,
    ) -> Classifier:
        """A net with the architecture ``settings["arch"]``, trained on :attr:`rows`; opened where that was done.

        Args:
            name: of its folder under ``out/nets``.
            settings: ``arch``, and training settings.
            seed: of its weights and batches.
            **options: more arguments of the training, such as its objective.
        """
        if "arch" not in settings:
            raise InputError(f"{self.train.name} has no settings to train a net with: give --classifier")
        chosen = {"lr": 2e-3, **settings, "seed": seed}
        net = build_classifier(
            str(chosen.pop("arch")), input_shape=self.rows.shape, classes=self.rows.classes, seed=seed
        )
        folder = TrainingFolder(self.out / "nets" / name)
        if not folder.is_finished():
            self.say(f"training {name} ({settings['arch']})")
        return train_classifier(
            net,
            self.rows,
            device=self.device,
            out=folder.folder,
            resume=folder.is_unfinished() or folder.is_finished(),
            progress=self.progress,
            **options,
            **chosen,
        )

    @cached_property
    def layers(self) -> list[str]:
        """Candidate layers of the nearest-neighbour defence, from the middle of the net to its end."""
        return spread(spatial_layers(self.classifier.net, self._example), self.scope.layers)

    @cached_property
    def _example(self) -> Tensor:
        return torch.full((1, *self.classifier.input_shape), 0.5, device=self.device)

    @cached_property
    def attacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """The held-out images, the same under the gray-box attack at the headline budget, and their classes."""
        scope = self.scope
        return attack_all(
            AttackSettings("pgd", scope.norm, (scope.headline,), scope.steps),
            self.classifier,
            self.held,
            scope.headline,
            batch_size=scope.batch_size,
            seed=self.seed + 1,
            device=self.device,
        )

    def chosen(self, pooling: str) -> tuple[FeatureSpec, Calibration]:
        """Layer, K and weighting for a pooling, chosen once."""
        if pooling not in self._choices:
            self._choices[pooling] = self._choose(pooling)
        return self._choices[pooling]

    def _choose(self, pooling: str) -> tuple[FeatureSpec, Calibration]:
        """Choose on the held-out images, in databases of candidate rows."""
        layers = self._usable(pooling)
        self.say(f"calibrating nearest neighbours, {pooling}: layers {', '.join(layers)}")
        rows = self.rows
        if len(rows) > self.scope.candidate_rows:
            drawn = np.random.default_rng(self.seed).permutation(len(rows))[: self.scope.candidate_rows]
            rows = rows.subset(np.sort(drawn))
        features = [FeatureSpec(layer, pooling, pca=self.scope.pca) for layer in layers]
        places = {self.out / "candidates" / f"{pooling}-{i}": feature for i, feature in enumerate(features)}
        databases = self._databases(rows, places)
        found = calibrate(self.classifier, databases, *self.attacked, ks=_KS)
        return features[found.candidate], found

    def _usable(self, pooling: str) -> list[str]:
        """The candidate layers whose vectors are not too long."""
        widths = vector_widths(self.classifier, self.layers, [pooling], self._example)
        found = [layer for layer, (width,) in zip(self.layers, widths, strict=True) if width <= WIDEST]
        if not found:
            raise InputError(f"{pooling} makes vectors of over {WIDEST:,} numbers of every layer: pool more coarsely")
        return found

    def database(self, feature: FeatureSpec, name: str) -> ImageDatabase:
        """The database of all rows for one feature."""
        folder = self.out / "databases" / name
        if not folder.exists():
            self.say(f"building the database {name}: {len(self.rows):,} rows of {feature}")
        return self._databases(self.rows, {folder: feature})[0]

    def _databases(self, rows: ImageDataset, places: dict[Path, FeatureSpec]) -> list[ImageDatabase]:
        """Open finished databases of these very rows and features, and build the others."""
        missing = {folder: feature for folder, feature in places.items() if not self._fits(folder, feature, rows)}
        if missing:
            build_databases(
                rows,
                self.classifier,
                missing,
                specs=list(self.specs),
                batch_size=self.scope.batch_size,
                seed=self.seed,
                overwrite=True,
                progress=self.progress,
            )
        return [ImageDatabase.open(folder, classifier=self.classifier) for folder in places]

    def _fits(self, folder: Path, feature: FeatureSpec, rows: ImageDataset) -> bool:
        try:
            found = ImageDatabase.open(folder, classifier=self.classifier)
        except DatabaseError:
            return False
        return found.feature == feature and found.manifest.data["fingerprint"] == rows.fingerprint
