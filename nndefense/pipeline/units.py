"""The observation of Szegedy et al. (2014) on a net and a data set: what excites a unit, and what a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nndefense.bars import progress_bar
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError
from nndefense.features import FeatureExtractor, FeatureSpec
from nndefense.models import Classifier

if TYPE_CHECKING:
    from nndefense.theory.studies import Study


@torch.no_grad()
def study_units(
    classifier: Classifier,
    dataset: ImageDataset,
    feature: FeatureSpec,
    *,
    count: int = 8,
    draws: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Compare the images that most excite units of a layer with those that excite random directions of its space.

    Args:
        classifier: whose units they are.
        dataset: labelled images of the classifier's shape, as a rule none that it was trained on. They and their
            activations are held in memory.
        feature: the layer, and the pooling that makes a unit of each entry.
        count, draws, seed: as :func:`nndefense.theory.exciting` takes them.
        batch_size: images per forward pass.
        progress: whether to show a bar.

    Raises:
        DataError: images without a label.
        InputError: a layer that does not exist or has nothing to compare, or too few images.
    """
    from nndefense.theory import studies

    dataset = dataset.usable
    if (dataset.labels < 0).any():
        raise DataError(
            f"{dataset.name} has images without a label: what pictures have in common is told by their labels"
        )
    pixels, vectors, extractor = [], [], None
    for images, _, _ in progress_bar(
        dataset.batches(batch_size), total=-(-len(dataset) // batch_size), desc="activations", shown=progress
    ):
        here = images.to(classifier.device)
        extractor = extractor or FeatureExtractor(classifier, feature, None, here)
        pixels.append(images.cpu())
        vectors.append(extractor(here).double().cpu())
    return studies.units(
        torch.cat(vectors).numpy(),
        torch.cat(pixels).permute(0, 2, 3, 1).numpy(),
        dataset.labels,
        facts={"classifier": classifier.fingerprint, "dataset": dataset.name, "feature": str(feature)},
        count=count,
        draws=draws,
        seed=seed,
    )
