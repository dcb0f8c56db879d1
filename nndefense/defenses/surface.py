"""The attack surface that the nearest-neighbour defence declares for itself, at each level of knowledge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nndefense.attacks.retrieval import Knowledge, RetrievalSurface, Rows, relaxation
from nndefense.database import ImageDatabase, Rule
from nndefense.database.exact_search import ExactSearch
from nndefense.database.rule import label_votes
from nndefense.database.weighting import neighbor_weights
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.features import FeatureExtractor
from nndefense.images import check_images
from nndefense.models import Classifier
from nndefense.modes import EvaluationOnly, evaluating, outside_inference_mode

_PIECE = 256


class NeighborSearch(Protocol):
    """What an attacker looks for in a defence: :class:`~nndefense.defenses.NearestNeighborDefense` and its settings."""

    classifier: Classifier
    database: ImageDatabase
    extractor: FeatureExtractor
    rule: Rule

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes."""


@outside_inference_mode
def retrieval_surface(
    defense: NeighborSearch,
    knowledge: Knowledge = Knowledge.WHITE,
    *,
    overlap: float | None = None,
    images: ImageDataset | Tensor | None = None,
    own_images: Tensor | None = None,
    seed: int = 0,
) -> RetrievalSurface:
    """What an attacker of this defence can hold in his hands.

    The attacker's rows are held in memory on the classifier's device, n x (d + C + 2) numbers, and searched exactly
    whatever the defence's own index is; ``predict`` is the defence itself.

    Args:
        defense: the defence.
        knowledge: GRAY: the classifier alone; FEATURES: also the feature, K and weighting, and rows made from
            ``own_images``; PARTIAL: also a random ``overlap`` of the rows; WHITE: all rows.
        overlap: PARTIAL only: the share of the defender's rows that the attacker holds, 0 to 1.
        images: the images of the defender's rows, so that attacks can begin on the way to them: a data set in which
            every row's id is found, or a tensor with one image per row of the whole database.
        own_images: FEATURES and PARTIAL: images of the attacker's, N x C x H x W in [0, 1]; they fill the places of the
            rows that he does not know, as many as there are.
        seed: draws which rows he knows.

    Raises:
        InputError: settings that do not go together, or images that cannot be used.
        DataError: (when an attack asks) a row whose id is not in the data set.
    """
    knowledge = Knowledge(knowledge)
    if (overlap is None) == (knowledge is Knowledge.PARTIAL):
        raise InputError("give an overlap at L2, and only there: the share of the rows that the attacker knows")
    if overlap is not None and not 0 <= overlap <= 1:
        raise InputError(f"the overlap is {overlap}, but must be from 0 to 1")
    if own_images is not None and knowledge in (Knowledge.GRAY, Knowledge.WHITE):
        raise InputError(f"images of the attacker's own add nothing at {knowledge.value}: leave them out")
    if knowledge is Knowledge.GRAY:
        return RetrievalSurface(knowledge, defense, defense.rule.k, classify=defense.classifier)
    share = {Knowledge.FEATURES: 0.0, Knowledge.WHITE: 1.0}.get(knowledge, overlap or 0.0)
    rows = _rows(defense, share, images, own_images, seed)
    return RetrievalSurface(
        knowledge,
        defense,
        defense.rule.k,
        classify=defense.classifier,
        features=defense.extractor,
        rows=rows,
        alpha=defense.rule.alpha,
    )


def _rows(
    defense: NeighborSearch,
    share: float,
    images: ImageDataset | Tensor | None,
    own_images: Tensor | None,
    seed: int,
) -> Rows | None:
    """The attacker's rows, or None where he has none."""
    database, device, rule = defense.database, defense.classifier.device, defense.rule
    every = database.row_numbers
    known = round(share * len(every))
    if known < len(every):
        every = np.sort(np.random.default_rng(seed).permutation(every)[:known])
    vectors = database.features(every).float()
    votes, weights = rule.voters(database, every)
    mine = None
    if own_images is not None:
        mine = own_images[: len(database) - known]
        extra_vectors, more = _describe(defense, mine)
        extra = neighbor_weights(more, rule.weighting, power=rule.power, terms=rule.terms)
        if rule.votes == "labels":
            # Of his own images the classifier's class is the label that he has.
            more, extra = label_votes(more.argmax(1), extra, more.shape[1])
        vectors, votes, weights = (
            torch.cat([vectors, extra_vectors]),
            torch.cat([votes, more]),
            torch.cat([weights, extra]),
        )
    if not len(vectors):
        return None
    vectors, votes, weights = vectors.to(device), votes.to(device), weights.to(device)
    # Rows that do not vote are of no class.
    silent = (weights <= 0) if rule.votes == "labels" else torch.zeros_like(weights, dtype=torch.bool)
    search = ExactSearch(vectors, votes.argmax(1).masked_fill(silent, -1))
    return Rows(
        count=len(vectors),
        nearest=lambda features, m, *, of=None, but=None: search.search(features, m, of=of, but=but),
        vectors=lambda rows: vectors[rows],
        posteriors=lambda rows: votes[rows],
        weights=lambda rows: weights[rows],
        images=_row_images(defense, every, images, mine),
        overlap=known / len(database),
        temperature=rule.temperature,
    )


