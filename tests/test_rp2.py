"""RP2: geometry, printing, views, the optimisation, the mask search and the paper's ratio."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from nndefense.attacks.rp2 import (
    RELEASED,
    Settings,
    Sticker,
    ViewChanges,
    as_photographed,
    carry,
    check_mask,
    check_palette,
    cut_mask,
    default_palette,
    frame,
    homography,
    look,
    nearest_printable,
    non_printability,
    objective,
    paper_white,
    rp2,
    search_mask,
    success,
    warp,
)
from nndefense.errors import InputError
from nndefense.statistics import wilson_interval

SKEW = torch.tensor([[[-0.5, -0.7], [0.9, -0.8], [0.7, 0.6], [-0.6, 0.9]]], dtype=torch.float64)


class Patch(nn.Module):
    """Class 1 where the mean of one patch's red is above a half; class 2 where its blue is; else class 0."""

    def __init__(self, top: int = 4, left: int = 8, side: int = 4) -> None:
        super().__init__()
        self.part = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        red, _, blue = x[self.part].mean((2, 3)).unbind(1)
        return 20 * torch.stack([torch.full_like(red, 0.5), red, blue], 1)


def scene(n: int = 4, size: int = 16) -> Tensor:
    return 0.2 + 0.1 * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def square(top: int, left: int, side: int, size: int = 16) -> Tensor:
    mask = torch.zeros(1, size, size)
    mask[:, top : top + side, left : left + side] = 1
    return mask


# Geometry.


def test_a_homography_carries_corners_exactly_and_the_identity_is_the_identity() -> None:
    matrix = homography(frame(), SKEW)
    assert torch.allclose(carry(frame(), matrix), SKEW, atol=1e-13)
    assert torch.allclose(carry(SKEW, torch.linalg.inv(matrix)), frame(), atol=1e-12)
    assert torch.equal(homography(SKEW, SKEW)[0], torch.eye(3, dtype=torch.float64))
    images = torch.rand(1, 3, 7, 9)
    assert warp(images, homography(frame(), frame()), (7, 9)) is images


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.4, 0.4), min_size=8, max_size=8))
def test_random_homographies_carry_corners(shifts: list[float]) -> None:
    target = frame() + torch.tensor(shifts, dtype=torch.float64).view(1, 4, 2)
    assert torch.allclose(carry(frame(), homography(frame(), target)), target, atol=1e-10)


