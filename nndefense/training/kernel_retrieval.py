"""Kernel nearest neighbours that can be differentiated, attacked and trained like any net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nndefense.attacks.retrieval.relaxation import log_sums
from nndefense.attacks.wrappers import adopt_mode
from nndefense.errors import InputError, check_choice
from nndefense.models import Classifier
from nndefense.models.architectures.embedded import EmbeddedNet
from nndefense.training.batch import BankRows

VOTES = ("labels", "posteriors")
#: As many neighbours as an image can have: each batch holds all of its images' at once.
MOST_ROWS = 4096
# Log of the share of the votes that a class is given at most of which no row was found.
_NONE_FOUND = -27.6
# How far apart the two likeliest classes may be in what an attack is shown, in nats.
_GAP = 5.0
# Distances that a search holds at a time.
_BLOCK = 2**23


def embedded(model: nn.Module) -> EmbeddedNet:
    """The net of a classifier of an architecture ``nn-``, perhaps compiled.

    Raises:
        InputError: it is another.
    """
    bare = _bare(model)
    if not isinstance(bare, Classifier) or not isinstance(bare.net, EmbeddedNet):
        name = bare.arch if isinstance(bare, Classifier) else type(bare).__name__
        raise InputError(
            f"{name} has no embedding to retrieve by: choose an architecture whose name begins with nn-, such as "
            "nn-small-cnn"
        )
    return bare.net


def _bare(model: nn.Module) -> nn.Module:
    bare: nn.Module = getattr(model, "_orig_mod", model)
    return bare


def embeddings(classifier: nn.Module, images: Tensor) -> Tensor:
    """``g(x)`` of images N x C x H x W in [0, 1]: N x d, differentiable, float32 (float64 from a net in float64)."""
    assert isinstance(classifier, Classifier)
    found = embedded(classifier).embed(classifier.normalised(images))
    return found if found.dtype == torch.float64 else found.float()


@torch.no_grad()
def nearest_rows(queries: Tensor, rows: BankRows, m: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows nearest to each query.

    Args:
        queries: n x d.
        rows: M rows.
        m: how many, at least 2.
        own: n rows that are the queries themselves, and are left out; as many rows of each class are then found, at
            least one, so that every class has votes that can be raised. None: the nearest, whatever their class.

    Returns:
        Numbers n x about m, and as many booleans: which of them are rows, where there are fewer.
    """
    groups = (torch.arange(len(rows.labels), device=queries.device),) if own is None else rows.by_class
    each, block = max(1, m // len(groups)), max(1, _BLOCK // len(queries))
    numbers, distances = [], []
    for group in groups:
        near, far = group.new_zeros((len(queries), 0)), queries.new_zeros((len(queries), 0))
        for start in range(0, len(group), block):
            part = group[start : start + block]
            vectors = rows.vectors[part].to(queries.dtype)
            # Less |g(x)|^2, which orders no rows.
            found = torch.addmm(vectors.square().sum(1), queries, vectors.T, alpha=-2)
            if own is not None:
                found.masked_fill_(own[:, None] == part, torch.inf)
            found, order = found.topk(min(each, len(part)), largest=False)
            far, near = torch.cat([far, found], 1), torch.cat([near, part[order]], 1)
            if start:
                far, order = far.topk(min(each, far.shape[1]), largest=False)
                near = near.gather(1, order)
        numbers.append(near)
        distances.append(far)
    return torch.cat(numbers, 1), torch.cat(distances, 1).isfinite()


def log_shares(weights: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Log of each class's share of the votes.

    Args:
        weights: n x m, log weights of the votes; -inf for no vote, but not for all of an image's.
        labels: n x m class numbers.
        classes: C.

    Returns:
        n x C. A class without a vote has the share of the weakest vote or 1e-12, whichever is less, as a constant: its
        logarithm is finite, and no gradient leads away from it or to it.
    """
    shares = log_sums(weights, labels, classes) - weights.logsumexp(1, keepdim=True)
    voting = weights.detach() - weights.detach().logsumexp(1, keepdim=True)
    least = voting.masked_fill(voting == -torch.inf, torch.inf).amin(1, keepdim=True).clamp_max(_NONE_FOUND)
    return torch.where(torch.isneginf(shares), least, shares)


class KernelRetrieval(nn.Module):
    """Images N x C x H x W in [0, 1] -> log-probabilities N x classes of kernel nearest neighbours.

    ``p(y | x) = sum_j exp(-|g(x) - g_j|^2 / T) s_jy / sum_j exp(-|g(x) - g_j|^2 / T)`` over the rows found near x, with
    s_j the row's label, or the softmax of the head at g_j. The rows g_j are constants; the gradient runs through g(x)
    and T.

    Images that are no rows are answered by the nearest rows. For a batch whose images are rows themselves, each without
    its own, as many are taken of each class, and in evaluation mode, as an attack sees the net, they are those nearest
    to the image's own row, found once; in training mode they are found anew at each call.

    Attributes:
        queries: g(x) of the last call.
    """

    def __init__(
        self, model: nn.Module, rows: BankRows, neighbors: int, votes: str = "labels", own: Tensor | None = None
    ) -> None:
        """
        Args:
            model: of an architecture ``nn-``, perhaps compiled, in any mode.
            rows: where neighbours are found.
            neighbors: how many, from 2 to :data:`MOST_ROWS`.
            votes: ``labels`` or ``posteriors``.
            own: N numbers of the rows that the images are, of the one batch that will be given; None: they are no rows.

        Raises:
            InputError: another architecture, or settings that cannot be used.
        """
        super().__init__()
        check_choice("votes", votes, VOTES)
        embedded(model)
        self.model, self.rows, self.neighbors, self.votes, self.own = model, rows, int(neighbors), votes, own
        self.embed = embeddings if _bare(model) is model else torch.compile(embeddings, dynamic=False)
        self.queries: Tensor | None = None
        self._kept: tuple[Tensor, ...] | None = None
        adopt_mode(self, model)

    @property
    def net(self) -> EmbeddedNet:
        """Embedding, head and temperature."""
        return embedded(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities N x classes."""
        queries = self.queries = self.embed(_bare(self.model), images)
        vectors, lengths, found, votes = self._near(queries)
        # Products instead of differences: no n x m x d array has to be made and kept for the gradient.
        near = torch.bmm(vectors, queries[:, :, None])[:, :, 0]
        far = queries.square().sum(1, keepdim=True) - 2 * near + lengths
        weights = (-far * torch.exp(-self.net.log_temperature)).masked_fill(~found, -torch.inf)
        if self.votes == "labels":
            return log_shares(weights, votes, self.net.head.out_features)
        return (weights[:, :, None] + votes).logsumexp(1) - weights.logsumexp(1, keepdim=True)

    def _near(self, queries: Tensor) -> tuple[Tensor, ...]:
        """Vectors n x m x d of the rows, their squared lengths, which are rows, and their labels or log posteriors."""
        if self.training or self.own is None:
            return self._found(queries.detach())
        if self._kept is None:
            self._kept = self._found(self.rows.vectors[self.own].to(queries.dtype))
        return self._kept

    @torch.no_grad()
    def _found(self, queries: Tensor) -> tuple[Tensor, ...]:
        numbers, found = nearest_rows(queries, self.rows, self.neighbors, self.own)
        vectors = self.rows.vectors[numbers].to(queries.dtype)
        lengths = vectors.square().sum(2)
        if self.votes == "labels":
            return vectors, lengths, found, self.rows.labels[numbers]
        return vectors, lengths, found, self.net.head(vectors).to(queries.dtype).log_softmax(2)


class Unsaturated(nn.Module):
    """The answers of a retrieval on a scale that leaves an attack a gradient: the same order of the classes.

    Log-probabilities are divided, image by image, so that the two likeliest classes are at most 5 nats apart. With a
    small T the nearest rows' class has all of the votes but for less than float32 resolves; the gradient of the
    cross-entropy is then 0, the attack stands still, and the training learns to hide from it by a smaller T.
    """

    def __init__(self, retrieval: nn.Module) -> None:
        """
        Args:
            retrieval: images N x C x H x W -> log-probabilities N x classes.
        """
        super().__init__()
        self.retrieval = retrieval
        adopt_mode(self, retrieval)

    def forward(self, images: Tensor) -> Tensor:
        """Logits N x classes."""
        log_p: Tensor = self.retrieval(images)
        first, second = log_p.detach().topk(2, dim=1).values.unbind(1)
        return log_p / ((first - second) / _GAP).clamp_min(1)[:, None]
