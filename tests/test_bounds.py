"""Linear bounds: against closed forms, brute force over tiny nets, the exact search, and attacks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import BLOCK2, digits, images, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import vote_surface
from torch import Tensor, nn
from torch.nn import functional as F

from index_build import build_database
from nndefense import attacks
from nndefense.attacks.retrieval import RetrievalSurface, adaptive, run_exact
from nndefense.certificates import registry
from nndefense.certificates.bounds import _Pairs, certify_bounds
from nndefense.certificates.propagation import LinearBounds
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.features import FeatureExtractor, FeatureSpec
from nndefense.models import build_classifier

SIDES = (1, 2, 2)


class Residual(nn.Module):
    """Every operation that is known, in a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.short = (
            nn.Conv2d(1, 3, 2, padding=1),
            nn.BatchNorm2d(3),
            nn.Conv2d(1, 3, 2, padding=1),
        )
        self.inner, self.out = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * (x - 0.3) / 0.5
        maps = F.relu(self.norm(self.conv(x)), inplace=True)
        maps = F.relu(self.inner(maps) - self.short(-x) + 0.1)
        pools = F.max_pool2d(maps, 2, 1, padding=1, ceil_mode=True), maps.amax((2, 3), keepdim=True)
        parts = [maps.mean((2, 3)), F.adaptive_avg_pool2d(pools[0], 1).flatten(1), (1 - pools[1])[:, :, 0, 0]]
        parts += [F.avg_pool2d(maps, 3).flatten(1), maps.permute(0, 2, 3, 1).sum(1).amax(1)]
        return self.out(torch.cat(parts, 1))