def test_a_warp_moves_pixels_where_the_points_say() -> None:
    # The left half of the frame becomes the whole: columns 0 and 1 of 4, each twice as wide.
    left = torch.tensor([[[-1.0, -1.0], [0.0, -1.0], [0.0, 1.0], [-1.0, 1.0]]])
    image = torch.arange(4.0).expand(1, 1, 4, 4)
    shown = warp(image, homography(left, frame()), (4, 4), padding="border")
    assert torch.allclose(shown[0, 0, 1], torch.tensor([0.0, 0.25, 0.75, 1.25]), atol=1e-6)
    # And back: everything in the left half, nothing in the right one.
    shown = warp(torch.ones(1, 1, 4, 4), homography(frame(), left), (4, 4))
    assert torch.equal(shown[0, 0, 2], torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_a_planted_point_arrives_where_its_homography_says() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 20:24, 40:44] = 1
    matrix = homography(frame(), SKEW)
    centre = carry(torch.tensor([[[42.0, 22.0]]]) / 32 - 1, matrix)[0, 0]
    shown = warp(image, matrix, (100, 80))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(100.0) + 0.5, torch.arange(80.0) + 0.5, indexing="ij")
    found = torch.stack([(shown * columns).sum(), (shown * rows).sum()]) / shown.sum()
    assert torch.allclose(found / torch.tensor([40.0, 50.0]) - 1, centre.float(), atol=0.02)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[-1, -1], [0, 0], [1, 1], [-1, 1]], "convex"),
        ([[-1, -1], [1, 1], [1, -1], [-1, 1]], "in turn"),
        ([[-1, -1], [1, math.nan], [1, 1], [-1, 1]], "finite"),
        ([[-1, -1], [1, -1], [1, 1]], "N x 4 x 2"),
    ],
)
def test_points_that_make_no_homography(points: list[list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        homography(frame(), torch.tensor([points], dtype=torch.float64))


# Printing.


def test_printable_colours_have_no_score_and_no_gradient() -> None:
    palette = default_palette()
    assert palette.shape == (30, 3)
    assert len(palette.unique(dim=0)) == 30
    colours = palette.T.reshape(3, 5, 6).clone().requires_grad_(True)
    scores = non_printability(colours, palette)
    assert torch.equal(scores, torch.zeros(5, 6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(scores.sum(), colours)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    # Pure green, which no printer has, is worse than a colour near a printable one.
    pair = torch.tensor([[0.0, 1.0, 0.0], [0.45, 0.1, 0.11]]).T.reshape(3, 1, 2)
    far, near = non_printability(pair, palette)[0].tolist()
    assert far > 100 * near > 0


def test_the_score_is_the_product_of_thirty_distances() -> None:
    palette = default_palette()
    pixel = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    product = math.prod(float((pixel - colour).norm()) for colour in palette)
    assert float(non_printability(pixel.view(3, 1, 1), palette)) == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize("gap", [1e-12, 1e-6, 20.0])
def test_thirty_factors_neither_underflow_nor_overflow(gap: float) -> None:
    # In float32, 30 factors of 1e-6 are 0 and 30 of 20 are infinite.
    palette = torch.zeros(30, 3, dtype=torch.float64)
    colours = torch.tensor([gap, 0, 0], dtype=torch.float64).view(3, 1, 1).requires_grad_(True)
    score = non_printability(colours, palette)
    (gradient,) = torch.autograd.grad(score.sum(), colours)
    assert torch.isfinite(score).all()
    assert torch.isfinite(gradient).all()
    if gap > 1e-10:
        assert score.item() == pytest.approx(gap**30, rel=1e-9)
        assert gradient[0].item() == pytest.approx(30 * gap**29, rel=1e-9)


def test_the_nearest_printable_colour() -> None:
    palette = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 1]])
    colours = torch.tensor([[0.9, 0.2, 0.1], [0.2, 0.1, 0.3], [0.8, 0.9, 0.7]]).T.reshape(3, 1, 3)
    found = nearest_printable(colours, palette)
    assert torch.equal(found[:, 0].T, palette[[1, 0, 2]])
    assert float(non_printability(found, palette).sum()) == 0


def test_palettes_that_cannot_be_used() -> None:
    for palette, message in (
        (torch.rand(3), "P x 3"),
        (torch.zeros(0, 3), "P x 3"),
        (torch.full((2, 3), 128), "divide"),
        (torch.tensor([[math.nan, 0, 0]]), "finite"),
    ):
        with pytest.raises(InputError, match=message):
            check_palette(palette)


# Views and stickers.


def test_views_are_seeded_differentiable_and_inside_the_box() -> None:
    changes = RELEASED
    first, again = (changes.draw(50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.matrices, again.matrices)
    assert torch.equal(first.gains, again.gains)
    assert len(first) == 50
    assert not torch.equal(first.matrices, changes.draw(50, torch.Generator().manual_seed(4)).matrices)
    assert 0.1 <= float(first.gains.min()) < 0.5 < 1.6 < float(first.gains.max()) <= 2
    images = (0.5 * torch.rand(50, 3, 12, 12)).requires_grad_(True)
    shown = first(images)
    picture = shown.detach()
    assert shown.shape == images.shape
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    (gradient,) = torch.autograd.grad(shown.sum(), images)
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())


def test_a_gradient_through_homography_and_view_is_that_of_finite_differences() -> None:
    views = ViewChanges().draw(1, torch.Generator().manual_seed(0))
    photo, mask = torch.full((1, 3, 8, 8), 0.3, dtype=torch.float64), square(1, 1, 5, 8).double()
    matrix = homography(frame(), SKEW)

    def total(delta: Tensor) -> Tensor:
        return views(Sticker(delta, mask).on(photo, matrix)).square().sum()

    delta = (0.2 + 0.5 * torch.rand(3, 8, 8, dtype=torch.float64)).requires_grad_(True)
    assert torch.autograd.gradcheck(total, (delta,), atol=1e-6)


def test_no_change_changes_nothing() -> None:
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(as_photographed(3)(images), images)
    for bad in ({"brightness": (0.0, 1.0)}, {"brightness": (1.2, 1.0)}, {"crop": 0.5}, {"perspective": -0.1}):
        with pytest.raises(InputError):
            ViewChanges(**bad)  # type: ignore[arg-type]


def test_a_sticker_hides_what_is_under_it_and_nothing_else() -> None:
    photos, mask = scene(), square(4, 8, 4)
    eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    delta = torch.rand(3, 16, 16)
    shown = Sticker(delta, mask).on(photos, eye, torch.tensor([1.0, 1.0, 0.5, 0.5]))
    inside = mask.bool().expand(3, -1, -1)
    assert torch.equal(shown[:, ~inside], photos[:, ~inside])
    assert torch.allclose(shown[0][inside], delta[inside])
    assert torch.allclose(shown[3][inside], 0.5 * delta[inside])
    added = Sticker(2 * delta - 1, mask, "add").on(photos, eye)
    assert torch.equal(added[:, ~inside], photos[:, ~inside])
    assert torch.allclose(added[0][inside], (photos[0] + 2 * delta - 1).clamp(0, 1)[inside])


def test_the_gradient_is_exactly_zero_outside_the_mask() -> None:
    mask = square(2, 3, 6)
    photos = scene()
    matrices = torch.cat([homography(frame(), SKEW), homography(frame(), frame()).expand(3, 3, 3)])
    views = ViewChanges().draw(4, torch.Generator().manual_seed(0))
    for mode in ("replace", "add"):
        delta = torch.rand(3, 16, 16).requires_grad_(True)
        chosen = Settings(mode=mode, norm_weight=0.3, nps_weight=2.0)
        logits = Patch()(views(Sticker(delta, mask, mode).on(photos, matrices)))
        terms = objective(logits, delta, mask, 1, chosen, default_palette(), torch.full((3, 16, 16), 0.4))
        (gradient,) = torch.autograd.grad(terms.total, delta)
        inside = mask.bool().expand(3, -1, -1)
        assert torch.equal(gradient[~inside], torch.zeros_like(gradient[~inside]))
        assert bool((gradient[inside] != 0).any())


def test_the_objective_is_the_papers() -> None:
    mask, palette = square(0, 0, 2, 4), default_palette()
    delta = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    logits = torch.tensor([[1.0, 2.0], [0.0, 3.0]], requires_grad=True)
    loss = (math.log(1 + math.e) + math.log(1 + math.e**3)) / 2
    masked = (mask * delta).detach()
    for p in (1, 2):
        chosen = Settings(norm=p, norm_weight=0.5, nps_weight=3.0)
        terms = objective(logits, delta, mask, 0, chosen, palette)
        nps = sum(
            math.prod(float((masked[:, i, j].double() - colour).norm()) for colour in palette)
            for i in range(2)
            for j in range(2)
        )
        norm = float(masked.abs().sum()) if p == 1 else float(masked.square().sum().sqrt())
        assert terms.loss.item() == pytest.approx(loss, rel=1e-5)
        assert terms.total.item() == pytest.approx(0.5 * norm + 3 * nps + loss, rel=1e-5)


def test_paper_white_is_the_brightest_part_of_the_object() -> None:
    photos = torch.full((2, 3, 20, 20), 0.1)
    photos[:, :, 5:15, 5:15] = torch.tensor([0.8, 0.4]).view(2, 1, 1, 1)
    found = paper_white(photos, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert found.tolist() == pytest.approx([0.8, 0.4])


# The optimisation.


def test_a_sticker_reaches_its_target_and_keeps_its_budget() -> None:
    photos, mask = scene(), square(4, 8, 4)
    for mode, limit in (("replace", 1.0), ("add", 0.6)):
        made = rp2(Patch(), photos, mask, 2, settings=Settings(mode=mode, steps=60, limit=limit, changes=None))  # type: ignore[arg-type]
        delta = made.sticker.delta
        assert torch.equal(delta * (1 - mask), torch.zeros_like(delta))
        assert float(delta.max()) <= limit
        assert float(delta.min()) >= (0 if mode == "replace" else -limit)
        seen = look(Patch(), photos, made.sticker)
        assert seen.attacked.tolist() == [[2, 2, 2, 2]]
        assert seen.clean.tolist() == [[0, 0, 0, 0]]
        assert seen.rate(0, 2).value == 1
        assert made.forwards == 60 * 4
        assert made.history[-1]["step"] == 59
        assert made.history[-1]["total"] < made.history[0]["total"]


def test_the_same_seed_gives_the_same_sticker() -> None:
    def run(seed: int) -> Tensor:
        return rp2(
            Patch(), scene(6), square(3, 7, 6), 1, settings=Settings(steps=8, batch_size=4, seed=seed)
        ).sticker.delta

    before = torch.get_rng_state()
    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))
    assert torch.equal(torch.get_rng_state(), before)


