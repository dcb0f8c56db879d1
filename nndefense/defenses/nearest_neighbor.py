"""The nearest-neighbour defence: classify the images that lie next to the input, not the input itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.retrieval import Knowledge, RetrievalSurface
from nndefense.database import ImageDatabase, Rule
from nndefense.database.rule import DEFAULT_WEIGHTING, Ruled
from nndefense.database.weighting import CBW_D_POWER, CBW_D_TERMS
from nndefense.defenses.calibration import Calibration, calibrate
from nndefense.defenses.stored import default_k, open_stored
from nndefense.defenses.surface import retrieval_surface
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
        weights: N x K, each neighbour's share of the neighbours' vote, the kernel included; every row sums to 1.
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


class NearestNeighborDefense(Ruled, EvaluationOnly):
    """Project an image on its K nearest neighbours and average what the classifier says of them.

    ``p(x) = sum_k w_k s_k / sum_k w_k``, where s_k is the posterior and w_k the weight of the k-th nearest row by
    Euclidean distance of deep features (Dubey et al. 2019, section 3). The input's own posterior is not used.
    Posteriors and weights are stored in the database, so a prediction costs one forward pass up to the feature
    layer and one search. The :class:`~nndefense.database.Rule` can have more to it: votes of true labels, a kernel of
    the distances, and a share of the classifier's own posterior (then the forward pass is a whole one).

    Called, it carries no gradient: attack its :meth:`surface`. Without a kernel or a share of the classifier the output
    is piecewise constant in the pixels.

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
        votes: str = "posteriors",
        temperature: float | None = None,
        alpha: float = 0.0,
    ) -> None:
        """
        Args:
            classifier: the classifier that the database was made with.
            database: where neighbours are found.
            k: number of neighbours, 1 to the number of rows; by default 50, or all rows where there are fewer.
            weighting, power, terms, votes, temperature, alpha: of the :class:`~nndefense.database.Rule`.

        Raises:
            DatabaseError: the database was made with another classifier.
            InputError: a rule that cannot be used, or not with this database.
        """
        super().__init__()
        k = default_k(len(database)) if k is None else k
        self.rule = Rule.fitting(database, k, weighting, power, terms, votes, temperature, alpha)
        self.classifier, self.database = unwrapped(classifier), database
        self.extractor = database.extractor(self.classifier)
        self.eval()

    @classmethod
    def open(
        cls, folder: str | Path, classifier: str | Path | Classifier | None = None, **options: Any
    ) -> NearestNeighborDefense:
        """The defence of a database's folder, with its classifier and the rule that is stored there.

        Args:
            folder: of the database.
            classifier: the classifier or where it comes from. None: the one that the database names, unless that is
                Python code, which runs only if you name it.
            **options: ``k``, ``weighting``, ``votes``, ``temperature``, ``alpha``, ``device``, ``classes``,
                ``input_shape`` and ``verify``, and errors, as for
                :func:`~nndefense.defenses.stored.open_stored`.
        """
        found = open_stored(folder, classifier, **options)
        return cls(found.classifier, found.database, **found.rule.to_json())

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
        """Choose layer, pooling and rule on held-out images.

        Args:
            classifier: what the defence is for.
            candidates: a database for each layer and pooling.
            clean, attacked: the held-out images N x C x H x W in [0, 1], and the same under an attack.
            labels: their class numbers, N.
            **options: those of :func:`calibrate`, and its errors.

        Returns:
            The defence with the chosen setting, and the table that it was chosen from.
        """
        calibration = calibrate(classifier, candidates, clean, attacked, labels, **options)
        rule = calibration.chosen.rule.to_json()
        return cls(classifier, candidates[calibration.candidate], **rule), calibration

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes, on the images' device.

        Raises:
            InputError: images that are not finite, not in [0, 1] or of the wrong shape.
        """
        found = self._decided(images)[0]
        return found.to(images.device)

    @torch.no_grad()
    def explain(self, images: Tensor) -> Explanation:
        """The prediction for images N x C x H x W in [0, 1] with the neighbours that it rests on; errors as for
        :meth:`forward`.
        """
        log_probabilities, distances, rows, weights = self._decided(images)
        ids = self.database.ids(rows)
        return Explanation(
            log_probabilities=log_probabilities,
            rows=rows,
            distances=distances,
            weights=self.rule.shares(weights, distances),
            posteriors=self.database.posteriors(rows).float(),
            labels=self.database.labels(rows),
            ids=[ids[first : first + self.k] for first in range(0, len(ids), self.k)],
        )

    def surface(self, knowledge: Knowledge = Knowledge.WHITE, **options: Any) -> RetrievalSurface:
        """What an attacker can hold in his hands.

        Args:
            knowledge: how much he knows; by default everything.
            **options: ``images``, ``own_images``, ``overlap`` and whatever else
                :func:`~nndefense.defenses.surface.retrieval_surface` takes, and its errors.
        """
        return retrieval_surface(self, knowledge, **options)

    def _decided(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities N x C, and distances, rows and weights of the neighbours, N x K each."""
        check_images(images, channels=self.classifier.input_shape[0])
        self.classifier.check_shape(images.shape)
        if self.rule.alpha:
            vectors, logits = self.extractor.with_answer(images)
            own = logits.float().softmax(1).cpu()
        else:
            vectors, own = self.extractor(images), None
        distances, rows = self.database.search(vectors, self.k)
        votes, weights = self.rule.voters(self.database, rows)
        probabilities = self.rule.probabilities(votes, weights, distances, own)
        return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log(), distances, rows, weights
