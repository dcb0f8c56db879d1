"""What an attacker of RA-CNN differentiates: retrieval fresh, held, or relaxed; and its rows as a retrieval surface.

The attention can only move P(x) inside the hull of the neighbours. Where these are all of the right class, no weights
over them change the answer, and an attack that takes them for constants seems to fail: what decides is who is
retrieved. So the strong attacks are those that differentiate the choice (after the advice of Tramer et al., NeurIPS
2020, to attack a defence's decisive part).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from nndefense.attacks.retrieval import Knowledge, RetrievalSurface, Rows, relaxation
from nndefense.database import ImageDatabase
from nndefense.database.exact_search import ExactSearch
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.models.architectures.attentive import AttentiveNet
from nndefense.models.racnn import RowTable

RETRIEVALS = ("straight-through", "soft", "fresh", "held")
_PIECE = 4096


class Attending(Protocol):
    """What an attacker looks for in :class:`~nndefense.defenses.racnn.RaCnnDefense`, which describes its parts."""

    database: ImageDatabase
    net: Classifier
    table: RowTable
    attentive: AttentiveNet
    k: int

    def __call__(self, images: Tensor, /) -> Tensor: ...
    def retrieve(self, images: Tensor) -> tuple[Tensor, Tensor]: ...
    def vectors(self, images: Tensor) -> Tensor: ...
    def neighbors(self, rows: Tensor, like: Tensor) -> Tensor: ...
    def answer(self, images: Tensor, neighbors: Tensor) -> Tensor: ...


class FreshRetrieval(nn.Module):
    """Neighbours are retrieved at every call and taken for constants; the gradient flows through the attention."""

    def __init__(self, defense: Attending) -> None:
        super().__init__()
        self.defense = defense
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W -> log-probabilities N x C."""
        _, rows = self.defense.retrieve(images.detach())
        return self.defense.answer(images, self.defense.neighbors(rows, images)).log_softmax(1)


class HeldRetrieval(nn.Module):
    """The neighbours of some images are found once and kept, as by an attacker who cannot see the retrieval."""

    def __init__(self, defense: Attending, images: Tensor) -> None:
        super().__init__()
        self.defense = defense
        self.held = defense.neighbors(defense.retrieve(images)[1], images)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W, made from the held ones and in their order -> log-probabilities N x C.

        Raises:
            InputError: another number of images.
        """
        if len(images) != len(self.held):
            raise InputError(
                f"the neighbours of {len(self.held)} images are held, but {len(images)} were given: "
                "make an attack model for each batch, and attack it without restarts"
            )
        return self.defense.answer(images, self.held.to(images)).log_softmax(1)


class SoftRetrieval(nn.Module):
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
        defense: Attending,
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
        self.rows = racnn_surface(defense).need_rows("the soft top-K")
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


def racnn_surface(
    defense: Attending, knowledge: Knowledge = Knowledge.WHITE, *, images: ImageDataset | None = None
) -> RetrievalSurface:
    """RA-CNN for the attacks on retrieval: each row counts as what g says of it alone, and all rows alike.

    So the attacks steer by a defence without attention, which is what an image retrieves; ``predict``, which has the
    last word, is RA-CNN itself.

    Args:
        defense: the defence.
        knowledge: WHITE: everything; GRAY: the net without its retrieval. The levels between are not offered.
        images: a data set in which every row's id is found, so that attacks can begin on the way to them.

    Raises:
        InputError: another level.
    """
    knowledge = Knowledge(knowledge)
    if knowledge is Knowledge.GRAY:
        return RetrievalSurface(knowledge, defense, defense.k, classify=defense.net)
    if knowledge is not Knowledge.WHITE:
        raise InputError(f"RA-CNN's surface is made at L0 or L3, not at {knowledge.value}")
    posteriors, database = _alone(defense), defense.database
    vectors = database.features(database.row_numbers).to(defense.net.device)
    search = ExactSearch(vectors, posteriors.argmax(1))

    def pictures(rows: Tensor) -> Tensor:
        assert images is not None
        found, _ = images.batch([images.index_of(item) for item in database.ids(rows.cpu())])
        return found.to(rows.device)

    return RetrievalSurface(
        knowledge,
        defense,
        defense.k,
        classify=defense.net,
        features=defense.vectors,
        rows=Rows(
            count=len(search),
            nearest=lambda features, m, *, of=None, but=None: search.search(features, m, of=of, but=but),
            vectors=lambda rows: vectors[rows],
            posteriors=lambda rows: posteriors[rows],
            weights=lambda rows: torch.ones(rows.shape, device=rows.device),
            images=None if images is None else pictures,
        ),
    )


@torch.no_grad()
def _alone(defense: Attending) -> Tensor:
    """softmax g(phi(x'_j)) of every row, n x C."""
    like = defense.net.mean
    parts = torch.split(torch.arange(len(defense.table)), _PIECE)
    return torch.cat([defense.attentive.g(defense.neighbors(rows, like)).softmax(1) for rows in parts])
