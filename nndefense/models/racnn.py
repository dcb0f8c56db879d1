"""A trained RA-CNN in a folder: the net, and its features of every row of the database that it retrieves from.

``net/`` is a classifier's folder, ``features-NNNNN.safetensors`` hold the features phi(x'_j) of the rows in order, and
``racnn.json``, which is written last, says which classifier and database they belong to.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from nndefense.errors import InputError, ModelError, one_line
from nndefense.files import sha256_of, tell_unsealed
from nndefense.images import shape_text
from nndefense.models.architectures.attentive import AttentiveNet
from nndefense.models.classifier import Classifier
from nndefense.models.files import read_json, write_json, write_tensors
from nndefense.models.load import load_classifier
from nndefense.versions import library_versions

FORMAT, VERSION = "nndefense-racnn", 1
DESCRIPTION_FILE = "racnn.json"
NET_FOLDER = "net"
_SHARD_BYTES = 64 * 2**20
_REMEDY = "copy the folder again, or finish its training with 'nndefense racnn train --resume'"


class RowTable:
    """One feature vector for each row of a database, in shards that all hold equally many rows but for the last.

    Args:
        shards: M x d each; in memory, or mapped from files, so that only the rows that are asked for are read.

    Raises:
        InputError: no shard, or shards of different lengths.
    """

    def __init__(self, shards: Sequence[Tensor]) -> None:
        if not shards or any(len(shard) != len(shards[0]) for shard in shards[:-1]):
            raise InputError("a table of features needs shards of the same number of rows, but for the last")
        self.shards = list(shards)
        self._each = max(1, len(shards[0]))

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def dimension(self) -> int:
        """d, the length of a vector."""
        return int(self.shards[0].shape[1])

    def take(self, rows: Tensor) -> Tensor:
        """The vectors of rows of any shape: ``rows.shape`` x d, on the CPU."""
        flat = rows.detach().cpu().flatten()
        if len(self.shards) == 1:
            found = self.shards[0][flat]
        else:
            owner = flat // self._each
            found = torch.empty((len(flat), self.dimension), dtype=self.shards[0].dtype)
            for number in torch.unique(owner).tolist():
                here = owner == number
                found[here] = self.shards[number][flat[here] - number * self._each]
        return found.view(*rows.shape, self.dimension)


@dataclass(frozen=True)
class RaCnn:
    """A trained RA-CNN, without the retrieval itself.

    Attributes:
        net: a classifier whose net is an :class:`AttentiveNet`; called on images, it answers without neighbours.
        table: phi of every row's image.
        k: neighbours that it was trained with.
        classifier: ``fingerprint`` and ``source`` of the classifier that gives the retrieval features.
        database: ``fingerprint``, ``rows`` and ``name`` of the database.
        training: how it was trained, as plain JSON values.
    """

    net: Classifier
    table: RowTable
    k: int
    classifier: dict[str, Any]
    database: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def attentive(self) -> AttentiveNet:
        """phi, U and g."""
        return attentive(self.net)


def attentive(classifier: Classifier) -> AttentiveNet:
    """The net of a classifier that can attend to neighbours.

    Raises:
        ModelError: it cannot.
    """
    if not isinstance(classifier.net, AttentiveNet):
        raise ModelError(
            f"{classifier.source or classifier.arch} has no attention over neighbours: train one with "
            "'nndefense racnn train'"
        )
    return classifier.net


def features_of(classifier: Classifier, images: Tensor) -> Tensor:
    """``phi(x)`` of images N x C x H x W in [0, 1]: N x d, differentiable."""
    return attentive(classifier).features(classifier.normalised(images))


def shard_rows(dimension: int) -> int:
    """How many rows of that many float32 numbers a shard holds: those of 64 MiB."""
    return max(1, _SHARD_BYTES // (4 * dimension))


def save_racnn(
    folder: Path,
    net: Classifier,
    shards: Iterable[Tensor],
    *,
    k: int,
    classifier: dict[str, Any],
    database: dict[str, Any],
    training: dict[str, Any],
) -> RaCnn:
    """Write what belongs to a net that stands in ``folder/net`` already, one shard at a time, and open it.

    Raises:
        InputError: the folder cannot be written.
    """
    clear_racnn(folder)
    files: list[dict[str, Any]] = []
    for number, shard in enumerate(shards):
        name = f"features-{number:05d}.safetensors"
        files.append({"file": name, "sha256": write_tensors(folder / name, {"features": shard}), "rows": len(shard)})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "k": k,
        "net": {"folder": NET_FOLDER, "fingerprint": net.fingerprint},
        "classifier": classifier,
        "database": database,
        "features": files,
        "training": training,
        "versions": library_versions(),
    }
    write_json(folder / DESCRIPTION_FILE, description)
    return RaCnn(net, _table(folder, files, verify=False), k, classifier, database, training)


def clear_racnn(folder: Path) -> None:
    """Delete the features and, before them, the file that makes them valid; the net stays."""
    (folder / DESCRIPTION_FILE).unlink(missing_ok=True)
    for path in folder.glob("features-*.safetensors*"):
        path.unlink(missing_ok=True)


def load_racnn(folder: str | Path, *, device: str | torch.device = "cpu", verify: bool = True) -> RaCnn:
    """Open a folder that a training wrote.

    Args:
        folder: as given to ``nndefense racnn train --out``.
        device: of the net; the table stays in its files.
        verify: compare the sha256 of the table's files, too.

    Raises:
        ModelError: anything is missing, unfinished, damaged or does not fit.
    """
    folder = Path(folder).expanduser()
    path = folder / DESCRIPTION_FILE
    if not path.exists():
        raise ModelError(f"{folder} holds no finished RA-CNN, because it has no {DESCRIPTION_FILE}: {_REMEDY}")
    told, had_digest = read_json(path, FORMAT, VERSION, _REMEDY)
    if not had_digest:
        tell_unsealed(path, folder)
    try:
        k, made, database = told["k"], dict(told["classifier"]), dict(told["database"])
        fingerprint, rows = str(told["net"]["fingerprint"]), database["rows"]
        if not (isinstance(k, int) and isinstance(rows, int) and 1 <= k <= rows):
            raise ValueError(f"k is {k} of {rows} rows")
        table = _table(folder, told["features"], verify=verify)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ModelError(f"{path} does not describe an RA-CNN ({what}): {_REMEDY}") from error
    net = load_classifier(folder / NET_FOLDER, device=device)
    if net.fingerprint != fingerprint:
        raise ModelError(f"the net in {folder / NET_FOLDER} is another one than {path} was written for: {_REMEDY}")
    if (len(table), table.dimension) != (rows, attentive(net).dimension):
        raise ModelError(
            f"{path} promises {rows} x {attentive(net).dimension} features, but there are "
            f"{len(table)} x {table.dimension}: {_REMEDY}"
        )
    return RaCnn(net, table, k, made, database, dict(told.get("training") or {}))


def _table(folder: Path, files: Sequence[dict[str, Any]], *, verify: bool) -> RowTable:
    shards = []
    for entry in files:
        path = folder / Path(entry["file"]).name
        if not path.is_file():
            raise ModelError(f"{path} is missing: {_REMEDY}")
        if verify and sha256_of(path) != entry["sha256"]:
            raise ModelError(f"{path} is damaged or cut short (its sha256 is not the recorded one): {_REMEDY}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                shard = file.get_tensor("features")
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a file of features ({one_line(error)}): {_REMEDY}") from None
        if shard.dim() != 2 or shard.dtype != torch.float32 or len(shard) != entry["rows"]:
            raise ModelError(f"{path} holds {shape_text(shard.shape)} numbers, not {entry['rows']} rows: {_REMEDY}")
        shards.append(shard)
    return RowTable(shards)