def test_homographies_carry_the_sticker_to_where_the_object_is() -> None:
    # The object fills the right half of one photo and the left half of the other.
    right = torch.tensor([[[0.0, -1], [1, -1], [1, 1], [0, 1]]], dtype=torch.float64)
    left = right - torch.tensor([1.0, 0], dtype=torch.float64)
    matrices = homography(frame(2), torch.cat([right, left]))
    shown = Sticker(torch.ones(3, 16, 16), torch.ones(1, 16, 16)).on(torch.zeros(2, 3, 16, 16), matrices)
    assert float(shown[0, :, :, :8].max()) == 0
    assert float(shown[0, :, :, 8:].min()) == pytest.approx(1)
    assert torch.allclose(shown[1], shown[0].flip(-1))


def test_a_weight_on_the_score_makes_colours_printable() -> None:
    photos, mask = scene(), square(4, 8, 4)
    palette = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.1], [0.2, 0.5, 0.9]])
    scores = []
    for weight in (0.0, 5.0):
        chosen = Settings(steps=80, nps_weight=weight, norm_weight=0, changes=None)
        made = rp2(Patch(), photos, mask, 2, palette=palette, settings=chosen)
        scores.append(float((non_printability(made.sticker.delta, palette) * mask[0]).sum()))
        assert look(Patch(), photos, made.sticker).rate(0, 2).value == 1
    assert scores[1] < scores[0] / 20


