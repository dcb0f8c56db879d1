"""One bad item ends no job: it is named and left out, and the others are answered."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from command import nndefense
from helpers import trained
from test_folders import lay
from torch import Tensor, nn

from index_build import build_database
from nndefense.datasets import ImageDataset, SourceError, open_dataset, write_hdf5
from nndefense.errors import DataError
from nndefense.evaluation import AttackSettings
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.models import save_classifier
from nndefense.pipeline.attacking import write_attacked
from nndefense.pipeline.sticker_files import read_photos
from nndefense.training import train_classifier
from nndefense.training.labellers import Teacher
from nndefense.training.pseudo_job import write_pseudo_labels


def numbers(path: Path, n: int = 24, bad: int = 3) -> ImageDataset:
    """Noise in the shape of digits, of which one image is NaN."""
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
    write_hdf5(path, images, np.arange(n) % 10, [f"row {i}" for i in range(n)], [str(i) for i in range(10)])
    with h5py.File(path, "r+") as file:
        file["images"][bad, 0, 0, 0] = np.nan
    return open_dataset(f"hdf5:{path}")


def test_what_can_be_read_is_a_data_set_and_the_rest_is_named_once(tmp_path: Path) -> None:
    whole = numbers(tmp_path / "a.h5")
    with pytest.warns(UserWarning, match=r"1 of the 24 images .* left out: row 3: .*NaN") as told:
        left = whole.usable
    assert len(told) == 1
    assert list(left.ids) == [f"row {i}" for i in range(24) if i != 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whole.usable is left.usable is left
        # Nothing is wrong with this part, so it is given back as it is.
        good = whole.subset(range(4, 9))
        assert good.usable is good
    with pytest.raises(DataError, match=r"none of the 1 images .*row 3"):
        whole.subset([3]).usable  # noqa: B018


def test_many_bad_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    root = lay(tmp_path / "p", *(f"cat/{i}.png" for i in range(12)))
    for i in range(8):
        (root / f"cat/{i}.png").write_bytes(b"cut")
    with pytest.warns(UserWarning, match=r"8 of the 12 .*0\.png.*4\.png.*and 3 more$"):
        assert len(open_dataset(f"imagefolder:{root}", size=8).usable) == 4


def test_a_source_that_is_gone_ends_the_job(tmp_path: Path) -> None:
    whole = open_dataset(f"imagefolder:{lay(tmp_path / 'p', 'cat/0.png', 'dog/1.png')}", size=8)
    shutil.rmtree(tmp_path / "p")
    with pytest.raises(SourceError):
        whole.usable  # noqa: B018


def test_jobs_go_on_without_a_bad_image(tmp_path: Path) -> None:
    def fresh() -> ImageDataset:
        return open_dataset(f"hdf5:{tmp_path / 'a.h5'}")

    numbers(tmp_path / "a.h5")
    settings = {"epochs": 1, "batch_size": 8, "progress": False}
    with pytest.warns(UserWarning, match="row 3"):
        net = train_classifier(copy.deepcopy(trained()), fresh(), validation=fresh(), **settings)
    assert net.info["data"]["n"] == 23
    with pytest.warns(UserWarning, match="row 3"):
        told = write_attacked(
            AttackSettings(eps=(0.1,), steps=1), net, fresh(), tmp_path / "attacked.h5", progress=False
        )
    assert told["n"] == 23
    with pytest.warns(UserWarning, match="row 3"):
        found = write_pseudo_labels(Teacher(net), fresh(), tmp_path / "pseudo.h5", progress=False)
    with pytest.warns(UserWarning, match="row 3"):
        assert len(found.dataset(fresh())) == 23


class Doubtful(nn.Module):
    """A net that has no answer for bright images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return torch.where((x.mean((1, 2, 3)) > 0.9)[:, None], torch.full_like(logits, torch.nan), logits)


@pytest.mark.parametrize(("pca", "precision"), [(0, "float32"), (4, "auto")])
def test_a_build_lists_images_for_which_the_net_gives_nan(pca: int, precision: str, tmp_path: Path) -> None:
    net = copy.deepcopy(trained())
    net.net = Doubtful(net.net)
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images[[0, 7]] = 1.0
    write_hdf5(tmp_path / "a.h5", images, np.arange(24) % 10, [f"row {i}" for i in range(24)], list(net.classes))
    folders = [tmp_path / "one", tmp_path / "another"]
    for folder, batch_size in zip(folders, (24, 5), strict=True):
        database = build_database(
            open_dataset(f"hdf5:{tmp_path / 'a.h5'}"), net, FeatureSpec("net.block2", pca=pca), folder,
            batch_size=batch_size, precision=precision, progress=False,
        )  # fmt: skip
        assert database.ids(np.arange(22)) == [f"row {i}" for i in range(24) if i not in (0, 7)]
        told = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
        assert [(entry["id"], entry["kind"]) for entry in told] == [("row 0", "not finite"), ("row 7", "not finite")]
        assert database.manifest.rejected == {"not finite": 2}


def test_photos_for_a_sticker(tmp_path: Path) -> None:
    lay(tmp_path / "p", "1.png", "2.png", "3.png")
    (tmp_path / "p/2.png").write_bytes((tmp_path / "p/2.png").read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"2\.png cannot be read as a picture: it is left out"):
        assert read_photos(tmp_path / "p", (3, 8, 8), None).names == ["1.png", "3.png"]
    for name in ("1.png", "3.png"):
        (tmp_path / "p" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="none of the 3 photos"):
        read_photos(tmp_path / "p", (3, 8, 8), None)


def test_classify_answers_the_others_and_the_guard_is_calibrated_without_a_bad_image(tmp_path: Path) -> None:
    save_classifier(trained(), tmp_path / "net")
    data = numbers(tmp_path / "a.h5")
    build_database(data, trained(), FeatureSpec("block2", pca=0), tmp_path / "db", progress=False)
    other = numbers(tmp_path / "b.h5", n=30)
    with pytest.warns(UserWarning, match="row 3"):
        made = Guard.open(tmp_path / "db", tmp_path / "net").calibrate(other.subset(range(3, 30), name="b"))
    assert len(made) == 26
    lay(tmp_path / "p", "good.png", "cut.png", "also.png")
    (tmp_path / "p/cut.png").write_bytes((tmp_path / "p/cut.png").read_bytes()[:60])
    files = [str(tmp_path / "p" / name) for name in ("good.png", "cut.png", "also.png", "none.png")]
    call = ["classify", "--database", str(tmp_path / "db"), "--classifier", str(tmp_path / "net"), "--convert"]
    done = nndefense(*call, "--json", *files)
    entries = json.loads(done.out)["images"]
    assert done.code == 3
    assert [("class" in entry, "error" in entry) for entry in entries] == [(True, False), (False, True)] * 2
    assert [Path(entry["file"]).name for entry in entries] == ["good.png", "cut.png", "also.png", "none.png"]
    assert len(done.err.splitlines()) == 2
    assert "cut.png" in done.err
    assert "none.png" in done.err
