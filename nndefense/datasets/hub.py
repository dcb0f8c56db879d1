"""Data sets of Hugging Face's hub, by the names that its library ``datasets`` has for them; it is an extra."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nndefense.datasets.derived import Size, check_form
from nndefense.datasets.encoded import EncodedDataset
from nndefense.datasets.ids import NumberedIds
from nndefense.datasets.labels import LABEL_NAMES, Label, class_numbers
from nndefense.datasets.parquet import cell_bytes, class_names, image_column, label_values
from nndefense.datasets.rejected import BadImage
from nndefense.datasets.store import check_bytes
from nndefense.errors import DataError, one_line

_HUB = "hf://datasets/"
# Tables that hold their pictures. What else the library reads unpacks archives, or reads files that a table names.
_KINDS = ("parquet", "arrow")
# Before it, the library ran code that lay beside the data.
_LEAST = 4
_FINGERPRINT_IMAGES = 100


class HubDataset(EncodedDataset):
    """The pictures of a data set of the hub, or of a folder that the library's ``save_to_disk`` wrote.

    Only Parquet and Arrow tables are read, and only pictures that stand in them; no code of a data set is run. What is
    fetched goes to the library's own cache. Pictures are in a column as for
    :class:`~nndefense.datasets.ParquetDataset`, labels in one of :data:`~nndefense.datasets.labels.LABEL_NAMES`, else
    in the only column of the type ``ClassLabel``. Ids are ``<name>/<split>/00000`` and so on.

    Args:
        source: ``OWNER/NAME``, ``NAME`` or a folder.
        config: which of its subsets, where it has several.
        split: ``train`` by default, or the only one.
        size, channels: as for :class:`~nndefense.datasets.ImageFolderDataset`.
        image, label: the columns, where others are meant.
        download: whether it may be fetched.

    Raises:
        DataError: ``datasets`` is not installed or too old; there is no such data set or split, it cannot be fetched,
            holds other files, or files from elsewhere; columns that are missing.
        InputError: ``size`` or ``channels`` is out of range.
    """

    def __init__(
        self,
        source: str,
        *,
        config: str | None = None,
        split: str | None = None,
        size: Size | None = None,
        channels: int | None = None,
        image: str | None = None,
        label: str | None = None,
        download: bool = True,
    ) -> None:
        form = check_form(size, channels)
        title = ":".join(("hf", source, *(part for part in (config, split) if part)))
        try:
            import datasets as library
        except ImportError:
            raise DataError(f"{title} needs the package datasets, which is missing: pip install datasets") from None
        if int(library.__version__.split(".")[0]) < _LEAST:
            raise DataError(
                f"datasets {library.__version__} could run code that comes with {title}: pip install 'datasets>=4'"
            )
        try:
            found = _opened(library, source, config, download, title)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{title} cannot be opened ({one_line(error)}): check its name and the network") from error
        table, split = _split_of(found, split, title)
        schema = table.features.arrow_schema
        for column in (image, label):
            if column is not None and column not in schema.names:
                raise DataError(f"{title} has no column {column}: it has {', '.join(schema.names)}")
        image = image or image_column(schema, title)
        marked = [name for name, kind in table.features.items() if isinstance(kind, library.ClassLabel)]
        known = [*(name for name in LABEL_NAMES if name in schema.names), *(marked if len(marked) == 1 else [])]
        label = label or next(iter(known), None)
        if not len(table):
            raise DataError(f"{title} has no rows: choose another split")
        labels: list[Label] = [None] * len(table)
        if label is not None:
            labels = label_values(table.with_format("arrow").select_columns([label])[:].column(0), title)
        classes, numbers = class_numbers(labels, class_names(schema, label), title, "the table")
        # Arrow's own values: nothing is decoded, and the file is mapped into memory.
        self._cells = table.select_columns([image]).with_format("arrow")
        place = os.path.expanduser(source)
        stem = Path(place).resolve().name if os.path.exists(place) else "/".join(filter(None, (source, config)))
        super().__init__(
            name=title,
            classes=classes,
            ids=NumberedIds(f"{stem}/{split}", len(table)),
            labels=numbers,
            size=form,
            channels=channels,
        )

    def _fetch(self, row: int, item: str) -> tuple[str, bytes]:
        cell = self._cells[row].column(0).chunk(0)
        data = cell.field("bytes") if hasattr(cell.type, "num_fields") and cell.type.num_fields else cell
        if data[0].is_valid:
            # By the length that the table tells, before it is copied.
            check_bytes(item, data[0].as_buffer().size)
        return cell_bytes(f"{item} of {self.name}", cell[0].as_py())

    def _digest(self) -> str:
        """Hash the form, labels, ids and up to 100 evenly spaced files: all of them could take hours."""
        digest = self._begun_digest("hub")
        digest.update(self.labels.astype("<i8").tobytes())
        picked = np.linspace(0, len(self) - 1, min(len(self), _FINGERPRINT_IMAGES)).astype(np.int64)
        for row in np.unique(picked).tolist():
            try:
                digest.update(self._fetch(row, self.ids[row])[1])
            except BadImage as error:  # noqa: PERF203
                digest.update(error.kind.encode())
        return digest.hexdigest()


def _opened(library: Any, source: str, config: str | None, download: bool, title: str) -> Any:
    """The splits of a data set, or what ``save_to_disk`` wrote; nothing is decoded."""
    place = os.path.abspath(os.path.expanduser(source))
    local = os.path.exists(place)
    states = [path for pattern in ("state.json", "*/state.json") for path in Path(place).glob(pattern)]
    if states:
        for state in states:
            files = [str(entry["filename"]) for entry in json.loads(state.read_bytes())["_data_files"]]
            check_files(title, str(state.parent), [os.path.join(state.parent, file) for file in files])
        return library.load_from_disk(place)
    builder = library.load_dataset_builder(
        place if local else source, config, download_config=library.DownloadConfig(local_files_only=not download)
    )
    modules = [kind.__module__.split(".") for kind in type(builder).__mro__]
    kind = next((parts[2] for parts in modules if parts[:2] == ["datasets", "packaged_modules"]), "code")
    # What was fetched before and lies in the cache is an Arrow table.
    if kind not in (*_KINDS, "cache"):
        raise DataError(
            f"{title} is made by {kind}, but only tables with images in them ({' or '.join(_KINDS)}) are read"
        )
    named = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    if named and (local or builder.base_path):
        check_files(title, place if local else str(builder.base_path), named)
    builder.download_and_prepare()
    return builder.as_dataset()


def check_files(title: str, base: str, files: Sequence[str]) -> None:
    """Raise :class:`DataError` where a description names files that are not its own.

    Its own lie below the folder ``base``, or in the revision ``hf://datasets/NAME@REVISION``.
    """
    revision = base.partition("@")[2].partition("/")[0]
    for file in files:
        if base.startswith(_HUB):
            own = file.startswith(_HUB) and file.partition("@")[2].partition("/")[0] == revision
        else:
            own = os.path.realpath(file).startswith(os.path.realpath(base) + os.sep)
        if not own or ".." in file.split("/"):
            raise DataError(f"{title} takes a file from elsewhere ({file}), which is not read")


def _split_of(found: Any, split: str | None, title: str) -> tuple[Any, str]:
    """The rows of a split, and its name."""
    if not isinstance(found, dict):
        own = str(found.split or "train")
        if split not in (None, own):
            raise DataError(f"{title} has the split {own} alone: leave the split out")
        return found, own
    chosen = split or ("train" if "train" in found or len(found) > 1 else next(iter(found), "train"))
    if chosen not in found:
        raise DataError(f"{title} has no split {chosen}: it has {', '.join(map(str, found))}")
    return found[chosen], chosen
