"""Distributions on which accuracy and robustness are at odds however many data there are, each worked out exactly.

They are the other explanation of the tradeoff, which the finite-sample one of this room is set against: here the gap
between standard and robust errors stays with infinite data, there it closes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm as normal

from nndefense.errors import InputError
from nndefense.theory.solve import Array


@dataclass(frozen=True)
class RobustFeature:
    """One feature that no small perturbation flips, and d that any does (Tsipras et al., ICLR 2019, section 2.1).

    Labels y are -1 or 1, equally likely; ``x_1 = y`` with probability p, else ``-y``; ``x_2 .. x_{d+1}`` are normal
    with mean ``eta * y`` and variance 1. The attacker moves every entry by at most eps.

    Attributes:
        p: in [1/2, 1).
        eta: at least 0.
        d: number of weakly correlated features, at least 1.
    """

    p: float = 0.95
    eta: float = 0.3
    d: int = 100

    def __post_init__(self) -> None:
        if not 0.5 <= self.p < 1:
            raise InputError(f"p is {self.p}, but must be a probability from 0.5 up to, but without, 1")
        if not 0 <= self.eta < math.inf or self.d < 1:
            raise InputError(f"eta must be finite and at least 0, and d at least 1, but are {self.eta} and {self.d}")

    def accuracy(self, first: float, rest: float, *, eps: float = 0.0) -> float:
        """The accuracy of ``sign(first * x_1 + rest * (x_2 + .. + x_{d+1}))`` under l_inf perturbations up to eps.

        The perturbation lowers the margin by ``eps (|first| + d |rest|)``; given x_1 the rest of it is normal, with
        mean ``d rest eta`` and standard deviation ``sqrt(d) |rest|``. A margin of exactly 0 counts as wrong.

        Raises:
            InputError: both weights 0, or an eps that is negative or not finite.
        """
        if first == 0 and rest == 0:
            raise InputError("a classifier with both weights 0 decides nothing: give one that is not 0")
        if not 0 <= eps < math.inf:
            raise InputError(f"eps is {eps}, but must be finite and at least 0")
        lost = eps * (abs(first) + self.d * abs(rest))
        right = 0.0
        for agrees, chance in ((1, self.p), (-1, 1 - self.p)):
            margin = agrees * first + self.d * rest * self.eta - lost
            spread = math.sqrt(self.d) * abs(rest)
            right += chance * (float(normal.cdf(margin / spread)) if spread > 0 else float(margin > 0))
        return right

    def averaging(self, *, eps: float = 0.0) -> float:
        """The accuracy of the classifier that averages the weak features: ``Phi((eta - eps) sqrt(d))``."""
        return self.accuracy(0.0, 1.0, eps=eps)

    @property
    def optimal_weights(self) -> tuple[float, float]:
        """The weights (first, rest) of the most accurate classifier: half the log-odds of x_1, and eta."""
        return 0.5 * math.log(self.p / (1 - self.p)), self.eta

    def robust_bound(self, accuracy: float) -> float:
        """What the robust accuracy cannot exceed at ``eps >= 2 eta``, whatever the classifier (their Theorem 2.1).

        With a standard accuracy of ``1 - delta``: at most ``delta p / (1 - p)``.
        """
        return min((1 - accuracy) * self.p / (1 - self.p), 1.0)

    def sample(self, n: int, *, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
        """Draw n points by ``seed``: n x (d + 1), and their labels -1 or 1, n."""
        generator = np.random.default_rng(seed)
        y = generator.choice([-1, 1], size=n)
        first = np.where(generator.random(n) < self.p, y, -y)
        rest = generator.normal(self.eta * y[:, None], 1.0, size=(n, self.d))
        return np.concatenate([first[:, None], rest], axis=1), y.astype(np.int64)


@dataclass(frozen=True)
class Intervals:
    """Labels that alternate on intervals of width eps (Zhang et al., ICML 2019, section 3, the TRADES toy).

    x is uniform on [0, 1], which is cut into ``count`` intervals of width ``eps = 1 / count``; their labels alternate,
    without noise, from 0. A rule is piecewise constant: one label for each interval.

    Attributes:
        count: number of intervals, at least 2.
    """

    count: int = 10

    def __post_init__(self) -> None:
        if self.count < 2:
            raise InputError(f"labels alternate on at least 2 intervals, not {self.count}")

    @property
    def eps(self) -> float:
        """The width of an interval."""
        return 1 / self.count

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of each interval; as a rule, the Bayes rule."""
        return np.arange(self.count, dtype=np.int64) % 2

    def errors(self, rules: ArrayLike, radius: float) -> tuple[Array, Array]:
        """Natural and robust error of rules, exactly.

        A point counts as robustly right where the rule gives its label on all of [0, 1] within ``radius`` of it.

        Args:
            rules: ... x count labels 0 or 1.
            radius: of the perturbation, at least 0.

        Returns:
            ``R_nat = P[rule(x) != y]`` and ``R_rob``, ... each; their difference is the boundary error R_bdy.

        Raises:
            InputError: rules of another length or with other labels, or a radius that is negative or not finite.
        """
        given = np.asarray(rules)
        if given.shape[-1:] != (self.count,) or not np.isin(given, (0, 1)).all():
            raise InputError(f"a rule must be {self.count} labels 0 or 1, one for each interval")
        if not 0 <= radius < math.inf:
            raise InputError(f"the radius is {radius}, but must be finite and at least 0")
        place = np.arange(self.count)
        wrong = given[..., None, :] != self.labels[:, None]  # ... x i x j: what interval j says is wrong for i
        own = wrong[..., place, place]
        # For each interval i, where the nearest wrong interval on its left ends, and that on its right begins.
        before = np.where(wrong & (place < place[:, None]), place + 1.0, -np.inf).max(-1)
        after = np.where(wrong & (place > place[:, None]), place + 0.0, np.inf).min(-1)
        reach = radius * self.count
        safe = np.minimum(place + 1.0, after - reach) - np.maximum(place, before + reach)
        right = np.where(own, 0.0, safe.clip(0, 1))
        return np.asarray(own.mean(-1)), np.asarray(1 - right.mean(-1))

    def every_rule(self) -> NDArray[np.int64]:
        """All ``2^count`` rules, one a row.

        Raises:
            InputError: more than 2^16 of them.
        """
        if self.count > 16:
            raise InputError(f"{self.count} intervals have 2^{self.count} rules: list them for at most 16")
        return (np.arange(2**self.count)[:, None] >> np.arange(self.count)) & 1


