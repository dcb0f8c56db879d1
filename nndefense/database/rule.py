"""The rule by which neighbours decide: how many, with which weights and votes, and what the classifier adds to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.database.database import ImageDatabase
from nndefense.database.weighting import CBW_D_POWER, CBW_D_TERMS, check_weighting, combine, weight_shares
from nndefense.errors import InputError, check_choice, make_plain, plain
from nndefense.reporting.wording import rule_words

#: What a neighbour votes with: its stored posterior, or its true label.
VOTES = ("posteriors", "labels")
DEFAULT_WEIGHTING = "cbw-d"


@dataclass(frozen=True)
class Rule:
    """``p(x) = (1 - alpha) sum_j w_j kappa(d_j) s_j / sum_j w_j kappa(d_j) + alpha softmax f(x)`` over the K nearest.

    Attributes:
        k: K, at least 1.
        weighting: w_j, one of :data:`~nndefense.database.WEIGHTINGS`.
        power, terms: P and M of ``cbw-d``; with fewer than M + 1 classes, C - 1 is used.
        votes: s_j: ``posteriors``, the stored ones, or ``labels``, the one-hot true label; a row without a label does
            not vote.
        temperature: T of the kernel ``kappa(d) = exp(-d^2 / T)``, in squared feature distances, above 0; None: 1.
        alpha: the share of the classifier's own posterior of the input, 0 to 1.

    Raises:
        InputError: a value that cannot be used.
    """

    k: int
    weighting: str = DEFAULT_WEIGHTING
    power: float = CBW_D_POWER
    terms: int = CBW_D_TERMS
    votes: str = "posteriors"
    temperature: float | None = None
    alpha: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self)
        if type(self.k) is not int or self.k < 1:
            raise InputError(f"k is {self.k}, but must be a whole number of at least 1")
        if not _number(self.power) or type(self.terms) is not int:
            raise InputError(f"CBW-D needs a power and a whole number of terms, not {self.power!r} and {self.terms!r}")
        check_weighting(self.weighting, self.power, self.terms)
        check_choice("votes", self.votes, VOTES)
        if self.temperature is not None and not (_number(self.temperature) and 0 < self.temperature < math.inf):
            raise InputError(
                f"temperature is {self.temperature}, but must be above 0 and finite (in squared feature distances), or "
                "left out for no kernel"
            )
        if not (_number(self.alpha) and 0 <= self.alpha <= 1):
            raise InputError(f"alpha is {self.alpha}, but must be from 0 (neighbours alone) to 1 (classifier alone)")

    # -- as plain values and in words -------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The plain values, for a file."""
        return asdict(self)

    @property
    def settings(self) -> dict[str, Any]:
        """``k``, ``weighting``, and whatever else is not the default: what is shown, and what finished work is found by
        (so that it was found before rules had more to them)."""
        usual = {field.name: field.default for field in fields(self) if field.name not in ("k", "weighting")}
        return {name: value for name, value in asdict(self).items() if name not in usual or usual[name] != value}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Rule:
        """The rule that plain values say; what they leave out has its default.

        Raises:
            InputError: values that are none of a rule's, or that cannot be used.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or "k" not in value or set(value) - set(names):
            raise InputError(f"a rule has a k and may have {', '.join(names[1:])}, but was given {value!r}")
        return cls(**value)

    def changed(self, **asked: Any) -> Rule:
        """The same rule but for what is asked for: values by name, None for one that stays.

        An infinite ``temperature`` asks for no kernel.
        """
        values = {name: value for name, value in asked.items() if value is not None}
        if values.get("temperature") == math.inf:
            values["temperature"] = None
        return Rule.of({**self.to_json(), **values})

    def __str__(self) -> str:
        """In plain words, such as ``k = 50, CBW-D, votes of labels, kernel exp(-d²/3.2), alpha 0.5``."""
        return ", ".join(rule_words(self.to_json()))

    # -- what it reads ----------------------------------------------------------------------------------------------

    @classmethod
    def fitting(cls, database: ImageDatabase, k: int, *values: Any, **named: Any) -> Rule:
        """The rule for this database with K = ``k`` and these ``values``, in their order or by name (``named``).

        Raises:
            InputError: a value that cannot be used, fewer rows than K, or labels that should vote where there are none.
        """
        k = plain(k)
        if type(k) is not int or not 1 <= k <= len(database):
            raise InputError(f"k is {k}, but must be from 1 to the database's {len(database):,} rows: lower k")
        rule = cls(k, *values, **named)
        labels = database.labels(database.row_numbers) if rule.votes == "labels" else None
        if labels is not None and not bool(_known(labels, len(database.classes)).any()):
            raise InputError(
                f"no image in {database.path} has a label to vote with: build it from labelled images, or let the "
                "posteriors vote (votes: posteriors)"
            )
        return rule

    def voters(self, database: ImageDatabase, rows: Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:
        """What rows of any shape vote for, and with which weight: ``rows.shape`` x C and ``rows.shape``, float32.

        Where labels vote, a row without one holds all classes as likely, and weighs 0.
        """
        weights = database.weights(rows, self.weighting, power=self.power, terms=self.terms).float()
        if self.votes == "posteriors":
            return database.posteriors(rows).float(), weights
        return label_votes(database.labels(rows), weights, len(database.classes))

    # -- what it computes -------------------------------------------------------------------------------------------

    @property
    def plain_vote(self) -> bool:
        """Whether the answer depends on which rows are the nearest alone: no kernel, nothing of the classifier."""
        return self.temperature is None and not self.alpha

    def shares(self, weights: Tensor, distances: Tensor, *, in_order: bool = False) -> Tensor:
        """Each neighbour's share of the vote: N x K, every row sums to 1.

        Args:
            weights: N x K, at least 0. Where all of a row are 0, they count as equal.
            distances: N x K, Euclidean.
            in_order: as for :func:`~nndefense.database.combine`.
        """
        return weight_shares(self._kernel(weights, distances), in_order=in_order)

    def probabilities(
        self, votes: Tensor, weights: Tensor, distances: Tensor, own: Tensor | None = None, *, in_order: bool = False
    ) -> Tensor:
        """The defence's answer, N x C, each row a probability distribution.

        Args:
            votes: N x K x C, what the K neighbours say.
            weights, distances, in_order: as for :meth:`shares`.
            own: N x C, the classifier's posteriors of the inputs; needed where alpha is above 0.
        """
        found = combine(votes, self._kernel(weights, distances), in_order=in_order)
        if not self.alpha:
            return found
        assert own is not None
        return (1 - self.alpha) * found + self.alpha * own.to(found)

    def _kernel(self, weights: Tensor, distances: Tensor) -> Tensor:
        """The weights times the kernel, up to a factor of each row's own: rows far from everything are no 0 / 0."""
        if self.temperature is None:
            return weights
        weights = torch.where((weights > 0).any(1, keepdim=True), weights, 1.0).double()
        squared = distances.double().square().masked_fill(weights == 0, torch.inf)
        # The nearest that votes has an exponent of exactly 0, however small T is.
        exponents = (squared.amin(1, keepdim=True) - squared) / self.temperature
        # Vectorised exponentials may round by their place in the array, and an answer must not depend on its batch.
        found = weights * exponents.cpu().apply_(math.exp).to(weights.device)
        return (found / found.amax(1, keepdim=True)).to(distances.dtype)


class Ruled:
    """What decides by a rule, whose K and weights go by these names, too."""

    rule: Rule

    @property
    def k(self) -> int:
        """K, the number of neighbours."""
        return self.rule.k

    @property
    def weighting(self) -> str:
        """The name of the weights."""
        return self.rule.weighting


def _known(labels: Tensor, classes: int) -> Tensor:
    return (labels >= 0) & (labels < classes)


def label_votes(labels: Tensor, weights: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Votes of true labels and their weights, from labels and weights of one shape: ``shape`` x C and ``shape``.

    A row without a label (-1) holds all classes as likely, and weighs 0.
    """
    known = _known(labels, classes)
    votes = torch.nn.functional.one_hot(torch.where(known, labels, 0), classes).to(weights.dtype)
    return torch.where(known.unsqueeze(-1), votes, 1 / classes), torch.where(known, weights, 0.0)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
