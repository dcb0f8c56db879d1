"""Error against sample size on the staircase: figure 6a of Raghunathan et al. (ICML 2020), vectorised over trials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nndefense.errors import InputError
from nndefense.theory.solve import Array, in_order, root
from nndefense.theory.staircase import Staircase

# The sizes and numbers of trials of the authors' figure, which shows those above 32.
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
