"""Photos of different sizes: what they are brought to where a net is trained, and whose input shape counts."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command import fails, nndefense
from PIL import Image

from nndefense.datasets import open_dataset, write_hdf5
from nndefense.errors import DataError
from nndefense.models import ARCHITECTURES, load_classifier
from nndefense.pipeline import training_shape

MIXED = ((30, 40), (40, 30), (25, 61), (9, 9))


def photos(root: Path, sizes: Sequence[tuple[int, int]], count: int = 12) -> Path:
    """Digits 0 and 1 as photos, ``count`` of each, in the sizes (height, width) in turn."""
    data = open_dataset("digits:test")
    for digit in (0, 1):
        (root / str(digit)).mkdir(parents=True)
        for number, row in enumerate(np.flatnonzero(data.labels == digit)[:count]):
            pixels = (data[int(row)][0][0].numpy() * 255).round().astype(np.uint8)
            height, width = sizes[number % len(sizes)]
            Image.fromarray(pixels).convert("RGB").resize((width, height)).save(root / str(digit) / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("mixed") / "photos", MIXED)


def test_train_takes_photos_of_different_sizes(mixed: Path, tmp_path: Path) -> None:
    spec = f"imagefolder:{mixed}"
    words = ("train", "--dataset", spec, "--holdout", 6, "--epochs", 1, "--batch-size", 6)
    done = nndefense(*words, "--out", tmp_path / "own")
    assert done.code == 0, done.err
    assert "different sizes are brought to 32 x 32, which small-cnn was made for; --size says otherwise" in done.err
    assert load_classifier(tmp_path / "own").input_shape == (3, 32, 32)
    done = nndefense(*words, "--out", tmp_path / "said", "--size", "12,20", "--validation", spec)
    assert done.code == 2  # held out and named
    done = nndefense(*words[:3], "--validation", spec, "--epochs", 1, "--out", tmp_path / "said", "--size", "12,20")
    assert done.code == 0, done.err
    assert "brought" not in done.err
    assert load_classifier(tmp_path / "said").input_shape == (3, 12, 20)
    said: list[str] = []
    training_shape([spec], "small-cnn", say=said.append, hint="")  # for commands without --size
    assert said == ["images of different sizes are brought to 32 x 32, which small-cnn was made for"]
    fails(2, "--size is 1,2,3, but must be one side", *words, "--out", tmp_path / "no", "--size", "1,2,3")


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (((10, 14),), (3, 10, 14)),  # all one size: as they are
        (((10, 14), (10, 14), (14, 10)), None),
        (((300, 280),), None),  # of one camera
        (((256, 200),), (3, 256, 200)),
    ],
)
@pytest.mark.parametrize("arch", ["small-cnn", "madry-mnist", "wrn-28-10"])
def test_the_size_of_a_training(
    sizes: Sequence[tuple[int, int]], shape: tuple[int, int, int] | None, arch: str, tmp_path: Path
) -> None:
    root = photos(tmp_path / "photos", sizes, 3)
    said: list[str] = []
    side = ARCHITECTURES[arch].side
    assert training_shape([f"imagefolder:{root}"], arch, say=said.append) == (shape or (3, side, side))
    assert len(said) == (shape is None)
    assert training_shape([f"imagefolder:{root}"], arch, 17, say=said.append) == (3, 17, 17)
    assert len(said) == (shape is None)


def test_every_source_of_pictures_is_looked_at(mixed: Path, tmp_path: Path) -> None:
    """A slice, a list, loose images, an archive; several sets, each of a size of its own; arrays, which have one."""
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(mixed.rglob("*.png"))))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(mixed.rglob("*.png")):
            archive.write(path, path.relative_to(mixed))
    specs = [f"imagefolder:{mixed}[3:]", f"files:{listed}", f"images:{mixed}", f"images:zip://::{tmp_path}/photos.zip"]
    for spec in specs:
        assert training_shape([spec], "strided-cnn") == (3, 28, 28), spec
    one, other = photos(tmp_path / "one", [(8, 8)], 2), photos(tmp_path / "other", [(9, 8)], 2)
    assert training_shape([f"imagefolder:{one}", f"imagefolder:{one}"], "small-cnn") == (3, 8, 8)
    assert training_shape([f"imagefolder:{one}", f"imagefolder:{other}"], "small-cnn") == (3, 32, 32)
    assert training_shape(["digits"], "madry-mnist") == (1, 8, 8)
    write_hdf5(tmp_path / "digits.h5", open_dataset("digits:test").batch(range(4))[0])
    assert training_shape([f"hdf5:{tmp_path}/digits.h5"], "madry-mnist") == (1, 8, 8)


def test_a_broken_photo_says_nothing_of_the_size(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", [(10, 14)], 4)
    (root / "0" / "02.png").write_bytes(b"no picture")
    assert training_shape([f"imagefolder:{root}"], "small-cnn") == (3, 10, 14)
    with pytest.raises(DataError, match=r"\(--size\)"):
        open_dataset(f"imagefolder:{photos(tmp_path / 'other', MIXED)}").batch([0, 1, 2])


NET = """
from torch import nn
def silent():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
def spoken():
    net = silent()
    net.input_shape, net.classes = (3, 11, 13), ["0", "1"]
    return net
"""


def test_a_guessed_input_shape_is_said_and_the_nets_own_comes_first(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NET)
    words = ("attack", "--dataset", f"imagefolder:{mixed}", "--norm", "linf", "--eps", 0.01, "--steps", 1)
    done = nndefense(*words, "--classifier", f"python:{tmp_path}/mine.py:silent", "--out", tmp_path / "a.h5")
    assert done.code == 0, done.err
    assert "--input-shape 3,30,40 is taken" in done.err
    assert open_dataset(f"hdf5:{tmp_path}/a.h5").shape == (3, 30, 40)
    done = nndefense(*words, "--classifier", f"python:{tmp_path}/mine.py:spoken", "--out", tmp_path / "b.h5")
    assert done.code == 0, done.err
    assert "--input-shape" not in done.err
    assert open_dataset(f"hdf5:{tmp_path}/b.h5").shape == (3, 11, 13)


@pytest.mark.slow
def test_the_demo_of_photos_of_different_sizes(tmp_path: Path) -> None:
    train, test = photos(tmp_path / "train", MIXED, 40), photos(tmp_path / "test", MIXED[::-1], 10)
    done = nndefense(
        "demo", "--dataset", f"imagefolder:{train}[:60]", "--test", f"imagefolder:{test}", "--out", tmp_path / "out",
        "--size", 16, "--holdout", 20, "--epochs", 2, "--eps", "0.1,0.2", "--steps", 2, "--no-audit", "--no-exact",
        "--no-adaptive", "--pca", 8, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["format"] == "nndefense-results"
    for net in ("classifier", "surrogate"):
        assert load_classifier(tmp_path / "out" / net).input_shape == (3, 16, 16)
    fails(2, "leave --size out", "demo", "--dataset", f"imagefolder:{train}", "--test", f"imagefolder:{test}",
          "--classifier", tmp_path / "out/classifier", "--size", 16, "--out", tmp_path / "no", "--quiet")  # fmt: skip
