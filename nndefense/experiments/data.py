"""The images of a recipe: training, validation and test images, and who is labelled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nndefense.datasets import ImageDataset, holdout, measured_spec, open_dataset
from nndefense.datasets.base import stratified_rows
from nndefense.errors import DataError, InputError
from nndefense.experiments.recipe import ExperimentRecipe
from nndefense.pipeline.checks import check_disjoint
from nndefense.training.identity import described
from nndefense.training.pools import complement

# The split and the images that are attacked are the same for every seed, so that differences between seeds are those
# of training.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """What a recipe works on.

    Attributes:
        train: labelled images without the validation ones.
        validation: split off the training set; None where the recipe needs none.
        test: reported on, and used for nothing else.
        attacked: those of the test images that are attacked.
        extra: unlabelled images from elsewhere, or None.
    """

    train: ImageDataset
    validation: ImageDataset | None
    test: ImageDataset
    attacked: ImageDataset
    extra: ImageDataset | None = None

    def labelled(self, labels: int, seed: int) -> tuple[ImageDataset, ImageDataset | None]:
        """The labelled images and the pool of unlabelled ones (None where all are labelled).

        Args:
            labels: how many are labelled, the classes in equal shares; 0 for all.
            seed: of the draw; the labelled images of fewer labels are among those of more.

        Raises:
            InputError: there are not so many images.
        """
        if labels == 0 or labels == len(self.train):
            return self.train, self.extra
        labelled, rest = complement(self.train, labels, seed)
        return labelled, self.extra if self.extra is not None else rest

    def true_labels(self, pool: ImageDataset) -> ImageDataset | None:
        """The pool with its true labels, to say how good pseudo-labels are; None for images from elsewhere."""
        if self.extra is not None:
            return None
        wanted = set(pool.ids)
        return self.train.subset(np.array([item in wanted for item in self.train.ids], dtype=np.bool_))

    def to_json(self) -> dict[str, Any]:
        """Names, sizes and fingerprints."""
        found = {"train": self.train, "validation": self.validation, "test": self.test, "attacked": self.attacked}
        if self.extra is not None:
            found["unlabelled"] = self.extra
        return {name: None if images is None else described(images) for name, images in found.items()}


def open_images(
    recipe: ExperimentRecipe, data_dir: Path | None = None, unlabelled: str | None = None, *, download: bool = True
) -> Images:
    """Open what a recipe names.

    Args:
        recipe: names the images.
        data_dir: the folder of the data sets, as for :func:`nndefense.datasets.open_dataset`.
        unlabelled: spec of a pool that takes the place of the training images that are left over.
        download: whether the usual data sets may be fetched.

    Raises:
        DataError: images are missing, or have no labels.
        InputError: the recipe asks for more images than there are.
    """
    specs = recipe.train, measured_spec(recipe.test, data_dir=data_dir)
    train, test = (open_dataset(spec, data_dir=data_dir, download=download).usable for spec in specs)
    if train.classes != test.classes or train.shape != test.shape:
        raise DataError(f"{train.name} and {test.name} differ in classes or shape: give two splits of one data set")
    check_disjoint(test, train)
    validation = None
    if recipe.validation:
        rest, held = holdout(train, recipe.validation, _SPLIT_SEED)
        train, validation = train.subset(rest), train.subset(held, name=f"{train.name} ({len(held)} held out)")
    if max(recipe.labels) > len(train):
        raise InputError(
            f"the recipe labels {max(recipe.labels):,} images, but {train.name} has {len(train):,}: label fewer"
        )
    attacked = test
    if recipe.images is not None and recipe.images < len(test):
        attacked = test.subset(stratified_rows(test.labels, recipe.images, _SPLIT_SEED))
    extra = None
    if unlabelled is not None:
        extra = open_dataset(unlabelled, data_dir=data_dir, size=train.shape[1:], channels=train.shape[0]).usable
    pooled = any(method.unlabelled for method in recipe.methods)
    if pooled and extra is None and any(labels in (0, len(train)) for labels in recipe.labels):
        raise InputError("self-training needs unlabelled images: label fewer than all, or give a pool of others")
    return Images(train, validation, test, attacked, extra)
