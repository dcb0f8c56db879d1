"""Data sets that a file records, such as a database's manifest: a stranger's, maybe, so that only what is harmless is
opened because it stands there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nndefense.datasets.base import ImageDataset
from nndefense.datasets.derived import concatenate
from nndefense.datasets.spec import NAMED, locate, open_dataset, split_slice, splits_of
from nndefense.errors import DataError

# Kinds of which nothing names another file that would be opened, and runs no loader of another library.
_PART = re.compile(r"(:[\w-]+)?(\[[-\d:\s]*\])?")
_PLAIN = ("imagefolder", "images", "hdf5", "webdataset", "parquet")


def open_recorded(
    data: Mapping[str, Any],
    ids: Callable[[], Sequence[str]],
    shape: tuple[int, int, int],
    data_dir: Path | None = None,
    *,
    folder: Path | None = None,
    images: Sequence[str] = (),
    named: Sequence[str] = (),
) -> ImageDataset | None:
    """Open a data set again that was recorded, as in a database's manifest.

    Args:
        data: ``specs`` and ``fingerprint``.
        ids: gives the ids of its images in order, where it may be a part of what the specs open, because some were held
            out or a limit was given.
        shape: C, H, W that it was opened with.
        data_dir: the folder of the data sets.
        folder: the one that the record stands in.
        images: the specs that the user names for it. None: the recorded ones, where :func:`specs_at_hand` allows.
        named: further specs that the user has named, as for :func:`specs_at_hand`.

    Returns:
        The data set, or None where what the specs open is not what was recorded, or where they are not opened.

    Raises:
        NNDefenseError: it cannot be opened.
    """
    specs = images or specs_at_hand(data, folder, named)
    if not specs:
        return None
    form: dict[str, Any] = {"data_dir": data_dir, "size": shape[1:], "channels": shape[0]}
    dataset = concatenate([open_dataset(spec, **form, download=bool(images)) for spec in specs])
    wanted = data.get("fingerprint")
    if dataset.fingerprint == wanted:
        return dataset
    chosen = ids()
    if not len(chosen):
        return None
    try:
        part = dataset.subset([dataset.index_of(item) for item in chosen])
    except DataError:
        return None
    return part if part.fingerprint == wanted else None


def recorded_specs(data: Mapping[str, Any]) -> list[str]:
    """The specs that ``data``, a manifest's record of its images, names, as text; empty where it names none."""
    specs = data.get("specs")
    return [*map(str, specs)] if isinstance(specs, (list, tuple)) else []


def specs_at_hand(data: Mapping[str, Any], folder: Path | None, named: Sequence[str] = ()) -> list[str]:
    """The recorded specs as they may be opened because they are recorded; empty where one of them may not.

    These are digits, MNIST, Fashion-MNIST and CIFAR-10, as they lie in the folder of the data sets (nothing is
    fetched), files of pictures inside ``folder``, and other splits and slices of data sets that the user has ``named``.
    Anything else, such as a URL or another folder, only a user may name.
    """
    own = [splits_of(spec)[0] for spec in named]
    found = [spec if _is_part(spec, own) else _at_hand(spec, folder) for spec in recorded_specs(data)]
    return [spec for spec in found if spec is not None] if None not in found else []


def _is_part(spec: str, own: Sequence[str]) -> bool:
    return any(spec.startswith(base) and _PART.fullmatch(spec.removeprefix(base)) for base in own)


def _at_hand(spec: str, folder: Path | None) -> str | None:
    kind, _, rest = spec.partition(":")
    if split_slice(spec.strip())[0].partition(":")[0] in NAMED:
        return spec
    if folder is None or kind not in _PLAIN:
        return None
    home = os.path.realpath(folder)
    # By its letters first: to ask whether a place exists may already reach another machine.
    for place in (os.path.abspath(rest), os.path.abspath(os.path.join(home, rest))):
        if not _below(place, home) or _leads_out(home):
            continue
        try:
            path, split, cut = locate(kind, place, None)
        except DataError:
            continue
        if _below(os.path.realpath(path), home) and (split is None or os.path.basename(split) == split != ".."):
            return ":".join(filter(None, (kind, path, split))) + (cut or "")
    return None


def _below(place: str, home: str) -> bool:
    return place.startswith(os.path.join(home, ""))


def _leads_out(home: str) -> bool:
    """Whether a link in a folder leads to something outside it."""
    return any(
        os.path.islink(place) and not _below(os.path.realpath(place), home)
        for here, folders, files in os.walk(home)
        for place in (os.path.join(here, name) for name in (*folders, *files))
    )
