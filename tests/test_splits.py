"""The split that is taken where none is named: to train the training split, to measure never that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import fails, nndefense
from helpers import BLOCK2, digits, trained
from PIL import Image

from index_build import build_database
from nndefense import pipeline
from nndefense.datasets import measured_spec, open_dataset
from nndefense.datasets.arrays import write_hdf5
from nndefense.datasets.spec import VALIDATION
from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, Recipe, rungs_for
from nndefense.models import save_classifier


def photos(root: Path, *folders: str) -> Path:
    """A folder with a picture in each of these folders."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * number + 9).save(root / folder / f"{number}.png")
    return root


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist", "cifar10"])
def test_sets_known_by_name_are_measured_on_their_test_split(name: str) -> None:
    assert measured_spec(name) == f"{name}:test"
    assert measured_spec(f" {name}[:100:2] ") == f"{name}:test[:100:2]"
    for named in (f"{name}:train", f"{name}:train[:5]", f"{name}:test"):
        assert measured_spec(named) == named
    with pytest.raises(
        DataError, match=rf"^{name} has no split val or valid to take here, but train, test: .*{name}:test$"
    ):
        measured_spec(name, among=VALIDATION)


@pytest.mark.parametrize(
    ("splits", "taken"),
    [
        (("train", "val", "test"), "test"),
        (("train", "val"), "val"),
        (("train", "validation"), "validation"),
        (("valid", "train"), "valid"),
        (("test",), "test"),
    ],
)
def test_folders_are_measured_on_their_test_or_validation_folder(
    splits: tuple[str, ...], taken: str, tmp_path: Path
) -> None:
    root = photos(tmp_path, *(f"{split}/{kind}" for split in splits for kind in ("cat", "dog")))
    assert measured_spec(f"imagefolder:{root}") == f"imagefolder:{root}:{taken}"
    assert measured_spec(f"images:{root}") == f"images:{root}:{taken}"
    assert measured_spec(f"imagefolder:{root}[1:]") == f"imagefolder:{root}:{taken}[1:]"
    assert measured_spec(f"imagefolder:{root}:{splits[0]}") == f"imagefolder:{root}:{splits[0]}"
    found = open_dataset(measured_spec(f"imagefolder:{root}[1:]"))
    assert found.name == f"imagefolder:{root}:{taken}[1:]"
    assert found.ids[0].startswith(f"{taken}/dog/")


def test_a_split_without_classes_is_not_measured_on(tmp_path: Path) -> None:
    root = photos(tmp_path, "train/cat", "val/cat", "test")
    assert measured_spec(f"imagefolder:{root}") == f"imagefolder:{root}:val"
    assert measured_spec(f"images:{root}") == f"images:{root}:test"


def test_what_has_no_splits_is_measured_as_it_is(tmp_path: Path) -> None:
    root = photos(tmp_path / "a", "cat", "dog", "train")
    (tmp_path / "list.txt").write_text("a/cat/0.png\n")
    write_hdf5(tmp_path / "train.h5", np.zeros((2, 1, 8, 8), np.float32))
    for spec in (
        f"imagefolder:{root}", f"imagefolder:{root}[:1]", f"files:{tmp_path}/list.txt", f"hdf5:{tmp_path}/train.h5",
        "torchvision:Caltech101:x", "webdataset:s3://bucket/pool-{000..009}.tar", "parquet:https://host/a.parquet",
    ):  # fmt: skip
        assert measured_spec(spec) == spec


