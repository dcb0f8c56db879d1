"""Choosing layer, pooling, K and weighting on held-out images, never on those that are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense.database import WEIGHTINGS, ImageDatabase, Rule
from nndefense.errors import InputError, plain
from nndefense.images import check_images
from nndefense.models import Classifier

DEFAULT_KS = (1, 3, 5, 10, 20, 50)


@dataclass(frozen=True)
class Choice:
    """One setting of the defence with its accuracies on the calibration images, as fractions."""

    layer: str
    pooling: str
    dimension: int
    k: int
    weighting: str
    clean: float
    attacked: float


@dataclass(frozen=True)
class Calibration:
    """The table that a setting was chosen from, best first, and the choice.

    Attributes:
        objective: what was maximised, in words.
        n: number of calibration images.
        bare_clean: the bare classifier's accuracy on the clean calibration images.
        bare_attacked: the same on the attacked ones.
        chosen: the best setting within the bound on lost clean accuracy; where none is within it, the one that
            loses least, and ``within_bound`` is false.
        candidate: which of the candidates that setting belongs to, counted from 0.
        table: all settings, admissible ones first, best first.
    """

    objective: str
    n: int
    bare_clean: float
    bare_attacked: float
    chosen: Choice
    candidate: int
    within_bound: bool
    table: tuple[Choice, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        return asdict(self)


def calibrate(
    classifier: Classifier,
    candidates: Iterable[ImageDatabase],
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    weightings: Sequence[str] = WEIGHTINGS,
    max_clean_loss: float = 0.02,
    batch_size: int = 256,
    progress: Callable[[Iterable[ImageDatabase]], Iterable[ImageDatabase]] = iter,
) -> Calibration:
    """Measure every setting and choose one: best attacked accuracy subject to a bound on lost clean accuracy.

    The neighbours of each image are found once per candidate, for the largest K; every smaller K is a prefix of
    them. The databases must not hold the calibration images: an image would find itself.

    Args:
        classifier: the classifier that all candidates were made with.
        candidates: one database per layer and pooling.
        clean: calibration images, N x C x H x W in [0, 1].
        attacked: the same images under the attack that the defence is chosen for.
        labels: N class numbers of the classifier.
        ks: numbers of neighbours to try; those beyond a candidate's rows are left out.
        weightings: weightings to try.
        max_clean_loss: how much clean accuracy may be lost against the bare classifier, as a fraction.
        batch_size: images per forward pass.
        progress: wraps the candidates, to show how far it has come.

    Raises:
        InputError: no candidate, no usable k, or images and labels that do not fit.
    """
    for images, name in ((clean, "clean images"), (attacked, "attacked images")):
        check_images(images, channels=classifier.input_shape[0], name=name)
        if len(images) != len(labels) or not len(labels):
            raise InputError(
                f"{len(images)} {name} and {len(labels)} labels were given to calibrate on: give N of each"
            )
    classifier.eval()
    measured: list[tuple[Choice, int]] = []
    for number, database in enumerate(progress(candidates)):
        usable = sorted({plain(k) for k in ks if 1 <= k <= len(database)})
        if usable:
            found = _measure(classifier, database, clean, attacked, labels, usable, weightings, batch_size)
            measured += [(choice, number) for choice in found]
    if not measured:
        raise InputError("there is nothing to calibrate: give candidate databases with at least as many rows as a k")
    with torch.no_grad():
        logits = [torch.cat([classifier(b) for b in torch.split(x, batch_size)]) for x in (clean, attacked)]
    bare = [float((each.argmax(1).cpu() == labels.cpu()).double().mean()) for each in logits]
    # A small slack, so that a bound of exactly n images is not missed by rounding.
    floor = bare[0] - max_clean_loss - 1e-9
    measured.sort(key=lambda m: (m[0].clean >= floor, m[0].attacked, m[0].clean, -m[0].k), reverse=True)
    within = measured[0][0].clean >= floor
    chosen, number = measured[0] if within else max(measured, key=lambda m: (m[0].clean, m[0].attacked, -m[0].k))
    return Calibration(
        objective=f"best attacked accuracy with at most {100 * max_clean_loss:g} points of clean accuracy lost",
        n=len(labels),
        bare_clean=bare[0],
        bare_attacked=bare[1],
        chosen=chosen,
        candidate=number,
        within_bound=within,
        table=tuple(choice for choice, _ in measured),
    )


@torch.no_grad()
def _measure(
    classifier: Classifier,
    database: ImageDatabase,
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    weightings: Sequence[str],
    batch_size: int,
) -> list[Choice]:
    """The accuracies of one candidate for every k and weighting."""
    extractor = database.extractor(classifier)
    correct = {(k, w): [0, 0] for k in ks for w in weightings}
    for side, images in enumerate((clean, attacked)):
        for batch, truth in zip(torch.split(images, batch_size), torch.split(labels.cpu(), batch_size), strict=True):
            distances, found = database.search(extractor(batch), max(ks))  # N x max K
            votes = database.posteriors(found).float()  # N x max K x C
            for weighting in weightings:
                weights = database.weights(found, weighting)
                for k in ks:
                    predicted = Rule(k, weighting).probabilities(votes[:, :k], weights[:, :k], distances[:, :k])
                    correct[k, weighting][side] += int((predicted.argmax(1) == truth).sum())
    feature = database.feature
    return [
        Choice(feature.layer, feature.pooling, database.dimension, k, w, right[0] / len(clean), right[1] / len(clean))
        for (k, w), right in correct.items()
    ]
