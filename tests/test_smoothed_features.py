"""Smoothed features: the Lipschitz bound, the error of a mean, the worst vote by brute force, and what is certified."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_exact import vote_surface

from nndefense.attacks.retrieval import Knowledge, RetrievalSurface
from nndefense.certificates import registry
from nndefense.certificates.smoothed_features import SmoothedFeatures, mean_error, radius_of
from nndefense.errors import InputError


def surface_of(seed: int, k: int = 3, rows: int = 12, classes: int = 3) -> RetrievalSurface:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.rand((rows, 4), generator=generator)
    votes = torch.rand((rows, classes), generator=generator).pow(4) + 0.01
    weights = torch.rand(rows, generator=generator) + 0.1
    matrix = torch.randn((4, 4), generator=generator) / 2
    return vote_surface(vectors, votes / votes.sum(1, keepdim=True), matrix, torch.full((4,), 0.25), k, weights)


def with_kernel(surface: RetrievalSurface, temperature: float | None) -> RetrievalSurface:
    assert surface.rows is not None
    return replace(surface, rows=replace(surface.rows, temperature=temperature))


def test_the_lipschitz_constant_is_the_known_one_and_no_function_in_the_ball_moves_faster() -> None:
    sigma, ball = 0.3, 2.0
    move = torch.tensor([1e-6])
    slope = float(move / radius_of(move, sigma, ball))
    assert slope == pytest.approx(ball * math.sqrt(2 / math.pi) / sigma, rel=1e-4)
    # The sign of a half-space reaches the bound: its mean is R (2 Phi(x / sigma) - 1), and moves from -r/2 to r/2.
    for r in (0.1, 0.5, 2.0):
        moved = 2 * ball * (2 * stats.norm.cdf(r / 2 / sigma) - 1)
        assert float(radius_of(torch.tensor([moved]), sigma, ball)) == pytest.approx(r, rel=1e-9)


def test_the_error_of_a_mean_is_bounded_as_often_as_it_says_and_falls_with_the_draws() -> None:
    generator = np.random.default_rng(0)
    ball, alpha, missed = 1.0, 0.05, 0
    for _ in range(200):
        draws = generator.normal(size=(64, 3)) * 0.5
        draws /= np.maximum(np.linalg.norm(draws, axis=1, keepdims=True), ball)
        half = ((draws[0::2] - draws[1::2]) ** 2).sum(1) / 2
        spread, variance = torch.tensor([half.mean()]), torch.tensor([half.var(ddof=1)])
        # By symmetry the expectation is 0.
        missed += np.linalg.norm(draws.mean(0)) > float(mean_error(spread, variance, 64, ball, alpha))
    assert missed <= 200 * alpha
    errors = [float(mean_error(spread, variance, m, ball, alpha)) for m in (64, 1000, 100_000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_no_feature_within_the_margin_has_another_vote(seed: int, temperature: float | None) -> None:
    smoothed = SmoothedFeatures(with_kernel(surface_of(seed), temperature), 0.1, draws=8)
    features = torch.rand((5, 4), generator=torch.Generator().manual_seed(seed)).double()
    classes = smoothed._vote(features).argmax(1)
    margin = smoothed._margin(features, classes)
    assert (margin > 0).any()
    generator = torch.Generator().manual_seed(seed + 100)
    away = torch.randn((5, 400, 4), generator=generator).double()
    away *= (margin[:, None] / away.norm(dim=2))[..., None]
    moved = (features[:, None] + away).flatten(0, 1)
    votes = smoothed._vote(moved).argmax(1).view(5, 400)
    assert (votes == classes[:, None])[margin > 0].all()


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_vote_is_that_of_all_choices_of_the_rows_between(seed: int) -> None:
    smoothed = SmoothedFeatures(surface_of(seed), 0.1, draws=8)
    rows, k = smoothed.rows, smoothed.base.k
    every = torch.arange(rows.count)
    vectors, votes, weights = (
        rows.vectors(every).double(),
        rows.posteriors(every).double(),
        rows.weights(every).double(),
    )
    feature = torch.rand((1, 4), generator=torch.Generator().manual_seed(seed)).double()
    c = smoothed._vote(feature).argmax(1)
    margin = float(smoothed._margin(feature, c))
    distances = (vectors - feature).norm(dim=1)
    ordered = distances.sort().values

    def stands(t: float) -> bool:
        possible = set((distances - t <= ordered[k - 1] + t).nonzero()[:, 0].tolist())
        certain = set((distances + t < ordered[k] - t).nonzero()[:, 0].tolist())
        for chosen in itertools.combinations(sorted(possible), k):
            if certain <= set(chosen):
                p = (weights[list(chosen), None] * votes[list(chosen)]).sum(0)
                if int(p.argmax()) != int(c):
                    return False
        return True

    assert stands(margin * 0.999)
    assert not stands(margin * 1.001 + 1e-4)


def test_certificates_hold_and_their_attackers_follow_a_gradient() -> None:
    surface = surface_of(1)
    x = torch.rand((4, 1, 2, 2), generator=torch.Generator().manual_seed(3))
    found = registry.get("smoothed-features").run(surface, x, sigma=0.1, draws=2000, seed=2)
    held = found.radius > 0
    assert held.any()
    assert found.norm == "l2"
    smoothed = SmoothedFeatures(surface, 0.1, draws=500, seed=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        delta = torch.randn(x.shape, generator=generator)
        delta *= (found.radius.float() / delta.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        assert not smoothed.refutes((x + delta).clamp(0, 1)[held], found.prediction[held]).any()
    wrong = (found.prediction[held] + 1) % 3
    assert SmoothedFeatures(surface, 0.1, draws=2000).refutes(x[held], wrong).any()
    assert torch.equal(smoothed(x), smoothed(x.flip(0)).flip(0))
    seen = smoothed.surface()
    assert seen.features is not None
    leaf = x.clone().requires_grad_()
    seen.features(leaf).sum().backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("surface", "settings", "says"),
    [
        (surface_of(0), {"sigma": 0.0}, "sigma is 0"),
        (surface_of(0), {"draws": 3}, "draws is 3"),
        (surface_of(0), {"alpha": 0.0}, "alpha is 0"),
        (replace(surface_of(0), alpha=0.5), {}, "neighbours alone"),
        (replace(surface_of(0), knowledge=Knowledge.PARTIAL), {}, "every row"),
    ],
)
def test_what_cannot_be_smoothed_is_refused(surface: RetrievalSurface, settings: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        registry.get("smoothed-features").run(surface, torch.rand(1, 1, 2, 2), **{"sigma": 0.1, "draws": 8, **settings})
