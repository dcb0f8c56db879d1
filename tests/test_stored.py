"""Cells, results and pseudo-labels that have changed since they were written are never taken for what was written."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nndefense import versions
from nndefense.comparison import read_comparison
from nndefense.errors import DataError
from nndefense.evaluation import CellStore
from nndefense.experiments import read_results
from nndefense.files import DIGEST, sealed, write_json
from nndefense.training.pseudo_file import encode_ids, read_file, write_file
from nndefense.versions import code_version

VALUE = [{"accuracy": 0.5, "correct": "f0a1", "n": 16, "attack": "pgd", "database": None}, {"right": [1, 2, 3]}]
CHANGED = "has changed since it was written"


def flipped(path: Path, count: int) -> Iterator[tuple[int, bytes]]:
    """Change one bit of a file at a time, drawn by a seed."""
    whole, drawn = path.read_bytes(), random.Random(0)
    for place in drawn.sample(range(len(whole)), min(count, len(whole))):
        mask = 1 << drawn.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        yield place, whole
    path.write_bytes(whole)


# --- cells


def test_a_cell_that_changed_is_measured_again_and_said(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.put("gray pgd", ["a", 1], VALUE)
    assert store.get("gray pgd", ["a", 1]) == VALUE
    (path,) = tmp_path.iterdir()
    told = 0
    for place, _ in flipped(path, 400):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = store.get("gray pgd", ["a", 1])
        # A space that has become another one changes nothing.
        assert found == VALUE or (found is None and CHANGED in str(caught[0].message)), place
        told += found is None
    assert told > 300
    assert store.get("gray pgd", ["a", 1]) == VALUE


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: {name: value for name, value in cell.items() if name != DIGEST},
        lambda cell: sealed({**cell, "key": {**cell["key"], "cell": ["b", 1]}}),
        lambda cell: sealed({**cell, "key": {**cell["key"], "code": "0" * 64}}),
        lambda cell: {**cell, "value": []},
        lambda cell: [],
        lambda cell: None,
    ],
)
def test_a_cell_without_a_digest_or_of_another_key_is_no_cell(change: Any, tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.put("x", ["a", 1], VALUE)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.warns(UserWarning, match=f"{CHANGED}: its cell is measured again"):
        assert store.get("x", ["a", 1]) is None
    store.put("x", ["a", 1], VALUE)
    assert store.get("x", ["a", 1]) == VALUE


def test_what_other_code_has_measured_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CellStore(tmp_path)
    store.put("x", 1, VALUE)
    assert CellStore(tmp_path, "experiments").get("x", 1) is None
    with monkeypatch.context() as patch:
        patch.setattr("nndefense.evaluation.cells.code_version", lambda *rooms: "of a changed attack")
        assert CellStore(tmp_path).get("x", 1) is None
    assert CellStore(tmp_path).get("x", 1) == VALUE


def test_the_version_of_code_is_that_of_every_file_in_its_rooms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("attacks/__init__.py", "attacks/retrieval/soft.py", "images.py", "theory/toys.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))

    def version() -> str:
        code_version.cache_clear()
        return code_version("attacks", "images")

    seen = [version()]
    assert version() == seen[0]
    (tmp_path / "theory" / "toys.py").write_text("x = 2\n")
    assert version() == seen[0]
    for name in ("attacks/__init__.py", "attacks/retrieval/soft.py", "images.py", "attacks/new.py"):
        (tmp_path / name).write_text("x = 2\n")
        seen.append(version())
    (tmp_path / "attacks" / "new.py").rename(tmp_path / "attacks" / "other.py")
    seen.append(version())
    assert len(set(seen)) == len(seen)
    code_version.cache_clear()


# --- results


@pytest.mark.parametrize(
    ("read", "form"), [(read_comparison, "nndefense-comparison"), (read_results, "nndefense-experiment")]
)
def test_results_that_changed_are_refused_and_older_ones_are_read(read: Any, form: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = sealed({"format": form, "version": 1, "records": VALUE})
    write_json(path, results)
    assert read(path) == results
    refused = 0
    for place, _ in flipped(path, 150):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                found = read(path)
            except DataError:
                refused += 1
            else:
                # Another name of the digest is no digest.
                assert found["records"] == VALUE, place
    assert refused > 100
    write_json(path, {**results, "records": []})
    with pytest.raises(DataError, match=rf"{CHANGED}: restore it, or run nndefense \w+"):
        read(path)
    write_json(path, {name: value for name, value in results.items() if name != DIGEST})
    with pytest.warns(UserWarning, match="written before results had a digest"):
        assert read(path)["records"] == VALUE


# --- pseudo-labels


def pseudo_labels(path: Path, **changed: Any) -> None:
    columns = {
        "rows": np.arange(30),
        "ids": encode_ids([f"image {i}" for i in range(30)]),
        "label": np.arange(30) % 3,
        "confidence": np.linspace(0, 1, 30, dtype=np.float32),
        "near_row": np.full(30, -1),
        "near_distance": np.full(30, np.inf),
    }
    job = {
        "labeller": {"teacher": {"fingerprint": "f", "source": "s"}}, "pool": {"ids_sha256": "0"}, "exclude": None,
        "batch_size": 8,
    }  # fmt: skip
    given: dict[str, Any] = {"classes": ["a", "b", "c"], "class_ids": None, "job": job, "selection": {"per_class": 10}}
    parts = [{name: column[part] for name, column in columns.items()} for part in (slice(20), slice(20, None))]
    write_file(path, 30, lambda: parts, **{**given, **changed})


def said_by(path: Path) -> Any:
    columns, ids, *rest = read_file(path)
    return {name: column.tolist() for name, column in columns.items()}, list(ids), rest


def test_pseudo_labels_that_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    pseudo_labels(path)
    whole, refused = said_by(path), 0
    for place, _ in flipped(path, 300):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                assert said_by(path) == whole, place
            except DataError:
                refused += 1
    assert refused > 30
    assert said_by(path) == whole


@pytest.mark.parametrize("name", ["label", "confidence", "rows", "near_row", "near_distance", "ids"])
def test_every_column_of_pseudo_labels_is_under_the_digest(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    pseudo_labels(path)
    with h5py.File(path, "a") as file:
        file[name][0] = 7 if name.startswith("near") else file[name][1]
    with pytest.raises(DataError, match=r"changed since it was written\): restore it or label the pool again"):
        read_file(path)


def test_what_pseudo_labels_say_of_themselves_is_under_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    for name, value in (("classes", ["b", "a", "c"]), ("selection", "null"), ("class_ids", ["1", "2", "3"])):
        pseudo_labels(path)
        with h5py.File(path, "a") as file:
            file.attrs[name] = value
        with pytest.raises(DataError, match="changed since it was written"):
            read_file(path)


def test_older_pseudo_labels_without_a_digest_are_read_with_a_warning(tmp_path: Path) -> None:
    pseudo_labels(tmp_path / "p.h5")
    whole = said_by(tmp_path / "p.h5")
    with h5py.File(tmp_path / "p.h5", "a") as file:
        del file.attrs[DIGEST]
    with pytest.warns(UserWarning, match="written before pseudo-labels had a digest"):
        assert said_by(tmp_path / "p.h5") == whole