def test_inputs_that_cannot_be_used() -> None:
    photos, mask, model = scene(), square(4, 8, 4), Patch().eval()
    quick = Settings(steps=1)
    skew = homography(frame(), SKEW)
    for message, call in (
        ("empty", lambda: rp2(model, photos, 0 * mask, 1)),
        ("0 and 1 only", lambda: rp2(model, photos, 0.5 * mask, 1)),
        ("1 x h x w", lambda: check_mask(mask[0])),
        ("divide", lambda: rp2(model, 255 * photos, mask, 1)),
        ("no photos", lambda: rp2(model, photos[:0], mask, 1)),
        ("target is class 3", lambda: rp2(model, photos, mask, 3, settings=quick)),
        ("4 finite homographies", lambda: rp2(model, photos, mask, 1, matrices=skew)),
        ("factors of light", lambda: rp2(model, photos, mask, 1, light=torch.zeros(4))),
        ("reference", lambda: rp2(model, photos, mask, 1, reference=torch.zeros(3, 8, 8))),
        ("RGB", lambda: rp2(model, photos[:, :1], mask, 1)),
        ("gradient", lambda: rp2(lambda x: Patch()(x).detach(), photos, mask, 1, settings=quick)),
        ("probabilities", lambda: rp2(lambda x: Patch()(x).softmax(1), photos, mask, 1, settings=quick)),
        ("training mode", lambda: rp2(Patch().train(), photos, mask, 1)),
        ("training mode", lambda: look(Patch().train(), photos, Sticker(photos[0], mask))),
        ("needs a mask", lambda: Sticker(photos[0], mask[:, :8])),
        ("mode is 'glue'", lambda: Settings(mode="glue")),  # type: ignore[arg-type]
        ("the norm is 3", lambda: Settings(norm=3)),
        ("norm_weight", lambda: Settings(norm_weight=-1)),
        ("learning_rate", lambda: Settings(learning_rate=0)),
        ("at least 1", lambda: Settings(steps=0)),
        ("limit", lambda: Settings(limit=20)),
    ):
        with pytest.raises(InputError, match=message):
            call()