@torch.no_grad()
def _describe(defense: NeighborSearch, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and posteriors of the attacker's own images, made as the defender makes his."""
    check_images(images, channels=defense.classifier.input_shape[0], name="the attacker's own images")
    device = defense.classifier.device
    parts = [part.to(device) for part in torch.split(images, _PIECE)]
    features = torch.cat([defense.extractor(part).cpu() for part in parts])
    with evaluating(defense.classifier):
        return features, torch.cat([defense.classifier(part).softmax(1).cpu() for part in parts])


def _row_images(
    defense: NeighborSearch,
    known: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    images: ImageDataset | Tensor | None,
    mine: Tensor | None,
) -> Callable[[Tensor], Tensor] | None:
    """The function from the attacker's row numbers to images, or None where some rows have none."""
    if images is None and (len(known) or mine is None):
        return None
    if isinstance(images, Tensor):
        check_images(images, channels=defense.classifier.input_shape[0], name="the rows' images")
        if len(images) != defense.database.manifest.rows:
            raise InputError(
                f"{len(images)} images were given for {defense.database.manifest.rows} rows: give one for each"
            )

    def fetch(rows: Tensor) -> Tensor:
        numbers = rows.detach().cpu().numpy()
        out: list[Tensor | None] = [None] * len(numbers)
        theirs = np.flatnonzero(numbers < len(known))
        if len(theirs):
            wanted = known[numbers[theirs]]
            if isinstance(images, Tensor):
                found = images[torch.from_numpy(wanted)]
            else:
                assert images is not None
                found = images.batch([images.index_of(item) for item in defense.database.ids(wanted)])[0]
            for place, image in zip(theirs, found, strict=True):
                out[place] = image
        for place in np.flatnonzero(numbers >= len(known)):
            assert mine is not None
            out[place] = mine[numbers[place] - len(known)]
        return torch.stack([image for image in out if image is not None]).to(rows.device)

    return fetch


class RelaxedDefense(EvaluationOnly):
    """The defence with a soft top-K in place of the hard one, for any gradient attack: images -> log-probabilities.

    ``mode`` soft is the soft top-K R1 of :mod:`~nndefense.attacks.retrieval.relaxation`; straight-through (R3) gives
    the true pipeline's own answer with R1's gradient. The temperature is fixed for a call; set ``temperature`` between
    calls to anneal it.

    The rows around an image are retrieved again at every ``refresh``-th call, or as soon as a batch is of another
    length or an image's feature has left the ball that its rows span, so that another batch is never answered from
    this one's rows.
    """

    def __init__(
        self,
        surface: RetrievalSurface,
        *,
        mode: str = "soft",
        temperature: float = 0.2,
        m: int | None = None,
        others: int = 32,
        refresh: int = 1,
    ) -> None:
        """
        Args:
            surface: with rows (L1 with own images, L2 or L3).
            mode: ``soft`` or ``straight-through``.
            temperature: T as a multiple of each neighbourhood's spread, above 0.
            m: nearest rows looked at, default 4K and at least 32.
            others: rows of other predicted classes looked at besides; they need the class that the image is first
                predicted as, which is taken as the one to leave.
            refresh: calls between two retrievals, at least 1.

        Raises:
            InputError: settings that cannot be used, or a surface without rows.
        """
        super().__init__()
        if mode not in ("soft", "straight-through"):
            raise InputError(f"mode is {mode!r}, but must be soft or straight-through")
        if not temperature > 0 or refresh < 1:
            raise InputError("a relaxation needs a temperature above 0 and a refresh of at least 1")
        self.rows, self.features = surface.need_rows("the relaxation"), surface.need_features("the relaxation")
        self.predict, self.k, self.mode, self.temperature = surface.predict, surface.k, mode, temperature
        self.alpha = surface.alpha
        self.classify = surface.need_classifier("the relaxation") if surface.alpha else None
        self.m, self.others, self.refresh = max(4 * surface.k, 32) if m is None else m, others, refresh
        self._hood: relaxation.Neighborhood | None = None
        self._center, self._reach, self._calls = torch.zeros(0, 0), torch.zeros(0), 0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes, with a gradient to the images."""
        features = self.features(images)
        hood = self._around(features.detach())
        soft = relaxation.soft_log_probabilities(hood, features, self.k, self.temperature)
        if self.alpha:
            assert self.classify is not None
            soft = relaxation.mixed(soft, self.classify(images).log_softmax(1), self.alpha)
        if self.mode == "soft":
            return soft
        return relaxation.straight_through(self.predict(images.detach()).to(soft), soft)

    @torch.no_grad()
    def _around(self, features: Tensor) -> relaxation.Neighborhood:
        hood, self._calls = self._hood, self._calls + 1
        if hood is not None and self._calls < self.refresh and features.shape == self._center.shape:
            moved = (features - self._center).norm(dim=1)
            if bool((moved <= self._reach).all()):
                return hood
        _, nearest = self.rows.nearest(features, min(self.k, self.rows.count))
        own = self.rows.posteriors(nearest).mean(1).argmax(1)
        hood = relaxation.retrieve(self.rows, features, own, self.k, m=self.m, others=self.others)
        self._hood, self._center, self._calls = hood, features, 0
        filled = hood.distances(features)[:, : min(max(self.m, self.k + 1), self.rows.count)]
        self._reach = filled.amax(1)
        return hood
