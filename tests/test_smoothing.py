"""Randomised smoothing: the paper's arithmetic, noise that depends on the image alone, and certificates that hold."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from nndefense.attacks import pgd
from nndefense.certificates import SmoothedClassifier, certify, certify_smoothing, predict, registry
from nndefense.certificates.noise import BLOCK
from nndefense.certificates.smoothing import NoisyMean, count_answers, lower_bound
from nndefense.errors import InputError


# Cohen et al.: with n = 100,000 draws and alpha = 0.001 no radius of theirs is larger; section 4 and the ends of the
# curves of figure 6 (0.95 for sigma 0.25, 1.90 for 0.5, 3.81 for 1).
@pytest.mark.parametrize(("sigma", "published"), [(0.12, 0.45), (0.25, 0.95), (0.5, 1.90), (1.0, 3.81)])
def test_the_largest_radius_of_the_papers_setting_is_the_published_one(sigma: float, published: float) -> None:
    found = certify(torch.tensor([[100, 0]]), torch.tensor([[100_000, 0]]), sigma, alpha=0.001)
    assert math.floor(100 * float(found.radius)) / 100 == published
    assert float(found.radius) == pytest.approx(sigma * stats.norm.ppf(0.001 ** (1 / 100_000)), rel=1e-12)


@given(st.integers(1, 20_000), st.data(), st.sampled_from([0.001, 0.01, 0.05]))
def test_the_lower_bound_is_that_of_scipys_exact_test(n: int, data: st.DataObject, alpha: float) -> None:
    successes = data.draw(st.integers(0, n))
    exact = stats.binomtest(successes, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert float(lower_bound(successes, n, alpha)) == pytest.approx(exact, abs=1e-12)


@given(st.lists(st.integers(0, 300), min_size=2, max_size=5).filter(any), st.sampled_from([0.001, 0.05]))
def test_predict_abstains_by_scipys_two_sided_binomial_test(counts: list[int], alpha: float) -> None:
    first, second = sorted(counts, reverse=True)[:2]
    p = stats.binomtest(first, first + second, 0.5).pvalue
    answer = int(predict(torch.tensor([counts]), alpha))
    assert answer == (counts.index(first) if p <= alpha else -1)


def test_certify_abstains_where_the_bound_is_at_most_one_half_and_takes_the_class_of_the_first_draws() -> None:
    selected = torch.tensor([[60, 40], [60, 40], [40, 60], [50, 50]])
    counts = torch.tensor([[990, 10], [510, 490], [990, 10], [900, 100]])
    found = certify(selected, counts, 0.5, 0.001)
    assert found.prediction.tolist() == [0, -1, -1, 0]
    low = lower_bound([990, 900], 1000, 0.001)
    assert found.radius.tolist() == pytest.approx([0.5 * stats.norm.ppf(low[0]), 0, 0, 0.5 * stats.norm.ppf(low[1])])
    assert (found.norm, found.alpha) == ("l2", 0.001)


class Halves(nn.Module):
    """The class of an image by the sum of its pixels: a half-space, which smoothing leaves as it is but for clips."""

    def __init__(self, level: float = 0.5, classes: int = 2) -> None:
        super().__init__()
        self.level, self.classes, self.seen = level, classes, 0

    def forward(self, x: Tensor) -> Tensor:
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
        self.seen = max(self.seen, len(x))
        side = (x.flatten(1).mean(1) - self.level) * math.sqrt(x[0].numel())
        return torch.stack([-side, side, *[side - 9] * (self.classes - 2)], 1)


def test_the_radius_on_a_half_space_is_the_distance_to_it() -> None:
    """Where the bound is tight; the distance of an image of one grey is the difference of greys times d^1/2."""
    x = torch.full((1, 1, 8, 8), 0.52)
    found = certify_smoothing(Halves(), x, sigma=0.1, draws=20_000, batch_size=4096)
    assert found.prediction.tolist() == [1]
    distance = 0.02 * 8
    assert 0.9 * distance < float(found.radius) <= distance + 1e-6


def test_counts_do_not_depend_on_the_batch_its_order_or_the_batch_size() -> None:
    x = torch.rand((5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    whole = count_answers(Halves(), x, 0.3, 3 * BLOCK + 5)
    assert (whole.sum(1) == 3 * BLOCK + 5).all()
    for size in (1, 7, BLOCK, 2 * BLOCK + 1, 4096):
        net = Halves()
        assert torch.equal(count_answers(net, x, 0.3, 3 * BLOCK + 5, batch_size=size), whole)
        assert net.seen <= size
    order = torch.tensor([3, 0, 4])
    assert torch.equal(count_answers(Halves(), x[order], 0.3, 3 * BLOCK + 5), whole[order])
    assert not torch.equal(count_answers(Halves(), x, 0.3, 3 * BLOCK + 5, seed=1), whole)
    assert not torch.equal(count_answers(Halves(), x, 0.3, 3 * BLOCK + 5, purpose="select"), whole)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.3]))
def test_no_attack_breaks_a_certified_image_of_a_random_net(seed: int, sigma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in net.parameters():
        parameter.data = 2 * torch.randn(parameter.shape, generator=generator)
    x = torch.rand((3, 1, 3, 3), generator=generator)
    found = certify_smoothing(net.eval(), x, sigma=sigma, draws=600, alpha=1e-5, seed=seed)
    held = found.radius > 1e-3
    if not held.any():
        return
    smoothed = SmoothedClassifier(net, sigma, draws=600, alpha=1e-5, seed=seed + 1)
    torch.manual_seed(seed)
    moved = pgd(
        smoothed.attack_model(), x[held], found.prediction[held], eps=found.radius[held].float(), norm="l2", steps=5
    )
    assert not smoothed.refutes(moved, found.prediction[held]).any()


def test_a_false_class_is_refuted_and_the_right_one_never() -> None:
    smoothed = SmoothedClassifier(Halves(), 0.1, draws=1000)
    x = torch.stack([torch.full((1, 8, 8), grey) for grey in (0.2, 0.5, 0.8)])
    answers = smoothed(x).argmax(1)
    assert answers[[0, 2]].tolist() == [0, 1]
    assert smoothed(x).exp().sum(1).tolist() == pytest.approx([1, 1, 1])
    assert smoothed.refutes(x, torch.tensor([1, 1, 0])).tolist() == [True, False, True]
    assert not smoothed.refutes(x, torch.tensor([0, 0, 1])).any()
    assert torch.equal(smoothed(x), smoothed(x.flip(0)).flip(0))


def test_the_attackers_mean_has_a_gradient_and_draws_of_its_own_at_every_call() -> None:
    mean = NoisyMean(trained(), 0.2, 4)
    x = images("test", 3)[0].requires_grad_()
    scores = mean(x)
    assert scores.exp().sum(1).detach().tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    scores[:, 0].sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert not torch.equal(mean(x.detach()), mean(x.detach()))


def test_a_digits_net_is_certified_and_its_accuracy_falls_with_the_budget() -> None:
    x, y = images("test", 20)
    found = registry.get("smoothing").run(trained(), x, sigma=0.15, draws_select=32, draws=200, eps=(0.1,))
    levels = [found.accuracy(y, eps).accuracy for eps in (0.0, 0.1, 0.2, 0.3, 0.5)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 0.5 > levels[-1]
    limit = 0.15 * stats.norm.ppf(0.001 ** (1 / 200))
    assert float(found.radius.max()) <= limit + 1e-12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sigma": 0.0}, "sigma is"),
        ({"sigma": math.nan}, "sigma is"),
        ({"draws": 0}, "draws is 0"),
        ({"draws_select": 0}, "draws is 0"),
        ({"alpha": 0.0}, "alpha is"),
        ({"alpha": 1.0}, "alpha is"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_certify_nothing_are_refused(change: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        certify_smoothing(Halves(), torch.rand(1, 1, 2, 2), **{"sigma": 0.1, "draws": 10, **change})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no image"):
        certify_smoothing(Halves(), torch.rand(0, 1, 2, 2), sigma=0.1)
    with pytest.raises(InputError, match="same sum"):
        certify(torch.ones(2, 2), torch.tensor([[1, 2], [2, 2]]), 0.1)
