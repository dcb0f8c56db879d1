"""Image quilting: tiling, seams, stitching, and the defence, against plain loops and brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digits, images, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from index_build.patches import build_patches
from nndefense.attacks import pgd
from nndefense.database.index import FaissIndex
from nndefense.defenses.quilting import (
    PatchDatabase,
    Quilt,
    boundary_cut,
    cut,
    lay_out,
    quilting,
    stitch,
    write_patches,
)
from nndefense.defenses.quilting.layout import starts
from nndefense.errors import InputError

tilings = st.integers(1, 7).flatmap(
    lambda patch: st.tuples(
        st.integers(patch, patch + 24), st.integers(patch, patch + 24), st.just(patch), st.integers(0, patch - 1)
    )
)


def store(folder: Path, patches: Tensor, *, index: str = "auto", probes: int | None = None) -> PatchDatabase:
    """A patch database of these patches, n x C x p x p."""
    data = {"name": "made up", "fingerprint": "", "images": 1}
    write_patches(folder, patches, np.zeros((len(patches), 3), np.int64), data=data, seed=0, index=index, probes=probes)
    return PatchDatabase.open(folder)


def bytes_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# -- tiling -----------------------------------------------------------------------------------------------------


@given(tilings)
@settings(max_examples=150, deadline=None)
def test_patches_cover_every_pixel_and_nothing_else(tiling):
    side, _, patch, overlap = tiling
    first = starts(side, patch, overlap)
    assert first[0] == 0
    assert first[-1] == side - patch
    assert set(np.diff(first)[:-1]) <= {patch - overlap}
    assert all(0 < step <= patch - overlap for step in np.diff(first))


def test_the_last_rows_of_a_224_pixel_image_are_covered():
    layout = lay_out(224, 224, 5, 2)
    assert len(layout) == 74 * 74
    assert sorted(set(layout.pixels.flatten().tolist())) == list(range(224 * 224))


@given(tilings)
@settings(max_examples=60, deadline=None)
def test_waves_keep_the_raster_order_of_patches_that_meet(tiling):
    height, width, patch, overlap = tiling
    layout = lay_out(height, width, patch, overlap)
    assert torch.equal(torch.cat(layout.waves).sort().values, torch.arange(len(layout)))
    level = torch.empty(len(layout), dtype=torch.int64)
    for number, wave in enumerate(layout.waves):
        level[wave] = number
        assert len(layout.pixels[wave].flatten().unique()) == layout.pixels[wave].numel()
    covered: dict[int, int] = {}
    for number, pixels in enumerate(layout.pixels.tolist()):
        before = [pixel in covered for pixel in pixels]
        rows, columns = np.divmod(np.arange(patch**2), patch)
        known = (columns < int(layout.left[number])) | (rows < int(layout.top[number]))
        assert known.tolist() == before
        assert all(level[covered[pixel]] < level[number] for pixel in pixels if pixel in covered)
        covered.update(dict.fromkeys(pixels, number))
    assert len(covered) == height * width


@pytest.mark.parametrize(
    ("side", "patch", "overlap", "message"),
    [(4, 5, 2, "smaller than a patch"), (9, 5, 5, "from 0 to 4"), (9, 5, -1, "from 0 to 4"), (9, 0, 0, "at least 1")],
)
def test_tilings_that_cannot_be(side, patch, overlap, message):
    with pytest.raises(InputError, match=message):
        lay_out(side, 20, patch, overlap)


# -- seams ------------------------------------------------------------------------------------------------------


def arms(begin: int, place: int, side: int, band: int) -> list[tuple[int, ...]]:
    """Every path from ``place`` in line ``begin`` to the last line, within ``band``; before it, ``place`` itself."""
    found = [(place,) * (begin + 1)]
    for _ in range(begin + 1, side):
        found = [(*path, step) for path in found for step in range(band) if abs(step - path[-1]) <= 1]
    return found


def every_seam(errors: np.ndarray, left: int, top: int) -> dict[bytes, float]:
    """The least cost of every cut that a seam makes, by trying all seams."""
    side = len(errors)
    found: dict[bytes, float] = {}
    rows, columns = np.mgrid[:side, :side]
    for a, b in itertools.product(range(max(top, 1)), range(max(left, 1))):
        for down in arms(a, b, side, max(left, 1)):
            for right in arms(b, a, side, max(top, 1)):
                pixels = {(row, down[row]) for row in range(a, side)} if left else set()
                pixels |= {(right[column], column) for column in range(b, side)} if top else set()
                # The two arms share the pixel at which they meet; each counts its other pixels by itself.
                cost = sum(errors[row, down[row]] for row in range(a, side)) if left else 0.0
                cost += sum(errors[right[column], column] for column in range(b, side)) if top else 0.0
                cost -= errors[a, b] if left and top else 0.0
                shows = (columns >= np.array(down)[:, None]) & (rows >= np.array(right)[None])
                key = shows.tobytes()
                found[key] = min(found.get(key, np.inf), cost)
    return found


@st.composite
def cases(draw):
    side = draw(st.integers(1, 5))
    left, top = draw(st.integers(0, min(side - 1, 3))), draw(st.integers(0, min(side - 1, 3)))
    flat = draw(st.lists(st.integers(0, 9), min_size=side**2, max_size=side**2))
    return np.array(flat, dtype=np.float32).reshape(side, side), left, top


@given(cases())
@settings(max_examples=150, deadline=None)
def test_no_seam_costs_less(case):
    errors, left, top = case
    seams = every_seam(errors, left, top)
    shows, cost = boundary_cut(torch.from_numpy(errors), torch.tensor(left), torch.tensor(top))
    assert float(cost) == min(seams.values())
    # What the mask shows is the cut of a seam, and of one that costs this little.
    assert seams[shows.numpy().tobytes()] == float(cost)


def test_many_seams_at_once_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(3, 40, 5, 5, generator=generator)
    left, top = (torch.randint(0, 5, (40,), generator=generator) for _ in range(2))
    shows, costs = boundary_cut(errors, left, top)
    for i, j in itertools.product(range(3), range(40)):
        alone, cost = boundary_cut(errors[i, j], left[j], top[j])
        assert torch.equal(shows[i, j], alone)
        assert torch.isclose(costs[i, j], cost)


def test_a_seam_follows_the_pixels_that_agree():
    errors = torch.full((5, 5), 9.0)
    path = [1, 0, 0, 1, 2]
    for row, column in enumerate(path):
        errors[row, column] = 0
    shows, cost = boundary_cut(errors, torch.tensor(3), torch.tensor(0))
    assert cost == 0
    assert [int(row.nonzero()[0, 0]) for row in shows] == path
    across, cost = boundary_cut(errors.T, torch.tensor(0), torch.tensor(3))
    assert cost == 0
    assert torch.equal(across, shows.T)


def test_both_arms_meet_in_the_corner():
    errors = torch.full((5, 5), 9.0)
    errors[1:, 1] = 0
    errors[1, 1:] = 0
    shows, cost = boundary_cut(errors, torch.tensor(2), torch.tensor(2))
    assert cost == 0
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:, 1:] = True
    assert torch.equal(shows, expected)


def test_a_patch_that_meets_nothing_shows_whole():
    shows, cost = boundary_cut(
        torch.rand(7, 4, 4), torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    )
    assert shows.all()
    assert (cost == 0).all()


# -- stitching --------------------------------------------------------------------------------------------------


def stitched_by_loop(patches: Tensor, height: int, width: int, overlap: int) -> Tensor:
    """One image, one patch after the other, each seam the best of all seams: P x C x p x p -> C x H x W."""
    side = patches.shape[-1]
    canvas = np.zeros((patches.shape[1], height, width), np.float32)
    places = itertools.product(starts(height, side, overlap), starts(width, side, overlap))
    laid = np.zeros((height, width), dtype=bool)
    for patch, (y, x) in zip(patches.numpy(), places, strict=True):
        here = (slice(y, y + side), slice(x, x + side))
        there, known = canvas[(slice(None), *here)], laid[here]
        # The overlap is what is laid in the lowest row and in the last column.
        left, top = int(known[-1].sum()) % side, int(known[:, -1].sum()) % side
        seams = every_seam(((there - patch) ** 2).sum(0), left, top)
        shows = np.frombuffer(min(seams, key=lambda mask: seams[mask]), dtype=bool).reshape(side, side)
        canvas[(slice(None), *here)] = np.where(shows, patch, there)
        laid[here] = True
    return torch.from_numpy(canvas)


@pytest.mark.parametrize(
    ("height", "width", "patch", "overlap"), [(8, 11, 5, 2), (9, 8, 4, 2), (7, 10, 3, 1), (6, 6, 3, 0), (9, 10, 5, 3)]
)
def test_stitching_is_laying_one_after_the_other(height, width, patch, overlap):
    layout = lay_out(height, width, patch, overlap)
    patches = torch.rand(2, len(layout), 2, patch, patch, generator=torch.Generator().manual_seed(1))
    found = stitch(patches, layout)
    for one, image in zip(patches, found, strict=True):
        assert torch.equal(image, stitched_by_loop(one, height, width, overlap))


@given(tilings)
@settings(max_examples=40, deadline=None)
def test_patches_that_agree_give_the_image_back(tiling):
    height, width, patch, overlap = tiling
    layout = lay_out(height, width, patch, overlap)
    pictures = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    patches = cut(pictures, layout)
    assert patches.shape == (2, len(layout), 3, patch, patch)
    assert torch.equal(stitch(patches, layout), pictures)


def test_patches_that_do_not_fit_the_layout():
    with pytest.raises(InputError, match="4 patches of 5 x 5"):
        stitch(torch.rand(1, 3, 1, 5, 5), lay_out(8, 8, 5, 2))


# -- quilting ---------------------------------------------------------------------------------------------------


def neighbours_of(patches: Tensor) -> Tensor:
    """Patches that differ from these by one level in one pixel, which a search must tell from them."""
    near = patches.clone().flatten(1)
    near[:, 0] = torch.where(near[:, 0] > 127, near[:, 0] - 1, near[:, 0] + 1)
    return near.view(patches.shape)


@pytest.mark.parametrize("index", ["Flat", "IVF16,Flat", "PCA8,IVF16,Flat"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 23)])
def test_an_image_made_of_database_patches_is_reproduced(tmp_path, index, channels, height, width):
    picture = bytes_like(1, channels, height, width)
    tiles = cut(picture, lay_out(height, width, 5, 2))[0]
    rows = torch.cat([neighbours_of(tiles), tiles, bytes_like(2000, channels, 5, 5, seed=1)])
    patches = store(tmp_path, rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))], index=index)
    wanted = picture.float() / 255
    assert torch.equal(Quilt(patches)(wanted), wanted)
    assert torch.equal(Quilt(PatchDatabase.open(tmp_path, backend="torch"))(wanted), wanted)


def test_without_overlap_every_tile_is_a_patch(tmp_path):
    patches = store(tmp_path, bytes_like(50, 3, 5, 5))
    rows = torch.tensor([[3, 14, 15], [9, 2, 6]])
    picture = patches.pixels(rows).permute(2, 0, 3, 1, 4).reshape(1, 3, 10, 15)
    assert torch.equal(Quilt(patches, overlap=0)(picture), picture)
    noisy = (picture + 0.03 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert torch.equal(Quilt(patches, overlap=0)(noisy), picture)


def test_every_pixel_is_one_of_a_patch_that_was_picked(tmp_path):
    patches = store(tmp_path, bytes_like(300, 3, 5, 5))
    picture = torch.rand(2, 3, 14, 17, generator=torch.Generator().manual_seed(0))
    layout = lay_out(14, 17, 5, 2)
    rows = patches.search(cut(picture, layout).flatten(0, 1).flatten(1), 1)[1].view(2, len(layout))
    quilt = Quilt(patches)(picture)
    hit = torch.zeros(2, 14 * 17, dtype=torch.bool)
    for image in range(2):
        for place, row in zip(layout.pixels, rows[image], strict=True):
            same = (quilt[image].flatten(1)[:, place] == patches.pixels(row).flatten(1)).all(0)
            hit[image, place] |= same
    assert hit.all()


def test_a_patch_is_drawn_evenly_from_the_k_nearest(tmp_path):
    patches = store(tmp_path, bytes_like(40, 1, 4, 4))
    target = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    nearest = (patches.pixels(torch.arange(40)) - target).square().sum((1, 2, 3)).argsort()[:3]
    quilt = Quilt(patches, k=3, overlap=2)
    torch.manual_seed(0)
    found = quilt(target.expand(3000, -1, -1, -1))
    counts = [int((found == patches.pixels(row)).flatten(1).all(1).sum()) for row in nearest]
    assert sum(counts) == 3000
    # Five standard deviations.
    assert all(abs(count - 1000) < 130 for count in counts)


def test_an_image_is_quilted_as_it_would_be_alone(tmp_path):
    patches = store(tmp_path, bytes_like(500, 3, 5, 5))
    pictures = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = Quilt(patches)(pictures)
    assert torch.equal(together, torch.cat([Quilt(patches)(one[None]) for one in pictures]))
    assert Quilt(patches)(pictures[:0]).shape == (0, 3, 16, 16)
    assert Quilt(patches)(pictures.double()).dtype == torch.float64


def test_further_draws_for_the_same_images_search_no_more(tmp_path, monkeypatch):
    patches = store(tmp_path, bytes_like(100, 1, 4, 4), index="Flat")
    searched = []
    search = FaissIndex.search
    monkeypatch.setattr(FaissIndex, "search", lambda *given: searched.append(1) or search(*given))
    quilt = Quilt(patches, k=5)
    pictures = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first, second = quilt(pictures), quilt(pictures)
    assert not torch.equal(first, second)
    assert len(searched) == 1
    pictures[0, 0, 0, 0] = 1 - pictures[0, 0, 0, 0]
    quilt(pictures)
    assert len(searched) == 2


# -- the defence ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digit_patches(tmp_path_factory):
    """Every patch of 3 x 3 of the first 600 digits."""
    folder = tmp_path_factory.mktemp("patches")
    few = digits("train").subset(np.arange(600))
    return build_patches(few, folder / "patches", patches=20_000, side=3, progress=False)


def test_predictions_repeat_and_draws_differ(digit_patches):
    pictures, _ = images("test", 6)
    defense = quilting(trained(), digit_patches, k=10, overlap=1, draws=3, seed=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = defense(pictures)
    assert torch.equal(first, defense.with_seed(4)(pictures))
    assert not torch.equal(first, defense(pictures))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(first.exp().sum(1), torch.ones(6), atol=1e-5)
    other = quilting(trained(), digit_patches, k=10, overlap=1, draws=3, seed=5)
    assert not torch.equal(first, other(pictures))
    single = quilting(trained(), digit_patches, overlap=1)
    assert not single.random
    assert torch.allclose(
        single(pictures), trained()(Quilt(digit_patches, overlap=1)(pictures)).log_softmax(1), atol=1e-6
    )


def test_the_attack_can_take_quilting_for_the_identity(digit_patches):
    pictures, labels = images("test", 6)
    leaf = pictures.clone().requires_grad_()
    out = quilting(trained(), digit_patches, overlap=1, substitute="identity").attack_model()(leaf)
    out.gather(1, labels[:, None]).sum().backward()
    quilted = Quilt(digit_patches, overlap=1)(pictures).requires_grad_()
    trained()(quilted).log_softmax(1).gather(1, labels[:, None]).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, quilted.grad)
    assert leaf.grad.abs().sum() > 0


def test_the_attack_takes_the_true_quilt_and_the_gradient_of_the_soft_one(digit_patches):
    pictures, labels = images("test", 6)
    leaf = pictures.clone().requires_grad_()
    defense = quilting(trained(), digit_patches, overlap=1)
    out = defense.attack_model()(leaf)
    assert torch.allclose(out, defense(pictures), atol=1e-6)
    out.gather(1, labels[:, None]).sum().backward()
    quilt = Quilt(digit_patches, overlap=1)
    quilted = quilt(pictures).requires_grad_()
    trained()(quilted).log_softmax(1).gather(1, labels[:, None]).sum().backward()
    moved = pictures.clone().requires_grad_()
    soft = quilt.soft(moved)
    soft.backward(quilted.grad)
    assert torch.allclose(leaf.grad, moved.grad, atol=1e-6)
    assert leaf.grad.abs().sum() > 0
    with pytest.raises(InputError, match="substitute"):
        quilting(trained(), digit_patches, substitute="none")


def test_the_soft_quilt_is_smooth_and_near_the_quilt(digit_patches):
    generator = torch.Generator().manual_seed(0)
    pictures = images("test", 2)[0].double()
    quilt = Quilt(digit_patches, overlap=1)
    step = 1e-5 * torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    rows = quilt.nearest(pictures, quilt.candidates)
    # The same neighbours and temperature on both sides, as the gradient takes them for fixed.
    pinned = mixed_by_loop(quilt, pictures, rows, pictures)
    assert torch.allclose(quilt.soft(pictures), pinned, atol=1e-9)
    leaf = pictures.clone().requires_grad_()
    (quilt.soft(leaf) * weight).sum().backward()
    ahead = mixed_by_loop(quilt, pictures + step, rows, pictures)
    behind = mixed_by_loop(quilt, pictures - step, rows, pictures)
    slope = float(((ahead - behind) * weight).sum() / 2)
    assert slope == pytest.approx(float((leaf.grad * step).sum()), rel=1e-3, abs=1e-10)
    assert (quilt.soft(pictures) - quilt(pictures)).abs().mean() < 0.05


def mixed_by_loop(quilt: Quilt, pictures: Tensor, rows: Tensor, about: Tensor) -> Tensor:
    """The soft quilt, patch by patch, with the neighbours and temperatures found at ``about``."""
    layout = lay_out(*pictures.shape[2:], quilt.patches.side, quilt.overlap)
    total, covered = torch.zeros_like(pictures), torch.zeros_like(pictures)
    for image, place in itertools.product(range(len(pictures)), range(len(layout))):
        pixels = layout.pixels[place]
        candidates = quilt.patches.pixels(rows[image, place]).double().flatten(1)
        here, there = (side[image].flatten()[pixels] for side in (pictures, about))
        squared, fixed = ((candidates - one).square().sum(1) for one in (here, there))
        mixed = ((-squared / (fixed.mean() - fixed.min()).clamp_min(1e-3)).softmax(0)[:, None] * candidates).sum(0)
        total[image].view(-1)[pixels] += mixed
        covered[image].view(-1)[pixels] += 1
    return total / covered


def test_the_attack_that_ignores_it_is_beaten_and_the_one_that_knows_it_is_not(tmp_path):
    pictures, labels = images("test", 50)
    ball = {"eps": 0.3, "norm": "normalized-l2", "steps": 15, "step_size": 0.075}

    def right(model: torch.nn.Module, seen: Tensor) -> int:
        with torch.no_grad():
            return int((model(seen).argmax(1) == labels).sum())

    patches = build_patches(digits("train"), tmp_path / "patches", patches=5000, progress=False)
    ignoring = pgd(trained(), pictures, labels, **ball, generator=torch.Generator().manual_seed(0))
    defense = quilting(trained(), patches)
    model = defense.attack_model(generator=torch.Generator().manual_seed(0))
    knowing = pgd(model, pictures, labels, **ball, generator=torch.Generator().manual_seed(0))
    bare, beaten, broken = right(trained(), ignoring), right(defense, ignoring), right(defense, knowing)
    assert right(defense, pictures) >= 43
    assert beaten >= bare + 10
    assert broken <= beaten - 10


def test_what_does_not_fit_is_said(digit_patches, tmp_path):
    colour = store(tmp_path, bytes_like(10, 3, 5, 5))
    with pytest.raises(InputError, match="colour"):
        quilting(trained(), colour)
    with pytest.raises(InputError, match="grey"):
        Quilt(colour)(torch.rand(1, 1, 8, 8))
    with pytest.raises(InputError, match="smaller than a patch"):
        Quilt(colour)(torch.rand(1, 3, 4, 8))
    with pytest.raises(InputError, match="only 10 patches"):
        Quilt(colour, k=11)
    with pytest.raises(InputError, match="k is 0"):
        Quilt(colour, k=0)
    with pytest.raises(InputError, match="overlap is 5"):
        Quilt(colour, overlap=5)


def test_the_soft_quilt_hardens_towards_the_quilt_of_the_nearest_patches(digit_patches):
    pictures = images("test", 8)[0]
    quilt = Quilt(digit_patches, overlap=0)
    # Without an overlap there are no seams, and the hardest choice is the nearest patch itself.
    apart = [float((quilt.soft(pictures, progress) - quilt(pictures)).norm()) for progress in (0.0, 0.5, 1.0)]
    assert apart[0] > apart[1] > apart[2] > 0
    assert apart[2] < 0.7 * apart[0]


def test_an_attack_climbs_the_soft_quilt_and_is_told_the_true_answer(digit_patches):
    pictures = images("test", 4)[0]
    defense = quilting(trained(), digit_patches, overlap=1)
    surface = defense.attack_model()
    assert torch.allclose(surface.predictions(pictures)[0], defense(pictures), atol=1e-6)
    soft = trained()(defense.quilt.soft(pictures, 0.5)).log_softmax(1)
    assert torch.allclose(surface.predictions(pictures, 0.5)[0], soft, atol=1e-6)
    drawn = quilting(trained(), digit_patches, k=10, overlap=1).attack_model(draws=3)
    assert drawn.predictions(pictures, 0.5).shape == (3, 4, 10)