# The search.


def test_the_search_finds_a_planted_region() -> None:
    region = square(1, 1, 14)
    found = search_mask(
        Patch(), scene(), region, 1, area=17 / 196, rectangles=1, settings=Settings(steps=60, changes=None)
    )
    assert torch.equal(found.mask, square(4, 8, 4))
    assert found.saliency.shape == (16, 16)
    assert float((found.saliency * (1 - found.mask[0])).max()) < 0.1 * float(found.saliency.max())


def test_rectangles_and_single_pixels() -> None:
    saliency = torch.full((20, 24), 0.1)
    saliency[2:6, 3:9], saliency[12:15, 10:20], saliency[9, 1] = 1.0, 0.8, 3.0
    everywhere = torch.ones(1, 20, 24)
    planted = torch.zeros(1, 20, 24)
    planted[:, 2:6, 3:9] = planted[:, 12:15, 10:20] = 1
    assert torch.equal(cut_mask(saliency, everywhere, area=56 / 480, rectangles=2), planted)
    pixels = cut_mask(saliency, everywhere, area=55.5 / 480, rectangles=None)
    planted[:, 9, 1] = 1
    assert torch.equal(pixels, planted)
    # It keeps to its region and its budget, also on a coarse grid.
    region = torch.zeros(1, 150, 130)
    region[:, 30:100, 40:120] = 1
    noise = torch.rand(150, 130, generator=torch.Generator().manual_seed(0))
    mask = cut_mask(noise, region, area=0.2)
    assert 0 < float(mask.sum()) <= 0.2 * float(region.sum())
    assert float((mask * (1 - region)).sum()) == 0
    for message, call in (
        ("share", lambda: cut_mask(saliency, everywhere, area=0)),
        ("less than one pixel", lambda: cut_mask(saliency, everywhere, area=1e-4)),
        ("changed no pixel", lambda: cut_mask(0 * saliency, everywhere, area=0.1)),
        ("does not fit", lambda: cut_mask(saliency[:4], everywhere, area=0.1)),
    ):
        with pytest.raises(InputError, match=message):
            call()


# The ratio.


