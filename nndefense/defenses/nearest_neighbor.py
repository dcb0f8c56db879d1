"""The nearest-neighbour defence: classify the images that lie next to the input, not the input itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.retrieval import Knowledge, RetrievalSurface
from nndefense.database import ImageDatabase, combine, weight_shares
from nndefense.database.weighting import CBW_D_POWER, CBW_D_TERMS, check_weighting
from nndefense.defenses.calibration import Calibration, calibrate
from nndefense.defenses.stored import DEFAULT_WEIGHTING, default_k, open_stored
from nndefense.defenses.surface import retrieval_surface
from nndefense.errors import InputError, plain
from nndefense.images import check_images
from nndefense.models import Classifier
from nndefense.modes import EvaluationOnly
from nndefense.unwrapping import unwrapped


@dataclass(frozen=True)
class Explanation:
    """Why the defence decided as it did, for N images and K neighbours each, nearest first.

    Attributes:
        log_probabilities: N x C, the defence's output.
        rows: N x K, row numbers in the database (int64).
        distances: N x K, Euclidean distances between feature vectors.
        weights: N x K, each neighbour's share of the total weight; every row sums to 1.
        posteriors: N x K x C, the classifier's posterior of each neighbour.
        labels: N x K, the neighbours' own labels as class numbers, -1 where unknown.
        ids: N lists of K ids.
    """

    log_probabilities: Tensor
    rows: Tensor
    distances: Tensor
    weights: Tensor
    posteriors: Tensor
    labels: Tensor
    ids: Sequence[Sequence[str]]


class NearestNeighborDefense(EvaluationOnly):
    """Project an image on its K nearest neighbours and average what the classifier says of them.

    ``p(x) = sum_k w_k s_k / sum_k w_k``, where s_k is the posterior and w_k the weight of the k-th nearest row by
    Euclidean distance of deep features (Dubey et al. 2019, section 3). The input's own posterior is not used.
    Posteriors and weights are stored in the database, so a prediction costs one forward pass up to the feature
    layer and one search.

    The output is piecewise constant in the pixels and carries no gradient: attack the classifier (gray box), or a
    relaxation of the retrieval.

    A defence is used, not trained: it is in evaluation mode whatever is called on it, on a copy or on a parent, and
    never changes the classifier's buffers.
    """

    def __init__(
        self,
        classifier: Classifier,
        database: ImageDatabase,
        k: int | None = None,
        weighting: str = DEFAULT_WEIGHTING,
        *,
        power: float = CBW_D_POWER,
        terms: int = CBW_D_TERMS,
    ) -> None:
        """
        Args:
            classifier: the classifier that the database was made with.
            database: where neighbours are found.
            k: number of neighbours, 1 to the number of rows; by default 50, or all rows where there are fewer.
            weighting: ``uniform``, ``cbw-e`` or ``cbw-d``.
            power: P of ``cbw-d``.
            terms: M of ``cbw-d``; with fewer than M + 1 classes, C - 1 is used.

        Raises:
            DatabaseError: the database was made with another classifier.
            InputError: k, weighting, power or terms cannot be used.
        """
        super().__init__()
        power, terms = plain(power), plain(terms)
        check_weighting(weighting, power, terms)
        k = default_k(len(database)) if k is None else plain(k)
        if type(k) is not int or not 1 <= k <= len(database):
            raise InputError(f"k is {k}, but must be from 1 to the database's {len(database):,} rows: lower k")
        self.classifier, self.database = unwrapped(classifier), database
        self.extractor = database.extractor(self.classifier)
        self.k, self.weighting, self.power, self.terms = k, weighting, power, terms
        self.eval()

    @classmethod
    def open(
        cls, folder: str | Path, classifier: str | Path | Classifier | None = None, **options: Any
    ) -> NearestNeighborDefense:
        """The defence of a database's folder, with its classifier and its calibrated setting.

        Args:
            folder: of the database.
            classifier: the classifier or where it comes from. None: the one that the database names, unless that is
                Python code, which runs only if you name it.
            **options: ``k``, ``weighting``, ``device``, ``classes``, ``input_shape`` and ``verify``, and errors, as for
                :func:`~nndefense.defenses.stored.open_stored`.
        """
        found = open_stored(folder, classifier, **options)
        return cls(found.classifier, found.database, found.k, found.weighting)

    @classmethod
    def calibrate(
        cls,
        classifier: Classifier,
        candidates: Sequence[ImageDatabase],
        clean: Tensor,
        attacked: Tensor,
        labels: Tensor,
        **options: Any,
    ) -> tuple[NearestNeighborDefense, Calibration]:
        """Choose layer, pooling, K and weighting on held-out images; arguments as for :func:`calibrate`.

        Returns:
            The defence with the chosen setting, and the table that it was chosen from.
        """
        calibration = calibrate(classifier, candidates, clean, attacked, labels, **options)
        chosen = calibration.chosen
        return cls(classifier, candidates[calibration.candidate], k=chosen.k, weighting=chosen.weighting), calibration

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes, on the images' device.

        Raises:
            InputError: images that are not finite, not in [0, 1] or of the wrong shape.
        """
        _, rows = self._neighbors(images)
        return self._log_probabilities(rows).to(images.device)

    @torch.no_grad()
    def explain(self, images: Tensor) -> Explanation:
        """The prediction for images N x C x H x W with the neighbours that it rests on."""
        distances, rows = self._neighbors(images)
        ids = self.database.ids(rows)
        return Explanation(
            log_probabilities=self._log_probabilities(rows),
            rows=rows,
            distances=distances,
            weights=weight_shares(self._weights(rows)),
            posteriors=self.database.posteriors(rows).float(),
            labels=self.database.labels(rows),
            ids=[ids[first : first + self.k] for first in range(0, len(ids), self.k)],
        )

    def surface(self, knowledge: Knowledge = Knowledge.WHITE, **options: Any) -> RetrievalSurface:
        """What an attacker who knows this much can hold in his hands; options and errors as for
        :func:`~nndefense.defenses.surface.retrieval_surface`.
        """
        return retrieval_surface(self, knowledge, **options)

    def _neighbors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        check_images(images, channels=self.classifier.input_shape[0])
        self.classifier.check_shape(images.shape)
        return self.database.search(self.extractor(images), self.k)

    def _weights(self, rows: Tensor) -> Tensor:
        return self.database.weights(rows, self.weighting, power=self.power, terms=self.terms)

    def _log_probabilities(self, rows: Tensor) -> Tensor:
        probabilities = combine(self.database.posteriors(rows).float(), self._weights(rows))
        return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
