"""The laboratory: published and computed values, exact identities, oracles of another make, and bad input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nndefense.errors import InputError
from nndefense.theory import (
    SIZES,
    Curve,
    Intervals,
    Population,
    RobustFeature,
    Staircase,
    ThreePoints,
    boundaries,
    change,
    decompose,
    error_against_size,
    estimators,
    exciting,
    harm_by_condition,
    harmless_share,
    location,
    min_norm,
    random_populations,
    robust_error_in_ball,
    rst,
    rst_closed_form,
    rst_guarantees,
    standard_error,
)
from nndefense.theory.staircase import ESTIMATORS, _fit_stack

Array = np.ndarray[Any, np.dtype[np.float64]]
SEEDS = st.integers(0, 2**32 - 1)


# -- the spline staircase: reference values ----------------------------------------------------------------------------

# stairs, labelled points, x_noise, left knots -> L_std and, where known, L_rob of std, aug and rst.
STAIRCASES = [
    ((7, 4, 0.1, "-4..-2"), (0.026279, 1.627987, 0.001284), (0.257459, 2.667394, 0.001284)),
    ((7, 4, 0.1, "-3..-1"), (0.025216, 1.627662, 0.000445), None),
    ((10, 5, 0.1, "-4..-2"), (0.023604, 3.865124, 0.000078), (0.234605, 4.524592, None)),
    ((10, 5, 0.01, "-3..-1"), (0.002460, 3.799109, 0.000033), (0.242224, 4.524507, None)),
]


@pytest.mark.parametrize(("case", "standard", "robust"), STAIRCASES, ids=lambda c: str(c))
def test_the_three_estimators_have_their_known_errors(case: Any, standard: Any, robust: Any) -> None:
    stairs, labelled, noise, knots = case
    fits = Staircase(stairs, noise, knots).fit(range(labelled))
    assert list(fits.standard.values()) == pytest.approx(standard, abs=6e-7)
    for found, known in zip(fits.robust.values(), robust or (), strict=False):
        if known is not None:
            assert found == pytest.approx(known, abs=6e-7)
    # Invariant predictors have no robust error beyond their standard one.
    assert fits.robust["rst"] == pytest.approx(fits.standard["rst"], abs=1e-12)


def test_predictions_beyond_the_labelled_stairs() -> None:
    staircase = Staircase(7, 0.1)
    fits = staircase.fit([0, 1, 2, 3])
    known = {"std": (4.044, 5.090, 6.113), "aug": (2.135, 0.139, -1.817), "rst": (4.071, 5.116, 6.134)}
    for name, values in known.items():
        assert staircase.predict(getattr(fits, name), [4, 5, 6]) == pytest.approx(values, abs=6e-4)
    assert staircase.predict(fits.rst, [4.5, 5.5, 6.5]) == pytest.approx(known["rst"], abs=6e-4)
    # theta* is right everywhere, and the penalties are those of the two interpolants and of theta*.
    assert staircase.predict(staircase.theta_star, np.arange(14) / 2) == pytest.approx(np.arange(14) // 2, abs=1e-9)
    found = [staircase.roughness(theta) for theta in (fits.std, fits.aug, staircase.theta_star)]
    assert found == pytest.approx((0.032, 43.27, 98.4), rel=0.01)
    # The constraints leave directions open that no point of the support sees. The known penalty of theta_rst, 138.0, is
    # that of the shortest coefficients; theta_rst as it is here takes the smoothest, and predicts the same.
    population = staircase.population(staircase.noise_in_training)
    x = np.concatenate([staircase.support[:4].reshape(-1, 16), population.differences])
    y = np.concatenate([np.repeat(np.arange(4.0), 2), np.zeros(7)])
    shortest = rst(fits.std, x, y, sigma=population.sigma, norm=np.eye(16))
    assert staircase.roughness(shortest) == pytest.approx(138.0, abs=0.05)
    assert staircase.roughness(fits.rst) < 104
    assert staircase.support @ shortest == pytest.approx(staircase.support @ fits.rst, abs=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-10])
def test_single_points_that_are_added(ridge: float) -> None:
    staircase = Staircase(10, 0.1, ridge=ridge)
    on_the_line = staircase.one_extra_point(range(5), range(5, 10))
    assert on_the_line == pytest.approx([0.00023, 0.00018, 0.00014, 0.00011, 0.00014], abs=6e-6)
    between = staircase.one_extra_point(range(5), np.arange(10) + 0.5)
    known = [0.00767, 0.0989, 0.6058, 2.8212, 0.8932, 0.0819, 0.0240, 0.0097, 0.0046, 0.0012]
    assert between == pytest.approx(known, abs=1e-4)
    assert int(between.argmax()) == 3


# Means of 400 trials, 200 from n = 500 on.
KNOWN_MEANS = {
    "std": (0.0223, 0.0178, 0.0330, 0.0443, 0.0130, 0.0110, 0.0096, 0.0050, 0.0029, 0.0027, 0.0025, 0.0021),
    "aug": (1.616, 1.170, 0.830, 0.761, 0.660, 0.214, 0.103, 0.0216, 0.0032, 0.0011, 0.0005, 0.0),
    "rst": (0.0198, 0.0153, 0.0304, 0.0416, 0.0104, 0.0084, 0.0070, 0.0024, 0.0002, 0.0001, 0.0, 0.0),
}


TRIALS = 8_000


@pytest.fixture(scope="module")
def curve() -> Curve:
    """The means are driven by rare trials, so that their spread is only known from very many."""
    return error_against_size(Staircase(10, 0.01, "-3..-1"), trials=TRIALS, seed=1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_monte_carlo_has_its_known_means(curve: Curve, name: str) -> None:
    mean, error = curve.mean_and_error(curve.standard[name])
    spread = error * np.sqrt(TRIALS)
    known_error = spread / np.sqrt([400] * 10 + [200] * 2)
    scores = (mean - KNOWN_MEANS[name]) / (np.hypot(error, known_error) + 5e-5)
    assert np.abs(scores).max() < 3.5
    assert np.sqrt(np.mean(scores**2)) < 1.6


def test_the_monte_carlo_of_augmentation_agrees_with_its_exact_mean(curve: Curve) -> None:
    # theta_aug depends only on which stairs were drawn: 2^10 sets, whose probabilities inclusion-exclusion gives.
    staircase = Staircase(10, 0.01, "-3..-1")
    sets = ((np.arange(1024)[:, None] >> np.arange(10)) & 1).astype(float)
    seen = np.repeat(sets[..., None], 2, axis=2)
    weights = np.broadcast_to(staircase.population().weights, seen.shape)
    losses = staircase.population().standard_error(_fit_stack(staircase, seen, weights)["aug"], staircase.theta_star)
    for place, n in enumerate(SIZES):
        chance = (sets @ staircase.stair_probabilities) ** n  # that no stair outside the set was drawn
        for bit in range(10):
            pairs = chance.reshape(-1, 2, 2**bit)
            chance = np.stack([pairs[:, 0], pairs[:, 1] - pairs[:, 0]], axis=1).reshape(-1)
        assert chance.sum() == pytest.approx(1)
        exact = float(chance @ losses)
        spread = float(np.sqrt(chance @ (losses - exact) ** 2))
        mean = curve.standard["aug"][place].mean()
        assert abs(mean - exact) < 4.5 * spread / np.sqrt(TRIALS) + 1e-12


def test_the_stack_of_trials_is_solved_as_one_trial_is() -> None:
    staircase = Staircase(6, 0.1, "-3..-1")
    generator = np.random.default_rng(0)
    for _ in range(20):
        seen = generator.random((1, 6, 2)) < 0.3
        seen[0, 0, 0] = seen[0, 2, 0] = True
        weights = staircase.population(0.05).weights[None]
        stack = _fit_stack(staircase, seen.astype(float), weights)
        alone = staircase.fit(np.flatnonzero(seen.ravel()) / 2)
        for name in ESTIMATORS:
            assert staircase.support @ stack[name][0] == pytest.approx(
                staircase.support @ getattr(alone, name), abs=1e-7
            )


def test_few_unlabelled_points_do_not_make_self_training_explode() -> None:
    # Those that lie on stairs already labelled leave nothing but rounding noise to be fitted.
    found = error_against_size(Staircase(10, 0.01, "-3..-1"), (30, 300), trials=300, unlabelled=3)
    assert np.isfinite(found.standard["rst"]).all()
    assert found.standard["rst"].max() < 100
    many = error_against_size(Staircase(10, 0.01, "-3..-1"), (100,), trials=200, unlabelled=50_000, seed=5)
    whole = error_against_size(Staircase(10, 0.01, "-3..-1"), (100,), trials=200, seed=5)
    means = [c.standard["rst"].mean() for c in (many, whole)]
    errors = [c.mean_and_error(c.standard["rst"])[1][0] for c in (many, whole)]
    assert abs(means[0] - means[1]) < 5 * np.hypot(*errors) + 1e-3


def test_a_curve_repeats_under_its_seed() -> None:
    first, second, other = (
        error_against_size(Staircase(5), (10, 20), trials=30, unlabelled=50, seed=seed) for seed in (1, 1, 2)
    )
    for name in ESTIMATORS:
        assert np.array_equal(first.standard[name], second.standard[name])
        assert not np.array_equal(first.standard[name], other.standard[name])


def test_the_basis_is_that_of_cox_and_de_boor() -> None:
    for knots in ("-4..-2", "-3..-1"):
        staircase = Staircase(5, left_knots=knots)
        assert staircase.dimension == 12
        for t in np.linspace(0, 4.5, 37)[:-1]:
            values = [_cox_de_boor(staircase.knots, number, 4, t) for number in range(staircase.dimension)]
            assert staircase.features(t)[0] == pytest.approx(values, abs=1e-12)
    staircase = Staircase(5)
    difference = np.array([1.0, -2.0, 1.0])
    theta = np.arange(12.0) ** 2 + np.sin(np.arange(12))
    assert staircase.roughness(theta) == pytest.approx(np.sum(np.convolve(theta, difference, "valid") ** 2))


def _cox_de_boor(knots: Array, number: int, order: int, t: float) -> float:
    if order == 1:
        return float(knots[number] <= t < knots[number + 1])
    left = (t - knots[number]) / (knots[number + order - 1] - knots[number])
    right = (knots[number + order] - t) / (knots[number + order] - knots[number + 1])
    return left * _cox_de_boor(knots, number, order - 1, t) + right * _cox_de_boor(knots, number + 1, order - 1, t)


# -- estimators: oracles and identities --------------------------------------------------------------------------------


def problem(seed: int, *, scale: float = 0.0) -> tuple[Array, Array, Array, Array]:
    """x_std, x_ext, theta* and Sigma of a random problem; ``scale`` spreads Sigma and the points over decades."""
    generator = np.random.default_rng(seed)
    dimension = int(generator.integers(2, 12))
    labelled = int(generator.integers(0, dimension))
    added = int(generator.integers(1, 4))
    decades = 10.0 ** (-scale * generator.random(dimension))
    points = generator.normal(size=(labelled + added, dimension)) * decades
    if labelled and generator.random() < 0.3:
        # An augmented point that is almost a labelled one.
        points[labelled] = points[0] + 10.0 ** (-scale) * generator.normal(size=dimension) * decades
    factor = generator.normal(size=(dimension, dimension)) * 10.0 ** (-scale * generator.random(dimension))[:, None]
    return points[:labelled], points[labelled:], generator.normal(size=dimension), factor.T @ factor


def check_identity(seed: int, scale: float) -> None:
    x_std, x_ext, star, sigma = problem(seed, scale=scale)
    found = decompose(x_std, x_ext, star, sigma)
    left = found.loss_std - found.loss_aug
    right = found.v @ sigma @ found.v + 2 * found.w @ sigma @ found.v
    size = max(found.loss_std, found.loss_aug, abs(found.cost), found.benefit)
    assert abs(left - right) <= 1e-8 * size
    assert abs(left - (found.benefit - found.cost)) <= 1e-8 * size
    assert found.benefit >= 0
    if found.no_harm.any:
        assert not found.loss_aug - found.loss_std > 1e-8 * size


@given(SEEDS, st.floats(0, 6))
@settings(max_examples=300, deadline=None)
def test_the_decomposition_is_exact(seed: int, scale: float) -> None:
    check_identity(seed, scale)


def test_the_decomposition_is_exact_in_thousands_of_draws() -> None:
    for seed in range(2000):
        check_identity(seed, scale=(seed % 4) * 2.0)


@given(SEEDS, st.floats(0, 6))
@settings(max_examples=200, deadline=None)
def test_augmentation_never_hurts_where_sigma_is_the_identity(seed: int, scale: float) -> None:
    x_std, x_ext, star, sigma = problem(seed, scale=scale)
    found = decompose(x_std, x_ext, star, np.eye(len(sigma)))
    assert found.no_harm.isotropic
    assert not found.hurts
    assert found.loss_aug <= found.loss_std * (1 + 1e-9)


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_estimators_agree_with_the_pseudo_inverse(seed: int) -> None:
    x_std, x_ext, star, sigma = problem(seed)
    found = decompose(x_std, x_ext, star, sigma)
    both = np.concatenate([x_std, x_ext])
    assert found.theta_std == pytest.approx(np.linalg.pinv(x_std) @ x_std @ star, abs=1e-7)
    assert found.theta_aug == pytest.approx(np.linalg.pinv(both) @ both @ star, abs=1e-7)
    difference = found.theta_aug - star
    assert found.loss_aug == pytest.approx(difference @ sigma @ difference, rel=1e-7, abs=1e-12)


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_general_norm_is_a_change_of_variables(seed: int) -> None:
    x_std, x_ext, star, sigma = problem(seed)
    factor = np.random.default_rng(seed).normal(size=sigma.shape)
    norm = factor @ factor.T + 0.3 * np.eye(len(sigma))
    values, vectors = np.linalg.eigh(norm)
    half, back = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    there = decompose(x_std, x_ext, star, sigma, norm=norm)
    here = decompose(x_std @ back, x_ext @ back, half @ star, back @ sigma @ back)
    assert there.theta_aug == pytest.approx(back @ here.theta_aug, abs=1e-6)
    for one, other in ((there.benefit, here.benefit), (there.cost, here.cost), (there.loss_std, here.loss_std)):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    # What is least harmful in one geometry is so in its own.
    assert decompose(x_std, x_ext, star, 3 * norm, norm=norm).no_harm.isotropic
    assert not decompose(x_std, x_ext, star, 3 * norm, norm=norm).hurts


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_singular_norm_solves_the_optimality_conditions(seed: int) -> None:
    generator = np.random.default_rng(seed)
    dimension = int(generator.integers(3, 9))
    x = generator.normal(size=(int(generator.integers(2, dimension)), dimension))
    penalty = np.diff(np.eye(dimension), axis=0)
    norm = penalty.T @ penalty  # blind to constants
    y = generator.normal(size=len(x))
    system = np.block([[norm, x.T], [x, np.zeros((len(x), len(x)))]])
    expected = np.linalg.solve(system, np.concatenate([np.zeros(dimension), y]))[:dimension]
    assert min_norm(x, y, norm=norm) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_eigenvector_condition_and_its_counter_example() -> None:
    # x_ext = e1 + e2 is an eigenvector of Sigma, but what it adds to x_std = e1 is e2, which is not.
    sigma = np.array([[2.0, -1.0, 0.5], [-1.0, 2.0, -0.5], [0.5, -0.5, 1.0]])
    x_ext = np.array([[1.0, 1.0, 0.0]])
    assert sigma @ x_ext[0] == pytest.approx(x_ext[0])
    hurting = decompose([[1.0, 0, 0]], x_ext, [0.0, 0.1, 1.0], sigma)
    assert hurting.hurts
    assert not hurting.no_harm.any
    # Without the labelled point, x_ext adds itself.
    assert decompose(np.zeros((0, 3)), x_ext, [0.0, 0.1, 1.0], sigma).no_harm.invariant


def test_harm_under_each_condition() -> None:
    counts = {count.name: count for count in harm_by_condition(400, seed=3)}
    for name in ("Sigma = I", "w = 0", "Q_std x_ext is an eigenvector of Sigma"):
        assert counts[name].hits == 0
    for name in ("one point added", "two points added", "x_ext is an eigenvector of Sigma"):
        assert 0.1 < counts[name].interval[0] < counts[name].share < counts[name].interval[1] < 0.4
    assert harm_by_condition(50, seed=3) == harm_by_condition(50, seed=3)


# -- robust self-training ----------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_self_training_by_formula_and_by_least_squares(seed: int) -> None:
    x_std, x_ext, star, sigma = problem(seed)
    sigma = sigma + 0.05 * np.eye(len(sigma))
    both = np.concatenate([x_std, x_ext])
    std = min_norm(x_std, x_std @ star)
    solved = rst(std, both, both @ star, sigma=sigma)
    assert solved == pytest.approx(rst_closed_form(std, both, both @ star, sigma), rel=1e-5, abs=1e-6)
    # The population is its own sample, when every point of it is seen.
    values, vectors = np.linalg.eigh(sigma)
    sample = np.sqrt(values * len(values))[:, None] * vectors.T
    assert rst(std, both, both @ star, unlabelled=sample) == pytest.approx(solved, rel=1e-5, abs=1e-6)
    # Pythagoras: the Sigma-norm projection of theta_std on a set that holds theta*.
    lost = standard_error(std, star, sigma)
    assert lost == pytest.approx(standard_error(std, solved, sigma) + standard_error(solved, star, sigma), rel=1e-6)


@given(SEEDS, st.floats(0, 7))
@settings(max_examples=300, deadline=None)
def test_self_training_never_raises_the_standard_error(seed: int, scale: float) -> None:
    x_std, x_ext, star, sigma = problem(seed, scale=scale)
    both = np.concatenate([x_std, x_ext])
    std = min_norm(x_std, x_std @ star)
    solved = rst(std, both, both @ star, sigma=sigma)
    assert standard_error(solved, star, sigma) <= standard_error(std, star, sigma) * (1 + 1e-8) + 1e-13


@pytest.mark.slow
def test_the_guarantees_of_self_training_in_thousands_of_draws() -> None:
    counts = {count.name: count.hits for count in rst_guarantees(3000, seed=7)}
    unconditional = counts.pop("L_rob(rst) > L_rob(aug)")
    assert counts.pop("L_rob(rst) > L_rob(aug), fitted to X_std and X_ext alone") > 300
    assert counts.pop("the same, where augmentation hurts") > 10
    assert len(counts) == 4
    assert set(counts.values()) == {0}
    # Said without its condition, the inequality on robust errors is false in general.
    assert unconditional > 300


def test_a_population_on_which_augmentation_beats_self_training() -> None:
    # x_1 = e1 + e3 may become e1 - e3; x_2 = e1 + e2 stays; y = the first coordinate. theta_aug finds theta* = e1. The
    # standard interpolant of x_1 calls x_2 one half, and self-training keeps to that.
    points = [[[1, 0, 1], [1, 0, -1]], [[1, 1, 0], [1, 1, 0]]]
    population = Population.of(points, [[0.5, 0.0], [0.5, 0.0]])
    fits = estimators(population, [[0, 0]], [1.0, 0.0, 0.0])
    assert fits.std == pytest.approx([0.5, 0, 0.5])
    assert fits.aug == pytest.approx([1, 0, 0])
    assert fits.rst == pytest.approx([1, -0.5, 0])
    assert fits.robust["aug"] == pytest.approx(0)
    assert fits.robust["rst"] == pytest.approx(1 / 8)
    assert fits.standard["rst"] <= fits.standard["std"] + 1e-12
    mended = estimators(population, [[0, 0]], [1.0, 0.0, 0.0], teacher="aug")
    assert mended.robust["rst"] == pytest.approx(0, abs=1e-12)


def test_robust_errors_are_those_of_the_worst_version() -> None:
    generator = np.random.default_rng(0)
    for population, _, star in itertools.islice(random_populations(50, seed=1), 50):
        theta = generator.normal(size=len(star))
        worst, mean = 0.0, 0.0
        for versions, weights in zip(population.points, population.weights, strict=True):
            errors = [float((x @ theta - x @ star) ** 2) for x in versions]
            worst += max(errors) * weights.sum()
            mean += float(np.dot(errors, weights))
        assert population.robust_error(theta, star) == pytest.approx(worst)
        assert population.standard_error(theta, star) == pytest.approx(mean)
        assert standard_error(theta, star, population.sigma) == pytest.approx(mean)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_robust_error_in_a_ball_is_reached_and_not_exceeded(norm: str) -> None:
    generator = np.random.default_rng(4)
    x, theta, star = generator.normal(size=(5, 3)), generator.normal(size=3), generator.normal(size=3)
    found = robust_error_in_ball(theta, star, x, eps=0.3, norm=norm)
    side = np.sign(x @ (theta - star))[:, None]
    worst = np.sign(theta) if norm == "linf" else theta / np.linalg.norm(theta)
    assert np.mean(((x + 0.3 * side * worst) @ theta - x @ star) ** 2) == pytest.approx(found)
    for _ in range(200):
        delta = generator.normal(size=(5, 3))
        length = np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)
        moved = x + 0.3 * delta / length[:, None]
        assert np.mean((moved @ theta - x @ star) ** 2) <= found + 1e-12


# -- degenerate and bad input ------------------------------------------------------------------------------------------


def test_degenerate_problems_have_defined_answers() -> None:
    # No rows: nothing is asked of theta.
    assert np.array_equal(min_norm(np.zeros((0, 3)), []), np.zeros(3))
    # Rank-deficient rows: a point twice, and their sum, say nothing new.
    x = np.array([[1.0, 2, 0], [1, 2, 0], [0, 1, 1], [1, 3, 1]])
    star = np.array([1.0, -1, 2])
    assert min_norm(x, x @ star) == pytest.approx(min_norm(x[1:3], x[1:3] @ star))
    found = decompose(x, x[:1], star, np.diag([1.0, 0, 3]))
    assert (found.benefit, found.cost, found.hurts) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12), False)
    # Sigma = 0: no error counts.
    assert decompose(x[:1], x[2:3], star, np.zeros((3, 3))).loss_aug == 0
    # A singular Sigma leaves self-training near its teacher in the directions that nobody sees.
    solved = rst([1.0, 5, 0], [[1.0, 0, 0]], [2.0], sigma=np.diag([1.0, 0, 0]))
    assert solved == pytest.approx([2, 5, 0])
    # No constraints at all, or no augmented points.
    assert rst([1.0, 2], np.zeros((0, 2)), [], sigma=np.eye(2)) == pytest.approx([1, 2])
    assert not decompose(x[:1], np.zeros((0, 3)), star, np.eye(3)).hurts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: min_norm([[1, 0], [1, 0]], [1, 2]), "contradict"),
        (lambda: min_norm([[0, 0]], [1]), "contradict"),
        (lambda: min_norm([[1, 0]], [1, 2]), "must have 1 entries"),
        (lambda: min_norm([1, 0], [1]), "must be m x d"),
        (lambda: min_norm([[1, np.nan]], [1]), "NaN"),
        (lambda: min_norm([[1, "a"]], [1]), "numbers"),
        (lambda: min_norm([[1, 0]], [1], norm=[[1, 0], [0, -1]]), "not positive semidefinite"),
        (lambda: min_norm([[1, 0]], [1], norm=[[1, 1], [0, 1]]), "not symmetric"),
        (lambda: min_norm([[1, 0]], [1], norm=np.eye(3)), "m x 2"),
        (lambda: decompose([[1, 0]], [[0, 1]], [1, 1], [[1, 2], [2, 1]]), "sigma is not positive semidefinite"),
        (lambda: decompose([[1, 0]], [[0, 1]], [1, 1, 1], np.eye(2)), "theta_star"),
        (lambda: decompose([[1, 0]], [[0, 1, 1]], [1, 1], np.eye(2)), "x_ext"),
        (lambda: decompose([[1, 0]], [[1, 0]], [1, 1], np.eye(2), norm=np.diag([1, 0])), "does not determine"),
        (lambda: rst([1, 0], [[1, 0], [1, 0]], [1, 2], sigma=np.eye(2)), "contradict"),
        (lambda: rst([1, 0], [[1, 0]], [1]), "give one"),
        (lambda: rst([1, 0], [[1, 0]], [1], sigma=np.eye(2), unlabelled=[[1, 0]]), "give one"),
        (lambda: rst_closed_form([1, 0], [[1, 0]], [1], np.diag([1, 0])), "singular"),
        (lambda: robust_error_in_ball([1], [1], [[1]], eps=-1), "at least 0"),
        (lambda: robust_error_in_ball([1], [1], [[1]], eps=1, norm="l1"), "linf or l2"),
        (lambda: robust_error_in_ball([1], [1], np.zeros((0, 1)), eps=1), "at least one point"),
        (lambda: Population.of([[1, 2]], [[1]]), "S x T x d"),
        (lambda: Population.of([[[1, 2]]], [[-1]]), "at least 0"),
        (lambda: Population.of([[[1, 2]]], [[0]]), "above 0"),
        (lambda: estimators(Population.of([[[1, 0], [1, 1]]], [[1, 0]]), [[0, 0]], [1, 1]), "consistent"),
        (lambda: estimators(Population.of([[[1, 0], [1, 1]]], [[1, 0]]), [[1, 0]], [1, 0]), "pairs"),
        (lambda: estimators(Population.of([[[1, 0], [1, 1]]], [[1, 0]]), [[0, 0]], [1, 0], teacher="x"), "std or aug"),
        (lambda: Staircase(1), "at least 2 stairs"),
        (lambda: Staircase(5, 1.5), "probability"),
        (lambda: Staircase(5, left_knots="-9"), "left_knots"),
        (lambda: Staircase(5, ridge=-1), "ridge"),
        (lambda: Staircase(5).fit([0.25]), "points of the stairs"),
        (lambda: Staircase(5).fit([5]), "points of the stairs"),
        (lambda: Staircase(5).features(4.6), "support"),
        (lambda: error_against_size(Staircase(5), ()), "at least 1"),
        (lambda: error_against_size(Staircase(5), (5,), trials=1), "at least 2 trials"),
        (lambda: error_against_size(Staircase(5), (5,), unlabelled=0), "unlabelled"),
        (lambda: harm_by_condition(0), "at least 1 draw"),
        (lambda: harm_by_condition(1, dimension=5, labelled=3), "more than 5"),
        (lambda: RobustFeature(p=1.0), "probability"),
        (lambda: RobustFeature(eta=-1), "at least 0"),
        (lambda: RobustFeature().accuracy(0, 0), "decides nothing"),
        (lambda: RobustFeature().accuracy(1, 0, eps=-1), "eps"),
        (lambda: Intervals(1), "at least 2"),
        (lambda: Intervals(4).errors([0, 1], 0.1), "4 labels"),
        (lambda: Intervals(2).errors([0, 2], 0.1), "labels 0 or 1"),
        (lambda: Intervals(2).errors([0, 1], -0.1), "radius"),
        (lambda: Intervals(20).every_rule(), "at most 16"),
        (lambda: change(0.0, [1, 2, 3], np.eye(2)), "theta_star"),
        (lambda: harmless_share([1, 2], np.eye(3)), "2"),
    ],
)
def test_bad_input_is_one_clear_error(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# -- toys and directions -----------------------------------------------------------------------------------------------


@given(st.floats(0.5, 0.99), st.floats(0, 1), st.integers(1, 30), st.floats(-2, 2), st.floats(-1, 1), st.floats(0, 0.9))
@settings(max_examples=40, deadline=None)
def test_accuracies_on_tsipras_toy_are_those_of_a_sample(
    p: float, eta: float, d: int, first: float, rest: float, eps: float
) -> None:
    toy = RobustFeature(p, eta, d)
    if abs(rest) < 1e-3:
        rest = 0.5
    x, y = toy.sample(20_000, seed=d)
    moved = x - eps * y[:, None] * np.sign([first] + [rest] * d)
    for points, radius in ((x, 0.0), (moved, eps)):
        right = float(np.mean(y * (points @ np.array([first] + [rest] * d)) > 0))
        assert right == pytest.approx(toy.accuracy(first, rest, eps=radius), abs=0.02)


def test_tsipras_toy_in_its_closed_forms() -> None:
    toy = RobustFeature(p=0.95, eta=0.3, d=100)
    assert toy.averaging() == pytest.approx(0.99865, abs=1e-5)  # Phi(3): eta = 3 / sqrt(d) gives over 99 %
    assert toy.averaging(eps=0.6) == pytest.approx(1 - toy.averaging())
    assert toy.accuracy(1, 0) == toy.accuracy(1, 0, eps=0.6) == 0.95
    best = toy.accuracy(*toy.optimal_weights)
    for share in np.linspace(0, 1, 201):
        first, rest = float(share), float(1 - share)
        standard, robust = toy.accuracy(first, rest), toy.accuracy(first, rest, eps=0.6)
        assert standard <= best + 1e-12
        assert robust <= toy.robust_bound(standard) + 1e-9  # their Theorem 2.1


def test_the_errors_of_rules_on_intervals() -> None:
    toy = Intervals(10)
    assert [float(e) for e in toy.errors(toy.labels, toy.eps)] == [0, 1]
    assert [float(e) for e in toy.errors(0 * toy.labels, toy.eps)] == [0.5, 0.5]
    assert float(toy.errors(toy.labels, 0.03)[1]) == pytest.approx(0.54)
    generator = np.random.default_rng(0)
    x = (np.arange(4000) + 0.5) / 4000
    label = np.minimum((x * 10).astype(int), 9) % 2
    for radius in (0.0, 0.02, 0.1, 0.17, 0.35, 2.0):
        rules = generator.integers(0, 2, size=(4, 10))
        natural, robust = toy.errors(rules, radius)
        for rule, own, worst in zip(rules, natural, robust, strict=True):
            near = np.linspace(-radius, radius, 801)
            seen = x[:, None] + near
            inside = (seen >= 0) & (seen <= 1)
            agrees = rule[np.clip((seen * 10).astype(int), 0, 9)] == label[:, None]
            assert own == pytest.approx(np.mean(rule != toy.labels))
            assert worst == pytest.approx(1 - np.mean((agrees | ~inside).all(1)), abs=0.006)
    # No rule is good in both: this is where no amount of data helps.
    natural, robust = toy.errors(toy.every_rule(), toy.eps)
    assert robust.min() == pytest.approx(0.5)
    assert natural[robust < 0.75].min() >= 0.3


def test_the_share_of_harmless_directions() -> None:
    assert harmless_share([1, 0.2], np.diag([1, 4])) == pytest.approx(0.689, abs=5e-4)
    assert harmless_share([1, 0.2], np.diag([1, 25])) == pytest.approx(0.331, abs=5e-4)
    assert harmless_share([1, 0.2], np.eye(2)) == pytest.approx(1)


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_directions_agree_with_the_decomposition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    star = generator.normal(size=2)
    factor = generator.normal(size=(2, 2))
    sigma = factor @ factor.T
    angles = generator.uniform(-4, 4, size=7)
    for angle, found in zip(angles, change(angles, star, sigma), strict=True):
        x = [[np.cos(angle), np.sin(angle)]]
        split = decompose(np.zeros((0, 2)), x, star, sigma)
        assert found == pytest.approx(split.loss_aug - split.loss_std, abs=1e-9)
    # Midpoints of a fine grid fall on the right side of every boundary.
    grid = (np.arange(20_000) + 0.5) / 20_000 * np.pi - np.pi / 2
    harmless = float(np.mean(change(grid, star, sigma) <= 0))
    assert harmless_share(star, sigma) == pytest.approx(harmless, abs=1e-3)
    assert len(boundaries(star, sigma)) <= 5


# -- a class that is too small, and two things called robust


def test_no_line_is_accurate_and_robust_but_an_interval_is() -> None:
    points = ThreePoints()
    errors = [points.line(*line) for line in points.lines()]
    assert min(errors)[0] == 0
    assert all(robust >= standard for standard, robust in errors)
    # Whoever makes no standard error can be moved to err everywhere, and nobody is below the smaller side's share.
    assert all(robust > 0.5 for standard, robust in errors if standard == 0)
    assert min(robust for _, robust in errors) == pytest.approx(0.3)
    assert points.interval(1.0) == (0, 0)
    assert points.interval(3.0)[0] == pytest.approx(0.6)
    for bad in ({"height": 1.0}, {"eps": 1.0}, {"height": 0.0}, {"middle": 1.0}, {"eps": float("nan")}):
        with pytest.raises(InputError, match="0 < height < eps < 1"):
            ThreePoints(**bad)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.4])
def test_mean_and_median_of_spoilt_training_values_are_those_of_a_large_sample(share: float) -> None:
    found, generator = location(share, 10.0), np.random.default_rng(0)
    values = np.where(generator.random(400_000) < share, 10.0, generator.normal(size=400_000))
    assert found["mean"]["predicted"] == pytest.approx(values.mean(), abs=0.03)
    assert found["median"]["predicted"] == pytest.approx(float(np.median(values)), abs=0.03)
    assert found["median"]["error"] == pytest.approx(1 + found["median"]["predicted"] ** 2)
    with pytest.raises(InputError, match="share in"):
        location(0.5)


def test_fitted_to_the_given_points_alone_self_training_keeps_one_guarantee_and_breaks_the_other() -> None:
    counts = {count.name: count for count in rst_guarantees(400, seed=0)}
    assert counts["L_std(rst) > L_std(std), fitted to X_std and X_ext alone"].hits == 0
    broken = counts["the same, where augmentation hurts"]
    assert 0 < broken.hits < broken.draws < 400


def test_what_excites_a_unit_or_a_direction_is_its_largest_entries() -> None:
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(4), 25)
    activations = np.concatenate([np.eye(4)[labels] * 9, np.ones((100, 1))], 1) + 0.0
    activations[:, :4] += generator.random((100, 4))
    found = exciting(activations, labels, count=5, draws=200, seed=1)
    # The fifth unit is the same for all images.
    assert found["units"].names == ("unit 0", "unit 1", "unit 2", "unit 3")
    for unit, chosen in enumerate(found["units"].chosen):
        assert chosen.tolist() == sorted(range(100), key=lambda n: -activations[n, unit])[:5]
    assert found["units"].to_json() == {"directions": 4, "share": 1, "low": 1, "high": 1}
    # A random direction has a largest class, too; images drawn at random have none.
    assert found["directions"].shares.mean() > 0.9
    assert found["chance"].shares.mean() < 0.6
    again = exciting(activations, labels, count=5, draws=200, seed=1)
    assert all(np.array_equal(found[kind].chosen, again[kind].chosen) for kind in found)
    turned = exciting(activations * -1, labels, count=5, draws=200, seed=1)
    assert not np.array_equal(turned["directions"].chosen, found["directions"].chosen)


def test_what_cannot_excite_is_refused() -> None:
    labels = np.zeros(4, dtype=np.int64)
    with pytest.raises(InputError, match="4 of 4 images cannot be the most exciting"):
        exciting(np.eye(4), labels, count=4)
    with pytest.raises(InputError, match="the same for all images"):
        exciting(np.ones((4, 3)), labels, count=2)
    with pytest.raises(InputError, match="NaN or infinite"):
        exciting(np.full((4, 3), np.nan), labels, count=2)
