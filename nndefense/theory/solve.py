"""Least squares in order of importance: the one solver behind every estimator of the laboratory.

All functions work on stacks of problems: any leading axes are batches, as in :func:`numpy.linalg.svd`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nndefense.errors import InputError

Array = NDArray[np.float64]

# Singular values below this share of the matrix's own largest are zeros: those of the matrix as it was given, not as
# earlier stages left it. Where those have pinned everything down, the rest is rounding noise, and a threshold
# relative to that noise would divide by it.
TOLERANCE = 1e-9


def in_order(*stages: tuple[Array, Array], dimension: int) -> tuple[Array, Array]:
    """Minimise ``||G_1 theta - h_1||``, then among its minimisers ``||G_2 theta - h_2||``, and so on.

    Constraints are a first stage that can be met; a norm to minimise is a last stage with ``h = 0``. What no stage
    determines stays 0.

    Args:
        stages: pairs (G, h) of shapes ... x m x d and ... x m, or ... x m x k for k right-hand sides at once.
        dimension: d.

    Returns:
        theta, ... x d (or ... x d x k), and how many directions no stage determines, ....
    """
    columns = stages[0][1].ndim == stages[0][0].ndim
    theta = np.zeros((dimension, 1))
    # An orthonormal basis, d x d, and which of its vectors are still open. (Projectors would lose digits: a direction
    # that is determined by a small singular value is known less exactly than the space that it lies in.)
    basis, still_open = np.eye(dimension), np.ones(dimension, dtype=bool)
    for matrix, target in stages:
        wanted = target if columns else target[..., None]
        largest = np.linalg.norm(matrix, 2, axis=(-2, -1)) if matrix.size else np.zeros(matrix.shape[:-2])
        scale = np.where(largest > 0, largest, 1.0)[..., None]  # ... x 1
        reduced = matrix @ (basis * still_open[..., None, :])  # ... x m x d: zero columns where nothing is open
        # Directions that are settled get singular values above all others, so that the decomposition keeps them apart.
        settled = 2 * scale[..., None] * (np.eye(dimension) * ~still_open[..., None, :])
        shape = np.broadcast_shapes(reduced.shape[:-2], settled.shape[:-2])
        both = [np.broadcast_to(part, shape + part.shape[-2:]) for part in (reduced, settled)]
        left, values, right = np.linalg.svd(np.concatenate(both, axis=-2), full_matrices=False)
        basis = basis @ np.swapaxes(right, -1, -2)
        found = (values > TOLERANCE * scale) & (values < 1.5 * scale)
        inverses = np.where(found, 1 / np.where(found, values, 1.0), 0.0)
        back = np.swapaxes(left[..., : matrix.shape[-2], :], -1, -2)  # ... x d x m
        theta = theta + (basis * inverses[..., None, :]) @ (back @ (wanted - matrix @ theta))
        still_open = values <= TOLERANCE * scale
    return (theta if columns else theta[..., 0]), still_open.sum(-1)


def check_met(matrix: Array, theta: Array, values: Array, what: str) -> None:
    """Raise :class:`InputError` unless ``matrix @ theta`` is ``values``, within rounding."""
    if matrix.shape[-2] == 0:
        return
    columns = theta.ndim == matrix.ndim
    found = matrix @ (theta if columns else theta[..., None])
    gap = np.abs(found - (values if columns else values[..., None])).max()
    size = max(float(np.abs(values).max()), float(np.abs(found).max()), 1e-300)
    if gap > 1e-6 * size:
        raise InputError(
            f"{what} contradict each other: no linear predictor fits all of them (the best one misses by {gap:.3g}); "
            "give labels that are linear in the points"
        )


def root(matrix: Array, name: str) -> Array:
    """A matrix R with ``R^T R`` = the positive semidefinite ``matrix``, d x d.

    Raises:
        InputError: the matrix is not symmetric, or has a negative eigenvalue beyond rounding.
    """
    if not np.allclose(matrix, matrix.T, rtol=1e-8, atol=1e-10 * max(float(np.abs(matrix).max(initial=0)), 1e-300)):
        raise InputError(f"{name} is not symmetric: give a symmetric positive semidefinite matrix")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    if len(values) and values[0] < -1e-9 * max(float(np.abs(values).max()), 1e-300):
        raise InputError(
            f"{name} is not positive semidefinite (it has the eigenvalue {values[0]:.4g}): "
            "give a covariance, or a penalty that is never negative"
        )
    # Eigenvalues are exact to about the machine precision times the largest: what is smaller is noise, and its square
    # root would be large enough to count.
    noise = 4 * len(values) * np.finfo(np.float64).eps * float(np.abs(values).max(initial=0))
    rooted: Array = np.sqrt(np.where(values > noise, values, 0.0))[:, None] * vectors.T
    return rooted


def matrix_of(values: ArrayLike, name: str, columns: int | None = None) -> Array:
    """``values`` as a float64 matrix m x d; no rows are allowed where the number of columns is known.

    Raises:
        InputError: another number of dimensions or columns, or values that are not finite numbers.
    """
    found = _numbers(values, name)
    if found.size == 0 and columns is not None and found.ndim <= 2:
        return np.zeros((0, columns))
    if found.ndim != 2 or (columns is not None and found.shape[1] != columns):
        wanted = f"m x {columns}" if columns is not None else "m x d"
        raise InputError(f"{name} has shape {' x '.join(map(str, found.shape)) or '()'}, but must be {wanted}")
    return found


def vector_of(values: ArrayLike, name: str, length: int) -> Array:
    """``values`` as a float64 vector of the given length.

    Raises:
        InputError: another length, or values that are not finite numbers.
    """
    found = _numbers(values, name)
    if found.shape != (length,):
        raise InputError(
            f"{name} has shape {' x '.join(map(str, found.shape)) or '()'}, but must have {length} entries"
        )
    return found


def _numbers(values: ArrayLike | Sequence[float], name: str) -> Array:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must hold numbers, in rows of equal length") from None
    if not np.isfinite(found).all():
        raise InputError(f"{name} holds NaN or infinite values: give finite numbers")
    return found
