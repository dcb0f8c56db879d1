"""Attacks on retrieval: relaxations against their limits, exact cases, bounds that no attack may break."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import digits, images, trained
from torch import Tensor

from index_build import build_database
from nndefense import attacks
from nndefense.attacks import pgd, retrieval
from nndefense.attacks.retrieval import Knowledge, RetrievalSurface, Rows, aims, ascent, ranks, relaxation
from nndefense.database import combine
from nndefense.database.exact_search import ExactSearch
from nndefense.defenses import NearestNeighborDefense, RelaxedDefense
from nndefense.errors import InputError
from nndefense.features import FeatureSpec

N = 40
FIXED = {
    "gray": retrieval.gray,
    "rank": retrieval.rank_margin,
    "soft": retrieval.soft_top_k,
    "straight": retrieval.straight_through,
    "push-pull": retrieval.push_pull,
    "ask": retrieval.class_scores,
    "drift": retrieval.feature_drift,
    "pr": retrieval.pgd_pr,
    "fs": retrieval.pgd_fs,
    "adaptive": retrieval.adaptive,
}
# Those that steer by the rows, and must beat the attack that ignores them.
AIMED = ("rank", "soft", "straight", "push-pull", "ask", "adaptive")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return build_database(
        digits("train"), trained(), FeatureSpec("block2", "grid4", pca=48), tmp_path_factory.mktemp("d"), progress=False
    )


@pytest.fixture(scope="module")
def defense(database) -> NearestNeighborDefense:
    return NearestNeighborDefense(trained(), database, 5, "cbw-d")


@pytest.fixture(scope="module")
def surface(defense) -> RetrievalSurface:
    return defense.surface(Knowledge.WHITE, images=digits("train"))


@pytest.fixture(scope="module")
def batch(defense) -> tuple[Tensor, Tensor]:
    """Test digits that the defence gets right."""
    x, y = images("test", 60)
    right = defense(x).argmax(1) == y
    return x[right][:N], y[right][:N]


def accuracy(model, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def pixel_surface(rows: Tensor, classes: Tensor, *, matrix: Tensor | None = None, k: int = 1) -> RetrievalSurface:
    """K-NN of (linear images of) pixels: a surface of callables alone, with no net behind it."""
    matrix = torch.eye(rows[0].numel()) if matrix is None else matrix
    vectors = rows.flatten(1) @ matrix
    posteriors = torch.nn.functional.one_hot(classes, int(classes.max()) + 1).float()
    search = ExactSearch(vectors, classes)

    def predict(x: Tensor) -> Tensor:
        # By differences in double precision: no rounding can call a tie a success.
        distances = (x.flatten(1).double() @ matrix.double())[:, None] - rows.flatten(1).double() @ matrix.double()
        nearest = distances.norm(dim=2).topk(k, largest=False).indices
        return posteriors[nearest].mean(1).clamp_min(1e-30).log()

    found = Rows(
        len(rows), search.search, lambda r: vectors[r], lambda r: posteriors[r], lambda r: torch.ones(r.shape),
        images=lambda r: rows[r],
    )  # fmt: skip
    return RetrievalSurface(Knowledge.WHITE, predict, k, features=lambda x: x.flatten(1) @ matrix, rows=found)


def made_up_hood(n=4, m=12, d=5, c=3, dtype=torch.float64) -> tuple[relaxation.Neighborhood, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    posteriors, weights = (2 * draw(n, m, c)).softmax(2), draw(n, m).abs() + 0.1
    vectors, spread = draw(n, m, d), torch.ones(n, dtype=dtype)
    hood = relaxation.Neighborhood(
        vectors, weights.log(), posteriors.log(), posteriors.argmax(2), spread, vectors.square().sum(2)
    )
    return hood, draw(n, d), posteriors, weights


# -- relaxation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5, 12])
def test_soft_top_k_tends_to_k_nn_and_not_to_1_nn(k):
    hood, features, posteriors, weights = made_up_hood()
    nearest = hood.distances(features).topk(k, largest=False).indices
    wanted = combine(posteriors.gather(1, nearest[..., None].expand(-1, -1, 3)), weights.gather(1, nearest))
    soft = relaxation.soft_log_probabilities(hood, features, k, 1e-5).exp()
    assert torch.allclose(soft, wanted, atol=1e-6)
    assert torch.allclose(relaxation.hard_log_probabilities(hood, hood.distances(features), k).exp(), wanted, atol=1e-9)
    one = posteriors[torch.arange(4), nearest[:, 0]]
    assert torch.allclose(soft, one, atol=1e-3) == (k == 1)
    far = [
        float((relaxation.soft_log_probabilities(hood, features, k, t).exp() - wanted).abs().max())
        for t in (1, 0.1, 1e-3)
    ]
    assert far[0] >= far[1] >= far[2]


def rank_margin_by_hand(surface: RetrievalSurface, features: Tensor, target: int, y: int, k: int) -> float:
    """m_t from the definition, over every row, for equal weights."""
    rows = torch.arange(surface.rows.count)
    squared = (surface.rows.vectors(rows).double() - features.double()).square().sum(1)
    own = surface.rows.posteriors(rows).argmax(1) == target
    pull, push = (~own, own) if target == y else (own, ~own)
    m = k // 2 + 1
    return float(squared[push].sort().values[k - m] - squared[pull].sort().values[m - 1])


@pytest.mark.parametrize("k", [1, 3, 4, 50])
def test_the_rank_margin_is_the_majority(database, k):
    surface = NearestNeighborDefense(trained(), database, k, "uniform").surface()
    x, y = images("test", 12)
    features = surface.features(x).detach()
    for target in (torch.full_like(y, 3), y):
        hood, _ = ranks.sides(surface.rows, features, target, k)
        distances = hood.distances(features)
        plain, _ = ranks.margins(hood, distances, target, y, k)
        wanted = [
            rank_margin_by_hand(surface, f, int(t), int(c), k) for f, t, c in zip(features, target, y, strict=True)
        ]
        assert torch.allclose(plain.double(), torch.tensor(wanted).double(), rtol=1e-3, atol=1e-3)
        # Cold, the smooth margin is the plain one.
        _, smooth = ranks.margins(hood, distances, target, y, k, torch.full_like(plain, 1e-6))
        assert torch.allclose(smooth, plain, atol=1e-4)
    # Above 0 it says what the vote says, where rows are sure of their class.
    _, near = surface.rows.nearest(features, k)
    most = torch.stack([(surface.rows.posteriors(near).argmax(2) == c).sum(1) for c in range(10)], 1)
    for c in range(10):
        target = torch.full_like(y, c)
        hood, _ = ranks.sides(surface.rows, features, target, k)
        plain, _ = ranks.margins(hood, hood.distances(features), target, (y + 1) % 10 + 10, k)
        assert torch.equal(plain > 0, most[:, c] > k / 2)


def test_the_rank_margin_has_a_gradient_where_membership_is_decided_already(surface, batch):
    # With the nearest rows of the goal inside the K-ball, what is left to pull is the row that tips the vote.
    x, y = batch[0][:8], batch[1][:8]
    features = surface.features(x).detach().double().requires_grad_()
    objective = ranks.RankMargin(surface, target=(y + 1) % 10)
    problem = ascent.pose(surface, x, y, 0.1, "linf")
    objective.renew(problem, features.detach().float())
    hood = objective.hood
    for name in ("vectors", "log_weights", "log_posteriors", "lengths"):
        setattr(hood, name, getattr(hood, name).double())
    temperature = objective.gap.double()

    def smooth(f: Tensor) -> Tensor:
        return ranks.margins(hood, hood.distances(f), objective.target, y, surface.k, temperature)[1]

    (gradient,) = torch.autograd.grad(smooth(features).sum(), features)
    assert bool((gradient.norm(dim=1) > 1e-3).all())
    # Shares are held fixed, so the slope is that of a mean distance: compared where the heat makes them all equal.
    temperature = torch.full_like(temperature, 1e12)
    assert torch.autograd.gradcheck(smooth, (features,), eps=1e-5, atol=1e-4)


def test_gradient_of_the_relaxation_is_that_of_finite_differences(monkeypatch):
    hood, features, _, _ = made_up_hood()
    # tau is held fixed by definition, so it must not move with the finite differences either.
    tau = relaxation.threshold(hood.distances(features), 3)
    monkeypatch.setattr(relaxation, "threshold", lambda distances, k: tau)
    for temperature in (1.0, 0.1):
        assert torch.autograd.gradcheck(
            lambda f, t=temperature: relaxation.soft_log_probabilities(hood, f, 3, t), (features.requires_grad_(),)
        )


def test_unfilled_places_change_nothing():
    hood, features, _, _ = made_up_hood()
    cut = hood[torch.arange(4)]
    hood.log_weights[:, 7:] = -torch.inf
    for name in ("vectors", "log_weights", "log_posteriors", "classes", "lengths"):
        setattr(cut, name, getattr(cut, name)[:, :7])
    for k in (3, 7, 9):
        found = [relaxation.soft_log_probabilities(h, features, k, 0.1) for h in (hood, cut)]
        assert torch.allclose(*found)
    leaf = features.clone().requires_grad_()
    relaxation.soft_log_probabilities(hood, leaf, 9, 0.1)[:, 0].sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())


def test_straight_through_says_what_the_true_pipeline_says(surface, defense, batch):
    x = batch[0].clone().requires_grad_()
    output = RelaxedDefense(surface, mode="straight-through")(x)
    assert torch.allclose(output.detach(), defense(batch[0]), atol=1e-6)
    (gradient,) = torch.autograd.grad(attacks.margin(output, batch[1]).sum(), x)
    assert float((gradient.flatten(1).abs().amax(1) > 0).double().mean()) == 1


def test_a_relaxed_defense_tends_to_the_defense_and_serves_plain_pgd(surface, defense, batch):
    x, y = batch
    cold = RelaxedDefense(surface, temperature=1e-4)(x)
    assert torch.allclose(cold.exp(), defense(x).exp(), atol=1e-2)
    assert torch.allclose(cold.exp().sum(1), torch.ones(len(x)), atol=1e-4)
    attacked = pgd(RelaxedDefense(surface, refresh=5), x, y, eps=0.2, steps=20, random_start=False)
    assert accuracy(defense, attacked, y) < accuracy(defense, pgd(trained(), x, y, eps=0.2, steps=20), y)


def test_a_relaxed_defense_never_answers_for_another_batch(surface, batch):
    model = RelaxedDefense(surface, refresh=100)
    model(batch[0][:20])
    for other in (batch[0][20:40], batch[0][:7], 1 - batch[0][:20]):
        assert torch.allclose(model(other), RelaxedDefense(surface)(other), atol=1e-5)


def test_losses():
    log_p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
    y = torch.tensor([0, 1])
    assert torch.allclose(attacks.margin(log_p, y), torch.tensor([2 / 7, 2.0]).log())
    assert torch.allclose(relaxation.towards(log_p, y, torch.tensor([2, 0])), torch.tensor([1 / 7, 1 / 3]).log())
    ratio = torch.tensor([(2 / 7), 2.0]).log() / torch.tensor([7.0, 6.0]).log()
    assert torch.allclose(attacks.dlr(log_p, y), ratio)


# -- fixed budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.8), ("normalized-l2", 0.2)])
@pytest.mark.parametrize("name", FIXED)
def test_ball_and_box_are_respected_and_the_input_is_left_alone(surface, batch, name, norm, eps):
    x, y = batch[0][:8], batch[1][:8]
    before, generator = x.clone(), torch.Generator().manual_seed(0)
    attacked = FIXED[name](surface, x, y, eps=eps, norm=norm, steps=4, generator=generator)
    assert attacked.shape == x.shape
    assert torch.equal(x, before)
    assert not attacked.requires_grad
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    delta = (attacked - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    radius = eps * x.flatten(1).norm(dim=1) if norm == "normalized-l2" else eps
    assert bool((length <= radius + 1e-6).all())


def test_attacks_that_see_the_rows_beat_the_one_that_does_not(surface, defense, batch):
    x, y = batch
    found = {}
    for name, attack in FIXED.items():
        attacked = attack(surface, x, y, eps=0.2, steps=30, generator=torch.Generator().manual_seed(0))
        found[name] = accuracy(defense, attacked, y)
    assert all(found[name] < found["gray"] for name in AIMED), found
    assert found["adaptive"] == min(found.values())
    assert all(value < 1 for value in found.values()), found


def test_larger_balls_and_more_steps_never_help_the_defense(surface, defense, batch):
    x, y = batch
    some = x[:16], y[:16]
    by_eps = [
        accuracy(defense, retrieval.adaptive(surface, *some, eps=e, steps=5), some[1]) for e in (0, 0.1, 0.2, 1.0)
    ]
    assert by_eps == sorted(by_eps, reverse=True)
    assert by_eps[0] == 1
    assert by_eps[-1] == 0
    few, many = (accuracy(defense, retrieval.soft_top_k(surface, x, y, eps=0.15, steps=s), y) for s in (5, 60))
    assert many <= few


@pytest.mark.parametrize("name", FIXED)
def test_restarts_attack_again_what_still_stands(surface, batch, name):
    x, y = batch[0][:24], batch[1][:24]

    def run(restarts: int) -> tuple[Tensor, Tensor, int]:
        surface.counts.reset()
        generator = torch.Generator().manual_seed(0)
        found = FIXED[name](surface, x, y, eps=0.12, steps=5, restarts=restarts, generator=generator, batch_size=16)
        assert float((found - x).abs().max()) <= 0.12 + 1e-6
        backwards = surface.counts.backwards
        return found, surface.fooled(found, y), backwards

    (once, fell, cost), (often, fell_often, more) = run(1), run(3)
    # What fell stays as it is; the others are attacked again, and the true pipeline alone says whether they fell.
    # The adaptive attack ends with one batch before the next, which meets other draws.
    first = slice(0, 16 if name == "adaptive" else None)
    assert torch.equal(often[first][fell[first]], once[first][fell[first]])
    assert bool((fell_often | ~fell)[first].all())
    if name in ("push-pull", "ask"):
        assert int(fell_often.sum()) > int(fell.sum())
    assert cost < more
    assert name == "adaptive" or more <= cost + 2 * 5 * int((~fell).sum())


def test_targets_and_starts(surface, defense, batch):
    x, y = batch
    goal = (y + 1) % 10
    aimed = retrieval.soft_top_k(surface, x, y, eps=0.4, steps=30, target=goal)
    assert float((defense(aimed).argmax(1) == goal).double().mean()) > 0.3
    nearer = retrieval.rank_margin(surface, x, y, eps=0.4, steps=30, target=goal)
    assert float((defense(nearer).argmax(1) == goal).double().mean()) > 0.5


def test_aims_lie_inside_and_the_best_are_kept(surface, batch):
    x, y = batch[0][:12], batch[1][:12]
    for norm, eps in (("linf", 0.2), ("normalized-l2", 0.3)):
        problem = ascent.pose(surface, x, y, eps, norm)
        few, more = (
            aims.from_rows(problem, torch.arange(12), classes=3, pool=pool, keep=2).best(1, torch.ones(12).bool())
            for pool in (1, 20)
        )
        for found in (few, more):
            assert found.index.tolist() == list(range(12))
            size = attacks.distance(x[found.index], found.points, norm)
            assert bool((size <= problem.radii[found.index] + 1e-6).all())
            assert 0 <= float(found.points.min()) <= float(found.points.max()) <= 1
        reached = []
        for found in (few, more):
            features, label = surface.features(found.points).detach(), y[found.index]
            hood, _ = ranks.sides(surface.rows, features, found.target, surface.k)
            reached.append(ranks.margins(hood, hood.distances(features), found.target, label, surface.k)[0])
        assert float(reached[1].mean()) > float(reached[0].mean())
        again = aims.relinked(problem, more, torch.Generator().manual_seed(0), pool=4, keep=2)
        assert len(again) == 24
        assert bool((attacks.distance(x[again.index], again.points, norm) <= problem.radii[again.index] + 1e-6).all())
        standing = torch.arange(12) % 2 == 0
        assert set(again.best(1, standing).index.tolist()) == set(range(0, 12, 2))


def earlier_plan(surface: RetrievalSurface, x: Tensor, y: Tensor, **budget) -> Tensor:
    """Which images the plan breaks that the adaptive attack had before: the yardstick that it must not fall below."""
    draw = torch.Generator().manual_seed(0)
    clean = surface.features(x).detach()
    near = surface.rows.nearest(clean, 2, but=y)[1]
    starts = [surface.rows.images(column) for column in near.unbind(1)]
    target = surface.rows.posteriors(near[:, 0]).argmax(1)
    fell = surface.fooled(x, y)
    for attack, options in (
        (retrieval.soft_top_k, {}),
        *((retrieval.soft_top_k, {"start": start}) for start in starts),
        (retrieval.straight_through, {}),
        (retrieval.push_pull, {"start": starts[0]}),
        (retrieval.soft_top_k, {"target": target}),
        (retrieval.gray, {"generator": draw}),
    ):
        fell |= surface.fooled(attack(surface, x, y, steps=40, **budget, **options), y)
    return fell


@pytest.mark.parametrize(
    ("k", "weighting", "norm", "eps"),
    [
        (3, "uniform", "normalized-l2", 0.25),
        *(
            pytest.param(k, weighting, norm, eps, marks=pytest.mark.slow)
            for k in (1, 3, 5, 50)
            for weighting in ("uniform", "cbw-e", "cbw-d")
            for norm, eps in (("linf", 0.12), ("l2", 0.9), ("normalized-l2", 0.2))
        ),
    ],
)
def test_the_adaptive_attack_is_no_weaker_than_its_earlier_plan(database, k, weighting, norm, eps):
    surface = NearestNeighborDefense(trained(), database, k, weighting).surface(images=digits("train"))
    x, y = images("test", 20 if k == 3 else 60)
    before = earlier_plan(surface, x, y, eps=eps, norm=norm)
    now = retrieval.run_adaptive(surface, x, y, eps=eps, norm=norm, generator=torch.Generator().manual_seed(0)).fooled
    assert bool((now | ~before).all())
    assert int(before.sum()) > 0


def test_the_result_tells_what_broke_each_image_and_what_it_cost(surface, defense, batch):
    x, y = torch.cat([batch[0], batch[0][:2]]), torch.cat([batch[1], (batch[1][:2] + 1) % 10])
    surface.counts.reset()
    gray = pgd(trained(), x, y, eps=0.2, steps=10)
    found = retrieval.run_adaptive(surface, x, y, eps=0.2, steps=10, start=gray, batch_size=17)
    assert torch.equal(found.fooled, defense(found.images).argmax(1) != y)
    assert torch.equal(found.fooled, torch.tensor([stage != "" for stage in found.stages]))
    assert bool(((found.margins > 0) == found.fooled).all())
    assert sum(found.broken.values()) == int(found.fooled.sum())
    assert found.stages[-2:] == ("clean", "clean")
    assert torch.equal(found.images[-2:], x[-2:])
    # Never weaker than the attack whose images it was given.
    assert bool((found.fooled | (defense(gray).argmax(1) == y)).all())
    assert vars(found.counts) == vars(surface.counts)
    assert found.counts.backwards > 0
    assert found.counts.forwards >= found.counts.backwards


def test_counts_are_exact_where_nothing_falls(surface, batch):
    x, y = batch[0][:10], batch[1][:10]
    surface.counts.reset()
    retrieval.soft_top_k(surface, x, y, eps=0.0, steps=20, refresh=10)
    # Two searches (nearest, and nearest of other classes) at steps 0 and 10; one last look at copy and defence.
    assert vars(surface.counts) == {"forwards": 210, "backwards": 200, "searches": 40, "queries": 10}


def test_batches_and_empty_batches(surface, batch):
    x, y = batch[0][:9], batch[1][:9]
    whole = retrieval.soft_top_k(surface, x, y, eps=0.1, steps=5)
    parts = retrieval.soft_top_k(surface, x, y, eps=0.1, steps=5, batch_size=4)
    assert float(((whole - parts).abs() > 1e-4).double().mean()) < 0.02
    for attack in FIXED.values():
        assert attack(surface, x[:0], y[:0], eps=0.1, steps=2).shape == (0, 1, 8, 8)


# -- knowledge ---------------------------------------------------------------------------------------------------------


def test_what_each_level_of_knowledge_gives(defense, batch):
    x, y = batch[0][:6], batch[1][:6]
    gray, alone = defense.surface(Knowledge.GRAY), defense.surface(Knowledge.FEATURES)
    own = defense.surface(Knowledge.FEATURES, own_images=images("test", 50, 200)[0])
    part = defense.surface(Knowledge.PARTIAL, overlap=0.25, own_images=images("test", 50, 200)[0], seed=3)
    assert gray.features is None
    assert alone.rows is None
    assert (own.rows.count, own.rows.overlap) == (50, 0.0)
    known = round(0.25 * len(defense.database))
    assert (part.rows.count, round(part.rows.overlap, 3)) == (known + 50, round(known / len(defense.database), 3))
    assert {level.value for level in Knowledge} == {"L0", "L1", "L2", "L3"}
    assert all(level.words for level in Knowledge)
    with pytest.raises(InputError, match="L1 or above, not L0"):
        retrieval.feature_drift(gray, x, y, eps=0.1)
    with pytest.raises(InputError, match="needs rows to aim at"):
        retrieval.soft_top_k(alone, x, y, eps=0.1)
    for level in (gray, alone, own, part):
        found = retrieval.run_adaptive(level, x, y, eps=0.1, steps=3)
        assert found.images.shape == x.shape
    assert set(retrieval.run_adaptive(gray, x, y, eps=0.0, steps=2).broken) == {"clean", "gray"}
    assert set(retrieval.run_adaptive(alone, x, y, eps=0.0, steps=2).broken) == {"clean", "drift", "gray"}


def test_the_attackers_rows_are_the_defenders(defense, surface, batch):
    told = defense.explain(batch[0])
    distances, rows = surface.rows.nearest(defense.extractor(batch[0]).detach(), 5)
    assert torch.equal(rows, told.rows)
    assert torch.allclose(distances, told.distances, atol=1e-3)
    assert torch.allclose(combine(surface.rows.posteriors(rows), surface.rows.weights(rows)).log(), defense(batch[0]))
    assert torch.equal(surface.rows.images(rows[:, 0]), digits("train").batch(rows[:, 0].numpy())[0])
    tensor = defense.surface(images=images("train", len(digits("train")))[0])
    assert torch.equal(tensor.rows.images(rows[0]), surface.rows.images(rows[0]))
    cut = NearestNeighborDefense(trained(), defense.database.subset(np.arange(100, 400)), 5, "cbw-d")
    found = cut.surface(images=digits("train")).rows
    assert (found.count, found.overlap) == (300, 1.0)
    assert torch.equal(found.images(torch.tensor([0])), digits("train").batch([100])[0])


def test_more_overlap_is_a_stronger_attack(defense, batch):
    x, y = batch
    own = images("test", 200, 300)[0]
    found = []
    for share in (0.0, 0.5, 1.0):
        level = defense.surface(Knowledge.PARTIAL, overlap=share, own_images=own)
        found.append(accuracy(defense, retrieval.soft_top_k(level, x, y, eps=0.2, steps=30), y))
    # A random half can happen to guide as well as the whole; it must not guide much better.
    assert found[2] <= found[1] + 0.05
    assert found[1] <= found[0] + 0.05


# -- exact cases and bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("box", "wanted"), [(False, [-0.25, 0.25]), (True, [0.0, 0.5])])
def test_least_perturbation_of_a_1_nn_that_is_known(box, wanted):
    rows = torch.tensor([[0.5, 0.5], [1.0, 0.5], [0.0, 1.0]]).view(3, 1, 1, 2)
    toy = pixel_surface(rows, torch.tensor([1, 1, 0]))
    x, y = torch.zeros(1, 1, 1, 2), torch.tensor([1])
    found = retrieval.push_pull_minimum(toy, x, y, box=box, steps=200, generator=torch.Generator().manual_seed(0))
    least = float(torch.tensor(wanted).norm())
    assert bool(toy.fooled(found, y))
    assert least - 1e-6 <= float(found.norm()) <= 1.02 * least
    assert torch.allclose(found.flatten(), torch.tensor(wanted), atol=0.05)
    if box:
        assert float(found.min()) >= 0
        # Neither does a fixed budget find what is not there, nor miss what is.
        for eps, there in ((0.49, False), (0.51, True)):
            attacked = retrieval.adaptive(toy, x, y, eps=eps, norm="l2")
            assert bool(toy.fooled(attacked, y)) == there


@pytest.mark.parametrize("k", [1, 5])
def test_no_minimum_is_above_the_way_to_an_image_of_another_class(database, k):
    defense = NearestNeighborDefense(trained(), database, k)
    surface = defense.surface(images=digits("train"))
    x, y = images("test", 16)
    right = defense(x).argmax(1) == y
    x, y = x[right], y[right]
    z = images("train", 600)[0]
    other = defense(z).argmax(1)[None] != y[:, None]
    gaps = (z[None] - x[:, None]).flatten(2)
    for norm, ways in (("l2", gaps.norm(dim=2)), ("linf", gaps.abs().amax(2))):
        bound = ways.masked_fill(~other, torch.inf).amin(1)
        attacked = retrieval.adaptive(surface, x, y, eps=bound + 1e-3, norm=norm, steps=40)
        assert accuracy(defense, attacked, y) == 0
    least = retrieval.push_pull_minimum(surface, x, y, steps=40, searches=3, targets=1, bisections=8)
    lengths = (least - x).flatten(1).norm(dim=1)
    bound = gaps.norm(dim=2).masked_fill(~other, torch.inf).amin(1)
    assert bool(surface.fooled(least, y).all())
    assert bool((lengths <= bound + 1e-5).all())
    assert float((lengths / bound).median()) < 0.8


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_no_attack_succeeds_below_the_lipschitz_bound_of_1_nn(scale):
    rows, classes = images("train", 300)
    matrix = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    matrix = matrix * torch.linspace(0.2, scale, 64)
    toy = pixel_surface(rows, classes, matrix=matrix)
    x, y = images("test", 12)
    keep = ~toy.fooled(x, y)
    x, y = x[keep], y[keep]
    with torch.no_grad():
        same, other = (toy.rows.nearest(toy.features(x), 1, **{side: y})[0][:, 0] for side in ("of", "but"))
    bound = (other - same) / (2 * float(torch.linalg.matrix_norm(matrix, 2)))
    assert bool((bound > 0).all())
    attacked = retrieval.adaptive(toy, x, y, eps=0.999 * bound, norm="l2", steps=40)
    assert not bool(toy.fooled(attacked, y).any())
    least = retrieval.push_pull_minimum(toy, x, y, steps=60, searches=4, targets=1)
    assert bool(toy.fooled(least, y).all())
    assert bool(((least - x).flatten(1).norm(dim=1) >= bound - 1e-5).all())


def test_a_minimum_is_0_for_images_that_are_wrong_already(surface, batch):
    x, y = batch[0][:3], (batch[1][:3] + 1) % 10
    assert torch.equal(retrieval.push_pull_minimum(surface, x, y, steps=2, searches=1), x)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((2, 1, 8, 8), 3.0)}, r"must lie in \[0, 1\]"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, "one class number per image"),
        ({"eps": -0.1}, "eps must be finite and at least 0"),
        ({"eps": 16}, "give 16/255"),
        ({"norm": "l7"}, "norm is 'l7'"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_arguments_that_cannot_be_used(surface, batch, change, message):
    given = {"x": batch[0][:2], "y": batch[1][:2], "eps": 0.1, "norm": "linf", "steps": 2} | change
    for attack in FIXED.values():
        with pytest.raises(InputError, match=message):
            attack(surface, **given)


def test_settings_that_cannot_be_used(defense, surface, batch):
    x, y = batch[0][:2], batch[1][:2]
    for attack, options, message in (
        (retrieval.soft_top_k, {"loss": "x"}, "margin, dlr, cross-entropy"),
        (retrieval.soft_top_k, {"hot": 0.1, "cold": 0.2}, "temperatures go from"),
        (retrieval.push_pull, {"guides": 1}, "at least 2"),
        (retrieval.class_scores, {"references": 0}, "at least 1 reference"),
        (retrieval.pgd_pr, {"gamma": -1}, "gamma is -1"),
        (retrieval.rank_margin, {"hot": 0.1, "cold": 0.2}, "temperatures go from"),
        (retrieval.adaptive, {"batch_size": 0}, "batch size is 0"),
        (retrieval.soft_top_k, {"batch_size": 0}, "batch size"),
        (retrieval.pgd_fs, {"restarts": 0}, "restarts is 0"),
        (retrieval.adaptive, {"restarts": 0}, "restarts is 0"),
    ):
        with pytest.raises(InputError, match=message):
            attack(surface, x, y, eps=0.1, steps=2, **options)
    with pytest.raises(InputError, match="must be above 0"):
        retrieval.push_pull_minimum(surface, x, y, searches=0)
    for options, message in (
        ({"knowledge": Knowledge.PARTIAL}, "give an overlap at L2"),
        ({"overlap": 0.5}, "give an overlap at L2"),
        ({"knowledge": Knowledge.PARTIAL, "overlap": 1.5}, "from 0 to 1"),
        ({"own_images": x}, "add nothing at L3"),
        ({"images": x}, "give one for each"),
    ):
        with pytest.raises(InputError, match=message):
            defense.surface(**options)
    with pytest.raises(InputError, match="soft or straight-through"):
        RelaxedDefense(surface, mode="x")
    with pytest.raises(InputError, match="temperature above 0"):
        RelaxedDefense(surface, temperature=0)
    bare = RetrievalSurface(Knowledge.GRAY, defense, 5)
    with pytest.raises(InputError, match="give the surface its classify"):
        retrieval.gray(bare, x, y, eps=0.1)


def test_rows_that_vote_for_one_class_alone_answer_as_their_posteriors_do():
    hood, features, _, _ = made_up_hood(c=4)
    votes = torch.nn.functional.one_hot(hood.classes.clamp_max(2), 4).double()
    slow = replace(hood, classes=votes.argmax(2), log_posteriors=votes.clamp_min(1e-30).log())
    leaf = features.requires_grad_()
    answers = [relaxation.soft_log_probabilities(h, leaf, 5, 0.3) for h in (slow, replace(slow, sole=True))]
    gradients = [torch.autograd.grad(log_p[:, :3].sum(), leaf)[0] for log_p in answers]
    assert torch.allclose(*answers)
    assert torch.allclose(*gradients)
    distances = hood.distances(features)
    hard = [relaxation.hard_log_probabilities(h, distances, 5) for h in (slow, replace(slow, sole=True))]
    assert torch.allclose(*hard)
    assert bool((hard[0] < -60).any()), "no class is without a vote"