def test_the_ratio_counts_only_views_that_are_right_without_the_sticker() -> None:
    clean = torch.tensor([14, 14, 14, 3, 12])
    attacked = torch.tensor([12, 12, 14, 12, 12])
    rate = success(clean, attacked, 14, 12)
    assert (rate.hits, rate.views, rate.shown, rate.photos) == (2, 3, 5, 3)
    assert rate.value == pytest.approx(2 / 3)
    # Two views of each of three photos: five views are right, of two photos.
    rate = success(torch.tensor([[1, 1, 0], [1, 1, 0]]), torch.tensor([[2, 2, 2], [2, 0, 2]]), 1, 2)
    assert (rate.hits, rate.views, rate.shown, rate.photos) == (3, 4, 6, 2)
    assert rate.interval == wilson_interval(1.5, 2)
    none = success(torch.tensor([0]), torch.tensor([2]), 1, 2)
    assert none.value is None
    assert none.interval is None
    with pytest.raises(InputError, match="the object's own"):
        success(clean, attacked, 12, 12)
    with pytest.raises(InputError, match="same views"):
        success(clean, attacked[:2], 14, 12)


def test_the_wilson_interval_is_scipys() -> None:
    from scipy.stats import binomtest

    for k, n in ((0, 5), (10, 15), (15, 15), (844, 1000)):
        exact = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson_interval(k, n) == pytest.approx((exact.low, exact.high), abs=1e-12)
    with pytest.raises(InputError):
        wilson_interval(3, 2)


# The paper's traffic-sign net and its photos.


@pytest.fixture(scope="module")
def signs(data_root: Path) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    sys.path.insert(0, str(data_root))
    try:
        from models import lisa_cnn  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(data_root))
    folder = data_root / "rp2"
    files = sorted((folder / "victim_set_32").iterdir(), key=lambda file: int(file.stem))
    photos = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files])
    names = ("octagon", "mask_l1loss_uniform_rectangles")
    pictures = {name: np.array(Image.open(folder / "masks" / f"{name}.png").convert("L")) for name in names}
    masks = {name: torch.from_numpy(picture > 127).float()[None] for name, picture in pictures.items()}
    net: nn.Module = lisa_cnn().requires_grad_(False)
    return net, photos.float() / 255, masks


def test_stop_becomes_speed_limit_45_on_photos_not_used(signs: tuple[nn.Module, Tensor, dict[str, Tensor]]) -> None:
    net, photos, masks = signs
    order = torch.randperm(40, generator=torch.Generator().manual_seed(11))
    used, apart = order[:20], order[20:]
    light = paper_white(photos, torch.eye(3, dtype=torch.float64).expand(40, 3, 3))
    made = rp2(net, photos[used], masks["octagon"], 12, light=light[used], settings=Settings(steps=80))
    seen = look(net, photos[apart], made.sticker, light=light[apart], changes=ViewChanges(), views=20, seed=99)
    rate = seen.rate(14, 12)
    assert rate.views > 300
    assert rate.value is not None
    assert rate.value >= 0.9
    assert look(net, photos[apart], made.sticker, light=light[apart]).rate(14, 12).value == 1
    # The poster alone is not the reason: one that shows the sign as it is leaves it a stop sign.
    plain = Sticker((photos[used] / light[used].view(-1, 1, 1, 1)).clamp(0, 1).mean(0).float(), masks["octagon"])
    assert look(net, photos[apart], plain, light=light[apart]).rate(14, 12).hits == 0


def test_the_published_perturbations_are_additive_and_reach_class_12(
    signs: tuple[nn.Module, Tensor, dict[str, Tensor]], data_root: Path
) -> None:
    net, photos, masks = signs
    with np.load(data_root / "rp2" / "lisa_noise.npz") as noise:
        stickers = {name: torch.from_numpy(noise[name]).permute(2, 0, 1) for name in noise.files}
    for name, mask, hits in (
        ("subliminal_poster", "octagon", 40),
        ("stickers_l1rect", "mask_l1loss_uniform_rectangles", 36),
    ):
        published = Sticker(stickers[name] * masks[mask], masks[mask], "add")
        rate = look(net, photos, published).rate(14, 12)
        assert rate.views == 40
        assert abs(rate.hits - hits) <= 1
