"""Objectives on the answer of kernel nearest neighbours, whose features are trained end to end.

    p(y | x) = sum_j exp(-|g(x) - g_j|^2 / T) [y_j = y] / sum_j exp(-|g(x) - g_j|^2 / T)

with g the net's embedding, T its temperature, and j the rows of the training set (and of a pool) other than x itself:
neighbourhood components analysis (Goldberger et al., NIPS 2004, eq. 1) with a deep embedding and stored rows, as Wu,
Efros and Yu ("Improving generalization via scalable neighborhood component analysis", ECCV 2018) have them. New here
are the attack through the retrieval, and that the rows near each image stand for all.

Each is an objective of :mod:`nndefense.training.objectives.supervised` with log p in the place of the logits. Beside
it the linear head is trained on detached embeddings: ``head * mean_i CE(head(g(x_i)), y_i)``, at the images that the
objective saw last. So the net has posteriors, and they change no feature. The control is that same objective on the
same architecture, through the head.

Images of a pool, with their pseudo-labels, are rows and members of the batch as the labelled ones are: the mean is over
all (robust self-training through retrieval).
"""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.errors import InputError
from nndefense.training.batch import Batch, BatchAttack, Objective, Outcome
from nndefense.training.kernel_retrieval import MOST_ROWS, VOTES, KernelRetrieval, Unsaturated
from nndefense.training.objectives.registry import WEIGHT, entered
from nndefense.training.objectives.supervised import adversarial, standard, trades
from nndefense.training.objectives.terms import needed

_LIMITS = {"rows": (2, MOST_ROWS), "votes": VOTES, "head": WEIGHT}
#: Neighbours of each image in a training.
NEIGHBORS = 256


@entered("retrieval-standard", "kernel nearest neighbours of the images as they are", _LIMITS, attack=False, rows=True)
def retrieval_standard(
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None = None,
    *,
    rows: int = NEIGHBORS,
    votes: str = "labels",
    head: float = 1.0,
) -> Outcome:
    """:func:`standard` on kernel nearest neighbours: ``mean_i -log p(y_i | x_i)``; ``attack`` is not used.

    Args:
        model: of an architecture ``nn-``.
        batch: with a ``bank``.
        attack: none.
        rows: neighbours of each image, as many of each class (at least one), from 2 to 4096.
        votes: ``labels``, or ``posteriors`` for the softmax of the head at each row.
        head: the weight of the head's own loss.

    Raises:
        InputError: a batch without rows, or a net without an embedding.
    """
    return _retrieved("retrieval-standard", standard, model, batch, attack, rows, votes, head)


@entered("retrieval", "kernel nearest neighbours under attack", _LIMITS, rows=True)
def retrieval(
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None,
    *,
    rows: int = NEIGHBORS,
    votes: str = "labels",
    head: float = 1.0,
) -> Outcome:
    """:func:`adversarial` on kernel nearest neighbours: ``mean_i -log p(y_i | x'_i)``.

    x'_i is what the attack finds against the retrieval itself, without the image's own row. The attack goes through the
    rows near the image; for the loss they are found again, near x'_i. ``rows``, ``votes`` and ``head`` as for
    :func:`retrieval_standard`.
    """
    needed(attack, "retrieval")
    return _retrieved("retrieval", adversarial, model, batch, attack, rows, votes, head)


@entered("retrieval-trades", "TRADES on kernel nearest neighbours", {"beta": WEIGHT, **_LIMITS}, rows=True)
def retrieval_trades(
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None,
    *,
    beta: float = 6.0,
    rows: int = NEIGHBORS,
    votes: str = "labels",
    head: float = 1.0,
) -> Outcome:
    """:func:`trades` on kernel nearest neighbours: ``mean_i [ -log p(y_i | x_i) + beta KL(p(x_i) || p(x'_i)) ]``.

    ``rows``, ``votes`` and ``head`` as for :func:`retrieval_standard`.
    """
    needed(attack, "retrieval-trades")
    loss = functools.partial(trades, beta=beta)
    return _retrieved("retrieval-trades", loss, model, batch, attack, rows, votes, head)


def _retrieved(
    name: str,
    objective: Objective,
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None,
    rows: int,
    votes: str,
    head: float,
) -> Outcome:
    if batch.bank is None or batch.own is None:
        raise InputError(
            f"the objective {name} needs rows to retrieve from: train with train_classifier, which keeps those of the "
            "training set, or give the batch a bank"
        )
    retrieved = KernelRetrieval(model, batch.bank, rows, votes, batch.own)
    found = objective(retrieved, replace(batch, labelled=None), None if attack is None else _shown(attack))
    assert retrieved.queries is not None
    own = F.cross_entropy(retrieved.net.head(retrieved.queries.detach()), batch.labels)
    parts = {**found.parts, "retrieval_loss": found.loss.detach(), "head_loss": own.detach()}
    return replace(found, loss=found.loss + head * own, parts=parts)


def _shown(attack: BatchAttack) -> BatchAttack:
    """The attack, on answers that leave it a gradient."""

    def attacked(model: nn.Module, images: Tensor, y: Tensor, *, loss: str = "cross-entropy") -> Tensor:
        found: Tensor = attack(Unsaturated(model), images, y, loss=loss)
        return found

    attacked.mode = getattr(attack, "mode", "eval")  # type: ignore[attr-defined]
    return attacked
