"""Data sets of Hugging Face's hub: made by its library here, and opened as the hub's are, without a download."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from dirty import encoded, noise

from nndefense.datasets import HubDataset, ImageDataset, open_dataset
from nndefense.datasets.hub import check_files
from nndefense.datasets.spec import measured_spec
from nndefense.errors import DataError

needs_library = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the package datasets")
COUNT = 6
PICTURES = [noise(number, 6, 7) for number in range(COUNT)]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = importlib.import_module("datasets")
    monkeypatch.setattr(made.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(made.config, "HF_HUB_OFFLINE", True)
    return made


def rows(library: Any, *, image: str = "image", label: str = "label", first: int = 0) -> Any:
    """Pictures of two classes, as the library stores them."""
    kinds = {image: library.Image(), label: library.ClassLabel(names=["cat", "dog"]), "source": library.Value("string")}
    cells = [{"bytes": encoded(picture, "PNG"), "path": None} for picture in PICTURES[first:]]
    labels = [number % 2 for number in range(COUNT)][first:]
    return library.Dataset.from_dict(
        {image: cells, label: labels, "source": ["x"] * len(cells)}, features=library.Features(kinds)
    )


def assert_pictures(dataset: ImageDataset, first: int = 0) -> None:
    assert list(dataset.classes) == ["cat", "dog"]
    assert dataset.labels.tolist() == [number % 2 for number in range(COUNT)][first:]
    wanted = torch.from_numpy(np.stack(PICTURES[first:])).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(dataset.batch(np.arange(len(dataset)))[0], wanted)


@needs_library
def test_what_the_library_saved(library: Any, tmp_path: Path) -> None:
    both = library.DatasetDict({"train": rows(library), "test": rows(library, first=2)})
    both.save_to_disk(tmp_path / "pets")
    train, test = open_dataset(f"hf:{tmp_path}/pets"), open_dataset(f"hf:{tmp_path}/pets:test")
    assert_pictures(train)
    assert_pictures(test, 2)
    assert train.ids[0] == "pets/train/00000"
    assert test.ids[3] == "pets/test/00003"
    assert open_dataset(f"hf:{tmp_path}/pets:test[1:3]").ids == ["pets/test/00001", "pets/test/00002"]
    # Neither the folder's place nor another opening changes who is who.
    (tmp_path / "moved").mkdir()
    (tmp_path / "pets").rename(tmp_path / "moved" / "pets")
    again = open_dataset(f"hf:{tmp_path}/moved/pets")
    assert (list(again.ids), again.fingerprint) == (list(train.ids), train.fingerprint)
    assert measured_spec(f"hf:{tmp_path}/moved/pets") == f"hf:{tmp_path}/moved/pets:test"
    assert again.fingerprint != open_dataset(f"hf:{tmp_path}/moved/pets:test").fingerprint
    assert_pictures(pickle.loads(pickle.dumps(again)))
    with pytest.raises(DataError, match="no split val: it has train, test"):
        open_dataset(f"hf:{tmp_path}/moved/pets:val")


@needs_library
def test_one_split_and_columns_of_other_names(library: Any, tmp_path: Path) -> None:
    rows(library, image="scan", label="kind").save_to_disk(tmp_path / "one")
    assert_pictures(open_dataset(f"hf:{tmp_path}/one"))
    with pytest.raises(DataError, match="has the split train alone"):
        open_dataset(f"hf:{tmp_path}/one:test")
    two = library.concatenate_datasets(
        [rows(library, image="scan"), rows(library, image="view").select_columns("view")], axis=1
    )
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="several: scan, view"):
        open_dataset(f"hf:{tmp_path}/two")
    assert_pictures(HubDataset(str(tmp_path / "two"), image="scan"))
    with pytest.raises(DataError, match="no column mask: it has scan, label, source, view"):
        HubDataset(str(tmp_path / "two"), image="mask")
    # Without a label that is one, all are unknown.
    plain = rows(library).remove_columns("label")
    plain.save_to_disk(tmp_path / "plain")
    assert open_dataset(f"hf:{tmp_path}/plain").labels.tolist() == [-1] * COUNT
    assert open_dataset(f"hf:{tmp_path}/plain", size=4, channels=1).shape == (1, 4, 4)


@needs_library
def test_a_repository_of_tables(library: Any, tmp_path: Path) -> None:
    home = tmp_path / "repository"
    (home / "data").mkdir(parents=True)
    rows(library).to_parquet(home / "data" / "train-00000-of-00001.parquet")
    rows(library, first=2).to_parquet(home / "data" / "test-00000-of-00001.parquet")
    assert_pictures(open_dataset(f"hf:{home}"))
    assert_pictures(open_dataset(f"hf:{home}:test"), 2)


@needs_library
@pytest.mark.parametrize("what", ["code", "elsewhere", "pictures", "nothing"])
def test_what_a_stranger_could_do_is_not_done(library: Any, what: str, tmp_path: Path) -> None:
    home = tmp_path / "repository"
    home.mkdir()
    ran = tmp_path / "ran"
    if what == "code":
        (home / "repository.py").write_text(f"open({str(ran)!r}, 'w')\n")
    elif what == "elsewhere":
        rows(library).to_parquet(tmp_path / "private.parquet")
        (home / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path / 'private.parquet'}\n---\n"
        )
    elif what == "pictures":
        (home / "train" / "cat").mkdir(parents=True)
        (home / "train" / "cat" / "a.png").write_bytes(encoded(PICTURES[0], "PNG"))
    words = {"elsewhere": "takes a file from elsewhere", "pictures": "is made by imagefolder"}.get(
        what, "cannot be opened"
    )
    with pytest.raises(DataError, match=words):
        open_dataset(f"hf:{home}")
    assert not ran.exists()


@needs_library
def test_a_cell_reads_no_file_that_it_names(library: Any, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(encoded(PICTURES[0], "PNG"))
    cells = [
        {"bytes": encoded(PICTURES[1], "PNG"), "path": None},
        {"bytes": None, "path": str(tmp_path / "private.png")},
    ]
    made = library.Dataset.from_dict({"image": cells}, features=library.Features({"image": library.Image()}))
    # Not by the library, which would embed the file.
    parquet = importlib.import_module("pyarrow.parquet")
    (tmp_path / "set").mkdir()
    parquet.write_table(made.with_format("arrow")[:], tmp_path / "set" / "train.parquet")
    found = open_dataset(f"hf:{tmp_path}/set")
    wrong = found.read_into(np.arange(2), torch.empty((2, *found.shape)))
    assert {place: error.kind for place, error in wrong.items()} == {1: "missing"}
    assert "only the path of a file" in str(wrong[1])


@needs_library
def test_a_saved_set_reads_no_file_from_elsewhere(library: Any, tmp_path: Path) -> None:
    rows(library).save_to_disk(tmp_path / "set")
    state = tmp_path / "set" / "state.json"
    name = next((tmp_path / "set").glob("*.arrow")).name
    (tmp_path / "set" / name).rename(tmp_path / name)
    state.write_text(state.read_text().replace(name, f"../{name}"))
    with pytest.raises(DataError, match="takes a file from elsewhere"):
        open_dataset(f"hf:{tmp_path}/set")


def test_files_of_a_set_of_the_hub_are_its_own() -> None:
    base = "hf://datasets/owner/name@0123abcd/more"
    # Renamed sets keep their revisions.
    check_files(
        "hf:x", base, ["hf://datasets/owner/name@0123abcd/a.parquet", "hf://datasets/new/name@0123abcd/b.parquet"]
    )
    for file in (
        "hf://datasets/owner/name@4567/a.parquet", "/home/me/a.parquet", "a.parquet", "s3://b/a.parquet",
        "hf://datasets/owner/name@0123abcd/../a.parquet", "hf://buckets/x@0123abcd/a.parquet",
    ):  # fmt: skip
        with pytest.raises(DataError, match="takes a file from elsewhere"):
            check_files("hf:x", base, [file])


@needs_library
def test_names_that_are_none(library: Any) -> None:
    for name in ("hf:", "hf:a:b:c:d", "hf:a::b"):
        with pytest.raises(DataError, match="write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
            open_dataset(name)
    with pytest.raises(DataError, match="hf:nobody/nothing:test cannot be opened"):
        open_dataset("hf:nobody/nothing:test", download=False)


def test_the_library_is_asked_for(tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {"datasets": None}), pytest.raises(DataError, match=r"pip install datasets$"):
        open_dataset("hf:mnist")
    old = mock.Mock(__version__="3.6.0")
    with mock.patch.dict(sys.modules, {"datasets": old}), pytest.raises(DataError, match="could run code"):
        open_dataset("hf:mnist")
    assert old.mock_calls == []
