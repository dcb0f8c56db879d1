"""Opening again what a database or a calibration was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nndefense.datasets.base import ImageDataset
from nndefense.datasets.joined import concatenate
from nndefense.datasets.spec import open_dataset


def open_recorded(
    data: Mapping[str, Any],
    ids: Callable[[], Sequence[str]],
    shape: tuple[int, int, int],
    data_dir: Path | None = None,
) -> ImageDataset | None:
    """Open a data set again that was recorded, as in a database's manifest.

    Args:
        data: ``specs`` and ``fingerprint``.
        ids: gives the ids of its images in order, where it may be a part of what the specs open, because some were held
            out or a limit was given.
        shape: C, H, W that it was opened with.
        data_dir: the folder of the data sets.

    Returns:
        The data set, or None where what the specs open is not what was recorded.

    Raises:
        NNDefenseError: it cannot be opened.
    """
    parts = [open_dataset(s, data_dir=data_dir, size=shape[1:], channels=shape[0]) for s in data.get("specs") or ()]
    if not parts:
        return None
    dataset = concatenate(parts)
    if dataset.fingerprint == data["fingerprint"]:
        return dataset
    wanted = ids()
    if not len(wanted):
        return None
    part = dataset.subset([dataset.index_of(item) for item in wanted])
    return part if part.fingerprint == data["fingerprint"] else None
