"""Confidence-based weights of neighbours (Dubey et al. 2019, section 3.3).

A weight depends on the neighbour's own posterior alone, so it is computed once, when the row is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from nndefense.errors import InputError, check_choice

#: How neighbours are weighted (Dubey et al. 2019, section 3.3): alike; by the posterior's entropy; by its margins.
Weighting = Literal["uniform", "cbw-e", "cbw-d"]
#: The weightings by name.
WEIGHTINGS: tuple[Weighting, ...] = ("uniform", "cbw-e", "cbw-d")
CBW_D_POWER = 3.0
CBW_D_TERMS = 20


def check_weighting(weighting: str, power: float = CBW_D_POWER, terms: int = CBW_D_TERMS) -> None:
    """Raise :class:`InputError` for arguments that :func:`neighbor_weights` cannot use."""
    check_choice("weighting", weighting, WEIGHTINGS)
    if not 0 < power < math.inf or terms < 1:
        raise InputError(f"CBW-D needs a power above 0 and at least 1 term, but was given {power} and {terms}")


def neighbor_weights(
    posteriors: Tensor, weighting: str, *, power: float = CBW_D_POWER, terms: int = CBW_D_TERMS
) -> Tensor:
    """Weigh neighbours by how sure the classifier is of them.

    With s a posterior over C classes:

    - ``uniform`` (UW): 1
    - ``cbw-e`` (CBW-E): ``|log C + sum_c s_c log s_c|``, the entropy's distance from its maximum, natural logarithm
    - ``cbw-d`` (CBW-D): ``sum_{m=2..M+1} (s_(1) - s_(m))^P`` over the sorted posterior s_(1) >= s_(2) >= ...

    Args:
        posteriors: ... x C, each row at least 0 with sum 1.
        weighting: one of :data:`WEIGHTINGS`.
        power: P of CBW-D.
        terms: M of CBW-D; with fewer than M + 1 classes, C - 1 is used.

    Returns:
        The weights, ``...``, at least 0; all are 0 only for posteriors that are exactly uniform.

    Raises:
        InputError: an unknown weighting, or a power or number of terms that is not positive.
    """
    check_weighting(weighting, power, terms)
    classes = posteriors.shape[-1]
    if weighting == "uniform":
        return torch.ones(posteriors.shape[:-1], dtype=posteriors.dtype, device=posteriors.device)
    if weighting == "cbw-e":
        # xlogy is 0 at 0, as the entropy's limit is.
        negative_entropy = torch.special.xlogy(posteriors, posteriors).sum(-1)
        return torch.abs(negative_entropy + math.log(classes))
    top = posteriors.topk(min(terms, classes - 1) + 1, dim=-1).values
    weights: Tensor = ((top[..., :1] - top[..., 1:]) ** power).sum(-1)
    return weights


def combine(posteriors: Tensor, weights: Tensor, *, in_order: bool = False) -> Tensor:
    """The defence's prediction ``sum_k w_k s_k / sum_k w_k``; where all weights are 0, the plain mean.

    Args:
        posteriors: N x K x C, of the K neighbours.
        weights: N x K, at least 0.
        in_order: add neighbour after neighbour, which is slower, so that the last digits of a row depend on that row
            alone. Otherwise torch chooses the order, by the shape of all N rows.

    Returns:
        N x C, each row a probability distribution.
    """
    shares = weight_shares(weights, in_order=in_order).unsqueeze(-1)
    if in_order:
        return _in_order(w * s for w, s in zip(shares.unbind(1), posteriors.unbind(1), strict=True))
    return (posteriors * shares).sum(1)


def weight_shares(weights: Tensor, *, in_order: bool = False) -> Tensor:
    """Scale each row of N x K weights to sum 1; a row of zeros becomes uniform. ``in_order`` is that of
    :func:`combine`.
    """
    total = _in_order(weights.unbind(-1)).unsqueeze(-1) if in_order else weights.sum(-1, keepdim=True)
    uniform = torch.full_like(weights, 1.0 / weights.shape[-1])
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), uniform)


def _in_order(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape, from the first to the last."""
    total: Tensor | None = None
    for part in parts:
        total = part.clone() if total is None else total.add_(part)
    assert total is not None
    return total
