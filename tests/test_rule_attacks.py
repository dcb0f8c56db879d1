"""Attacks on kernels, mixtures and votes of labels: they differentiate the defence, and nothing simple beats them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import digits, images, trained
from torch import Tensor, nn

from index_build import build_database
from nndefense.attacks import pgd
from nndefense.attacks.losses import margin
from nndefense.attacks.retrieval import Knowledge, adaptive, check_exact, relaxation, run_adaptive
from nndefense.attacks.retrieval.ascent import pose
from nndefense.attacks.retrieval.ranks import AnswerMargin, answer_margins, sides
from nndefense.database import ImageDatabase, Rule
from nndefense.defenses import NearestNeighborDefense, RelaxedDefense
from nndefense.defenses.abstention import (
    answer_scores,
    disagreement_score,
    distance_score,
    margin_score,
    relaxed_answer,
)
from nndefense.errors import InputError
from nndefense.features import FeatureSpec
from nndefense.statistics import conformal_threshold

ROWS, EPS = 500, 0.12
KERNEL = {"k": ROWS, "weighting": "uniform", "votes": "labels"}


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> ImageDatabase:
    data = digits("train").subset(np.arange(ROWS))
    feature = FeatureSpec("block2", "grid2", pca=24)
    return build_database(data, trained(), feature, tmp_path_factory.mktemp("rule") / "db", progress=False)


def typical(database: ImageDatabase) -> float:
    """The median squared distance of clean images to their tenth neighbour: what temperatures are measured by."""
    return float(
        NearestNeighborDefense(trained(), database, 10).explain(images("test", 40)[0]).distances[:, -1].median() ** 2
    )


def made(database: ImageDatabase, warmth: float | None = None, **values) -> NearestNeighborDefense:
    temperature = None if warmth is None else warmth * typical(database)
    return NearestNeighborDefense(trained(), database, **values, temperature=temperature)


class ByHand(nn.Module):
    """The defence over all rows with plain tensors, differentiable given which rows are the nearest."""

    def __init__(self, defense: NearestNeighborDefense) -> None:
        super().__init__()
        self.rule, self.extractor, database = defense.rule, defense.extractor, defense.database
        every = database.row_numbers
        self.rows = database.features(every)
        self.votes, self.weights = self.rule.voters(database, every)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        squared = (self.extractor(x)[:, None] - self.rows).square().sum(2)
        logs = self.weights.clamp_min(1e-30).log().expand_as(squared)
        if self.rule.temperature is not None:
            logs = logs - squared / self.rule.temperature
        far = torch.ones_like(squared, dtype=torch.bool).scatter(
            1, squared.topk(self.rule.k, largest=False).indices, False
        )
        found = (1 - self.rule.alpha) * logs.masked_fill(far, -torch.inf).softmax(1) @ self.votes
        if self.rule.alpha:
            found = found + self.rule.alpha * trained()(x).softmax(1)
        return found.clamp_min(1e-30).log()


SMOOTH = [
    pytest.param({"warmth": 0.3, "k": 20}, id="kernel"),
    pytest.param({"k": 20, "votes": "labels", "alpha": 0.4}, id="mixture"),
    pytest.param({"warmth": 0.1, "alpha": 0.5, **KERNEL}, id="both"),
]


@pytest.mark.parametrize("values", SMOOTH)
def test_what_is_differentiated_is_the_defence(database, values):
    defense, (x, y) = made(database, **values), images("test", 16)
    surface, wanted = defense.surface(), defense(x)
    np.testing.assert_allclose(ByHand(defense)(x).exp().detach(), wanted.exp(), atol=1e-5)
    features = surface.features(x).detach()
    hood, _ = sides(surface.rows, features, y, defense.k)
    hard = relaxation.hard_log_probabilities(hood, hood.distances(features), defense.k)
    with torch.no_grad():
        own = trained()(x).log_softmax(1)
    torch.testing.assert_close(relaxation.mixed(hard, own, surface.alpha).exp(), wanted.exp(), atol=1e-4, rtol=0)
    soft = RelaxedDefense(surface, temperature=1e-6)(x)
    torch.testing.assert_close(soft.exp(), wanted.exp(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("values", SMOOTH)
def test_the_gradient_is_that_of_finite_differences(database, monkeypatch, values):
    defense, (x, y) = made(database, **values), images("test", 4)
    surface = defense.surface().counted()
    objective = AnswerMargin(surface, target=(y + 1) % 10)
    problem = pose(surface, x, y, EPS, "linf")
    free = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    point = (x + free).clamp(0.01, 0.99)
    objective.renew(problem, surface.features(point).detach())
    # The radius of the K-ball is held fixed in the gradient, and so it is here.
    tau = relaxation.threshold(objective.hood.distances(surface.features(point).detach()), surface.k)
    monkeypatch.setattr(relaxation, "threshold", lambda distances, k: tau)
    for progress in (0.0, 0.3, 1.0):

        def value(images: Tensor, progress: float = progress) -> Tensor:
            return objective.value(images, surface.features(images), progress).value

        given = point.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(given).sum(), given)
        way, step = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1), 2e-3
        with torch.no_grad():
            measured = (value(point + step * way) - value(point - step * way)) / (2 * step)
        slope = gradient.flatten(1).norm(dim=1)
        torch.testing.assert_close(measured, slope, rtol=0.1, atol=0.05)


def test_rows_without_a_label_are_nobodys_aim(database):
    defense = made(database, **KERNEL)
    labels = defense.database.labels(defense.database.row_numbers)
    defense.database._table = _Unlabelled(defense.database._table, labels % 3 == 0)
    try:
        surface = defense.surface()
        x, y = images("test", 6)
        for of in (torch.zeros(6, dtype=torch.int64), y):
            distances, rows = surface.rows.nearest(surface.features(x), 20, of=of)
            held = labels[rows][torch.isfinite(distances)]
            assert bool((held % 3 != 0).all())
        hood, _ = sides(surface.rows, surface.features(x), y, defense.k)
        hard = relaxation.hard_log_probabilities(hood, hood.distances(surface.features(x)), defense.k)
        torch.testing.assert_close(hard.exp(), defense(x).exp(), atol=1e-5, rtol=0)
    finally:
        defense.database._table = defense.database._table.table


class _Unlabelled:
    """A table of rows of which some have lost their label."""

    def __init__(self, table, which: Tensor) -> None:
        self.table, self.which = table, which.numpy()

    def take(self, name, rows):
        found = self.table.take(name, rows)
        return np.where(self.which[rows], -1, found) if name == "labels" else found

    def __getattr__(self, name):
        return getattr(self.table, name)


def test_extreme_temperatures_keep_a_gradient(database):
    x, y = images("test", 6)
    for warmth in (1e-12, 1e-4, 1e3):
        defense = made(database, warmth, **KERNEL)
        surface = defense.surface()
        given = x.clone().requires_grad_(True)
        features = surface.features(given)
        hood, _ = sides(surface.rows, features.detach(), (y + 1) % 10, defense.k)
        score = answer_margins(surface, hood, given, features, (y + 1) % 10, y)
        (gradient,) = torch.autograd.grad(score.sum(), given)
        assert bool(torch.isfinite(score).all())
        assert bool(torch.isfinite(gradient).all())
        assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


def test_the_exact_attack_takes_labels_and_neither_kernel_nor_mixture(database):
    x = images("test", 2)[0]
    for values in ({"warmth": 1.0, "k": 5}, {"k": 5, "alpha": 0.1}):
        with pytest.raises(InputError, match="takes neither a kernel nor a share of the classifier"):
            check_exact(made(database, **values).surface(), x)


def standing(defense: NearestNeighborDefense, attacked: Tensor, y: Tensor) -> Tensor:
    return defense(attacked).argmax(1) == y


def simple_attacks(defense: NearestNeighborDefense, x: Tensor, y: Tensor, steps: int, restarts: int) -> Tensor:
    """Which images stand against PGD on the classifier and, where it has a gradient, on the defence by hand."""
    stands = standing(defense, x, y)
    for model in (trained(), ByHand(defense)):
        for seed in range(restarts):
            chance = torch.Generator().manual_seed(seed)
            attacked = pgd(model, x, y, eps=EPS, norm="linf", steps=steps, generator=chance, random_start=True)
            stands &= standing(defense, attacked, y)
    return stands


@pytest.mark.slow
def test_a_small_adaptive_attack_is_no_weaker_than_plain_pgd_on_the_whole_defence(database):
    x, y = images("test", 12)
    defense = made(database, 0.1, **KERNEL)
    stands = simple_attacks(defense, x, y, 10, 1)
    chance = torch.Generator().manual_seed(0)
    fooled = run_adaptive(defense.surface(), x, y, eps=EPS, steps=10, generator=chance).fooled
    assert int((~fooled).sum()) <= int(stands.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("warmth", "alpha"), [(None, 0.3), (0.01, 0.0), (0.1, 0.0), (0.1, 0.3), (1.0, 0.7)])
def test_the_adaptive_attack_is_no_weaker_than_pgd_with_restarts(database, warmth, alpha):
    x, y = images("test", 40)
    for values in (KERNEL, {"k": 20}):
        defense = made(database, warmth, alpha=alpha, **values)
        stands = simple_attacks(defense, x, y, 100, 5)
        surface = defense.surface(images=images("train", ROWS)[0])
        fooled = run_adaptive(surface, x, y, eps=EPS, generator=torch.Generator().manual_seed(0)).fooled
        assert int((~fooled).sum()) <= int(stands.sum())


@pytest.mark.slow
def test_the_classifier_alone_in_a_mixture_is_as_broken_as_it_is_bare(database):
    x, y = images("test", 40)
    defense = made(database, k=20, alpha=1.0)
    bare = torch.ones(len(y), dtype=torch.bool)
    for seed in range(5):
        chance = torch.Generator().manual_seed(seed)
        attacked = pgd(trained(), x, y, eps=EPS, norm="linf", steps=100, generator=chance, random_start=True)
        with torch.no_grad():
            bare &= trained()(attacked).argmax(1) == y
    attacked = adaptive(defense.surface(), x, y, eps=EPS, generator=torch.Generator().manual_seed(0))
    assert int(standing(defense, attacked, y).sum()) <= int(bare.sum())


def test_what_each_level_of_knowledge_has_of_the_rule(database):
    defense = made(database, 0.5, k=5, votes="labels", alpha=0.25)
    own = images("test", 30, 100)[0]
    for knowledge, settings in ((Knowledge.WHITE, {}), (Knowledge.FEATURES, {"own_images": own})):
        surface = defense.surface(knowledge, **settings)
        assert (surface.alpha, surface.rows.temperature) == (0.25, defense.rule.temperature)
        votes = surface.rows.posteriors(torch.arange(surface.rows.count))
        assert bool(((votes == 0) | (votes == 1)).all())
    assert not made(database, k=5, votes="labels").surface().smooth
    assert Rule(5, votes="labels") == made(database, k=5, votes="labels").rule


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "score"),
    [
        pytest.param(*rule.values, score, id=f"{rule.id}-{score}")
        for rule, score in zip(SMOOTH, ["retrieval margin", "disagreement", "distance"], strict=True)
    ],
)
def test_the_attack_that_must_be_accepted_is_no_weaker_than_pgd_on_both_aims_through_all_rows(database, values, score):
    defense, (x, y), held = made(database, **values), images("test", 30), images("test", 99, 100)[0]
    hand, followed = ByHand(defense), relaxed_answer(defense)
    scores = [*answer_scores("retrieval margin", trained(), defense, followed), distance_score(defense)]
    meant = next(one for one in scores if one.name == score)
    typed = {
        "retrieval margin": lambda z: margin_score(hand(z)),
        "disagreement": lambda z: disagreement_score(trained()(z), hand(z)),
        "distance": lambda z: torch.cdist(hand.extractor(z), hand.rows).amin(1),
    }[score]
    with torch.no_grad():
        values_of = meant.of(held).double()
    threshold, spread = conformal_threshold(sorted(values_of.tolist()), 0.1), float(values_of.std())
    rejection = meant.rejection(followed, threshold, spread)
    surface = replace(defense.surface(images=images("train", ROWS)[0]), rejection=rejection)
    chance = torch.Generator().manual_seed(0)
    fooled = run_adaptive(surface, x, y, eps=EPS, steps=100, generator=chance).fooled
    simple = torch.zeros_like(fooled)
    for push in (0.3, 1.0, 3.0):
        z = (x + EPS * (2 * torch.rand(x.shape, generator=chance) - 1)).clamp(0, 1)
        for step in range(100):
            leaf = z.requires_grad_()
            wanted = -(0.1 - margin(hand(leaf), y)).relu() - push * ((typed(leaf) - threshold) / spread + 0.05).relu()
            z = z.detach() + 0.25 * EPS * (1 - step / 100) * torch.autograd.grad(wanted.sum(), leaf)[0].sign()
            z = z.clamp(x - EPS, x + EPS).clamp(0, 1)
            if step % 5 == 4:
                simple |= surface.fooled(z, y)
    assert int(fooled.sum()) >= int(simple.sum())
    assert simple.any()
