"""The three interpolating estimators of Raghunathan et al. (ICML 2020, sections 3 and 5), and what they are judged by.

``y = x . theta*`` without noise; ``X_std`` holds the labelled points, ``X_ext`` the perturbed ones that augmentation
adds under the labels of their originals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nndefense.errors import InputError
from nndefense.theory.solve import Array, check_met, in_order, matrix_of, root, vector_of


def min_norm(x: ArrayLike, y: ArrayLike, *, norm: ArrayLike | None = None) -> Array:
    """The interpolant of smallest norm: ``argmin theta^T M theta`` subject to ``X theta = y``.

    On the labelled points it is theta_std, on labelled and perturbed ones together theta_aug (section 3.1).

    Args:
        x: points n x d; no rows give theta = 0.
        y: labels n.
        norm: M, d x d, symmetric and positive semidefinite; the identity by default. Of several minimisers, where M
            leaves a direction free that the points do not determine, the one without that direction is returned.

    Returns:
        theta, d.

    Raises:
        InputError: shapes that do not fit, values that are not finite, labels that no linear predictor fits, or an M
            that is not symmetric positive semidefinite.
    """
    points = matrix_of(x, "x")
    labels, dimension = vector_of(y, "y", len(points)), points.shape[1]
    smooth = _norm_root(norm, dimension)
    theta, _ = in_order((points, labels), (smooth, np.zeros(len(smooth))), dimension=dimension)
    check_met(points, theta, labels, "the labels")
    return theta


def rst(
    theta_std: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sigma: ArrayLike | None = None,
    unlabelled: ArrayLike | None = None,
    norm: ArrayLike | None = None,
) -> Array:
    """Robust self-training: ``argmin E[(x . theta - x . theta_std)^2]`` subject to ``X theta = y`` (section 5).

    The expectation is over the population, whose covariance is ``sigma``, or over the ``unlabelled`` points. Solved by
    constrained least squares, so that a singular Sigma or too few unlabelled points are no error; what they leave open
    is decided by the norm of ``theta - theta_std``, or by ``theta^T M theta`` where a norm is given.

    Args:
        theta_std: the interpolant of the labelled points whose predictions are the pseudo-labels, d.
        x: the constraints' points m x d: labelled, perturbed, and for full robustness the differences ``x - x'`` of
            every point and its perturbations, with label 0.
        y: their labels m.
        sigma: population covariance ``E[x x^T]``, d x d, symmetric positive semidefinite.
        unlabelled: k x d points instead of ``sigma``.
        norm: M, d x d.

    Returns:
        theta_rst, d.

    Raises:
        InputError: as for :func:`min_norm`; or not exactly one of ``sigma`` and ``unlabelled``.
    """
    points, labels, teacher = _constraints(theta_std, x, y)
    dimension = len(teacher)
    if (sigma is None) == (unlabelled is None):
        raise InputError("robust self-training needs the population's covariance sigma or unlabelled points: give one")
    if unlabelled is None:
        assert sigma is not None
        seen = root(matrix_of(sigma, "sigma", dimension), "sigma")
    else:
        samples = matrix_of(unlabelled, "unlabelled", dimension)
        seen = samples / np.sqrt(max(len(samples), 1))
    smooth = np.eye(dimension) if norm is None else _norm_root(norm, dimension)
    anchor = smooth @ teacher if norm is None else np.zeros(len(smooth))
    theta, _ = in_order((points, labels), (seen, seen @ teacher), (smooth, anchor), dimension=dimension)
    check_met(points, theta, labels, "the constraints")
    return theta


def rst_closed_form(theta_std: ArrayLike, x: ArrayLike, y: ArrayLike, sigma: ArrayLike) -> Array:
    """:func:`rst` for an invertible Sigma, by its formula: the Sigma-norm projection of theta_std on the constraints
    of the points ``x``; Sigma is ``sigma``, d x d.

    ``theta_std + Sigma^-1 X^T (X Sigma^-1 X^T)^+ (y - X theta_std)``. Less accurate than :func:`rst` where Sigma is
    nearly singular.

    Raises:
        InputError: as for :func:`rst`, or a singular Sigma.
    """
    points, labels, teacher = _constraints(theta_std, x, y)
    covariance = matrix_of(sigma, "sigma", len(teacher))
    factor = root(covariance, "sigma")
    values = np.linalg.norm(factor, axis=1)
    if len(values) and values.min() <= 1e-7 * values.max():
        raise InputError("sigma is singular, or too nearly so for the closed form: use constrained least squares")
    inverse = np.linalg.inv(covariance)
    gram = points @ inverse @ points.T
    theta: Array = teacher + inverse @ points.T @ (np.linalg.pinv(gram, hermitian=True) @ (labels - points @ teacher))
    check_met(points, theta, labels, "the constraints")
    return theta


def standard_error(theta: ArrayLike, theta_star: ArrayLike, sigma: ArrayLike) -> float:
    """``L_std = (theta - theta*)^T Sigma (theta - theta*)``, at least 0 (section 3.1), theta* = ``theta_star``, Sigma =
    ``sigma``."""
    covariance = matrix_of(sigma, "sigma")
    star = vector_of(theta_star, "theta_star", covariance.shape[1])
    difference = vector_of(theta, "theta", len(star)) - star
    return float(np.sum((root(covariance, "sigma") @ difference) ** 2))


def robust_error_in_ball(
    theta: ArrayLike, theta_star: ArrayLike, x: ArrayLike, *, eps: float, norm: str = "linf"
) -> float:
    """``mean_i max ((x_i + delta) . theta - x_i . theta*)^2`` over the ball ``||delta|| <= eps``, theta* =
    ``theta_star``.

    The inner maximum has a closed form, ``(|x . (theta - theta*)| + eps ||theta||_q)^2``, with q the dual of the ball's
    norm: 1 for ``linf``, 2 for ``l2``.

    Raises:
        InputError: an unknown norm, an eps that is negative or not finite, no points, or shapes that do not fit.
    """
    points = matrix_of(x, "x")
    predictor = vector_of(theta, "theta", points.shape[1])
    star = vector_of(theta_star, "theta_star", points.shape[1])
    orders = {"linf": 1, "l2": 2}
    if norm not in orders:
        raise InputError(f"norm is {norm!r}, but must be linf or l2")
    if not np.isfinite(eps) or eps < 0:
        raise InputError(f"eps is {eps}, but must be finite and at least 0")
    if len(points) == 0:
        raise InputError("a robust error needs at least one point")
    reach = eps * float(np.linalg.norm(predictor, orders[norm]))
    return float(np.mean((np.abs(points @ (predictor - star)) + reach) ** 2))


def _constraints(theta_std: ArrayLike, x: ArrayLike, y: ArrayLike) -> tuple[Array, Array, Array]:
    points = matrix_of(x, "x")
    return points, vector_of(y, "y", len(points)), vector_of(theta_std, "theta_std", points.shape[1])


def _norm_root(norm: ArrayLike | None, dimension: int) -> Array:
    return np.eye(dimension) if norm is None else root(matrix_of(norm, "norm", dimension), "norm")


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
        """``L_std = E[(x . theta - x . theta*)^2]``, theta* = ``theta_star`` (d); ``theta`` ... x d gives as many
        errors as it has rows.
        """
        return np.asarray((self._errors(theta, theta_star) * self.weights).sum((-2, -1)))

    def robust_error(self, theta: Array, theta_star: Array) -> Array:
        """``L_rob = E[max over x' in T(x) of (x' . theta - x' . theta*)^2]``; ``theta_star`` and shapes as above."""
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

    @classmethod
    def on(cls, population: Population, star: Array, **thetas: Array) -> Estimators:
        """The three ``thetas`` with their errors on a population whose true predictor is ``star``."""
        standard = {name: float(population.standard_error(theta, star)) for name, theta in thetas.items()}
        robust = {name: float(population.robust_error(theta, star)) for name, theta in thetas.items()}
        return cls(**thetas, standard=standard, robust=robust)

    @property
    def thetas(self) -> dict[str, Array]:
        """theta_std, theta_aug and theta_rst by ``std``, ``aug`` and ``rst``."""
        return {"std": self.std, "aug": self.aug, "rst": self.rst}


def estimators(
    population: Population,
    labelled: ArrayLike,
    theta_star: ArrayLike,
    *,
    norm: ArrayLike | None = None,
    teacher: str = "std",
    everywhere: bool = True,
) -> Estimators:
    """Fit the three estimators of Raghunathan et al. (ICML 2020) to labelled points of the population.

    theta_std interpolates the labelled versions, theta_aug all versions of each labelled point, and theta_rst in
    addition predicts the same for all versions of every point, and otherwise what its teacher says of the population.

    Then always ``L_rob(rst) = L_std(rst) <= L_std(teacher)``. With the teacher ``std``, ``L_rob(rst) <= L_rob(aug)`` is
    quoted beside it (the paper's Theorem 2). That follows where ``L_std(std) <= L_rob(aug)``, so wherever augmentation
    hurts; otherwise there are counter-examples, since theta_rst keeps its teacher's errors on unlabelled points, which
    augmentation may have mended. With the teacher ``aug``, itself an interpolant of the labelled points, it always
    holds.

    In the form ``min E[(x . theta - x . theta_std)^2]`` subject to ``X_std theta = y_std`` and ``X_ext theta = y_ext``
    alone (``everywhere=False``), theta_rst is robust at the labelled points and nowhere else, and the second
    inequality fails even where augmentation hurts.

    Args:
        population: the points.
        labelled: pairs (kind, version) n x 2 of the labelled points; their labels are those of ``theta_star``.
        theta_star: the true predictor, d; it must say the same of all versions of a point.
        norm: M of the norm that the estimators minimise; the identity by default.
        teacher: whose predictions are the pseudo-labels: ``std`` or ``aug``.
        everywhere: whether theta_rst says the same of all versions of every point, or fits those of the labelled ones.

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
    constraints = np.concatenate([x_aug, apart]) if everywhere else x_aug
    values = np.concatenate([x_aug @ star, np.zeros(len(constraints) - len(x_aug))])
    robust = rst(std if teacher == "std" else aug, constraints, values, sigma=population.sigma, norm=norm)
    return Estimators.on(population, star, std=std, aug=aug, rst=robust)
