"""What a stranger's database names is not acted on: nothing is fetched, made, opened or run for that reason."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digits, trained
from PIL import Image

from index_build import build_database
from nndefense.database import ImageDatabase, Manifest, source_of
from nndefense.datasets import open_dataset, open_recorded, specs_at_hand
from nndefense.errors import DataError, InputError, ModelError
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.pipeline.opening import neighbor_pictures
from nndefense.training.neighbors import row_images

SHAPE = (1, 8, 8)


def tree(folder: Path) -> set[str]:
    return {str(place) for place in folder.rglob("*")}


@pytest.fixture(autouse=True)
def nothing_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home of its own that must not change, and no connection to anywhere."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME", "NNDEFENSE_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []

    def heard(*given: object, **named: object) -> None:
        asked.append(given)
        raise OSError("nobody may be asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, heard)
    monkeypatch.setattr(socket, "getaddrinfo", heard)
    yield
    assert asked == []
    assert tree(home) == set()
    assert not (tmp_path / "data").exists()


def pictures(folder: Path, count: int = 6) -> Path:
    """A folder of grey pictures in two classes."""
    images, _ = digits("train").batch(range(count))
    for number, image in enumerate(images):
        place = folder / "train" / "01"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(place)
    return folder


def record(spec: str, shape: tuple[int, int, int] = SHAPE) -> dict[str, Any]:
    """What a database records of a data set that can be opened."""
    found = open_dataset(spec, size=shape[1:], channels=shape[0])
    return {"name": spec, "specs": [spec], "fingerprint": found.fingerprint}


# -- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["imagefolder:http://127.0.0.1:9/photos", "images:https://127.0.0.1:9/p:train", "hdf5:http://127.0.0.1:9/a.h5",
     "webdataset:http://127.0.0.1:9/{000..009}.tar", "parquet:s3://bucket/a.parquet", "files:http://127.0.0.1:9/list",
     "imagefolder:zip://photos::http://127.0.0.1:9/p.zip", "imagefolder:file:///etc", "torchvision:MNIST:fresh",
     "torchvision:CIFAR10", "hf:owner/name", "hf:owner/name:test", "mnist", "mnist:train[:10]", "fashion-mnist:test",
     "cifar10", "images:/etc", "files:/etc/passwd", "hdf5:/dev/zero", "imagefolder://host/share", "imagefolder:~",
     "imagefolder:..", "imagefolder:.", "unknown:x", "", ":", "python:x.py:f", "imagefolder:\0"],
)  # fmt: skip
def test_what_a_database_names_is_not_opened_for_its_pictures(spec: str, tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    before = tree(tmp_path)
    for specs in ([spec], [spec, "digits"], ["digits", spec]):
        data = {"name": "x", "specs": specs, "fingerprint": "0" * 64}
        try:
            found = open_recorded(data, lambda: ["a"], SHAPE, tmp_path / "absent", folder=tmp_path / "db")
        except DataError:
            # MNIST, say, which is not in the folder of the data sets.
            found = None
        assert found is None
    assert tree(tmp_path) == before


@pytest.mark.parametrize("specs", [3, "digits", {"digits": 1}, None, [3], [None], [["digits"]]])
def test_records_of_another_form_open_nothing(specs: Any, tmp_path: Path) -> None:
    assert specs_at_hand({"specs": specs}, tmp_path) == []
    assert open_recorded({"specs": specs}, list, SHAPE, folder=tmp_path) is None


def test_pictures_come_from_the_databases_own_folder(tmp_path: Path) -> None:
    inside = pictures(tmp_path / "db" / "photos")
    data = record(f"imagefolder:{inside}:train")
    for spec in (f"imagefolder:{inside}:train", "imagefolder:photos:train", "imagefolder:db/photos:train"):
        found = open_recorded({**data, "specs": [spec]}, list, SHAPE, folder=tmp_path / "db")
        assert found is not None
        assert len(found) == 6
    # Of these none stays inside.
    pictures(tmp_path / "other")
    for spec in (
        "imagefolder:photos:../../other/train", "imagefolder:../other:train", "imagefolder:photos/../../other:train",
        f"imagefolder:{tmp_path}/dbx", "files:photos/list",
    ):  # fmt: skip
        assert specs_at_hand({"specs": [spec]}, tmp_path / "db") == []


@pytest.mark.parametrize("linked", ["folder", "file", "root"])
def test_no_link_leads_out_of_the_databases_folder(linked: str, tmp_path: Path) -> None:
    """The pictures are the recorded ones to the last bit: nothing but the link speaks against them."""
    private = pictures(tmp_path / "private")
    data = {**record(f"imagefolder:{private}:train"), "specs": ["imagefolder:photos:train"]}
    home = tmp_path / "db"
    home.mkdir()
    if linked == "root":
        (home / "photos").symlink_to(private)
    elif linked == "folder":
        (home / "photos").mkdir()
        (home / "photos/train").symlink_to(private / "train")
    else:
        pictures(home / "photos")
        (home / "photos/train/0/0.png").unlink()
        (home / "photos/train/0/0.png").symlink_to(private / "train/0/0.png")
    assert open_recorded(data, list, SHAPE, folder=home) is None


def test_other_splits_of_what_a_user_names_are_opened(tmp_path: Path) -> None:
    root = pictures(tmp_path / "photos")
    data = record(f"imagefolder:{root}:train")
    for named in (f"imagefolder:{root}:train", f"imagefolder:{root}:train[:2]"):
        found = open_recorded(data, list, SHAPE, named=[named])
        assert found is not None
    assert open_recorded(data, list, SHAPE, named=["digits:test", f"images:{root}"]) is None
    for spec in (
        f"imagefolder:{root}x:train",
        f"imagefolder:{root}:../private",
        f"imagefolder:{root}/train",
        f"images:{root}",
    ):
        assert specs_at_hand({"specs": [spec]}, None, [f"imagefolder:{root}:train"]) == []


@pytest.fixture
def private(tmp_path: Path) -> ImageDatabase:
    """A database that names a folder of pictures which its opener has not named."""
    root = pictures(tmp_path / "private", 12)
    spec = f"imagefolder:{root}:train"
    rows = open_dataset(spec, size=SHAPE[1:], channels=1)
    return build_database(rows, trained(), FeatureSpec("block2"), tmp_path / "db", specs=[spec], progress=False)


def test_a_guard_shows_pictures_only_where_its_opener_says(
    private: ImageDatabase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        guard = Guard(trained(), private, 3, "uniform")
        assert guard.describe()["pictures"] is False
        assert guard.neighbor_image(0) is None
        assert guard.samples() == []
    assert sum("not opened unless --images names it" in record.message for record in caplog.records) == 1
    (spec,) = private.manifest.data["specs"]
    for images in ([spec], spec):
        shown = Guard(trained(), private, 3, "uniform", images=images)
        assert shown.describe()["pictures"] is True
        picture = shown.neighbor_image(0)
        assert picture is not None
        right, _ = open_dataset(spec, size=SHAPE[1:], channels=1).batch([0])
        assert np.array_equal(picture[:, :, 0], (right[0, 0] * 255).round().numpy())
    for wrong in ("digits", f"imagefolder:{tmp_path}/nowhere"):
        with pytest.raises(InputError, match="give --images the data set that it was built from"):
            Guard(trained(), private, 3, "uniform", images=[wrong])


def test_jobs_take_images_of_rows_only_where_they_are_named(private: ImageDatabase) -> None:
    said: list[str] = []
    assert neighbor_pictures(private, None, trained(), say=said.append) is None
    assert len(said) == 1
    assert "give --images" in said[0]
    specs = private.manifest.data["specs"]
    for more in ({"images": specs}, {"named": specs}):
        assert neighbor_pictures(private, None, trained(), **more) is not None
    with pytest.raises(DataError, match="does not hold the images"):
        neighbor_pictures(private, None, trained(), ["digits[:12]"])
    with pytest.raises(DataError, match="which only you may have opened: give the data set"):
        row_images(trained(), private)
    assert len(row_images(trained(), private, open_dataset(specs[0], size=(8, 8), channels=1))) == 12


# -- the classifier ---------------------------------------------------------------------------------------------------


def named(database: ImageDatabase, source: str) -> Manifest:
    return replace(database.manifest, classifier={**database.manifest.classifier, "source": source})


@pytest.mark.parametrize(
    "source",
    ["torchvision:resnet18:IMAGENET1K_V1", "torchvision:resnet18:DEFAULT", "timm:resnet18:pretrained",
     "timm:hf-hub:x/y", "timm:hf_hub:x/y", "timm:local-dir:/tmp/x", "timm:x/y", "hf:google/vit", "hf:.", "hf:/tmp"],
)  # fmt: skip
def test_a_classifier_is_not_fetched_because_a_database_names_it(source: str, private: ImageDatabase) -> None:
    with pytest.raises(ModelError, match="would be fetched, and that only if you name it: give --classifier"):
        source_of(private.path, named(private, source))


@pytest.mark.parametrize("source", ["torchvision:resnet18:none", "timm:resnet18", "timm:vit_base_patch16_224.x-y"])
def test_a_classifier_that_needs_nothing_is_found_by_name(source: str, private: ImageDatabase) -> None:
    assert source_of(private.path, named(private, source)) == source


def test_weights_in_the_cache_are_found_by_name(
    private: ImageDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    source = "torchvision:resnet18:IMAGENET1K_V1"
    assert source_of(private.path, named(private, source)) == source


@pytest.mark.parametrize(
    "source", ["//host/share/net", "\\\\host\\share\\net", "/dev/zero", "/dev/stdin", "\0", "~", ""]
)
def test_a_folder_elsewhere_is_no_classifier(
    source: str, private: ImageDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    really = os.open

    def watched(path: Any, *given: Any, **more: Any) -> int:
        opened.append(os.fspath(path))
        return really(path, *given, **more)

    monkeypatch.setattr(os, "open", watched)
    with pytest.raises(ModelError, match="not to be found: give --classifier"):
        source_of(private.path, named(private, source))
    assert not [path for path in opened if path.startswith(("//", "\\\\"))]


def test_a_pipe_in_the_place_of_a_classifier_is_not_waited_for(private: ImageDatabase) -> None:
    (private.path / "classifier").mkdir()
    os.mkfifo(private.path / "classifier/classifier.json")
    with pytest.raises(ModelError, match="not to be found"):
        source_of(private.path, named(private, ""))
