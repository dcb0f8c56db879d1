"""The arithmetic that docs/index-building.md does for large databases is that of the code."""

from __future__ import annotations

import io
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from nndefense.database.index_training import choose_index, index_bytes, training_rows
from nndefense.database.mapped_shards import DIGEST
from nndefense.database.writer import columns

PAGE = (Path(__file__).parent.parent / "docs" / "index-building.md").read_text(encoding="utf-8")
DIMENSION, CLASSES = 256, 1000
SIZES = (10**6, 10**8, 10**9)
MEMORY = {10**6: 8 << 30, 10**8: 64 << 30, 10**9: 256 << 30}


def size(count: float) -> str:
    unit, step = next((unit, step) for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= step)
    return f"{count / step:.3g} {unit}"


def row_of_table(start: str) -> list[str]:
    lines = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    assert len(lines) == 1, start
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("top", [0, 20])
def test_bytes_of_rows(half: bool, top: int) -> None:
    ids = [f"{number:040d}" for number in range(3)]
    made = columns(
        torch.zeros(3, DIMENSION), torch.full((3, CLASSES), 1e-3), ids, np.zeros(3, np.int64), half=half, top=top
    )
    made[DIGEST] = np.zeros((3, 16), np.uint8)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, column in made.items():
            file[name] = column
    bytes_of = {name: column.nbytes // 3 for name, column in made.items()}
    features = bytes_of.pop("features")
    posteriors = sum(bytes_of.pop(name) for name in list(bytes_of) if name.startswith(("top", "posteriors")))
    kept = "float16" if half else "float32"
    told = {
        "features": row_of_table(f"features, {kept}"),
        "posteriors": row_of_table(f"posteriors, {'top' if top else 'dense'}"),
    }
    assert told["features"] == [size(rows * features) for rows in SIZES]
    assert told["posteriors"] == [size(rows * posteriors) for rows in SIZES]
    assert row_of_table("weights, labels") == [size(rows * sum(bytes_of.values())) for rows in SIZES]


def test_bytes_of_the_indexes_that_are_advised() -> None:
    """Each kind in a row of the table, with the bytes in the same place of the next cell."""
    advised = PAGE[PAGE.index("Which to take, at d = 256") : PAGE.index("Upright figures")]
    for line in [line for line in advised.splitlines() if line.startswith("| 10^")]:
        rows, kinds, told = (cell.strip() for cell in line.strip("|").split("|")[:3])
        count = 10 ** int(rows.split(",")[0].removeprefix("10^"))
        sizes = [size(index_bytes(kind, count, DIMENSION)) for kind in kinds.split("`")[1::2] if kind != "auto"]
        unit = sizes[0].split()[1]
        assert [number.split()[0] for number in sizes] == re.findall(r"\b\d+(?:\.\d+)?\b", told.replace(unit, ""))
        assert unit in told


def test_kinds_of_index() -> None:
    free = [choose_index(rows, DIMENSION) for rows in SIZES]
    bound = [choose_index(rows, DIMENSION, memory=MEMORY[rows]) for rows in SIZES]
    assert row_of_table("`auto` without") == [f"`{choice.factory}`, {size(choice.bytes)}" for choice in free]
    assert row_of_table("`auto` with `") == [f"`{choice.factory}`, {size(choice.bytes)}" for choice in bound]
    small = [choose_index(rows, DIMENSION, memory=8 << 30) for rows in SIZES]
    assert row_of_table("`--memory 8G`") == [f"`{choice.factory}`, {size(choice.bytes)}" for choice in small]
    trained = [training_rows(choice.factory, DIMENSION, rows) for choice, rows in zip(free, SIZES, strict=True)]
    assert row_of_table("sample that trains") == [f"{count:,} rows, {size(4 * DIMENSION * count)}" for count in trained]


def test_hours() -> None:
    for start, rate in (("forward pass, two cores", 32.4), ("forward pass, a GPU", 2500.0)):
        assert row_of_table(start) == [f"{rows / rate / 3600:,.1f} h" for rows in SIZES]
