"""``nndefense rp2``: a sticker for one's own photos, its measurement, the mask search, and one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import fails, nndefense
from PIL import Image

from nndefense.attacks.rp2 import Sticker
from nndefense.errors import DataError, InputError
from nndefense.pipeline import sticker_files

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    input_shape, classes = (3, 16, 16), ("plain", "red", "blue")

    def forward(self, x):
        red, _, blue = x[:, :, 4:8, 8:12].mean((2, 3)).unbind(1)
        return 20 * torch.stack([torch.full_like(red, 0.5), red, blue], 1)


def build():
    return Net()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Eight photos of a grey thing, some larger than the classifier's, a mask, and a classifier."""
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        side = 16 if number % 2 else 48
        pixels = draw.integers(40, 90, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number + 5}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 16:24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def words(place: Path, *, sheet: str = "runs") -> list[object]:
    # The photos have no white in them to judge the light by.
    model = ["--classifier", f"python:{place / 'net.py'}:build", "--true", "plain", "--target", "red", "--no-shade"]
    return ["--photos", place / "photos", *model, "--out", place / sheet]


def stored(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.slow
def test_a_sticker_for_ones_own_photos(place: Path) -> None:
    extra = ["--mask", place / "mask.png", "--steps", 30, "--views", 4, "--crop", 0.02, "--perspective", 0.01]
    done = nndefense("rp2", "attack", *words(place), *extra, "--splits", 2, "--width-cm", 8, "--dpi", 254)
    assert done.code == 0, done.err
    assert "plain -> red, mask 6.2% of the frame" in done.out
    assert "held-out photos, as photographed: 100.0 % (4 of 4; 95 % interval 51 to 100 %, 4 photos)" in done.out
    found = stored(place / "runs" / "rp2.json")
    assert found["true"] == {"index": 0, "name": "plain"}
    assert found["target"] == {"index": 1, "name": "red"}
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    for run in found["runs"]:
        assert not set(run["optimised_on"]) & set(run["held_out"])
        assert sorted(run["optimised_on"] + run["held_out"]) == sorted(f"{n}.png" for n in range(5, 13))
        assert {row["photos"] for row in run["rates"]} == {"held-out", "optimised"}
        assert any(row.get("colours") == "rounded to the palette" for row in run["rates"])
    # 8 cm at 254 dpi are 800 pixels; the mask is the only part that is not transparent.
    with Image.open(place / "runs" / "sticker.png") as picture:
        assert picture.size == (800, 800)
        assert picture.mode == "RGBA"
        assert picture.info["dpi"] == pytest.approx((254, 254), abs=0.1)
        alpha = np.asarray(picture)[..., 3]
        assert (alpha[200:400, 400:600] == 255).all()
        assert alpha.mean() == pytest.approx(255 / 16)
    assert min(Image.open(place / "runs" / "sheet.png").size) > 300

    # Measured again from its file, on the same photos and on all.
    again = nndefense(
        "rp2", "evaluate", *words(place, sheet="again"), "--sticker", place / "runs" / "sticker.npz",
        "--hold-out", 0.5, "--views", 4, "--crop", 0.02, "--perspective", 0.01, "--json",
    ).json  # fmt: skip
    assert again == stored(place / "again" / "evaluation.json")
    assert again["photos"] == found["runs"][0]["held_out"]
    numbers = [{k: v for k, v in row.items() if k != "photos"} for row in again["rates"]]
    first = [row for row in found["runs"][0]["rates"] if row["photos"] == "held-out" and "colours" not in row]
    assert numbers == [{k: v for k, v in row.items() if k != "photos"} for row in first]

    # The same seed gives the same files.
    nndefense("rp2", "attack", *words(place, sheet="twice"), *extra, "--width-cm", 8, "--dpi", 254)
    assert (place / "twice" / "sticker.png").read_bytes() == (place / "runs" / "sticker.png").read_bytes()


def test_the_search_finds_where_the_net_looks(place: Path) -> None:
    searched = ["--steps", 40, "--area", 17 / 256, "--rectangles", 1, "--crop", 0, "--perspective", 0]
    done = nndefense("rp2", "mask", *words(place), *searched)
    assert done.code == 0, done.err
    assert "16 of 256 pixels of the region, found on 4 photos" in done.out
    mask = np.asarray(Image.open(place / "runs" / "mask.png"))
    assert (mask[4:8, 8:12] == 255).all()
    assert (mask > 0).sum() == 16
    assert min(Image.open(place / "runs" / "search.png").size) > 300
    assert stored(place / "runs" / "mask.json")["settings"]["norm"] == 1


def test_corner_points_carry_the_sticker(place: Path) -> None:
    whole = [[0, 0], [1, 0], [1, 1], [0, 1]]
    points: dict[str, Any] = {}
    for number in range(5, 13):
        side = 48 if (number - 5) % 2 == 0 else 16
        # The object fills the photo's upper right quarter, in the photo's own pixels.
        points[f"{number}.png"] = [[(0.5 + x / 2) * side, y / 2 * side] for x, y in whole]
    points["6.png"] = None
    (place / "corners.json").write_text(json.dumps(points))
    photos = sticker_files.read_photos(place / "photos", (3, 16, 16), place / "corners.json")
    assert photos.names[:2] == ["5.png", "6.png"]
    shown = Sticker(torch.ones(3, 16, 16), torch.ones(1, 16, 16)).on(0 * photos.images, photos.matrices)
    assert shown[0, 0, :8, 8:].min() == pytest.approx(1)
    assert float(shown[0].sum()) == pytest.approx(3 * 64)
    assert float(shown[1].sum()) == 3 * 256

    extra = ["--mask", place / "mask.png", "--steps", 2, "--views", 1, "--corners", place / "corners.json"]
    assert nndefense("rp2", "attack", *words(place), *extra).code == 0
    for broken, message in (
        ({**points, "7.png": [[0, 0]]}, "7.png needs four points"),
        ({**points, "7.png": [[0, 0], [9, 9], [9, 0], [0, 9]]}, "convex"),
        ({k: v for k, v in points.items() if k != "9.png"}, "no corners for 9.png"),
        ([], "must hold an object"),
    ):
        (place / "corners.json").write_text(json.dumps(broken))
        fails(3, message, "rp2", "attack", *words(place), *extra)


def test_a_palette_of_ones_own(place: Path) -> None:
    (place / "palette.txt").write_text("#ff8000\n\n0, 10, 255\n 1 2 3 \n")
    found = sticker_files.read_palette(place / "palette.txt")
    assert (255 * found).round().tolist() == [[255, 128, 0], [0, 10, 255], [1, 2, 3]]
    for text, message in (("red", "line 1"), ("#fff", "is no colour"), ("1,2,256", "is no colour")):
        (place / "palette.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            sticker_files.read_palette(place / "palette.txt")
    (place / "palette.txt").write_text("")
    with pytest.raises(InputError, match="P x 3"):
        sticker_files.read_palette(place / "palette.txt")


def test_a_perturbation_from_elsewhere(place: Path) -> None:
    noise = np.zeros((16, 16, 3))
    noise[..., 0] = 20.0
    np.savez(place / "noise.npz", red=noise)
    base = ["rp2", "evaluate", *words(place), "--views", 2, "--crop", 0, "--perspective", 0]
    found = nndefense(
        *base, "--sticker", f"{place / 'noise.npz'}:red", "--mask", place / "mask.png", "--mode", "add", "--json"
    ).json
    assert found["rates"][0]["hits"] == found["rates"][0]["right_without"] == 8
    assert found["mode"] == "add"
    fails(2, "give its mask", *base, "--sticker", f"{place / 'noise.npz'}:red")
    fails(3, "is no sticker", *base, "--sticker", f"{place / 'noise.npz'}:blue", "--mask", place / "mask.png")
    fails(3, "is no sticker", *base, "--sticker", place / "missing.npz")


def test_mistakes_are_one_line(place: Path) -> None:
    base, mask = ["rp2", "attack", *words(place), "--steps", 1], ["--mask", place / "mask.png"]
    fails(2, "which is no class", *base, *mask, "--target", "green")
    fails(2, "aim at another class", *base, *mask, "--target", "plain")
    fails(3, "is no folder", *base, *mask, "--photos", place / "nowhere")
    (place / "empty").mkdir()
    fails(3, "holds no photos", *base, *mask, "--photos", place / "empty")
    fails(3, "is missing", *base, "--mask", place / "nothing.png")
    Image.new("L", (8, 8)).save(place / "black.png")
    fails(3, "is black", *base, "--mask", place / "black.png")
    fails(3, "cannot be read as a picture", *base, "--mask", place / "net.py")
    fails(2, "two factors", *base, *mask, "--brightness", "1")
    fails(2, "crop is 0.4", *base, *mask, "--crop", 0.4)
    fails(2, "leave none to measure on", *base, *mask, "--hold-out", 0.01)
    fails(2, "lower --dpi", *base, *mask, "--width-cm", 5000)
    fails(2, "less than one pixel", "rp2", "mask", *words(place), "--steps", 2, "--area", 0.0001)
    for photo in (place / "photos").iterdir():
        photo.write_text("no picture")
    # One of them alone would be left out.
    with pytest.warns(UserWarning, match="cannot be read as a picture: it is left out"):
        fails(3, "photos of", *base, *mask)
