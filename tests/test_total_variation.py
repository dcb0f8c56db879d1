"""Total variation minimisation: the optimum against other solvers, what is proved of it, and the defence around it."""

from __future__ import annotations

import math
from itertools import product

import clarabel
import numpy as np
import pytest
import torch
from helpers import images as digits
from helpers import trained
from scipy import sparse
from skimage import data as samples
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from nndefense.defenses.transforms import (
    TotalVariation,
    TvProblem,
    minimize_total_variation,
    total_variation,
    tv_minimization,
)
from nndefense.defenses.transforms.tv_problem import DATA_TERMS, KINDS, differences, divergence, project
from nndefense.errors import InputError


def pictures(count: int = 3, channels: int = 2, side: int = 12, seed: int = 0) -> Tensor:
    """Blocks of colour with noise on them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 3, 3, generator=generator)
    flat = torch.nn.functional.interpolate(coarse, size=(side, side + 3))
    return (flat + 0.1 * torch.randn(flat.shape, generator=generator)).clamp(0, 1)


def masks(images: Tensor, seed: int = 1, per_entry: bool = False) -> Tensor:
    shape = images.shape if per_entry else (len(images), 1, *images.shape[2:])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def optimum(image: Tensor, keep: Tensor | None, weight: float, kind: str, data: str) -> float:
    """The least objective of one image C x H x W by an interior-point solver, which shares nothing with ours.

    Over (z, t, s): t bounds the lengths of the differences, s the data term, each by a cone of its own.
    """
    channels, height, width = image.shape
    n = image.numel()
    place = np.arange(n).reshape(channels, height, width)
    rows: list[list[tuple[int, float, float]]] = []  # entries (column, value) with the offset, one row per cone entry
    cones: list[object] = []
    bounds = 0

    def cone(members: list[tuple[list[tuple[int, float]], float]]) -> None:
        """Second-order cone: the first member is at least the length of the others."""
        for terms, offset in members:
            rows.append([(column, value, offset) for column, value in terms] or [(0, 0.0, offset)])
        cones.append(clarabel.SecondOrderConeT(len(members)))

    def bound(differences_: list[tuple[int, int]]) -> None:
        nonlocal bounds
        cone([([(n + bounds, 1.0)], 0.0), *(([(a, 1.0), (b, -1.0)], 0.0) for a, b in differences_)])
        bounds += 1

    for c in range(channels):
        across = [[(place[c, i, j + 1], place[c, i, j]) for i in range(height)] for j in range(width - 1)]
        down = [[(place[c, i + 1, j], place[c, i, j]) for j in range(width)] for i in range(height - 1)]
        if kind == "lines":
            for line in across + down:
                bound(line)
        elif kind == "anisotropic":
            for pair in (pair for line in across + down for pair in line):
                bound([pair])
        else:
            for i, j in product(range(height), range(width)):
                pairs = [(place[c, i, j + 1], place[c, i, j])] if j + 1 < width else []
                pairs += [(place[c, i + 1, j], place[c, i, j])] if i + 1 < height else []
                if pairs:
                    bound(pairs)
    x = image.double().numpy().ravel()
    kept = np.ones(n, dtype=bool) if keep is None else keep.expand_as(image).numpy().ravel()
    total = n + bounds + 1
    if data == "norm":
        cone([([(total - 1, 1.0)], 0.0), *(([(k, 1.0)], -x[k]) for k in np.flatnonzero(kept))])
    quadratic = np.zeros(total)
    linear = np.concatenate([np.zeros(n), np.full(bounds, weight), [1.0 if data == "norm" else 0.0]])
    constant = 0.0
    if data == "squared":
        quadratic[:n][kept] = 1.0
        linear[:n][kept] = -x[kept]
        constant = float((x[kept] ** 2).sum() / 2)
    # A z + s = b with s in the cones: s is what the rows say, so A holds their negative.
    entries = [(r, column, -value) for r, row in enumerate(rows) for column, value, _ in row]
    matrix = sparse.csc_matrix(
        ([e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])), shape=(len(rows), total)
    )
    offsets = np.array([row[0][2] for row in rows])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_rel = settings.tol_gap_abs = settings.tol_feas = 1e-10
    solver = clarabel.DefaultSolver(sparse.diags(quadratic).tocsc(), linear, matrix, offsets, cones, settings)
    found = solver.solve()
    assert str(found.status) in ("Solved", "AlmostSolved"), found.status
    return float(found.obj_val) + constant


class TestOptimum:
    @pytest.mark.parametrize("data", DATA_TERMS)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("mask", ["none", "pixel", "entry"])
    def test_lies_within_the_stated_gap_of_a_convex_solver(self, kind: str, data: str, mask: str) -> None:
        images = pictures(2, 2, 8)
        keep = None if mask == "none" else masks(images, per_entry=mask == "entry")
        for weight in (0.03, 0.2):
            found = minimize_total_variation(images, weight, keep=keep, kind=kind, data=data, tolerance=1e-4)
            problem = TvProblem(images, None if keep is None else keep.expand_as(images).float(), weight, kind, data)
            ours = problem.objective(found.images)
            for i in range(len(images)):
                best = optimum(images[i], None if keep is None else keep[i], weight, kind, data)
                assert float(ours[i]) - best <= 1e-4 * best + 1e-6
                # Nothing beats the optimum, and the proved bound never lies above it.
                assert float(ours[i]) - best >= -1e-5 * best
                assert float(found.objective[i] - found.gap[i]) <= best * (1 + 1e-5) + 1e-6
                assert float(ours[i]) <= float(found.objective[i]) * (1 + 1e-5) + 1e-6

    @pytest.mark.parametrize("weight", [pytest.param(0.03, marks=pytest.mark.slow), 0.1])
    def test_agrees_with_scikit_image_run_to_convergence(self, weight: float) -> None:
        image = torch.from_numpy(samples.astronaut()[100:132, 200:232]).permute(2, 0, 1)[None].double() / 255
        found = minimize_total_variation(image, weight, tolerance=1e-5)
        theirs = denoise_tv_chambolle(
            image[0].permute(1, 2, 0).numpy(), weight=weight, eps=1e-11, max_num_iter=20_000, channel_axis=-1
        )
        problem = TvProblem(image, None, weight, "isotropic", "squared")
        best = problem.objective(torch.from_numpy(theirs).permute(2, 0, 1)[None].contiguous())
        assert abs(float(problem.objective(found.images) / best) - 1) < 1e-4
        # The objective is flat at its minimum: 1/2 |z - z*|^2 <= gap bounds how far the images are apart.
        assert float((found.images[0].permute(1, 2, 0) - torch.from_numpy(theirs)).abs().mean()) < 2e-3

    def test_of_the_norm_is_that_of_the_squared_problem_with_its_own_weight(self) -> None:
        images = pictures(2, 1, 12).double()
        found = minimize_total_variation(images, 0.2, data="norm", tolerance=1e-6, max_iterations=20_000)
        for i in range(len(images)):
            distance = float((found.images[i] - images[i]).norm())
            assert distance > 0.1
            other = minimize_total_variation(images[i : i + 1], 0.2 * distance, tolerance=1e-6, max_iterations=20_000)
            torch.testing.assert_close(found.images[i : i + 1], other.images, rtol=0, atol=5e-3)


class TestPieces:
    def test_divergence_is_minus_the_adjoint(self) -> None:
        z = torch.randn(2, 3, 5, 7, dtype=torch.float64)
        px, py = differences(torch.randn_like(z))
        dx, dy = differences(z)
        assert float((px * dx + py * dy).sum()) == pytest.approx(-float((divergence(px, py) * z).sum()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_variation_is_the_greatest_product_with_the_unit_ball(self, kind: str) -> None:
        z = torch.randn(1, 2, 6, 5, dtype=torch.float64)
        dx, dy = differences(z)
        # Far along the differences, the projection is the point that meets the maximum.
        px, py = dx * 1e9, dy * 1e9
        project(px, py, kind)
        assert float((px * dx + py * dy).sum()) == pytest.approx(float(total_variation(z, kind)))

    def test_variation_of_a_step_is_its_height_times_its_length(self) -> None:
        z = torch.zeros(1, 1, 4, 6)
        z[..., 3:] = 0.5
        assert float(total_variation(z, "isotropic")) == float(total_variation(z, "anisotropic")) == 2.0
        assert float(total_variation(z, "lines")) == pytest.approx(0.5 * math.sqrt(4))

    def test_every_dual_point_proves_a_bound(self) -> None:
        images = pictures(2, 2, 6)
        for kind, data in product(KINDS, DATA_TERMS):
            problem = TvProblem(images, masks(images).expand_as(images).float(), 0.1, kind, data)
            best = minimize_total_variation(images, 0.1, keep=masks(images), kind=kind, data=data).objective
            for seed in range(5):
                px, py = differences(10 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))
                project(px, py, kind)
                bound = problem.lower_bound(px, py, problem.bounds())
                assert bool((bound <= best).all())
                better = problem.lower_bound(*problem.repaired(px, py), problem.bounds())
                assert bool((better >= bound).all())
                assert bool((better <= best).all())


class TestSolver:
    def test_black_pixels_that_are_kept_stay_black(self) -> None:
        image = torch.zeros(1, 1, 9, 9)
        keep = masks(image)
        image[~keep.expand_as(image)] = 1.0  # what is dropped is never looked at
        found = minimize_total_variation(image, 0.03, keep=keep)
        assert float(found.images.abs().max()) < 1e-6

    def test_a_dropped_pixel_is_filled_from_its_neighbours(self) -> None:
        image = torch.full((1, 1, 7, 7), 0.25)
        keep = torch.ones(1, 1, 7, 7, dtype=torch.bool)
        image[0, 0, 3, 3], keep[0, 0, 3, 3] = 1.0, False
        found = minimize_total_variation(image, 0.03, keep=keep)
        torch.testing.assert_close(found.images, torch.full_like(image, 0.25), rtol=0, atol=1e-4)

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        images = pictures(5, 3, 16)
        for data in DATA_TERMS:
            whole = minimize_total_variation(images, 0.05, keep=masks(images), data=data)
            for i in range(len(images)):
                alone = minimize_total_variation(images[i : i + 1], 0.05, keep=masks(images)[i : i + 1], data=data)
                assert int(alone.iterations) == int(whole.iterations[i])
                torch.testing.assert_close(alone.images[0], whole.images[i], rtol=0, atol=1e-5)

    def test_several_threads_give_what_one_gives_and_are_as_many_afterwards(self) -> None:
        images, before = pictures(6, 3, 90), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = minimize_total_variation(images, 0.05, keep=masks(images), tolerance=1e-2)
            torch.set_num_threads(2)
            two = minimize_total_variation(images, 0.05, keep=masks(images), tolerance=1e-2)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.iterations, two.iterations)

    def test_finished_images_leave_early(self) -> None:
        images = torch.cat([torch.full((1, 1, 16, 15), 0.5), pictures(1, 1, 16)[..., :15]])
        found = minimize_total_variation(images, 0.1, tolerance=1e-5)
        assert int(found.iterations[0]) < int(found.iterations[1])
        each = minimize_total_variation(images[1:].repeat(2, 1, 1, 1), 0.1, tolerance=torch.tensor([1e-1, 1e-5]))
        assert int(each.iterations[0]) < int(each.iterations[1])

    @pytest.mark.parametrize("data", DATA_TERMS)
    def test_a_warm_start_takes_fewer_iterations(self, data: str) -> None:
        images, keep = pictures(3, 3, 16), masks(pictures(3, 3, 16))
        cold = minimize_total_variation(images, 0.1, keep=keep, data=data)
        warm = minimize_total_variation(images, 0.1, keep=keep, data=data, start=cold)
        assert int(warm.iterations.max()) < int(cold.iterations.min())
        near = minimize_total_variation((images + 0.002).clamp(0, 1), 0.1, keep=keep, data=data, start=cold)
        assert int(near.iterations.sum()) < int(cold.iterations.sum())

    @pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 1, 1, 1), (1, 2, 1, 6), (1, 2, 6, 1), (3, 1, 2, 2)])
    def test_odd_shapes(self, shape: tuple[int, ...]) -> None:
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for kind, data in product(KINDS, DATA_TERMS):
            found = minimize_total_variation(images, 0.05, keep=torch.rand(shape) < 0.5, kind=kind, data=data)
            assert found.images.shape == images.shape
            assert len(found.iterations) == len(found.gap) == len(images)
            if len(images):
                assert float(found.images.min()) >= 0
                assert float(found.images.max()) <= 1

    def test_says_when_it_did_not_get_there(self) -> None:
        with pytest.warns(RuntimeWarning, match="did not reach the tolerance in 3 iterations"):
            found = minimize_total_variation(pictures(), 0.1, tolerance=1e-6, max_iterations=3)
        assert bool((found.gap > 1e-6 * found.objective).all())

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"weight": 0.0}, "weight is 0.0"),
            ({"kind": "round"}, "kind is 'round'"),
            ({"data": "cubed"}, "data is 'cubed'"),
            ({"tolerance": 1e-9}, "tolerance is 1e-09"),
            ({"tolerance": torch.tensor([0.1, 0.1])}, "one number or one per image"),
            ({"keep": torch.ones(4, 4)}, "keep has shape"),
            ({"keep": torch.full((3, 1, 1, 1), 0.5)}, "zeros and ones"),
            ({"start": torch.zeros(1, 1, 2, 2)}, "start has shape"),
            ({"max_iterations": 0}, "max_iterations is 0"),
        ],
    )
    def test_refuses(self, change: dict[str, object], said: str) -> None:
        with pytest.raises(InputError, match=said):
            minimize_total_variation(pictures(), **change)  # type: ignore[arg-type]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self) -> None:
        images = pictures(4, 3, 32)
        here = minimize_total_variation(images, 0.05, keep=masks(images))
        there = minimize_total_variation(images.cuda(), 0.05, keep=masks(images).cuda())
        torch.testing.assert_close(there.images.cpu(), here.images, rtol=0, atol=1e-3)


class TestTransform:
    def test_one_mask_for_all_channels_unless_asked(self) -> None:
        images = torch.rand(4, 3, 30, 30)
        assert TotalVariation().draw(images).shape == (4, 1, 30, 30)
        drawn = TotalVariation(mask="entry", keep=0.7).draw(images)
        assert drawn.shape == images.shape
        assert float(drawn.float().mean()) == pytest.approx(0.7, abs=0.03)
        assert not torch.equal(drawn[:, 0], drawn[:, 1])

    def test_redraws_within_its_range(self) -> None:
        images, _ = digits("test", 10)
        torch.manual_seed(0)
        found = TotalVariation()(images)
        assert found.shape == images.shape
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1
        assert bool((total_variation(found) < total_variation(images)).all())

    @pytest.mark.parametrize("change", [{"keep": 0.0}, {"mask": "row"}, {"tolerance": 2.0}, {"weight": -1.0}])
    def test_refuses(self, change: dict[str, object]) -> None:
        with pytest.raises(InputError, match=next(iter(change))):
            TotalVariation(**change)  # type: ignore[arg-type]

    def test_defends_with_a_seed_and_hands_gradients_to_an_attacker(self) -> None:
        images, labels = digits("test", 40)
        defense = tv_minimization(trained(), keep=0.9, weight=0.01)
        said = defense.with_seed(0)(images)
        assert torch.equal(said, defense.with_seed(0)(images))
        torch.testing.assert_close(said.exp().sum(1), torch.ones(40))
        assert float((said.argmax(1) == labels).float().mean()) > 0.6
        leaf = images.clone().requires_grad_()
        surface = defense.attack_model(draws=3, generator=torch.Generator().manual_seed(0))
        surface(leaf)[:, 0].sum().backward()
        assert leaf.grad is not None
        assert bool((leaf.grad.flatten(1).norm(dim=1) > 0).all())
        assert not tv_minimization(trained(), keep=1.0).random