def tiny(kind: str, seed: int) -> nn.Module:
    """A net of 2 x 2 pixels with drawn weights and statistics: pixels -> 3 numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {
            "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
            "plain": lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU()
            ),
            "pooled": lambda: nn.Sequential(
                nn.Conv2d(1, 4, 2, padding=1), nn.MaxPool2d(2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
            ),
            "residual": Residual,
        }
        net = layers[kind]().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                nn.init.normal_(part.weight)
        return net


NETS = ("linear", "plain", "pooled", "residual")


def corners_and_grid(x: Tensor, eps: float, norm: str, steps: int = 5) -> Tensor:
    """Many images of the ball around one image 1 x 1 x 2 x 2, the corners of its box among them."""
    x = x.double()
    low, high = (x - eps).clamp(0, 1).flatten(), (x + eps).clamp(0, 1).flatten()
    lines = [torch.linspace(float(a), float(b), steps, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    points = torch.cartesian_prod(*lines)
    if norm == "l2":
        around = points - x.flatten()
        size = around.norm(dim=1, keepdim=True)
        points = torch.cat([points[size[:, 0] <= eps], x.flatten() + around * (eps / size.clamp_min(max(eps, 1e-30)))])
    return points.view(-1, *SIDES)


@pytest.mark.parametrize(
    ("kind", "eps", "norm"),
    [("pooled", 0.1, "l2"), ("residual", 0.02, "linf"), ("linear", 0.0, "l2")],
)
def test_no_image_of_the_ball_goes_below_a_bound_and_tiny_balls_are_bounded_exactly(kind, eps, norm):
    check_bounds(kind, 1, eps, norm)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NETS),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.02, 0.1, 0.4]),
    st.sampled_from(["linf", "l2"]),
)
def test_no_image_of_the_ball_goes_below_a_bound_whatever_the_weights(kind, seed, eps, norm):
    check_bounds(kind, seed, eps, norm)


def check_bounds(kind: str, seed: int, eps: float, norm: str) -> None:
    """Bounds of two images and six heads are below a grid of the ball, and exact where nothing bends."""
    net, generator = tiny(kind, seed), torch.Generator().manual_seed(seed)
    x, heads = torch.rand((2, *SIDES), generator=generator), torch.randn((6, 3), generator=generator)
    owner = torch.tensor([0, 1, 0, 1, 1, 0])
    bounds = LinearBounds(net, x)
    net = net.double()
    bounded = bounds.over(x, eps, norm)
    plain, sloped = bounded.least(heads, owner), bounded.least(heads, owner, steps=3)
    assert bool((sloped >= plain).all())
    # What is not enough yet is raised, and what is enough is not.
    asked = torch.where(torch.arange(6) % 2 == 0, plain - 1e-9, (plain + sloped) / 2)
    met = bounded.least(heads, owner, steps=3, need=asked)
    assert bool((met[::2] == plain[::2]).all() & (met >= plain).all() & (met <= sloped + 1e-9).all())
    for number, image in enumerate(x.split(1)):
        found = net(corners_and_grid(image, eps, norm))
        assert bool((found >= bounded.low[number] - 1e-9).all() & (found <= bounded.high[number] + 1e-9).all())
        least = (found @ heads[owner == number].double().T).amin(0)
        assert bool((sloped[owner == number] <= least + 1e-9).all())
        if eps == 0:
            torch.testing.assert_close(plain[owner == number], least, rtol=0, atol=1e-9)
    # Where nothing bends within the ball the net is affine there, and the corners say what is least.
    near = bounds.over(x, 1e-9, "linf").least(heads, owner)
    slopes = torch.autograd.functional.jacobian(lambda p: (net(p)[owner] * heads).sum(1), x.double())
    reach = 1e-9 * slopes.flatten(1).abs().sum(1)
    inner = ((x > 1e-6) & (x < 1 - 1e-6)).all()
    if inner:
        assert bool(((net(x.double())[owner] * heads).sum(1) - near <= reach * 1.01 + 1e-12).all())


@pytest.mark.parametrize(
    "arch",
    [
        "small-cnn",
        pytest.param("madry-mnist", marks=pytest.mark.slow),
        pytest.param("cifar-resnet18", marks=pytest.mark.slow),
    ],
)
def test_the_architectures_are_read_as_they_are(arch):
    shape = (3, 8, 8) if arch == "cifar-resnet18" else (1, 8, 8)
    classifier = build_classifier(arch, input_shape=shape, classes=("a", "b", "c"), seed=1).train()
    x = torch.rand((2, *shape))
    read = LinearBounds(classifier, x)(x)
    assert classifier.training
    torch.testing.assert_close(read, classifier.eval()(x).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_the_bound_of_a_pair_of_rows_is_the_exact_searchs_limit_where_the_feature_is_affine(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix, rows = (torch.rand(shape, generator=generator) for shape in ((3, 4), (2, 3)))
    x = torch.rand((1, *SIDES), generator=generator)
    surface = vote_surface(rows, torch.eye(2), matrix, torch.zeros(3), 1)
    y = surface.predict(x).argmax(1)
    bounds = LinearBounds(lambda p: p.flatten(1) @ matrix.T, x)
    near, far = rows[y], rows[1 - y]
    level = float(far.double().square().sum() - near.double().square().sum())

    def least(eps: float) -> float:
        return float(bounds.over(x, eps).least(2 * (near - far), torch.tensor([0]))) + level

    low, high = 0.0, 1.0
    for _ in range(16):
        low, high = (low, (low + high) / 2) if least((low + high) / 2) < 0 else ((low + high) / 2, high)
    exact = [run_exact(surface, x, y, eps=eps, norm="linf") for eps in (max(low - 1e-3, 0), min(low + 1e-3, 1))]
    assert bool(exact[0].certified) or low < 1e-2
    assert bool(exact[1].broken) == (low < 1 - 1e-3)


def drawn_surface(seed: int, kind: str, k: int, count: int = 12) -> tuple[RetrievalSurface, Tensor]:
    """A vote of K rows on a tiny net's feature, with one-hot-like or unsure posteriors, and three images."""
    generator = torch.Generator().manual_seed(seed)
    net = tiny(kind, seed)
    pixels = torch.rand((count + 3, *SIDES), generator=generator)
    with torch.no_grad():
        vectors = net(pixels[:count])
    classes = (pixels[:count, 0, 0, 0] > 0.5).long() + (pixels[:count, 0, 1, 1] > 0.7)
    sure = 1 + 6 * torch.rand(count, 1, generator=generator)
    posteriors = (sure * F.one_hot(classes, 3)).softmax(1)
    weights = torch.rand(count, generator=generator).round(decimals=1)
    surface = vote_surface(vectors, posteriors, torch.eye(3), torch.zeros(3), k, weights)
    inner = surface.predict

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            # The surface's own feature flattens what it is given.
            return inner(net(x))

    return RetrievalSurface(surface.knowledge, predict, k, features=net, rows=surface.rows), pixels[count:]


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(NETS), st.sampled_from([1, 3, 5]), st.sampled_from(["linf", "l2"]))
def test_no_image_within_a_certified_radius_is_answered_otherwise(seed, kind, k, norm):
    surface, x = drawn_surface(seed, kind, k)
    found = certify_bounds(surface, x, eps=[0.01, 0.05, 0.2], norm=norm, steps=2)
    bare = certify_bounds(surface.features, x, eps=[0.01, 0.05, 0.2], norm=norm, steps=2)
    for image, *proofs in zip(
        x.split(1), *(zip(c.prediction, c.radius, strict=True) for c in (found, bare)), strict=True
    ):
        for answer, (prediction, radius) in zip((surface.predict, surface.features), proofs, strict=True):
            points = corners_and_grid(image, float(radius), norm, steps=5).float()
            assert set(answer(points).argmax(1).tolist()) == {int(prediction)} or not radius


