"""How a recipe's nets are used beside on their own: as a defence over the images that they were trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.calibration import kernel_scales
from nndefense.errors import InputError
from nndefense.experiments.form import Form
from nndefense.experiments.recipe import ExperimentRecipe, Method
from nndefense.features import FeatureSpec
from nndefense.models import Classifier
from nndefense.pipeline.finished import find_or_build

# Widths of the kernel that are tried, as multiples of the held-out images' median squared distance to the K-th row.
WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_BATCH = 250


def defenses_of(
    recipe: ExperimentRecipe,
    method: Method,
    net: Classifier,
    rows: ImageDataset,
    validation: ImageDataset | None,
    folder: Path,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[str, NearestNeighborDefense]]:
    """The defences that a recipe makes of a trained net, by their names in the tables.

    Args:
        recipe: whose forms are made.
        method: that trained the net.
        net: trained.
        rows: the images that it was trained on, with their labels or pseudo-labels, which the databases are made of.
        validation: images that no net was trained on, for temperatures.
        folder: where the databases stand, and are found again.
        seed: draws the rows of smaller databases.
        progress: whether to show bars.

    Raises:
        InputError: a learned temperature of a net that learned none, or a form without a usable layer.
    """
    forms = recipe.forms_of(method)
    features = dict.fromkeys(FeatureSpec(form.layer, form.pooling) for form in forms)
    places = {folder / f"{one.layer}-{one.pooling}".replace(".", "-"): one for one in features}
    if not places:
        return
    found = find_or_build(rows, net, places, progress=progress)
    databases = dict(zip(features, found, strict=True))
    order = np.random.default_rng(seed).permutation(len(rows))
    for form in forms:
        whole = databases[FeatureSpec(form.layer, form.pooling)]
        for count in form.rows:
            some = whole if count in (0, len(whole)) else whole.subset(order[:count])
            temperature = _temperature(form, net, some, validation)
            yield form.title(method.name, count), _defense(form, net, some, temperature)


def _defense(form: Form, net: Classifier, database: ImageDatabase, temperature: float | None) -> NearestNeighborDefense:
    k = min(form.k, len(database))
    return NearestNeighborDefense(
        net, database, k, form.weighting, votes=form.votes, temperature=temperature, alpha=form.alpha
    )


def _temperature(form: Form, net: Classifier, database: ImageDatabase, validation: ImageDataset | None) -> float | None:
    if form.temperature == "none":
        return None
    if form.temperature == "held-out":
        assert validation is not None
        return held_out_temperature(form, net, database, validation)
    learned = getattr(net.net, "temperature", None)
    if not isinstance(learned, float):
        raise InputError(f"{net.arch} learns no temperature: give the recipe an architecture nn-..., or 'held-out'")
    return learned


@torch.no_grad()
def held_out_temperature(form: Form, net: Classifier, database: ImageDatabase, images: ImageDataset) -> float:
    """The kernel's temperature, of :data:`WIDTHS`, under which held-out images' own classes are likeliest.

    Args:
        form: the other settings of the defence.
        net, database: of the defence.
        images: labelled, held out of the database.
    """
    labels_of, k = net.label_map(images.classes), min(form.k, len(database))
    batches = [(batch.to(net.device), labels_of[labels]) for batch, labels, _ in images.batches(_BATCH)]
    scale = kernel_scales(net, database, (batch for batch, _ in batches), k)[-1]

    def likelihood(temperature: float) -> float:
        defense = _defense(form, net, database, temperature)
        found = [defense(batch).cpu().gather(1, labels[:, None]) for batch, labels in batches]
        return float(torch.cat(found).double().mean())

    return max((width * scale for width in WIDTHS), key=likelihood)
