"""The spline staircase of Raghunathan et al. (ICML 2020, section 2 and figures 2, 6a and 7).

A stair i consists of the points i and i + 1/2, which have the same label i. Predictors are cubic splines, and the
interpolant of smallest P-spline penalty (Eilers and Marx, 1996) stands for the minimum-norm estimator.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import BSpline

from nndefense.errors import InputError, check_choice
from nndefense.theory.estimators import Estimators, Population, estimators, min_norm
from nndefense.theory.solve import Array, in_order, root

_DEGREE = 3
#: Where the outer knots on the left lie: the authors' scripts differ, by figure.
LEFT_KNOTS = {"-4..-2": (-4.0, -3.0, -2.0), "-3..-1": (-3.0, -2.0, -1.0)}


@dataclass(frozen=True)
class Staircase:
    """The problem, exactly as the authors' code builds it.

    Attributes:
        stairs: s, at least 2; targets are 0..s-1. The first five have probability 1/5, the others 0.01, normalised.
        x_noise: the probability q, in [0, 1], with which the standard error weighs the half-points i + 1/2.
        left_knots: a key of :data:`LEFT_KNOTS`.
        train_noise: the probability with which a drawn training point is a half-point; ``x_noise / 2`` by default, as
            the authors draw (a mask with probability x_noise, times a fair coin), although the test error uses x_noise.
        ridge: added to the diagonal of the penalty (1e-10 in the authors' figure 7).
    """

    stairs: int = 10
    x_noise: float = 0.1
    left_knots: str = "-4..-2"
    train_noise: float | None = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if self.stairs < 2:
            raise InputError(f"a staircase needs at least 2 stairs, not {self.stairs}")
        for name, value in (("x_noise", self.x_noise), ("train_noise", self.noise_in_training)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}, but must be a probability from 0 to 1")
        check_choice("left_knots", self.left_knots, LEFT_KNOTS)
        if not 0 <= self.ridge < float("inf"):
            raise InputError(f"the ridge is {self.ridge}, but must be finite and at least 0")

    @property
    def noise_in_training(self) -> float:
        """The probability that a training point is a half-point."""
        return self.x_noise / 2 if self.train_noise is None else self.train_noise

    @functools.cached_property
    def knots(self) -> Array:
        """The 2s + 6 knots: every point of the support, and three more on each side."""
        last = self.stairs - 0.5
        inner = np.arange(2 * self.stairs) / 2
        return np.concatenate([LEFT_KNOTS[self.left_knots], inner, last + np.arange(1, 4)])

    @property
    def dimension(self) -> int:
        """2s + 2, the number of cubic B-splines."""
        return len(self.knots) - _DEGREE - 1

    def features(self, t: ArrayLike) -> Array:
        """The B-splines at points t in [0, s - 1/2]: n -> n x (2s + 2).

        Raises:
            InputError: a point outside that range, where the basis is incomplete.
        """
        points = np.atleast_1d(np.asarray(t, dtype=np.float64))
        if not ((points >= 0) & (points <= self.stairs - 0.5)).all():
            raise InputError(f"points must lie between 0 and {self.stairs - 0.5}, the support of the staircase")
        return np.asarray(BSpline.design_matrix(points, self.knots, _DEGREE).toarray(), dtype=np.float64)

    @functools.cached_property
    def penalty(self) -> Array:
        """``D D^T`` of the second differences D, (2s+2) x 2s, of the coefficients.

        A P-spline's penalty, not the integral of the squared second derivative: on these uneven knots they differ.
        """
        second = np.diff(np.eye(self.dimension), n=2, axis=0)
        found: Array = second.T @ second + self.ridge * np.eye(self.dimension)
        return found

    @functools.cached_property
    def stair_probabilities(self) -> Array:
        """The probability of each stair, s."""
        raw = np.where(np.arange(self.stairs) < 5, 0.2, 0.01)
        return np.asarray(raw / raw.sum())

    @functools.cached_property
    def support(self) -> Array:
        """The features of all points: s x 2 x (2s + 2), first i, then i + 1/2."""
        t = np.arange(self.stairs)[:, None] + np.array([0.0, 0.5])
        return self.features(t.ravel()).reshape(self.stairs, 2, -1)

    def population(self, noise: float | None = None) -> Population:
        """The points with their weights; half-points weigh ``noise`` (``x_noise`` by default) of their stair."""
        share = self.x_noise if noise is None else noise
        return Population.of(self.support, self.stair_probabilities[:, None] * np.array([1 - share, share]))

    @functools.cached_property
    def theta_star(self) -> Array:
        """The smoothest predictor that is right everywhere, 2s + 2."""
        labels = np.repeat(np.arange(self.stairs, dtype=np.float64), 2)
        return min_norm(self.support.reshape(-1, self.dimension), labels, norm=self.penalty)

    def places(self, t: ArrayLike) -> Array:
        """Points ``t`` of the support as pairs (stair, version): n -> n x 2.

        Raises:
            InputError: a point that is neither i nor i + 1/2 of a stair.
        """
        doubled = 2 * np.atleast_1d(np.asarray(t, dtype=np.float64))
        numbers = np.round(doubled)
        if not (np.abs(doubled - numbers) < 1e-9).all() or not ((numbers >= 0) & (numbers < 2 * self.stairs)).all():
            raise InputError(f"labelled points must be 0, 0.5, 1, ... up to {self.stairs - 0.5}: points of the stairs")
        return np.stack(np.divmod(numbers.astype(np.int64), 2), axis=1)

    def fit(self, labelled: ArrayLike, *, teacher: str = "std") -> Estimators:
        """theta_std, theta_aug and theta_rst from labelled points t, with the errors that the test weights give.

        theta_rst learns from the predictor ``teacher``, and sees the population as training points are drawn
        (half-points with ``noise_in_training``); on the predictors that it may choose from, equal on both points of a
        stair, that changes the pseudo-labels alone.
        """
        places = self.places(labelled)
        trained = estimators(
            self.population(self.noise_in_training), places, self.theta_star, norm=self.penalty, teacher=teacher
        )
        return Estimators.on(self.population(), self.theta_star, **trained.thetas)

    def predict(self, theta: Array, t: ArrayLike) -> Array:
        """The spline with coefficients theta at points t in [0, s - 1/2]."""
        found: Array = self.features(t) @ theta
        return found

    def roughness(self, theta: Array) -> float:
        """The penalty of ``theta`` that the estimators minimise."""
        return float(theta @ self.penalty @ theta)

    def one_extra_point(self, labelled: ArrayLike, extra: ArrayLike) -> Array:
        """Figure 7: the change of L_std(theta_std) when one more correctly labelled point is added, for each of them.

        Args:
            labelled: the points t that are there already.
            extra: the points t to add, one at a time.

        Returns:
            One change per extra point; above 0 where more data hurt.
        """
        known = np.atleast_1d(np.asarray(labelled, dtype=np.float64))
        tested = self.population()

        def error(t: Array) -> float:
            kinds, versions = self.places(t).T
            x = self.support[kinds, versions]
            theta = min_norm(x, x @ self.theta_star, norm=self.penalty)
            return float(tested.standard_error(theta, self.theta_star))

        before = error(known)
        return np.array([error(np.append(known, t)) - before for t in np.atleast_1d(np.asarray(extra, dtype=float))])


#: The sizes and numbers of trials of the authors' figure, which shows those above 32.
SIZES = (22, 30, 35, 40, 50, 80, 100, 200, 300, 400, 500, 1000)
TRIALS = 2000
ESTIMATORS = ("std", "aug", "rst")
# Problems that are solved side by side; more would only fill memory.
_STACK = 1024


@dataclass(frozen=True)
class Curve:
    """Errors of each estimator against the number of labelled points.

    Attributes:
        sizes: the numbers of labelled points, N.
        standard, robust: for each estimator, errors N x trials.
    """

    sizes: tuple[int, ...]
    standard: dict[str, Array]
    robust: dict[str, Array]

    @staticmethod
    def mean_and_error(errors: Array) -> tuple[Array, Array]:
        """The mean over trials and its standard error: N x trials -> N, N."""
        return errors.mean(1), errors.std(1, ddof=1) / np.sqrt(errors.shape[1])

    def to_json(self) -> dict[str, object]:
        """Plain values: mean, its standard error and median of both errors."""
        table: dict[str, object] = {}
        for kind, errors in (("L_std", self.standard), ("L_rob", self.robust)):
            for name, values in errors.items():
                mean, error = self.mean_and_error(values)
                table[f"{kind}({name})"] = {
                    "mean": mean.tolist(),
                    "standard_error": error.tolist(),
                    "median": np.median(values, axis=1).tolist(),
                }
        return {"n": list(self.sizes), "trials": next(iter(self.standard.values())).shape[1], **table}


def error_against_size(
    staircase: Staircase,
    sizes: tuple[int, ...] = SIZES,
    *,
    trials: int = TRIALS,
    unlabelled: int | None = None,
    seed: int = 0,
) -> Curve:
    """Draw labelled points again and again, and fit the three estimators to each draw.

    A draw matters only through which of the 2s points it holds, and theta_aug only through which stairs; so equal draws
    are solved once, and different ones side by side, with the rows of points that were not drawn set to 0.

    Args:
        staircase: the problem; figure 6a has 10 stairs, x_noise 0.01 and the left knots -3..-1.
        sizes: numbers of labelled points.
        trials: draws of each size (the authors: 2,000, but 25 for the three largest).
        unlabelled: how many unlabelled points each theta_rst sees, drawn anew (the authors: 50,000 in all, less those
            already labelled, whose predictions are fixed anyway); None for the whole population.
        seed: of all draws.

    Raises:
        InputError: no size, a size below 1, fewer than 2 trials, or no unlabelled point.
    """
    if not sizes or min(sizes) < 1:
        raise InputError(f"sizes must be at least 1 labelled point, but are {sizes}")
    if trials < 2:
        raise InputError(f"a mean with its standard error needs at least 2 trials, not {trials}")
    if unlabelled is not None and unlabelled < 1:
        raise InputError(f"robust self-training needs at least 1 unlabelled point, not {unlabelled}")
    generator = np.random.default_rng(seed)
    fits = [_fit(staircase, *_draw(staircase, size, trials, unlabelled, generator)) for size in sizes]
    tested, star = staircase.population(), staircase.theta_star
    return Curve(
        tuple(sizes),
        {name: np.stack([tested.standard_error(fit[name], star) for fit in fits]) for name in ESTIMATORS},
        {name: np.stack([tested.robust_error(fit[name], star) for fit in fits]) for name in ESTIMATORS},
    )


def _draw(
    staircase: Staircase, size: int, trials: int, unlabelled: int | None, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Which points each trial has labels of, trials x s x 2 of 0 and 1, and what the others weigh, the same shape."""
    trained = staircase.population(staircase.noise_in_training)
    shape = (trials, *trained.weights.shape)
    seen = generator.multinomial(size, trained.weights.ravel(), size=trials).reshape(shape) > 0
    if unlabelled is None:
        return seen.astype(np.float64), np.broadcast_to(trained.weights, shape)
    counts = generator.multinomial(unlabelled, trained.weights.ravel(), size=trials).reshape(shape)
    return seen.astype(np.float64), counts / unlabelled


def _fit(staircase: Staircase, seen: Array, weights: Array) -> dict[str, Array]:
    """The three estimators of every trial: trials x (2s + 2) each."""
    trials, dimension = len(seen), staircase.dimension
    # Equal draws have equal estimators.
    keys = np.concatenate([seen.reshape(trials, -1), weights.reshape(trials, -1)], axis=1)
    _, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    parts = [
        _fit_stack(staircase, seen[rows], weights[rows])
        for rows in np.array_split(first, max(-(-len(first) // _STACK), 1))
    ]
    return {
        name: np.concatenate([part[name] for part in parts])[back.ravel()].reshape(trials, dimension)
        for name in ESTIMATORS
    }


def _fit_stack(staircase: Staircase, seen: Array, weights: Array) -> dict[str, Array]:
    """The estimators of a stack of B trials, as :func:`nndefense.theory.estimators.estimators` fits one."""
    dimension = staircase.dimension
    smooth = root(staircase.penalty, "the penalty")
    nothing = np.zeros((1, len(smooth)))
    points = staircase.support.reshape(-1, dimension)  # 2s x d
    labels = points @ staircase.theta_star  # 2s

    def fitted(held: Array, *stages: tuple[Array, Array]) -> Array:
        mask = held.reshape(len(held), -1)  # B x 2s
        first = (mask[..., None] * points, mask * labels)
        return in_order(first, *stages, (smooth, nothing), dimension=dimension)[0]

    augmented = np.broadcast_to(seen.max(2, keepdims=True), seen.shape)
    std, aug = fitted(seen), fitted(augmented)
    apart = staircase.support[:, 0] - staircase.support[:, 1]  # s x d
    scale = np.sqrt(weights.reshape(len(weights), -1))  # B x 2s
    self_training = (scale[..., None] * points, scale * (std @ points.T))
    invariance = (apart, np.zeros((1, len(apart))))
    return {"std": std, "aug": aug, "rst": fitted(augmented, invariance, self_training)}