@pytest.mark.parametrize(
    ("kind", "files", "taken"),
    [
        ("hdf5", ("train.h5", "test.h5"), "test"),
        ("hdf5", ("train.hdf5", "val.hdf5"), "val"),
        ("webdataset", ("train-000.tar", "train-001.tar", "val-000.tar"), "val"),
        ("webdataset", ("pool-000.tar", "testimony-000.tar"), None),
        ("webdataset", ("train/000.tar", "test/000.tar"), "test"),
        ("parquet", ("test-00000-of-00001.parquet", "train-00000-of-00001.parquet"), "test"),
        ("parquet", ("train.parquet", "validation.parquet"), "validation"),
    ],
)
def test_files_are_measured_by_the_split_in_their_names(
    kind: str, files: tuple[str, ...], taken: str | None, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    spec = f"{kind}:{tmp_path}"
    assert measured_spec(spec) == (spec if taken is None else f"{spec}:{taken}")


def test_torchvisions_sets_are_measured_on_their_test_or_validation_split(tmp_path: Path) -> None:
    for name, split in (("CIFAR100", "test"), ("ImageNet", "val"), ("dtd", "test"), ("Country211", "test")):
        assert measured_spec(f"torchvision:{name}:{tmp_path}") == f"torchvision:{name}:{tmp_path}:{split}"
        assert measured_spec(f"torchvision:{name}", data_dir="x") == f"torchvision:{name}:x:{split}"
        assert measured_spec(f"torchvision:{name}:{tmp_path}:train") == f"torchvision:{name}:{tmp_path}:train"


@pytest.mark.parametrize("kind", ["imagefolder", "hdf5", "webdataset"])
def test_a_training_split_alone_is_refused_and_named(kind: str, tmp_path: Path) -> None:
    photos(tmp_path, "train/cat")
    for name in ("train.h5", "train-0.tar"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=f"no split test or val to take here, but train: .*such as {kind}:{tmp_path}:train$"
    ):
        measured_spec(f"{kind}:{tmp_path}")
    with pytest.raises(DataError, match="there is nothing at"):
        measured_spec(f"{kind}:{tmp_path}/nowhere")


def test_what_is_reported_beside_a_training_set_is_its_other_split(tmp_path: Path) -> None:
    root = photos(tmp_path / "a", "train/cat", "val/cat")
    assert pipeline.reported_split(f"imagefolder:{root}") == f"imagefolder:{root}:val"
    assert pipeline.reported_split(f"imagefolder:{root}:train[:5]") == f"imagefolder:{root}:val"
    assert pipeline.reported_split("digits:train[:800]") == "digits:test"
    classes = photos(tmp_path / "b", "cat", "dog")
    for spec in (f"imagefolder:{classes}", f"imagefolder:{root}:val", "digits:test", f"hdf5:{tmp_path}/none"):
        with pytest.raises(InputError, match="cannot be guessed: give --test"):
            pipeline.reported_split(spec)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier, and beside it ``db``, whose rows are training images."""
    place = tmp_path_factory.mktemp("nets")
    save_classifier(trained(), place / "classifier")
    build_database(digits("train").subset(range(200)), trained(), BLOCK2, place / "db", progress=False)
    return place / "classifier"


def test_every_measurement_of_digits_is_on_the_test_images(net: Path, tmp_path: Path) -> None:
    test = digits("test")
    attacks = rungs_for(["gray"], AttackSettings("fgsm", "linf", (0.1,), 1, 1), None)
    recipe = Recipe(
        dataset="digits", classifier=str(net), rungs=attacks, headline_norm="linf", headline_eps=0.1, limit=20,
        audit=False, gallery=0, sizes=False,
    )  # fmt: skip
    results: dict[str, Any] = pipeline.evaluate(recipe, tmp_path / "e", device="cpu", progress=False)
    part = pipeline.drawn(test, 20, 0)
    assert (results["dataset"]["name"], results["dataset"]["fingerprint"]) == (part.name, part.fingerprint)
    assert "digits:test" in (tmp_path / "e/report.html").read_text()

    quiet = ("--device", "cpu", "--limit", 30, "--json")
    attack = nndefense("attack", "--dataset", "digits", "--classifier", net, "--attack", "fgsm", "--out",
                       tmp_path / "a.h5", *quiet)  # fmt: skip
    assert attack.json["dataset"].startswith("digits:test")
    assert set(open_dataset(f"hdf5:{tmp_path}/a.h5").ids) <= set(test.ids)

    guard = ("guard", "calibrate", "--database", net.parent / "db", "--dataset")
    assert nndefense(*guard, "digits", *quiet).json["dataset"].startswith("digits:test")
    fails(3, "stand in the database", *guard, "digits:train", "--limit", 900, "--overwrite", "--device", "cpu")


def test_a_setting_is_chosen_on_the_test_split_only_where_that_is_named(net: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="digits has no split val or valid to take here, but train, test"):
        pipeline.split(["digits:train[:900]"], "digits")
    _, _, held = pipeline.split(["digits:train[:900]"], "digits:test[:100]")
    assert len(held) == 100
    assert pipeline.split(["digits"])[0].name == "digits:train"
