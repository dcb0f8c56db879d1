"""RA-CNN (Zhao and Cho, CVPR 2019): classify an image's projection into the convex hull of its neighbours' features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.attacks.checks import at_least
from nndefense.attacks.retrieval import Knowledge, RetrievalSurface
from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.defenses.racnn_attacks import RETRIEVALS, FreshRetrieval, HeldRetrieval, SoftRetrieval, racnn_surface
from nndefense.errors import DatabaseError, InputError, ModelError
from nndefense.images import check_images
from nndefense.models import Classifier
from nndefense.models.racnn import RaCnn, features_of, load_racnn


@dataclass(frozen=True)
class Projection:
    """What RA-CNN made of N images with K neighbours each, nearest first.

    Attributes:
        log_probabilities: N x C, the defence's output.
        projections: N x d, P(x) = sum_k a_k phi(x'_k).
        rows: N x K, row numbers in the database (int64).
        distances: N x K, Euclidean distances between the retrieval features.
        weights: N x K, the attention a; above 0, every row sums to 1.
        features: N x K x d, phi(x'_k).
        labels: N x K, the neighbours' labels as class numbers, -1 where unknown.
        ids: N lists of K ids.
    """

    log_probabilities: Tensor
    projections: Tensor
    rows: Tensor
    distances: Tensor
    weights: Tensor
    features: Tensor
    labels: Tensor
    ids: Sequence[Sequence[str]]


class RaCnnDefense(nn.Module):
    """Retrieve K neighbours by fixed features phi', attend to them by trained features phi, classify the projection.

    ``b_k = phi(x'_k)^T U phi(x)``, ``a = softmax(b)``, ``P(x) = sum_k a_k phi(x'_k)``, output g(P(x)). A prediction
    costs one forward pass up to the retrieval features, a search, one pass through phi, and a look-up of phi(x'_k),
    which stand in a table.

    Which neighbours are retrieved has no gradient; how they are attended to has. The output of :meth:`forward` carries
    none at all: attack :meth:`attack_model`, or :meth:`surface`.
    """

    def __init__(self, classifier: Classifier, database: ImageDatabase, racnn: RaCnn, *, k: int | None = None) -> None:
        """
        Args:
            classifier: the one that the database was made with; only its features are used.
            database: the one that RA-CNN was trained with, whole.
            racnn: as :func:`nndefense.training.racnn.train_racnn` or :func:`nndefense.models.racnn.load_racnn` gave it;
                its net is moved to the classifier's device.
            k: neighbours, 1 to the number of rows; by default as in training.

        Raises:
            DatabaseError: the database was made with another classifier, or is not the one of the training.
            InputError: k cannot be used.
            ModelError: the nets have other classes or take other images.
        """
        super().__init__()
        made = racnn.database["fingerprint"]
        if database.fingerprint != made or len(database) != len(racnn.table):
            raise DatabaseError(
                f"{database.path} ({database.fingerprint[:12]}, {len(database):,} rows) is not the database that the "
                f"RA-CNN was trained with ({made[:12]}, {len(racnn.table):,} rows): give that one, or train again"
            )
        if racnn.net.classes != tuple(classifier.classes) or racnn.net.input_shape[0] != classifier.input_shape[0]:
            raise ModelError("the RA-CNN has other classes or takes other images than the classifier: train it again")
        self.k = racnn.k if k is None else k
        at_least("k", self.k)
        if self.k > len(database):
            raise InputError(f"k is {self.k}, but must be from 1 to the database's {len(database):,} rows: lower k")
        self.classifier, self.database, self.table = classifier, database, racnn.table
        self.extractor = database.extractor(classifier)
        self.net = racnn.net.to(classifier.device)
        self.attentive = racnn.attentive
        self.eval()

    @classmethod
    def load(
        cls, folder: str | Path, classifier: Classifier, database: ImageDatabase, *, k: int | None = None
    ) -> RaCnnDefense:
        """The defence of a folder that ``nndefense racnn train`` wrote; errors as for the class and
        :func:`~nndefense.models.racnn.load_racnn`.
        """
        return cls(classifier, database, load_racnn(folder, device=classifier.device), k=k)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes, on the images' device.

        Raises:
            InputError: images that are not finite, not in [0, 1] or of the wrong shape.
        """
        self.check(images)
        _, rows = self.retrieve(images)
        return self.answer(images, self.neighbors(rows, images)).log_softmax(1)

    @torch.no_grad()
    def explain(self, images: Tensor) -> Projection:
        """The prediction for images N x C x H x W with the neighbours and weights that it rests on."""
        self.check(images)
        distances, rows = self.retrieve(images)
        neighbors = self.neighbors(rows, images)
        weights = self.attentive.attention(features_of(self.net, images), neighbors)
        projections = torch.einsum("nk,nkd->nd", weights, neighbors)
        ids = self.database.ids(rows)
        return Projection(
            log_probabilities=self.attentive.g(projections).log_softmax(1),
            projections=projections,
            rows=rows,
            distances=distances,
            weights=weights,
            features=neighbors,
            labels=self.database.labels(rows),
            ids=[ids[first : first + self.k] for first in range(0, len(ids), self.k)],
        )

    def attack_model(
        self,
        *,
        draws: int | None = None,
        generator: torch.Generator | None = None,
        retrieval: str = "straight-through",
        held: Tensor | None = None,
        temperature: float = 0.3,
    ) -> nn.Module:
        """The attack surface: images N x C x H x W -> log-probabilities N x classes, with a gradient to the images.

        Args:
            draws, generator: without effect, since nothing in the defence is random; every defence takes them.
            retrieval: what the attacker makes of the retrieval:

                * ``straight-through``: the defence's own value; the gradient flows through the attention, and through
                  a relaxation of who is retrieved. Ours, and the strongest of the four where it was measured; see
                  :class:`~nndefense.defenses.racnn_attacks.SoftRetrieval`.
                * ``soft``: value and gradient of that relaxation.
                * ``fresh``: neighbours are retrieved anew at every call, as constants; the gradient flows through the
                  attention alone. The value is the defence's own. The paper's direct attack.
                * ``held``: the neighbours of the images ``held`` are kept, whatever the attack makes of these images.
                  The paper's attacker from whom the retrieval is hidden.
            held: for ``held`` alone: images N x C x H x W; the model takes batches of these N, in their order.
            temperature: of the relaxation, above 0, in spreads of the neighbourhood.

        Raises:
            InputError: an unknown retrieval, or settings that cannot be used.
        """
        if draws is not None:
            at_least("draws", draws)
        if retrieval not in RETRIEVALS:
            raise InputError(f"retrieval is {retrieval!r}, but must be one of {', '.join(RETRIEVALS)}")
        if (held is None) == (retrieval == "held"):
            raise InputError("images whose neighbours are held go with retrieval='held', and only with it")
        if held is not None:
            self.check(held)
            return HeldRetrieval(self, held)
        if retrieval == "fresh":
            return FreshRetrieval(self)
        return SoftRetrieval(self, temperature=temperature, hard=retrieval == "straight-through")

    def surface(
        self, knowledge: Knowledge = Knowledge.WHITE, *, images: ImageDataset | None = None
    ) -> RetrievalSurface:
        """For :mod:`nndefense.attacks.retrieval`: :func:`~nndefense.defenses.racnn_attacks.racnn_surface` of this."""
        return racnn_surface(self, knowledge, images=images)

    # -- its parts, for the attack surfaces ---------------------------------------------------------------------------

    def check(self, images: Tensor) -> None:
        """Raise :class:`InputError` for images that the defence does not take."""
        check_images(images, channels=self.classifier.input_shape[0])
        self.classifier.check_shape(images.shape)

    @torch.no_grad()
    def retrieve(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distances and row numbers of the K nearest rows, N x K each, on the CPU."""
        return self.database.search(self.vectors(images), self.k)

    def vectors(self, images: Tensor) -> Tensor:
        """phi'(x), what is searched for: N x D, differentiable in the images."""
        found: Tensor = self.extractor(images.to(self.classifier.mean.dtype))
        return found

    def neighbors(self, rows: Tensor, like: Tensor) -> Tensor:
        """phi(x'_j) of rows, of any shape: ``rows.shape`` x d, of the type and on the device of ``like``."""
        return self.table.take(rows).to(like)

    def answer(self, images: Tensor, neighbors: Tensor) -> Tensor:
        """g(P(x)): images and their neighbours' features N x K x d -> logits N x C, differentiable in the images."""
        return self.attentive.answer(features_of(self.net, images), neighbors)

    def settings(self) -> dict[str, Any]:
        """What identifies the defence, for a record."""
        return {"k": self.k, "net": self.net.fingerprint, "database": self.database.fingerprint}
