"""Which directions of an augmented point hurt, in two dimensions (Raghunathan et al., ICML 2020, section 3.3).

There is no labelled point, so theta_std = 0, and one point x is added with its label ``x . theta*``. (Labelled points
that leave a plane open give the same picture, of that plane.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nndefense.errors import InputError
from nndefense.theory.solve import Array, matrix_of, root, vector_of


def change(angles: ArrayLike, theta_star: ArrayLike, sigma: ArrayLike) -> Array:
    """``L_std(theta_aug) - L_std(0)`` for a point in each direction; above 0 where augmentation hurts.

    With x of length 1 and ``rho = x . theta*`` it is ``rho^2 x^T Sigma x - 2 rho x^T Sigma theta*``.

    Args:
        angles: of x, in radians from the first axis, any shape.
        theta_star: 2 entries.
        sigma: 2 x 2, symmetric positive semidefinite.

    Returns:
        The changes, in the angles' shape.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or a Sigma that is no covariance.
    """
    star, covariance = _checked(theta_star, sigma)
    turned = np.asarray(angles, dtype=np.float64)
    x = np.stack([np.cos(turned), np.sin(turned)], axis=-1)
    rho = x @ star
    found: Array = rho**2 * np.einsum("...i,ij,...j->...", x, covariance, x) - 2 * rho * (x @ covariance @ star)
    return found


def boundaries(theta_star: ArrayLike, sigma: ArrayLike) -> Array:
    """The angles in [-pi/2, pi/2) between which the change keeps its sign, ascending; exact but for rounding.

    They are the direction orthogonal to theta*, and the real roots of a cubic in the tangent.
    """
    star, covariance = _checked(theta_star, sigma)
    # With x = (1, t): (x . theta*) x^T Sigma x - 2 (1 + t^2) x^T Sigma theta*, by powers of t, highest first.
    line, moved = star[::-1], (covariance @ star)[::-1]
    quadratic = np.array([covariance[1, 1], 2 * covariance[0, 1], covariance[0, 0]])
    cubic = np.polysub(np.polymul(line, quadratic), 2 * np.polymul([1.0, 0.0, 1.0], moved))
    size = max(float(np.abs(cubic).max()), 1e-300)
    tangents = np.roots(np.where(np.abs(cubic) > 1e-14 * size, cubic, 0.0))
    real = tangents[np.abs(tangents.imag) < 1e-9 * (1 + np.abs(tangents))].real
    angles = [*np.arctan(real), np.arctan2(-star[0], star[1]), -np.pi / 2]
    return np.unique((np.array(angles) + np.pi / 2) % np.pi - np.pi / 2)


def harmless_share(theta_star: ArrayLike, sigma: ArrayLike) -> float:
    """The share of all directions in which an augmented point does not hurt, in [0, 1]."""
    edges = boundaries(theta_star, sigma)
    edges = np.append(edges, edges[0] + np.pi)
    middles = (edges[1:] + edges[:-1]) / 2
    harmless = change(middles, theta_star, sigma) <= 0
    return float(np.diff(edges)[harmless].sum() / np.pi)


def _checked(theta_star: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
    covariance = matrix_of(sigma, "sigma", 2)
    if len(covariance) != 2:
        raise InputError("the picture of directions is one of two dimensions: give a 2 x 2 sigma")
    root(covariance, "sigma")
    return vector_of(theta_star, "theta_star", 2), covariance
