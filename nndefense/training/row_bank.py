"""The embeddings of all rows that a training by retrieval looks for neighbours among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nndefense.models import Classifier
from nndefense.modes import evaluating
from nndefense.training.batch import BankRows
from nndefense.training.batches import DeviceImages
from nndefense.training.kernel_retrieval import KernelRetrieval, embedded, embeddings
from nndefense.training.launcher import Team
from nndefense.training.random_state import kept

_BATCH = 256
_VECTORS = "bank.vectors"


class RowBank:
    """M embeddings, the same in every process: the labelled images', then a pool's, without augmentation.

    They are those of the weights at the last refresh, and so a part of every checkpoint between two.

    Args:
        classifier: the net that is trained.
        sets: labelled images, then perhaps a pool.
        labels: class numbers or pseudo-labels of each.
        team: who shares the work.
        neighbors, votes: of the objective.

    Raises:
        InputError: the classifier has no embedding.
    """

    def __init__(
        self,
        classifier: Classifier,
        sets: Sequence[DeviceImages],
        labels: Sequence[Tensor],
        team: Team,
        *,
        neighbors: int,
        votes: str,
    ) -> None:
        net = embedded(classifier)
        self.sets, self.team, self.neighbors, self.votes = sets, team, neighbors, votes
        numbers = torch.cat(list(labels))
        self.rows = BankRows(torch.zeros(len(numbers), net.embedding.out_features, device=team.device), numbers)

    def refresh(self, classifier: Classifier) -> None:
        """Compute all rows anew."""
        self.rows.vectors.copy_(self._embedded(classifier))

    def answers(self, classifier: Classifier) -> KernelRetrieval:
        """What the retrieval with these weights answers to images that are no rows; rows are computed anew for it."""
        rows = BankRows(self._embedded(classifier), self.rows.labels)
        return KernelRetrieval(classifier, rows, self.neighbors, self.votes)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {_VECTORS: self.rows.vectors}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint, if it was between two refreshes."""
        if _VECTORS in tensors:
            self.rows.vectors.copy_(tensors[_VECTORS])

    @torch.no_grad()
    def _embedded(self, classifier: Classifier) -> Tensor:
        found, start = torch.zeros_like(self.rows.vectors), 0
        with evaluating(classifier), kept(self.team.device):
            for images in self.sets:
                for rows in torch.split(self.team.share(torch.arange(len(images))), _BATCH):
                    found[rows + start] = embeddings(classifier, images.fetch(rows)).to(found.dtype)
                start += len(images)
        # Each process has left the others' rows 0.
        return self.team.sum(found)
