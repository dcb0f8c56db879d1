"""A population of finitely many points with their perturbations, and robust self-training on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nndefense.errors import InputError
from nndefense.theory.estimators import min_norm, rst
from nndefense.theory.solve import Array, matrix_of, vector_of


@dataclass(frozen=True)
class Population:
    """S kinds of points, each with T perturbations of which the first is the unperturbed point.

    Attributes:
        points: S x T x d.
        weights: S x T, at least 0 with sum 1: how often each version occurs among clean points.
    """

    points: Array
    weights: Array

    @classmethod
    def of(cls, points: ArrayLike, weights: ArrayLike) -> Population:
        """Check and convert; weights are scaled to sum 1.

        Raises:
            InputError: shapes that do not fit, values that are not finite, or weights below 0 or all 0.
        """
        try:
            kinds, versions, dimension = np.shape(np.asarray(points, dtype=np.float64))
        except (TypeError, ValueError):
            raise InputError("the population's points must be numbers, S x T x d") from None
        flat = matrix_of(np.reshape(points, (kinds * versions, dimension)), "the population's points", dimension)
        shares = matrix_of(weights, "the population's weights", versions)
        if shares.shape[0] != kinds or kinds * versions == 0:
            raise InputError(f"a population of {kinds} x {versions} points needs as many weights, and at least one")
        if (shares < 0).any() or shares.sum() <= 0:
            raise InputError("the population's weights must be at least 0, and some above 0")
        return cls(flat.reshape(kinds, versions, dimension), shares / shares.sum())

    @property
    def sigma(self) -> Array:
        """``E[x x^T]`` over clean points, d x d."""
        flat = self.points.reshape(-1, self.points.shape[-1])
        found: Array = flat.T @ (self.weights.reshape(-1, 1) * flat)
        return found

    @property
    def differences(self) -> Array:
        """``x - x'`` of every point and each of its perturbations: S * (T - 1) x d, what robustness makes 0."""
        found = self.points[:, :1] - self.points[:, 1:]
        return found.reshape(-1, self.points.shape[-1])

    def standard_error(self, theta: Array, theta_star: Array) -> Array:
        """``L_std = E[(x . theta - x . theta*)^2]``; ``theta`` ... x d gives as many errors as it has rows."""
        return np.asarray((self._errors(theta, theta_star) * self.weights).sum((-2, -1)))

    def robust_error(self, theta: Array, theta_star: Array) -> Array:
        """``L_rob = E[max over x' in T(x) of (x' . theta - x' . theta*)^2]``; shapes as for :meth:`standard_error`."""
        return np.asarray((self._errors(theta, theta_star).max(-1) * self.weights.sum(1)).sum(-1))

    def _errors(self, theta: Array, theta_star: Array) -> Array:
        """Squared errors at every version of every point: ... x S x T."""
        errors: Array = np.einsum("stk,...k->...st", self.points, theta - theta_star) ** 2
        return errors


@dataclass(frozen=True)
class Estimators:
    """theta_std, theta_aug and theta_rst, each d, with their errors on the population."""

    std: Array
    aug: Array
    rst: Array
    standard: dict[str, float]
    robust: dict[str, float]


def estimators(
    population: Population,
    labelled: ArrayLike,
    theta_star: ArrayLike,
    *,
    norm: ArrayLike | None = None,
    teacher: str = "std",
) -> Estimators:
    """Fit the three estimators of Raghunathan et al. (ICML 2020) to labelled points of the population.

    theta_std interpolates the labelled versions, theta_aug all versions of each labelled point, and theta_rst in
    addition predicts the same for all versions of every point, and otherwise what its teacher says of the population.

    Then always ``L_rob(rst) = L_std(rst) <= L_std(teacher)``. With the teacher ``std``, ``L_rob(rst) <= L_rob(aug)`` is
    quoted beside it (the paper's Theorem 2). That follows where ``L_std(std) <= L_rob(aug)``, so wherever augmentation
    hurts; otherwise there are counter-examples, since theta_rst keeps its teacher's errors on unlabelled points, which
    augmentation may have mended. With the teacher ``aug``, itself an interpolant of the labelled points, it always
    holds.

    Args:
        population: the points.
        labelled: pairs (kind, version) n x 2 of the labelled points; their labels are those of ``theta_star``.
        theta_star: the true predictor, d; it must say the same of all versions of a point.
        norm: M of the norm that the estimators minimise; the identity by default.
        teacher: whose predictions are the pseudo-labels: ``std`` or ``aug``.

    Raises:
        InputError: indices outside the population, a theta* that is not consistent, an unknown teacher, or a norm that
            is not symmetric positive semidefinite.
    """
    kinds, versions, dimension = population.points.shape
    star = vector_of(theta_star, "theta_star", dimension)
    chosen = np.asarray(labelled, dtype=np.int64).reshape(-1, 2)
    if ((chosen < 0) | (chosen >= (kinds, versions))).any():
        raise InputError(f"labelled points must be pairs (kind, version) below ({kinds}, {versions})")
    if teacher not in ("std", "aug"):
        raise InputError(f"the teacher is {teacher!r}, but must be std or aug")
    apart = population.differences
    if np.abs(apart @ star).max(initial=0) > 1e-7 * max(float(np.abs(population.points @ star).max()), 1e-300):
        raise InputError("theta_star says different things of a point and its perturbation: give consistent labels")
    x_std = population.points[chosen[:, 0], chosen[:, 1]]  # n x d
    x_aug = population.points[chosen[:, 0]].reshape(-1, dimension)  # n * T x d
    std, aug = (min_norm(x, x @ star, norm=norm) for x in (x_std, x_aug))
    constraints = np.concatenate([x_aug, apart])
    values = np.concatenate([x_aug @ star, np.zeros(len(apart))])
    robust = rst(std if teacher == "std" else aug, constraints, values, sigma=population.sigma, norm=norm)
    found = {"std": std, "aug": aug, "rst": robust}
    return Estimators(
        **found,
        standard={name: float(population.standard_error(theta, star)) for name, theta in found.items()},
        robust={name: float(population.robust_error(theta, star)) for name, theta in found.items()},
    )
