"""The three interpolating estimators of Raghunathan et al. (ICML 2020, sections 3 and 5), and what they are judged by.

``y = x . theta*`` without noise; ``X_std`` holds the labelled points, ``X_ext`` the perturbed ones that augmentation
adds under the labels of their originals.
"""

from __future__ import annotations

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
    points = matrix_of(x, "x")
    dimension = points.shape[1]
    labels = vector_of(y, "y", len(points))
    teacher = vector_of(theta_std, "theta_std", dimension)
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
    """:func:`rst` for an invertible Sigma, by its formula: the Sigma-norm projection of theta_std on the constraints.

    ``theta_std + Sigma^-1 X^T (X Sigma^-1 X^T)^+ (y - X theta_std)``. Less accurate than :func:`rst` where Sigma is
    nearly singular.

    Raises:
        InputError: as for :func:`rst`, or a singular Sigma.
    """
    points = matrix_of(x, "x")
    dimension = points.shape[1]
    labels = vector_of(y, "y", len(points))
    teacher = vector_of(theta_std, "theta_std", dimension)
    covariance = matrix_of(sigma, "sigma", dimension)
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
    """``L_std = (theta - theta*)^T Sigma (theta - theta*)``, at least 0 (section 3.1)."""
    covariance = matrix_of(sigma, "sigma")
    star = vector_of(theta_star, "theta_star", covariance.shape[1])
    difference = vector_of(theta, "theta", len(star)) - star
    return float(np.sum((root(covariance, "sigma") @ difference) ** 2))


def robust_error_in_ball(
    theta: ArrayLike, theta_star: ArrayLike, x: ArrayLike, *, eps: float, norm: str = "linf"
) -> float:
    """``mean_i max ((x_i + delta) . theta - x_i . theta*)^2`` over the ball ``||delta|| <= eps``: the points' mean.

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


def _norm_root(norm: ArrayLike | None, dimension: int) -> Array:
    return np.eye(dimension) if norm is None else root(matrix_of(norm, "norm", dimension), "norm")
