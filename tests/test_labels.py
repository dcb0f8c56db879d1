"""Labels as people write them: numbers stay numbers, in every format that holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_webdataset import png, shard

from nndefense.datasets import HDF5Dataset, ImageDataset, ParquetDataset, WebDataset, open_dataset
from nndefense.datasets.labels import LABEL_NAMES, Label, class_numbers
from nndefense.errors import DataError
from nndefense.files import text_lines
from nndefense.models.classifier import read_classes


def read(*labels: Label, names: Sequence[str] | None = None) -> tuple[list[str], list[int]]:
    classes, numbers = class_numbers(labels, names, "the set", "classes.txt")
    return classes, numbers.tolist()


def in_list(folder: Path, labels: Sequence[object], column: str = "label") -> ImageDataset:
    for n in range(len(labels)):
        (folder / f"{n}.png").write_bytes(png(n))
    lines = [f"path,{column}", *(f"{n}.png,{label}" for n, label in enumerate(labels))]
    (folder / "l.csv").write_text("\n".join(lines))
    return open_dataset(f"files:{folder / 'l.csv'}")


def in_parquet(folder: Path, labels: Sequence[object]) -> ImageDataset:
    parquet.write_table(arrow.table({"image": [png(0)] * len(labels), "label": labels}), folder / "a.parquet")
    return ParquetDataset(folder / "a.parquet")


def in_json(folder: Path, labels: Sequence[object]) -> ImageDataset:
    files = [(f"k{n:02}", {"png": png(0), "json": json.dumps({"label": label})}) for n, label in enumerate(labels)]
    encoded = [(key, {"png": found["png"], "json": str(found["json"]).encode()}) for key, found in files]
    return WebDataset(shard(folder / "a.tar", encoded))


def in_hdf5(folder: Path, labels: Sequence[object]) -> ImageDataset:
    path = folder / f"{len(list(folder.iterdir()))}.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((len(labels), 4, 4, 3), np.uint8)
        file["labels"] = np.array(labels)
    return HDF5Dataset(path)


NAN = float("nan")


@pytest.mark.parametrize("write", [in_list, in_parquet, in_json, in_hdf5])
def test_floats_are_the_numbers_that_they_were(write: object, tmp_path: Path) -> None:
    assert callable(write)
    found = write(tmp_path, [float(n) for n in range(12)])
    assert found.labels.tolist() == list(range(12))
    assert found.classes == tuple(map(str, range(12)))
    assert write(tmp_path, [10.0, NAN, 2.0, -1.0]).labels.tolist() == [10, -1, 2, -1]
    for wrong in (0.5, -2.0, float("inf")):
        with pytest.raises(DataError, match=r"has label|is no label|numbers and labels that are names"):
            write(tmp_path, [0.0, 10.0, 2.0, wrong])


@pytest.mark.parametrize("write", [in_list, in_parquet, in_json])
def test_numbers_stored_as_text_are_numbers(write: object, tmp_path: Path) -> None:
    assert callable(write)
    assert write(tmp_path, ["0", "2", "10", ""]).labels.tolist() == [0, 2, 10, -1]
    assert write(tmp_path, ["cat", "ant", ""]).labels.tolist() == [1, 0, -1]
    with pytest.raises(DataError, match="'unsure' beside '0'"):
        write(tmp_path, ["0", "2", "10", "unsure"])


@pytest.mark.parametrize("empty", ["", " ", "nan", "NaN", "<NA>", "NA", "N/A", "null", "None", "-", "-1", "-1.0"])
def test_one_odd_value_leaves_the_numbers_alone(empty: str) -> None:
    classes, numbers = read("0", "1", empty, "10", "2")
    assert numbers == [0, 1, -1, 10, 2]
    assert len(classes) == 11


@pytest.mark.parametrize("wrong", ["-2", "1.5", "-1.5", "1e400", "3000000000", "2000000"])
def test_what_is_no_class_number_is_refused(wrong: str) -> None:
    with pytest.raises(DataError, match="has label"):
        read("0", "1", wrong)


def test_names_that_hold_some_numbers_are_names() -> None:
    assert read("30", "50", "stop", "yield", "give way") == (["30", "50", "give way", "stop", "yield"], [0, 1, 3, 4, 2])
    # Words for nothing may be the names of classes; NaN is none.
    assert read("some", "none", "nan", "") == (["none", "some"], [1, 0, -1, -1])
    # A list of names decides, whatever the names look like.
    assert read("10", "2", "nan", names=["10", "2", "nan"]) == (["10", "2", "nan"], [0, 1, 2])
    assert read("1", "0", names=["cat", "dog"]) == (["cat", "dog"], [1, 0])
    with pytest.raises(DataError, match="numbers and labels that are names"):
        read("cat", 0)


@given(st.lists(st.none() | st.integers(-1, 300), min_size=1), st.data())
@settings(max_examples=60, deadline=None)
def test_any_way_of_writing_gives_the_number(numbers: list[int | None], data: st.DataObject) -> None:
    def written(number: int | None) -> Label:
        if number is None:
            return data.draw(st.sampled_from([None, "", "nan", NAN, "NaN "]))
        return data.draw(
            st.sampled_from([number, float(number), f"{number}", f" {number}", f"{number}.0", f"{number}."])
        )

    assert read(*map(written, numbers))[1] == [-1 if number is None else number for number in numbers]


@pytest.mark.parametrize("column", LABEL_NAMES)
def test_a_list_and_a_table_have_the_same_columns_of_labels(column: str, tmp_path: Path) -> None:
    assert in_list(tmp_path, [1, 0], column).labels.tolist() == [1, 0]
    assert in_list(tmp_path, [1, 0], f" {column.upper()}").labels.tolist() == [1, 0]
    parquet.write_table(arrow.table({"image": [png(0)] * 2, column: [1, 0]}), tmp_path / "b.parquet")
    assert ParquetDataset(tmp_path / "b.parquet").labels.tolist() == [1, 0]


ODD = ["a\u2028b.png", "c\x85d.png", "e\u2029.png", "f\x0cg\x0bh.png", "i\x1cj\x1dk\x1e.png", "\u00a0l.png"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_lines_end_where_a_line_ends_and_nowhere_else(end: str, kind: str, tmp_path: Path) -> None:
    for name in ODD:
        (tmp_path / name).write_bytes(png(0))
    lines = [*(["path"] if kind == "csv" else []), *ODD]
    (tmp_path / f"l.{kind}").write_bytes(end.join([*lines, ""]).encode())
    dataset = open_dataset(f"files:{tmp_path / f'l.{kind}'}")
    assert list(dataset.ids) == ODD
    assert not dataset.read_each(range(len(ODD))).rejected


def test_class_names_with_odd_characters(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("cat\u2028big\r\ndog\n".encode())
    assert read_classes(tmp_path / "classes.txt")[0] == ("cat\u2028big", "dog")
    assert WebDataset(shard(tmp_path / "a.tar", [("x", {"png": png(0), "cls": b"1"})])).classes == (
        "cat\u2028big",
        "dog",
    )


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=5)), st.data())
@settings(max_examples=60, deadline=None)
def test_lines_are_what_was_written(lines: list[str], data: st.DataObject) -> None:
    text = "".join(line + data.draw(st.sampled_from(["\n", "\r\n"])) for line in lines)
    assert text_lines(text) == lines
