"""RA-CNN (Zhao and Cho, CVPR 2019): classify an image's projection into the convex hull of its neighbours' features.

What its attacker differentiates: retrieval fresh, held, or relaxed; and its rows as a retrieval surface. The attention
can only move P(x) inside the hull of the neighbours. Where these are all of the right class, no weights over them
change the answer, and an attack that takes them for constants seems to fail: what decides is who is retrieved. So the
strong attacks are those that differentiate the choice (after the advice of Tramer et al., NeurIPS 2020, to attack a
defence's decisive part).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.attacks.checks import at_least
from nndefense.attacks.retrieval import Knowledge, RetrievalSurface, Rows, relaxation
from nndefense.database import ImageDatabase
from nndefense.database.exact_search import ExactSearch
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, InputError, ModelError, check_choice
from nndefense.images import check_images
from nndefense.models import Classifier
from nndefense.models.racnn import RaCnn, features_of, load_racnn
from nndefense.modes import EvaluationOnly, evaluating

RETRIEVALS = ("straight-through", "soft", "fresh", "held")
_PIECE = 4096


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


class RaCnnDefense(EvaluationOnly):
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
        self.k = at_least("k", racnn.k if k is None else k)
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
        """The defence of a ``folder`` that ``nndefense racnn train`` wrote; ``classifier``, ``database``, ``k`` and
        errors are those of the class, other errors those of :func:`~nndefense.models.racnn.load_racnn`.
        """
        return cls(classifier, database, load_racnn(folder, device=classifier.device), k=k)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes, on the images' device.

        Raises:
            InputError: images that are not finite, not in [0, 1] or of the wrong shape.
        """
        images = self.checked(images)
        _, rows = self.retrieve(images)
        return self.answer(images, self.neighbors(rows, images)).log_softmax(1)

    @torch.no_grad()
    def explain(self, images: Tensor) -> Projection:
        """The prediction for images N x C x H x W with the neighbours and weights that it rests on."""
        images = self.checked(images)
        distances, rows = self.retrieve(images)
        neighbors = self.neighbors(rows, images)
        with evaluating(self.net):
            weights = self.attentive.attention(features_of(self.net, images), neighbors)
            projections = torch.einsum("nk,nkd->nd", weights, neighbors)
            log_probabilities = self.attentive.g(projections).log_softmax(1)
        ids = self.database.ids(rows)
        return Projection(
            log_probabilities=log_probabilities,
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
                  :class:`SoftRetrieval`.
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
        check_choice("retrieval", retrieval, RETRIEVALS)
        if (held is None) == (retrieval == "held"):
            raise InputError("images whose neighbours are held go with retrieval='held', and only with it")
        if held is not None:
            held = self.checked(held)
        if retrieval in ("fresh", "held"):
            return ConstantRetrieval(self, held)
        return SoftRetrieval(self, temperature=temperature, hard=retrieval == "straight-through")

    def surface(
        self, knowledge: Knowledge = Knowledge.WHITE, *, images: ImageDataset | None = None
    ) -> RetrievalSurface:
        """RA-CNN for the attacks on retrieval: each row counts as what g says of it alone, and all rows alike.

        So the attacks steer by a defence without attention, which is what an image retrieves; ``predict``, which has
        the last word, is RA-CNN itself.

        Args:
            knowledge: WHITE: everything; GRAY: the net without its retrieval. The levels between are not offered.
            images: a data set in which every row's id is found, so that attacks can begin on the way to them.

        Raises:
            InputError: another level.
        """
        knowledge = Knowledge(knowledge)
        if knowledge is Knowledge.GRAY:
            return RetrievalSurface(knowledge, self, self.k, classify=self.net)
        if knowledge is not Knowledge.WHITE:
            raise InputError(f"RA-CNN's surface is made at L0 or L3, not at {knowledge.value}")
        posteriors, database = _alone(self), self.database
        vectors = database.features(database.row_numbers).to(self.net.device)
        search = ExactSearch(vectors, posteriors.argmax(1))

        def pictures(rows: Tensor) -> Tensor:
            assert images is not None
            found, _ = images.batch([images.index_of(item) for item in database.ids(rows.cpu())])
            return found.to(rows.device)

        return RetrievalSurface(
            knowledge,
            self,
            self.k,
            classify=self.net,
            features=self.vectors,
            rows=Rows(
                count=len(search),
                nearest=lambda features, m, *, of=None, but=None: search.search(features, m, of=of, but=but),
                vectors=lambda rows: vectors[rows],
                posteriors=lambda rows: posteriors[rows],
                weights=lambda rows: torch.ones(rows.shape, device=rows.device),
                images=None if images is None else pictures,
            ),
        )

    # -- its parts, for the attack surfaces ---------------------------------------------------------------------------

    def checked(self, images: Tensor) -> Tensor:
        """The images in the net's type; raises :class:`InputError` for images that the defence does not take."""
        check_images(images, channels=self.classifier.input_shape[0])
        self.classifier.check_shape(images.shape)
        return images.to(self.classifier.mean.dtype)

    @torch.no_grad()
    def retrieve(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distances and row numbers of the K rows nearest to ``images``, N x K each, on the CPU."""
        return self.database.search(self.vectors(images), self.k)

    def vectors(self, images: Tensor) -> Tensor:
        """phi'(x), what is searched for: N x D, differentiable in the images."""
        found: Tensor = self.extractor(images.to(self.classifier.mean.dtype))
        return found

    def neighbors(self, rows: Tensor, like: Tensor) -> Tensor:
        """phi(x'_j) of rows, of any shape: ``rows.shape`` x d, of the type and on the device of ``like``."""
        return self.table.take(rows).to(like)

    def answer(self, images: Tensor, neighbors: Tensor) -> Tensor:
        """g(P(x)): images and their ``neighbors``' features N x K x d -> logits N x C, differentiable in the images."""
        with evaluating(self.net):
            return self.attentive.answer(features_of(self.net, images), neighbors)

    def settings(self) -> dict[str, Any]:
        """What identifies the defence, for a record."""
        return {"k": self.k, "net": self.net.fingerprint, "database": self.database.fingerprint}


class ConstantRetrieval(EvaluationOnly):
    """Neighbours are taken for constants, so that the gradient flows through the attention alone.

    They are retrieved at every call; or, of the images ``held``, once, and then kept for what becomes of these images
    in their order, as by an attacker who cannot see the retrieval.
    """

    def __init__(self, defense: RaCnnDefense, held: Tensor | None = None) -> None:
        super().__init__()
        self.defense = defense
        self.held = None if held is None else defense.neighbors(defense.retrieve(held)[1], held)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W -> log-probabilities N x C.

        Raises:
            InputError: another number of images than are held.
        """
        if self.held is None:
            neighbors = self.defense.neighbors(self.defense.retrieve(images.detach())[1], images)
        elif len(images) == len(self.held):
            neighbors = self.held.to(images)
        else:
            raise InputError(
                f"the neighbours of {len(self.held)} images are held, but {len(images)} were given: "
                "make an attack model for each batch, and attack it without restarts"
            )
        return self.defense.answer(images, neighbors).log_softmax(1)


class SoftRetrieval(EvaluationOnly):
    """Who is retrieved gets a gradient: the soft top-K of :mod:`~nndefense.attacks.retrieval.relaxation`.

    ``log p_c = log sum_j a_j q_jc`` with q_j = softmax g(phi(x'_j)), what g says of row j alone, and memberships
    ``a_j ~ sigmoid((tau - d_j) / T)`` by the distances of the retrieval features, over the m nearest rows and the
    nearest of other classes. The mixture of answers stands for the answer to a mixture, which is what local mixup
    trains g to make equal. The attention is left out of it on purpose: phi gives a row of another class a weight so
    small that no gradient is left to draw it in (in a trial on 98 digits, at 0.2 in l_inf with 20 steps, 53 % withstood
    this attack, and 91 % the same one with the attention as a factor of a_j).

    With ``hard`` the value is the defence's own, and the gradient that through the attention plus that of the soft
    top-K (straight-through): it brings rows in, and then follows how they are attended to.

    The retrieval features of all rows are held in memory on the classifier's device, n x D numbers, and searched
    exactly whatever the database's index is.
    """

    def __init__(
        self,
        defense: RaCnnDefense,
        *,
        temperature: float = 0.3,
        hard: bool = False,
        m: int | None = None,
        others: int = 32,
    ) -> None:
        """
        Args:
            defense: the defence.
            temperature: T as a multiple of the neighbourhood's spread, above 0.
            hard: give the defence's own value.
            m: nearest rows looked at, more than K; by default 4K and at least 32.
            others: rows looked at besides, that g alone takes for another class than the image is given.

        Raises:
            InputError: settings that cannot be used.
        """
        super().__init__()
        if not temperature > 0:
            raise InputError(f"the temperature is {temperature}, but must be above 0")
        m = max(4 * defense.k, 32) if m is None else m
        if m <= defense.k or others < 0:
            raise InputError(f"m is {m} and others {others}, but m must be above K = {defense.k} and others at least 0")
        self.defense, self.temperature, self.hard, self.m, self.others = defense, temperature, hard, m, others
        self.rows = defense.surface().need_rows("the soft top-K")
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W -> log-probabilities N x C."""
        defense = self.defense
        features = defense.vectors(images)
        # The same rows: an exact index's are found faster among those that are held here.
        search = self.rows.nearest if defense.database.exact else defense.database.search
        _, rows = search(features.detach(), defense.k)
        own = defense.answer(images, defense.neighbors(rows, images)).log_softmax(1)
        hood = relaxation.retrieve(
            self.rows, features.detach(), own.detach().argmax(1), defense.k, m=self.m, others=self.others
        )
        soft = relaxation.soft_log_probabilities(hood, features, defense.k, self.temperature).to(own)
        return own + (soft - soft.detach()) if self.hard else soft


@torch.no_grad()
def _alone(defense: RaCnnDefense) -> Tensor:
    """softmax g(phi(x'_j)) of every row, n x C."""
    like = defense.net.mean
    parts = torch.split(torch.arange(len(defense.table)), _PIECE)
    with evaluating(defense.net):
        return torch.cat([defense.attentive.g(defense.neighbors(rows, like)).softmax(1) for rows in parts])
