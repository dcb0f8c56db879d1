"""The exact robust accuracy: brute force over all sets of rows, cases that are known, every attack, and refusals."""

from __future__ import annotations

import itertools

import clarabel
import numpy as np
import pytest
import torch
from helpers import digits, images, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from index_build import build_database
from nndefense import attacks
from nndefense.attacks import registry
from nndefense.attacks.retrieval import Knowledge, RetrievalSurface, Rows, run_exact
from nndefense.attacks.retrieval.affine import affine_feature
from nndefense.database import combine
from nndefense.database.exact_search import ExactSearch
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.features import FeatureSpec


def vote_surface(
    vectors: Tensor, posteriors: Tensor, matrix: Tensor, offset: Tensor, k: int, weights: Tensor | None = None
) -> RetrievalSurface:
    """K-NN of an affine feature, F x d and F, of pixels: rows R x F with posteriors R x C and weights R."""
    weights = torch.ones(len(vectors)) if weights is None else weights
    search = ExactSearch(vectors, posteriors.argmax(1))

    def features(x: Tensor) -> Tensor:
        return x.flatten(1) @ matrix.T + offset

    def predict(x: Tensor) -> Tensor:
        _, found = search.search(features(x), k)
        return combine(posteriors[found], weights[found]).clamp_min(1e-30).log()

    rows = Rows(
        len(vectors),
        lambda f, m, *, of=None, but=None: search.search(f, m, of=of, but=but),
        lambda r: vectors[r],
        lambda r: posteriors[r],
        lambda r: weights[r],
    )
    return RetrievalSurface(Knowledge.WHITE, predict, k, features=features, rows=rows)