@dataclass(frozen=True)
class ThreePoints:
    """A class of rules that is too small to be accurate and robust, after Nakkiran (2019).

    Points (-2, 0) and (2, 0) have label -1, (0, height) has label 1; every coordinate may be moved by at most eps. A
    line separates them, but comes nearer than eps to all three; an interval of the first coordinate is right about all,
    wherever they are moved.

    Attributes:
        height: of the point in the middle, above 0 and below eps.
        eps: below 1, so that no point can be moved to where another one may be.
        middle: the middle point's probability, in (0, 1); the others share the rest.
    """

    height: float = 0.5
    eps: float = 0.9
    middle: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.height < self.eps < 1 or not 0 < self.middle < 1:
            raise InputError(
                f"give 0 < height < eps < 1 and middle between 0 and 1, not {self.height}, {self.eps} and {self.middle}"
            )

    @property
    def kinds(self) -> tuple[tuple[float, float, int, float], ...]:
        """The points: both coordinates, the label and the probability."""
        side = (1 - self.middle) / 2
        return (-2.0, 0.0, -1, side), (0.0, self.height, 1, self.middle), (2.0, 0.0, -1, side)

    def line(self, first: float, second: float, offset: float) -> tuple[float, float]:
        """Standard and robust error of ``sign(first x + second y + offset)``; a margin of 0 counts as wrong."""
        standard = robust = 0.0
        for x, y, label, share in self.kinds:
            margin = label * (first * x + second * y + offset)
            standard += share * (margin <= 0)
            robust += share * (margin <= self.eps * (abs(first) + abs(second)))
        return standard, robust

    def lines(self, turns: int = 72, offsets: int = 81) -> Iterator[tuple[float, float, float]]:
        """Lines of ``turns`` directions and ``offsets`` offsets, on a grid that has the horizontal and the vertical
        ones.
        """
        for angle in 2 * np.pi * np.arange(turns) / turns:
            for offset in np.linspace(-4, 4, offsets):
                yield float(np.cos(angle)), float(np.sin(angle)), float(offset)

    def interval(self, half: float) -> tuple[float, float]:
        """Standard and robust error of the rule that says 1 where ``|x| < half``."""
        inside = [(label * (half - abs(x)), share) for x, _, label, share in self.kinds]
        standard, robust = (sum(share for margin, share in inside if margin <= reach) for reach in (0, self.eps))
        return standard, robust


def location(share: float = 0.1, place: float = 10.0) -> dict[str, dict[str, float]]:
    """Robust statistics in its smallest example: hard training data, ordinary test data.

    Training values are standard normal, but a share of them stands at ``place``; a new value is standard normal.

    Returns:
        For the ``mean`` and the ``median`` of the training law: ``predicted``, and the mean squared ``error`` of that.

    Raises:
        InputError: a share that is not from 0 up to, but without, one half.
    """
    if not 0 <= share < 0.5 or not 0 <= place < math.inf:
        raise InputError(f"give a share in [0, 0.5) and a place of at least 0, not {share} and {place}")
    clean = 0.5 / (1 - share)
    found = {"mean": share * place, "median": min(float(normal.ppf(clean)), place)}
    return {name: {"predicted": value, "error": 1 + value**2} for name, value in found.items()}
