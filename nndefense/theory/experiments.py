"""Random problems: how often augmentation hurts under each condition, and what robust self-training guarantees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nndefense.errors import InputError
from nndefense.statistics import wilson_interval
from nndefense.theory.decomposition import decompose
from nndefense.theory.estimators import Population, estimators
from nndefense.theory.solve import Array

# One problem: x_std n x d, x_ext m x d, theta* d, Sigma d x d.
Problem = tuple[Array, Array, Array, Array]


@dataclass(frozen=True)
class Count:
    """How many of ``draws`` random problems were ``hits``, with the Wilson 95 % interval of the share."""

    name: str
    hits: int
    draws: int

    @property
    def share(self) -> float:
        """hits / draws; 0 without draws."""
        return self.hits / max(self.draws, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson_interval(self.hits, self.draws) if self.draws else (0.0, 1.0)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {"name": self.name, "hits": self.hits, "draws": self.draws, "share": self.share, "ci": self.interval}


def harm_by_condition(draws: int = 2000, *, dimension: int = 8, labelled: int = 3, seed: int = 0) -> list[Count]:
    """Count random problems in which augmentation raises the standard error, under each condition.

    Points and theta* are standard normal, and Sigma is ``B B^T / d`` with a standard normal B, d x d, unless the
    condition says otherwise. The first two rows are what is generally true, the middle three are enough for no harm,
    and the last is a condition that is sometimes quoted and is not enough.

    Args:
        draws: problems per condition.
        dimension: d, above ``labelled + 2``.
        labelled: number of labelled points n.
        seed: of all draws.

    Raises:
        InputError: numbers that leave nothing to draw.
    """
    _check(draws, dimension, labelled + 2)
    families: list[tuple[str, Callable[[np.random.Generator], Problem]]] = [
        ("one point added", lambda g: _generic(g, dimension, labelled, 1)),
        ("two points added", lambda g: _generic(g, dimension, labelled, 2)),
        ("Sigma = I", lambda g: (*_generic(g, dimension, labelled, 2)[:3], np.eye(dimension))),
        ("w = 0", lambda g: _complete(g, dimension, labelled)),
        ("Q_std x_ext is an eigenvector of Sigma", lambda g: _eigenvector(g, dimension, labelled, projected=True)),
        ("x_ext is an eigenvector of Sigma", lambda g: _eigenvector(g, dimension, labelled, projected=False)),
    ]
    counts = []
    for number, (name, draw) in enumerate(families):
        generator = np.random.default_rng([seed, number])
        counts.append(Count(name, sum(decompose(*draw(generator)).hurts for _ in range(draws)), draws))
    return counts


def rst_guarantees(draws: int = 2000, *, seed: int = 0) -> list[Count]:
    """Count populations, drawn by ``seed``, in which each inequality about robust self-training fails, beyond rounding.

    The first three cannot fail. The fourth, without a condition, does. The last three are of the form without
    invariance (``everywhere=False`` of :func:`nndefense.theory.estimators.estimators`): there the inequality on robust
    errors fails even among the problems in which augmentation hurts, which are then the draws.
    """
    _check(draws, 1, 0)
    failed = dict.fromkeys(
        (
            "L_std(rst) > L_std(std)",
            "L_rob(rst) > L_rob(aug) although L_std(std) <= L_rob(aug)",
            "L_rob(rst) > L_rob(aug), teacher theta_aug",
            "L_rob(rst) > L_rob(aug)",
            "L_std(rst) > L_std(std), fitted to X_std and X_ext alone",
            "L_rob(rst) > L_rob(aug), fitted to X_std and X_ext alone",
            "the same, where augmentation hurts",
        ),
        0,
    )
    *_, last = names = list(failed)
    hurt = 0
    for population, labelled, star in random_populations(draws, seed=seed):
        by_std = estimators(population, labelled, star)
        by_aug = estimators(population, labelled, star, teacher="aug")
        fitted = estimators(population, labelled, star, everywhere=False)
        size = max(*by_std.standard.values(), *by_std.robust.values())
        worse = _above(by_std.robust["rst"], by_std.robust["aug"], size)
        looser = _above(fitted.robust["rst"], fitted.robust["aug"], max(size, *fitted.robust.values()))
        hurts = _above(by_std.standard["aug"], by_std.standard["std"], size)
        hurt += hurts
        outcomes = (
            _above(by_std.standard["rst"], by_std.standard["std"], size),
            worse and by_std.standard["std"] <= by_std.robust["aug"],
            _above(by_aug.robust["rst"], by_aug.robust["aug"], size),
            worse,
            _above(fitted.standard["rst"], fitted.standard["std"], size),
            looser,
            looser and hurts,
        )
        for name, fails in zip(names, outcomes, strict=True):
            failed[name] += fails
    return [Count(name, hits, hurt if name == last else draws) for name, hits in failed.items()]


def random_populations(draws: int, *, seed: int = 0) -> Iterator[tuple[Population, Array, Array]]:
    """Yield ``draws`` random populations (by ``seed``), labelled places n x 2 and a consistent theta*.

    3 to 8 dimensions, up to three times as many kinds of points, each with one perturbation in a random subspace that
    theta* is blind to; the dimensions have very different scales, and the weights come from a flat Dirichlet law.
    """
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        dimension = int(generator.integers(3, 9))
        kinds = int(generator.integers(dimension, 3 * dimension))
        labelled = int(generator.integers(1, dimension))
        blind = generator.normal(size=(int(generator.integers(1, dimension - 1)), dimension))
        points = generator.normal(size=(kinds, dimension)) * np.exp(generator.normal(size=dimension))
        moved = points + generator.normal(size=(kinds, len(blind))) @ blind
        drawn = generator.normal(size=dimension)
        star = drawn - np.linalg.pinv(blind) @ (blind @ drawn)
        weights = generator.dirichlet(np.ones(kinds))[:, None] * np.array([1.0, 0.0])
        places = np.stack([generator.choice(kinds, size=labelled, replace=False), np.zeros(labelled)], axis=1)
        yield Population.of(np.stack([points, moved], axis=1), weights), places, star


def _above(left: float, right: float, size: float) -> bool:
    return left - right > 1e-8 * size


def _check(draws: int, dimension: int, least: int) -> None:
    if draws < 1 or dimension <= least:
        raise InputError(f"give at least 1 draw and more than {least} dimensions, not {draws} and {dimension}")


def _covariance(generator: np.random.Generator, dimension: int) -> Array:
    factor = generator.normal(size=(dimension, dimension))
    found: Array = factor @ factor.T / dimension
    return found


def _generic(generator: np.random.Generator, dimension: int, labelled: int, added: int) -> Problem:
    points = generator.normal(size=(labelled + added, dimension))
    star = generator.normal(size=dimension)
    return points[:labelled], points[labelled:], star, _covariance(generator, dimension)


def _complete(generator: np.random.Generator, dimension: int, labelled: int) -> Problem:
    """theta* lies in the span of labelled and augmented points."""
    x_std, x_ext, _, sigma = _generic(generator, dimension, labelled, 2)
    return x_std, x_ext, generator.normal(size=labelled + 2) @ np.concatenate([x_std, x_ext]), sigma


def _eigenvector(generator: np.random.Generator, dimension: int, labelled: int, *, projected: bool) -> Problem:
    """One augmented point; it, or what it adds to the labelled points, is an eigenvector of Sigma."""
    x_std, x_ext, star, _ = _generic(generator, dimension, labelled, 1)
    along = x_ext[0]
    if projected:
        along = along - np.linalg.pinv(x_std) @ (x_std @ along)
    along = along / np.linalg.norm(along)
    # Any covariance on the directions orthogonal to it, and a variance of its own along it.
    others = np.eye(dimension) - np.outer(along, along)
    sigma = others @ _covariance(generator, dimension) @ others + generator.exponential() * np.outer(along, along)
    return x_std, x_ext, star, (sigma + sigma.T) / 2