@pytest.mark.parametrize(("k", "share"), [(1, 0.9), (5, 0.25)])
def test_images_that_no_point_of_a_grid_breaks_are_often_certified(k, share):
    certified, standing = 0, 0
    # Nets whose features are not all the same.
    for seed in (1, 2, 4, 5):
        surface, x = drawn_surface(seed, "plain", k)
        found = certify_bounds(surface, x, eps=[0.01])
        for image, radius in zip(x.split(1), found.radius, strict=True):
            points = corners_and_grid(image, 0.01, "linf").float()
            standing += len(set(surface.predict(points).argmax(1).tolist())) == 1
            certified += bool(radius)
    assert standing >= 4
    assert certified >= share * standing


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_vote_stands_only_if_every_set_of_rows_that_the_proofs_allow_votes_so(seed, k):
    generator = torch.Generator().manual_seed(seed)
    own, rest = 2 + k, 4
    values = [torch.rand((n, 2), generator=generator) for n in (own, rest)]
    lead, others = values[0] + 0.01, 1.5 * values[1] - 1.2
    proven = torch.rand((own, rest), generator=generator) < 0.8
    zeros = torch.zeros_like(proven, dtype=torch.float64)
    pairs = _Pairs(0, torch.arange(own), torch.arange(rest), zeros, zeros, zeros, lead, others, 1e-5)
    leads = torch.cat([lead, others])
    worst = torch.full((2,), torch.inf)
    for chosen in itertools.combinations(range(own + rest), k):
        allowed = all(i in chosen for j in chosen if j >= own for i in proven[:, j - own].nonzero()[:, 0].tolist())
        if allowed:
            worst = torch.minimum(worst, leads[list(chosen)].sum(0))
    if pairs.stands(k, proven):
        assert bool((worst > 0).all())
    elif k == 1:
        assert bool((worst <= 1e-5).any())


@pytest.mark.parametrize("k", [None, 1, 3])
def test_most_images_that_can_be_broken_are_not_bounded(monkeypatch, k):
    shown, over, broken = [], LinearBounds.over, []

    def counted(self, images, eps, norm="linf"):
        shown.extend(images)
        return over(self, images, eps, norm)

    monkeypatch.setattr(LinearBounds, "over", counted)
    for seed in range(1, 7):
        surface, x = drawn_surface(seed, "plain", k or 1)
        target, answer = (surface, surface.predict) if k else (surface.features, surface.features)
        certify_bounds(target, x, eps=[0.5])
        broken += [
            image
            for image in x
            if len(set(answer(corners_and_grid(image, 0.5, "linf").float()).argmax(1).tolist())) > 1
        ]
    assert len(broken) >= 4
    assert sum(any(image.equal(other) for other in shown) for image in broken) <= len(broken) / 2


@pytest.mark.slow
def test_stopping_early_loses_no_proof_on_digits(tmp_path, monkeypatch):
    database = build_database(digits("train"), trained(), BLOCK2, tmp_path, progress=False)
    x, _ = images("test", 10)
    targets = [trained(), *(NearestNeighborDefense(trained(), database, k).surface() for k in (1, 5))]
    eps = [0.004, 0.008, 0.012, 0.016]
    early = [certify_bounds(target, x, eps=eps).radius for target in targets]
    # Nothing is seen but the image itself, and all slopes are followed to their end.
    monkeypatch.setattr("nndefense.certificates.bounds._STEPS", ())
    monkeypatch.setattr("nndefense.certificates.propagation._TRIED", 10**9)
    late = [certify_bounds(target, x, eps=eps).radius for target in targets]
    assert len(set(torch.cat(late).tolist())) > 3
    torch.testing.assert_close(early, late, rtol=0, atol=0)


