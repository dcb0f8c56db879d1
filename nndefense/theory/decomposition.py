"""When does fitting more correct labels raise the standard error? Raghunathan et al. (ICML 2020, section 3.2).

And, in two dimensions, which directions of an augmented point do (section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nndefense.errors import InputError
from nndefense.theory.estimators import standard_error
from nndefense.theory.solve import TOLERANCE, Array, matrix_of, root, vector_of


@dataclass(frozen=True)
class NoHarm:
    """Conditions each of which is enough for augmentation not to raise the standard error.

    Attributes:
        complete: w = 0: the augmented points span all that theta* needs.
        isotropic: Sigma is a multiple of the norm's M (of the identity by default).
        invariant: Sigma maps the span of ``Q_std x_ext`` into itself; for a single augmented point, ``Q_std x_ext`` is
            an eigenvector of Sigma. That x_ext itself is one is not enough.
    """

    complete: bool
    isotropic: bool
    invariant: bool

    @property
    def any(self) -> bool:
        """Whether one of them holds."""
        return self.complete or self.isotropic or self.invariant


@dataclass(frozen=True)
class Decomposition:
    """``L_std(theta_std) - L_std(theta_aug) = v^T Sigma v + 2 w^T Sigma v``.

    Attributes:
        theta_std, theta_aug: the two estimators, d.
        v: ``Q_std P_aug theta*``, d: what augmentation adds to the estimator.
        w: ``Q_aug theta*``, d: what both estimators lack.
        benefit: ``v^T Sigma v``, at least 0.
        cost: ``-2 w^T Sigma v``; augmentation hurts where it exceeds the benefit.
        loss_std, loss_aug: the standard errors, worked out from the estimators.
        no_harm: which sufficient conditions hold.
    """

    theta_std: Array
    theta_aug: Array
    v: Array
    w: Array
    benefit: float
    cost: float
    loss_std: float
    loss_aug: float
    no_harm: NoHarm

    @property
    def hurts(self) -> bool:
        """Whether augmentation raises the standard error: ``v^T Sigma v < -2 w^T Sigma v``, beyond rounding."""
        return self.cost - self.benefit > 1e-12 * (self.loss_std + self.loss_aug)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "theta_std": self.theta_std.tolist(),
            "theta_aug": self.theta_aug.tolist(),
            "v": self.v.tolist(),
            "w": self.w.tolist(),
            "benefit": self.benefit,
            "cost": self.cost,
            "L_std(theta_std)": self.loss_std,
            "L_std(theta_aug)": self.loss_aug,
            "augmentation_hurts": self.hurts,
            "no_harm": {
                "w_is_zero": self.no_harm.complete,
                "sigma_is_isotropic": self.no_harm.isotropic,
                "q_std_x_ext_is_invariant": self.no_harm.invariant,
            },
        }


def decompose(
    x_std: ArrayLike,
    x_ext: ArrayLike,
    theta_star: ArrayLike,
    sigma: ArrayLike,
    *,
    norm: ArrayLike | None = None,
) -> Decomposition:
    """Work out both estimators, their errors, and the exact difference between them.

    Args:
        x_std: labelled points n x d (n may be 0).
        x_ext: augmented points m x d (m may be 0); all labels are those of ``theta_star``.
        theta_star: the true predictor, d.
        sigma: population covariance, d x d, symmetric positive semidefinite.
        norm: M of the norm ``theta^T M theta`` that both estimators minimise; the identity by default. It must be
            positive definite on the directions that the labelled points leave open.

    Raises:
        InputError: shapes that do not fit, values that are not finite, a Sigma or M that is not symmetric positive
            semidefinite, or an M that does not determine theta_std.
    """
    covariance = matrix_of(sigma, "sigma")
    dimension = covariance.shape[1]
    star = vector_of(theta_star, "theta_star", dimension)
    labelled, added = matrix_of(x_std, "x_std", dimension), matrix_of(x_ext, "x_ext", dimension)
    seen = root(covariance, "sigma")
    geometry = np.eye(dimension) if norm is None else matrix_of(norm, "norm", dimension)
    smooth = root(geometry, "norm")
    # The directions that the labelled points leave open, and among them those that the augmented ones leave open too:
    # one inside the other by construction, so that rounding cannot undo the identity.
    open_std = _left_open(labelled, np.eye(dimension))
    open_aug = _left_open(added, open_std)
    w = _residual(smooth, open_aug, star)
    v = _residual(smooth, open_std, star - w)
    theta_std, theta_aug = star - _residual(smooth, open_std, star), star - w
    return Decomposition(
        theta_std=theta_std,
        theta_aug=theta_aug,
        v=v,
        w=w,
        benefit=float(np.sum((seen @ v) ** 2)),
        cost=float(-2 * (seen @ w) @ (seen @ v)),
        loss_std=standard_error(theta_std, star, covariance),
        loss_aug=standard_error(theta_aug, star, covariance),
        no_harm=_no_harm(covariance, geometry, open_std, added, star, w),
    )


def _left_open(points: Array, within: Array) -> Array:
    """An orthonormal basis, d x j, of the directions of the span of ``within``, d x k, that no point has a part in."""
    if points.size == 0 or within.size == 0:
        return within
    _, values, right = np.linalg.svd(points @ within)
    rank = int(np.sum(values > TOLERANCE * np.linalg.norm(points, 2)))
    found: Array = within @ right[rank:].T
    return found


def _residual(smooth: Array, basis: Array, vectors: Array) -> Array:
    """Q: what an estimator of smallest norm misses of theta*, where ``basis``, d x k, spans what its points leave open.

    The projector on that span that is orthogonal in the norm's geometry, applied to ``vectors``, d or d x m.
    """
    seen = smooth @ basis
    parts, _, rank, _ = np.linalg.lstsq(seen, smooth @ vectors, rcond=TOLERANCE)
    if rank < basis.shape[1]:
        raise InputError(
            "the norm does not determine the estimators: it is 0 in a direction that the labelled points leave open; "
            "give a positive definite norm, or more points"
        )
    found: Array = basis @ parts
    return found


def _no_harm(sigma: Array, geometry: Array, open_std: Array, added: Array, star: Array, w: Array) -> NoHarm:
    share = float(np.sum(sigma * geometry)) / max(float(np.sum(geometry * geometry)), 1e-300)
    size = max(float(np.abs(sigma).max(initial=0)), 1e-300)
    return NoHarm(
        complete=bool(np.linalg.norm(w) <= TOLERANCE * max(float(np.linalg.norm(star)), 1e-300)),
        isotropic=bool(np.abs(sigma - share * geometry).max(initial=0) <= TOLERANCE * size),
        invariant=_is_invariant(sigma, geometry, open_std, added),
    )


def _is_invariant(sigma: Array, geometry: Array, open_std: Array, added: Array) -> bool:
    """Whether Sigma, as a map of the norm's space into itself, keeps the span of what the augmented points add."""
    values = np.linalg.eigvalsh(geometry)
    if values.min(initial=1.0) <= TOLERANCE * values.max(initial=0.0):
        return False  # in a singular norm, orthogonality says nothing about that span
    added_here = np.linalg.solve(geometry, added.T)  # d x m: the points as vectors of that space
    novel = _residual(root(geometry, "norm"), open_std, added_here)
    basis, sizes, _ = np.linalg.svd(novel, full_matrices=False)
    basis = basis[:, sizes > TOLERANCE * np.linalg.norm(added_here)]
    moved = np.linalg.solve(geometry, sigma @ basis)
    left = moved - basis @ (basis.T @ moved)
    return bool(np.abs(left).max(initial=0) <= TOLERANCE * max(float(np.abs(moved).max(initial=0)), 1e-300))


def change(angles: ArrayLike, theta_star: ArrayLike, sigma: ArrayLike) -> Array:
    """``L_std(theta_aug) - L_std(0)`` for a point in each direction of the plane; above 0 where augmentation hurts.

    There is no labelled point, so theta_std = 0, and one point x is added with its label ``x . theta*``. (Labelled
    points that leave a plane open give the same picture, of that plane.)

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
    """The angles in [-pi/2, pi/2) between which the change keeps its sign, ascending, for ``theta_star`` (2) and
    ``sigma`` (2 x 2); exact but for rounding.

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
    """The share of all directions in which an augmented point does not hurt, in [0, 1]; ``theta_star`` (2), ``sigma``
    (2 x 2)."""
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