def least_move(
    surface: RetrievalSurface, matrix: Tensor, offset: Tensor, x: Tensor, y: int, norm: str, slack: float
) -> float:
    """The least move within the box to a set of K rows whose vote is not y, by a programme for each set.

    A row of the set may be farther than one outside by ``slack`` (squared), or must be nearer by as much.
    """
    every = torch.arange(surface.rows.count)
    v, s, w = (part(every).double() for part in (surface.rows.vectors, surface.rows.posteriors, surface.rows.weights))
    slope, level = -2 * v @ matrix.double(), -2 * v @ offset.double() + v.square().sum(1)
    center, d = x.flatten().double().numpy(), x.numel()
    options = clarabel.DefaultSettings()
    options.verbose = False
    best = np.inf
    for chosen in itertools.combinations(range(len(v)), surface.k):
        inner = torch.tensor(chosen)
        if int(combine(s[None, inner], w[None, inner])[0].argmax()) == y:
            continue
        outer = torch.tensor([row for row in range(len(v)) if row not in chosen])
        pairs = torch.cartesian_prod(inner, outer)
        normal = (slope[pairs[:, 0]] - slope[pairs[:, 1]]).numpy()
        bound = (level[pairs[:, 1]] - level[pairs[:, 0]] + slack).numpy()
        box, eye, zero = np.concatenate([np.ones(d), np.zeros(d)]), np.eye(d), np.zeros((d, 1))
        if norm == "linf":
            # Variables x and t, with |x - x0| <= t; t is least.
            blocks = [np.hstack([normal, np.zeros((len(normal), 1))]), np.hstack([eye, zero]), np.hstack([-eye, zero])]
            blocks += [np.hstack([eye, zero - 1]), np.hstack([-eye, zero - 1])]
            right = np.concatenate([bound, box, center, -center])
            quadratic, linear = np.zeros((d + 1, d + 1)), np.append(np.zeros(d), 1.0)
        else:
            blocks, right = [normal, eye, -eye], np.concatenate([bound, box])
            quadratic, linear = np.eye(d), -center
        answer = clarabel.DefaultSolver(
            sparse.csc_matrix(quadratic),
            linear,
            sparse.csc_matrix(np.vstack(blocks)),
            right,
            [clarabel.NonnegativeConeT(len(right))],
            options,
        ).solve()
        if answer.status == clarabel.SolverStatus.Solved:
            move = np.asarray(answer.x)[:d] - center
            best = min(best, np.abs(move).max() if norm == "linf" else np.linalg.norm(move))
    return best


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_one_row_of_each_of_three_classes_can_outvote_the_right_one(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix, rows = (torch.rand(shape, generator=generator) for shape in ((4, 4), (9, 4)))
    matrix, sure = 3 * matrix - 1.2, 0.9 + 0.1 * torch.rand((9, 1), generator=generator)
    posteriors = ((1 - sure) / 2).expand(-1, 3).scatter(1, (torch.arange(9) % 3)[:, None], sure)
    surface = vote_surface(rows @ matrix.T, posteriors, matrix, torch.zeros(4), 3)
    x = torch.rand((8, 1, 1, 4), generator=generator)
    y = surface.predict(x).argmax(1)
    found = run_exact(surface, x, y, eps=0.1)
    assert not bool(found.open.any())
    for image, label, broken in zip(x.split(1), y.tolist(), found.broken.tolist(), strict=True):
        assert broken == (least_move(surface, matrix, torch.zeros(4), image, label, "l2", 0.0) <= 0.1)


@pytest.mark.parametrize("equal", [False, True])
def test_rows_of_no_weight_and_equal_rows_are_no_obstacle(equal):
    generator = torch.Generator().manual_seed(3)
    matrix, rows = 3 * torch.rand((4, 5), generator=generator) - 1.2, torch.rand((11, 5), generator=generator)
    classes = torch.randint(0, 3, (11,), generator=generator)
    if equal:
        rows[1:8:2] = rows[:7:2]
    weights = (torch.arange(11) % 3) * torch.rand(11, generator=generator)
    surface = vote_surface(rows @ matrix.T, torch.eye(3)[classes], matrix, torch.zeros(4), 3, weights)
    x = torch.rand((6, 1, 1, 5), generator=generator)
    y = surface.predict(x).argmax(1)
    slack = 1.3 * run_exact(surface, x, y, eps=0.0).slack
    least = torch.tensor(
        [least_move(surface, matrix, torch.zeros(4), *one, "l2", slack) for one in zip(x, y.tolist(), strict=True)]
    )
    # Where two equal rows of other classes are the K-th and the next, the order of a search decides.
    clear = least > 1e-3
    assert int(clear.sum()) >= 3
    assert bool(run_exact(surface, x, y, eps=0.999 * least.clamp_max(2.0), norm="l2").certified[clear].all())


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([1, 2, 3]),
    norm=st.sampled_from(["l2", "linf", "normalized-l2"]),
    sharp=st.sampled_from([1.0, 4.0, 30.0]),
    edge=st.booleans(),
)
def test_it_agrees_with_brute_force(seed, k, norm, sharp, edge):
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    d, count = 3, 8
    matrix, offset = drawn(4, d) - 0.3, drawn(4)
    vectors = drawn(count, d) @ matrix.T + offset + 0.1 * drawn(count, 4)
    posteriors = (sharp * drawn(count, 3)).softmax(1)
    surface = vote_surface(vectors, posteriors, matrix, offset, k, drawn(count))
    # At the edge of the box, which is then a part of the problem.
    x = (drawn(3, 1, 1, d).round() if edge else drawn(3, 1, 1, d)).clamp(0.02, 1)
    y = surface.predict(x).argmax(1)
    for image, label in zip(x.split(1), y.split(1), strict=True):
        # Whatever rounding may decide lies between the two.
        slack = run_exact(surface, image, label, eps=0.0, norm=norm).slack
        size = float(image.norm()) if norm == "normalized-l2" else 1.0
        least, most = (
            least_move(surface, matrix, offset, image, int(label), norm, side * slack) / size for side in (1.3, -2.2)
        )
        # The solver of the brute force is right to 1e-8 in half the squared move.
        if least > 1e-3:
            below = run_exact(surface, image, label, eps=min(0.999 * least, 1.0 if norm == "linf" else 2.0), norm=norm)
            assert bool(below.certified)
            assert not below.broken
            assert torch.equal(below.images, image)
        if np.isfinite(most):
            most = min(1.001 * most, 1.0) if norm == "linf" else 1.001 * most
            above = run_exact(surface, image, label, eps=most, norm=norm)
            assert bool(above.broken)
            assert not above.certified
            assert bool(surface.fooled(above.images, label))
            assert float(attacks.distance(image, above.images, norm)) <= most * size + 1e-6
            assert 0 <= float(above.images.min()) <= float(above.images.max()) <= 1


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.5), ("normalized-l2", 0.5 / 2**0.5)])
def test_a_1_nn_that_is_known(norm, eps):
    # Without the box the least change in l2 were [-.25, .25]; the image moved by .5 stands where it begins.
    shift = torch.tensor([0.0, 0.0]) if norm != "normalized-l2" else torch.tensor([1.0, 1.0])
    rows = torch.tensor([[0.5, 0.5], [1.0, 0.5], [0.0, 1.0]])
    rows = rows if norm != "normalized-l2" else 1 - rows
    surface = vote_surface(rows, torch.eye(2)[[1, 1, 0]], torch.eye(2), torch.zeros(2), 1)
    x, y = shift.view(1, 1, 1, 2), torch.tensor([1])
    for share, there in ((0.999, False), (1.001, True)):
        found = run_exact(surface, x, y, eps=share * eps, norm=norm)
        assert bool(found.broken) == there
        assert bool(found.certified) != there
        assert not bool(found.open)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_what_is_below_the_lipschitz_bound_of_1_nn_is_certified(scale):
    rows, classes = images("train", 300)
    matrix = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    matrix = (matrix * torch.linspace(0.2, scale, 64)).T
    surface = vote_surface(rows.flatten(1) @ matrix.T, torch.eye(10)[classes], matrix, torch.zeros(64), 1)
    x, y = images("test", 20)
    x, y = x[~surface.fooled(x, y)], y[~surface.fooled(x, y)]
    same, other = (surface.rows.nearest(surface.features(x), 1, **{side: y})[0][:, 0] for side in ("of", "but"))
    bound = (other - same) / (2 * float(torch.linalg.matrix_norm(matrix, 2)))
    assert bool(run_exact(surface, x, y, eps=0.999 * bound, norm="l2").certified.all())
    # And moving straight to the nearest other row is always enough.
    far = (rows[None] - x[:, None]).flatten(2).norm(dim=2).masked_fill(classes[None] == y[:, None], torch.inf).amin(1)
    assert bool(run_exact(surface, x, y, eps=far + 1e-3, norm="l2").broken.all())


