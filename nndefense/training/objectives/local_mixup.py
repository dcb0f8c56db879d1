"""The objective of RA-CNN (Zhao and Cho, CVPR 2019): the right class from the neighbours' hull, and local mixup in it.

It is not in the table of objectives: it needs a database, and is put together by
:func:`nndefense.training.racnn.train_racnn`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks.checks import at_least
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.models.architectures.attentive import projected
from nndefense.models.racnn import attentive, features_of
from nndefense.training.batch import Attack, Batch, Outcome
from nndefense.training.batches import DeviceImages


def simplex_draws(
    shape: Sequence[int],
    k: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Weights over k items, uniform on the simplex: the gaps between k - 1 sorted uniforms, 0 and 1.

    This is Dirichlet(1, ..., 1). Uniforms divided by their sum are not: they crowd in the middle.

    Args:
        shape: how many draws.
        k: at least 1.
        generator, device: as for :func:`torch.rand`.

    Returns:
        ``shape`` x k, at least 0, every row summing to 1.

    Raises:
        InputError: k below 1.
    """
    at_least("k", k)
    cuts = torch.rand((*shape, k - 1), generator=generator, device=device).sort(-1).values
    ends = cuts.new_zeros((*shape, 1))
    return torch.cat([cuts, ends + 1], -1) - torch.cat([ends, cuts], -1)


def local_mixup(net: nn.Module, neighbors: Tensor, targets: Tensor, draws: int) -> Tensor:
    """``1/M sum_m CE(g(sum_k a_mk phi(x'_k)), sum_k a_mk y'_k)`` with a_m uniform on the simplex, in nats.

    Args:
        net: g, features ... x d -> logits ... x C.
        neighbors: N x K x d.
        targets: N x K x C, the neighbours' classes as distributions.
        draws: M, at least 1, for each of the N images; from torch's default generator.

    Returns:
        The mean over images and draws.
    """
    weights = simplex_draws((len(neighbors), draws), neighbors.shape[1], device=neighbors.device).to(neighbors)
    log_p = net(projected(weights, neighbors)).log_softmax(-1)
    loss: Tensor = -(projected(weights, targets.to(log_p)) * log_p).sum(-1).mean()
    return loss


class RetrievalAugmented:
    """``mean_i CE(g(P(x_i)), y_i) + weight * local mixup``, with each image's neighbours found beforehand.

    The neighbours' images go through phi in the same pass as the batch, each distinct one once, so that phi learns
    from both sides and batch normalisation sees both. The images of the batch may be augmented; their neighbours are
    those of the images as they are.
    """

    def __init__(
        self,
        neighbors: Tensor,
        images: ImageDataset,
        labels: Tensor,
        *,
        draws: int = 5,
        weight: float = 1.0,
        description: str = "",
    ) -> None:
        """
        Args:
            neighbors: N x K, for each training image its neighbours' numbers in ``images``.
            images: M images, the database's rows.
            labels: M classes of theirs, in the classifier's numbers; -1 where unknown.
            draws: of local mixup a step and image (N_MU of the paper), at least 1.
            weight: of local mixup against the cross-entropy; the paper's is unknown. 0 leaves it out.
            description: identifies the objective with all that it holds, for records.

        Raises:
            InputError: numbers that cannot be used, or, with local mixup, a neighbour without a label.
        """
        at_least("draws", draws)
        if isinstance(weight, bool) or not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of local mixup is {weight}, but must be a finite number and at least 0")
        if weight and len(neighbors) and bool((labels[torch.unique(neighbors)] < 0).any()):
            raise InputError(
                "local mixup mixes the neighbours' labels, but some rows of the database have none: build it from "
                "labelled images, or set the weight of local mixup to 0"
            )
        self.neighbors, self.labels, self.draws, self.weight = neighbors, labels, draws, weight
        self.description = description or f"ra-cnn(draws={draws}, weight={float(weight)})"
        self._dataset = images
        self._images: DeviceImages | None = None

    def __call__(self, model: nn.Module, batch: Batch, attack: Attack | None = None) -> Outcome:
        """The loss on one batch; ``attack`` is not used.

        Raises:
            InputError: a batch that does not know which images it holds.
        """
        if batch.rows is None or batch.labelled is not None:
            raise InputError("the objective ra-cnn needs batches of the training set that its neighbours were found in")
        net = attentive(_bare(model))
        near = self.neighbors.to(batch.rows.device)[batch.rows]
        distinct, place = torch.unique(near, return_inverse=True)
        pictures = self._fetch(distinct)
        found = features_of(_bare(model), torch.cat([batch.images, pictures]))
        query, neighbors = found[: len(near)], found[len(near) :][place]
        logits = net.answer(query, neighbors)
        loss = F.cross_entropy(logits, batch.labels)
        if not self.weight:
            return Outcome(loss, clean=logits.detach())
        targets = F.one_hot(self.labels.to(near.device)[near], logits.shape[1])
        mixed = local_mixup(net.g, neighbors, targets, self.draws)
        parts = {"projected_loss": loss.detach(), "mixup_loss": mixed.detach()}
        return Outcome(loss + self.weight * mixed, clean=logits.detach(), parts=parts)

    def _fetch(self, rows: Tensor) -> Tensor:
        """Images of the database: from the device where the set is small enough to be kept there, else read."""
        if self._images is None or self._images.device != rows.device:
            self._images = DeviceImages(self._dataset, rows.device)
        return self._images.at(rows) if self._images.resident is not None else self._images.fetch(rows.cpu())


def _bare(model: nn.Module) -> Classifier:
    """The classifier itself, where ``torch.compile`` has wrapped it: phi, U and g are called one by one."""
    bare = getattr(model, "_orig_mod", model)
    assert isinstance(bare, Classifier)
    return bare
