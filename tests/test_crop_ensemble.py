"""Crops, random and on a grid, and the ensembles of a classifier over them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images as digits
from helpers import trained
from torch.nn import functional as F

from nndefense.attacks import pgd
from nndefense.defenses.transforms import GridCropEnsemble, GridCrops, RandomCrop, crop_ensemble, resized_crops
from nndefense.defenses.transforms.crops import CROP_SIZE, window
from nndefense.errors import InputError


class TestCrops:
    @pytest.mark.parametrize("size", [(7, 8), (1, 1), (17, 20), (2, 19)])
    def test_are_what_cutting_and_interpolating_gives(self, size: tuple[int, int]) -> None:
        images = torch.rand(4, 3, 17, 20)
        corners = torch.stack([torch.randint(0, 18 - size[0], (4,)), torch.randint(0, 21 - size[1], (4,))], 1)
        ours = resized_crops(images, corners, size)
        for image, (row, column), crop in zip(images, corners.tolist(), ours, strict=True):
            cut = image[None, :, row : row + size[0], column : column + size[1]]
            theirs = F.interpolate(cut, size=(17, 20), mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(crop, theirs, rtol=0, atol=1e-5)

    def test_gradient_is_exact(self) -> None:
        images = torch.rand(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
        corners = torch.tensor([[1, 2], [0, 0]])
        assert torch.autograd.gradcheck(lambda x: resized_crops(x, corners, (4, 3)), (images,))

    def test_are_90_of_224_pixels(self) -> None:
        assert window(torch.rand(1, 3, 224, 224), CROP_SIZE) == (90, 90)
        assert window(torch.rand(1, 1, 1, 300), CROP_SIZE) == (1, 121)

    def test_random_places_differ_within_a_batch_and_reach_every_corner(self) -> None:
        # Each pixel's value says where it is, so a crop's least value says where its corner is.
        ramp = torch.arange(64.0).view(1, 1, 8, 8).expand(3000, 1, 8, 8) / 63
        crops = RandomCrop(6 / 8)(ramp)
        corners = (crops.flatten(1).amin(1) * 63).round().long()
        wanted = torch.tensor([8 * row + column for row in range(3) for column in range(3)])
        counts = torch.stack([(corners == place).sum() for place in wanted])
        assert int(counts.sum()) == 3000
        # Uniform over 9 places: 333 each, standard deviation 17.
        assert int((counts - 333).abs().max()) < 90

    def test_a_seed_repeats_them(self) -> None:
        images = torch.rand(5, 3, 12, 12)
        torch.manual_seed(3)
        first = RandomCrop()(images)
        torch.manual_seed(3)
        assert torch.equal(first, RandomCrop()(images))
        assert not torch.equal(first, RandomCrop()(images))

    def test_grid_reaches_from_border_to_border(self) -> None:
        image = torch.rand(2, 1, 10, 10)
        crops = GridCrops(0.4, 9)(image)
        assert crops.shape == (18, 1, 10, 10)
        places = [(row, column) for row in (0, 3, 6) for column in (0, 3, 6)]
        for number, (row, column) in enumerate(places):
            cut = image[1:, :, row : row + 4, column : column + 4]
            wanted = F.interpolate(cut, size=(10, 10), mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(crops[9 + number], wanted, rtol=0, atol=1e-5)
        middle = GridCrops(0.4, 1)(image)
        cut = image[:, :, 3:7, 3:7]
        torch.testing.assert_close(
            middle, F.interpolate(cut, size=(10, 10), mode="bilinear", align_corners=False), rtol=0, atol=1e-5
        )

    def test_refuse(self) -> None:
        for size in (0.0, 1.5):
            with pytest.raises(InputError, match="size"):
                RandomCrop(size)
        with pytest.raises(InputError, match="square number"):
            GridCrops(0.5, 8)
        with pytest.raises(InputError, match="crops is 0"):
            crop_ensemble(trained(), crops=0)


class TestEnsemble:
    def test_averages_probabilities_of_30_crops(self) -> None:
        images, _ = digits("test", 6)
        defense = crop_ensemble(trained(), size=0.8, seed=5)
        torch.manual_seed(5)
        with torch.no_grad():
            each = [trained()(RandomCrop(0.8)(images)).softmax(1) for _ in range(30)]
        torch.testing.assert_close(defense(images).exp(), torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)

    def test_grid_averages_probabilities_of_9_crops(self) -> None:
        images, _ = digits("test", 6)
        defense = crop_ensemble(trained(), size=0.8, grid=True)
        assert isinstance(defense, GridCropEnsemble)
        with torch.no_grad():
            each = trained()(GridCrops(0.8, 9)(images)).softmax(1).view(6, 9, -1)
        torch.testing.assert_close(defense(images).exp(), each.mean(1), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("grid", [False, True])
    def test_says_the_same_again_under_its_seed_and_is_attackable(self, grid: bool) -> None:
        images, labels = digits("test", 30)
        defense = crop_ensemble(trained(), size=0.9, grid=grid, crops=9)
        said = defense.with_seed(3)(images)
        assert torch.equal(said, defense.with_seed(3)(images))
        assert torch.equal(said, defense(images)) == grid
        torch.testing.assert_close(said.exp().sum(1), torch.ones(30))
        before = float((said.argmax(1) == labels).float().mean())
        surface = defense.attack_model(draws=5, generator=torch.Generator().manual_seed(0))
        attacked = pgd(surface, images, labels, eps=0.4, norm="normalized-l2", steps=8)
        after = float((defense(attacked).argmax(1) == labels).float().mean())
        # The net was not trained on crops, and a crop of 7 of 8 pixels is a large change.
        assert before > 0.35
        assert after < before / 2

    def test_attack_surface_has_the_exact_gradient(self) -> None:
        images, _ = digits("test", 3)
        surface = crop_ensemble(trained(), size=0.75, grid=True, crops=4).attack_model()
        leaf = images.clone().requires_grad_()
        surface(leaf)[:, 1].sum().backward()
        other = images.clone().requires_grad_()
        each = trained()(GridCrops(0.75, 4)(other)).log_softmax(1).view(3, 4, -1)
        (each.logsumexp(1) - math.log(4))[:, 1].sum().backward()
        assert leaf.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-6)

    def test_refuses_images_out_of_range(self) -> None:
        for grid in (False, True):
            with pytest.raises(InputError, match="must lie in"):
                crop_ensemble(trained(), grid=grid)(torch.full((1, 1, 8, 8), 2.0))
