"""JPEG and bit depth, and the defences made of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from helpers import images as digits
from helpers import trained
from PIL import Image
from skimage import data as samples

from nndefense.attacks import pgd
from nndefense.defenses.transforms import BitDepth, Jpeg, bit_depth_reduction, jpeg_compression
from nndefense.errors import InputError


def photograph() -> torch.Tensor:
    return torch.from_numpy(samples.astronaut()[64:128, 160:240]).permute(2, 0, 1)[None].float() / 255


class TestJpeg:
    def test_is_what_a_file_of_quality_75_holds(self) -> None:
        image = photograph()
        data = io.BytesIO()
        Image.fromarray((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(
            data, "JPEG", quality=75
        )
        wanted = torch.from_numpy(np.asarray(Image.open(data)).copy()).permute(2, 0, 1)[None].float() / 255
        assert torch.equal(Jpeg()(image), wanted)
        assert Jpeg()(image).is_contiguous()

    def test_keeps_an_image_near_and_nearer_at_high_quality(self) -> None:
        image = photograph()
        off = [float((Jpeg(quality)(image) - image).abs().mean()) for quality in (10, 75, 95)]
        assert 0.1 > off[0] > off[1] > off[2] > 0
        sharp = float((Jpeg(75, "4:4:4")(image) - image).abs().mean())
        assert sharp < off[1]

    def test_batches_of_grey_and_colour(self) -> None:
        colours = torch.rand(5, 3, 9, 11)
        assert torch.equal(Jpeg()(colours)[3:4], Jpeg()(colours[3:4]))
        assert Jpeg()(torch.rand(5, 1, 9, 11)).shape == (5, 1, 9, 11)
        assert Jpeg()(torch.rand(0, 3, 9, 11)).shape == (0, 3, 9, 11)
        assert Jpeg()(colours.double()).dtype == torch.float64

    def test_refuses(self) -> None:
        with pytest.raises(InputError, match="quality is 96"):
            Jpeg(96)
        with pytest.raises(InputError, match="subsampling"):
            Jpeg(75, "4:1:0")
        with pytest.raises(InputError, match="1 or 3"):
            Jpeg()(torch.rand(1, 2, 8, 8))


class TestBitDepth:
    def test_rounding_keeps_black_and_white(self) -> None:
        levels = BitDepth(3)(torch.linspace(0, 1, 256).view(1, 1, 16, 16)).unique()
        torch.testing.assert_close(levels, torch.arange(8) / 7)
        assert torch.equal(BitDepth(1)(torch.tensor([[[[0.49, 0.51]]]])), torch.tensor([[[[0.0, 1.0]]]]))

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_floor_clears_the_low_bits(self, bits: int) -> None:
        values = np.arange(256, dtype=np.uint8)
        wanted = (values >> (8 - bits)) << (8 - bits)
        given = torch.from_numpy(values.astype(np.float32) / 255).view(1, 1, 16, 16)
        found = BitDepth(bits, "floor")(given) * 255
        assert torch.equal(found.round().flatten(), torch.from_numpy(wanted).float())

    def test_eight_bits_change_nothing(self) -> None:
        image = photograph()
        torch.testing.assert_close(BitDepth(8)(image), image)

    def test_refuses(self) -> None:
        for bits in (0, 9):
            with pytest.raises(InputError, match="bits is"):
                BitDepth(bits)
        with pytest.raises(InputError, match="mode"):
            BitDepth(3, "ceil")


@pytest.mark.parametrize("make", [jpeg_compression, bit_depth_reduction])
def test_defences_classify_and_are_attacked_through_the_identity(make: object) -> None:
    images, labels = digits("test", 60)
    defense = make(trained())  # type: ignore[operator]
    said = defense(images)
    torch.testing.assert_close(said.exp().sum(1), torch.ones(60))
    before = float((said.argmax(1) == labels).float().mean())
    attacked = pgd(defense.attack_model(), images, labels, eps=0.4, norm="normalized-l2", steps=10)
    assert before > 0.8
    assert float((defense(attacked).argmax(1) == labels).float().mean()) < before - 0.5