def test_what_cannot_be_bounded_is_said_in_one_line():
    x = torch.rand((2, *SIDES))
    flat = nn.Flatten()
    for net, words in (
        (nn.Sequential(flat, nn.Linear(4, 3), nn.Sigmoid()), "not the net's sigmoid"),
        (nn.Sequential(flat, nn.Softmax(1)), "not the net's _softmax"),
        (lambda p: p.flatten(1) * p.flatten(1), "not the net's mul"),
        (lambda p: p.flatten(1) - p.flatten(1).mean(0, keepdim=True), "keeps images apart"),
        (lambda p: p.flatten(1) if float(p.sum()) > 0 else p.flatten(1)[:, :2], "recorded"),
        (lambda p: torch.ones(len(p), 2), "depends on the image"),
        (lambda p: p.flatten(1) + torch.rand(1), "answers otherwise"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), flat), "not the net's native_batch_norm"),
    ):
        with pytest.raises(InputError, match=words):
            certify_bounds(net, x, eps=[0.1])
    net = nn.Sequential(flat, nn.Linear(4, 3))
    with pytest.raises(InputError, match="at least one image and one eps"):
        certify_bounds(net, x, eps=[])
    with pytest.raises(InputError, match="norm"):
        certify_bounds(net, x, eps=[0.1], norm="normalized-l2")
    with pytest.raises(InputError, match="eps is -1"):
        certify_bounds(net, x, eps=[-1])
    surface, x = drawn_surface(0, "plain", 3)
    mixed = RetrievalSurface(
        surface.knowledge,
        lambda p: (surface.predict(p).exp() / 2 + 1 / 6).log(),
        3,
        features=surface.features,
        rows=surface.rows,
    )
    with pytest.raises(InputError, match="this defence answers otherwise"):
        certify_bounds(mixed, x, eps=[0.1])
    assert surface.rows is not None
    for other in ({"rows": replace(surface.rows, temperature=1e9)}, {"alpha": 1e-9}):
        with pytest.raises(InputError, match="a rule without a kernel and without a share of the classifier"):
            certify_bounds(replace(surface, **other), x, eps=[0.1])
    deep = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) if n % 2 else nn.ReLU() for n in range(1, 40)), flat)
    with pytest.raises(InputError, match=r"minutes an image on a net of this size.*smaller net"):
        certify_bounds(deep, torch.rand(1, 1, 64, 64), eps=[0.1])


@pytest.mark.slow
def test_length_one_features_are_bounded_before_they_are_scaled(tmp_path):
    spec = FeatureSpec("block2", "max", pca=8, normalize=True)
    database = build_database(digits("test"), trained(), spec, tmp_path, progress=False)
    x, _ = images("train", 3)
    surface = NearestNeighborDefense(trained(), database, 1).surface()
    assert isinstance(surface.features, FeatureExtractor)
    found = registry.get("bounds").run(surface, x, eps=[1e-4, 10.0], norm="linf")
    assert bool((found.radius == 1e-4).all())


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5])
def test_no_attack_breaks_a_certified_digit(tmp_path, k):
    database = build_database(digits("train"), trained(), BLOCK2, tmp_path, progress=False)
    x, y = images("test", 20)
    surface = NearestNeighborDefense(trained(), database, k).surface()
    eps = [0.004, 0.01]
    found, bare = (
        registry.get(name).run(target, x, eps=eps) for name, target in (("bounds", surface), ("bounds-net", trained()))
    )
    assert found.accuracy(y, eps[0]).accuracy > 0.5
    assert bare.accuracy(y, eps[0]).accuracy > 0.5
    for budget in eps:
        attacked = adaptive(surface, x, y, eps=budget, steps=20)
        assert not bool((found.stands(y, budget) & surface.fooled(attacked, y)).any())
        attacked = attacks.pgd(trained(), x, y, eps=budget, steps=20)
        assert not bool((bare.stands(y, budget) & (trained()(attacked).argmax(1) != y)).any())