@pytest.fixture(scope="module")
def defense(tmp_path_factory) -> NearestNeighborDefense:
    """The demo's: a first convolution before its non-linearity, averaged over a grid, and PCA."""
    feature = FeatureSpec("block1.0", "grid4", pca=48)
    database = build_database(digits("train"), trained(), feature, tmp_path_factory.mktemp("d"), progress=False)
    return NearestNeighborDefense(trained(), database, 3, "cbw-d")


@pytest.mark.parametrize(("norm", "eps"), [("normalized-l2", 0.15), ("linf", 0.08)])
def test_what_is_broken_is_broken_and_what_is_certified_falls_to_nothing(defense, norm, eps):
    x, y = images("test", 24)
    surface = defense.surface(images=digits("train"))
    found = run_exact(surface, x, y, eps=eps, norm=norm)
    assert int(found.broken.sum()) > 2 < int(found.certified.sum())
    assert not bool((found.broken & found.certified).any())
    assert torch.equal(defense(found.images).argmax(1) != y, found.broken)
    assert bool((attacks.distance(x, found.images, norm) <= attacks.radius(x, eps, norm) + 1e-6).all())
    x, y = x[found.certified], y[found.certified]
    for name in registry.names("adaptive"):
        attack = registry.get(name)
        effort = 20 if attack.effort == "steps" else 100
        target = surface if attack.on_retrieval else defense
        generator = torch.Generator().manual_seed(0)
        made = attack.run(
            target, x, y, effort=effort, restarts=1, loss="cross-entropy", eps=eps, norm=norm, generator=generator
        )
        assert not bool(surface.fooled(getattr(made, "images", made), y).any()), name


def test_what_goes_on_past_the_limit_stays_open(defense):
    x, y = images("test", 24)
    surface = defense.surface()
    short, whole = (run_exact(surface, x, y, eps=0.15, norm="normalized-l2", limit=limit) for limit in (1, 20_000))
    assert int(short.nodes.max()) == 1
    assert not bool(whole.open.any())
    assert bool(short.open.any())
    assert not bool((short.certified & ~whole.certified).any())
    assert not bool((short.broken & ~whole.broken).any())


def test_what_is_not_affine_is_refused(tmp_path, defense):
    database = build_database(digits("test"), trained(), FeatureSpec("block1.2", "grid4"), tmp_path, progress=False)
    x, y = images("test", 4)
    bent = NearestNeighborDefense(trained(), database, 3).surface()
    with pytest.raises(InputError, match="affine in the pixels"):
        run_exact(bent, x, y, eps=0.1)
    found = affine_feature(defense.extractor, x)
    assert found.error < 1e-4
    assert float((found(x) - defense.extractor(x).detach()).norm(dim=1).max()) < 1e-4


def test_answers_that_are_no_vote_of_rows_are_refused(defense):
    rows, classes = images("train", 60)
    x, y = images("test", 4)
    plain = vote_surface(rows.flatten(1), torch.eye(10)[classes], torch.eye(64), torch.zeros(64), 3)

    def by_distance(images: Tensor) -> Tensor:
        distances, found = plain.rows.nearest(images.flatten(1), 3)
        return combine(plain.rows.posteriors(found), (-5 * distances).exp()).clamp_min(1e-30).log()

    with pytest.raises(InputError, match="weights that depend on the row alone"):
        run_exact(RetrievalSurface(Knowledge.WHITE, by_distance, 3, None, plain.features, plain.rows), x, y, eps=0.1)
    with pytest.raises(InputError, match="every row"):
        run_exact(defense.surface(Knowledge.PARTIAL, overlap=0.5), x, y, eps=0.1)
    with pytest.raises(InputError, match="at least one image"):
        run_exact(plain, x[:0], y[:0], eps=0.1)
