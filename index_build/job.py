"""The job: what a build was asked for and what was settled when it began, kept in its folder until it is finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nndefense.database import Rule
from nndefense.database.writer import JOB, shard_name, writing
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, DataError, InputError, check_choice, make_plain
from nndefense.features import FeatureSpec
from nndefense.files import not_read, read_json, sealed, unsealed, write_json

NAME = JOB
FORMAT, VERSION = "nndefense-index-job", 1
STORAGES = ("float32", "float16")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
TOP, DENSE_UP_TO = 20, 64
"""How many posteriors a row keeps, and up to how many classes it keeps all."""
_SHARD_BYTES = 64 << 20
_MOST_SHARD_ROWS = 1 << 15


@dataclass(frozen=True)
class Options:
    """The settings of a build that decide its result; two builds with the same ones make the same files.

    Attributes:
        index: FAISS's factory string, or ``auto``.
        batch_size: images per forward pass. It counts: a product of another shape may round differently.
        pca_sample: how many images a PCA is fitted on.
        seed: draws that sample, and those that the index is trained and measured on.
        storage: of the features: ``float32`` or ``float16``.
        posteriors: ``dense``, ``top-M``, or ``auto``: dense up to 64 classes, else top-20.
        precision: of the forward pass: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        shard_rows: source images per shard; by default as many as make at most 64 MiB, and at most 32,768.
        dedupe: keep only the first of images with the same pixels.
        memory: bytes that the index may take in memory; None for no limit.
        recall: share of the K nearest rows that a search must find, for which an index's setting is chosen.
        k: K of that recall.
        rule: how the rows are to decide, as values of :class:`~nndefense.database.Rule`; None: nobody says.
        row_noise: standard deviation, in pixels of [0, 1], of the Gaussian noise that each image gets before its row is
            made: one draw of ``seed`` and the image's position.
    """

    index: str = "Flat"
    batch_size: int = 128
    pca_sample: int = 4096
    seed: int = 0
    storage: str = "float32"
    posteriors: str = "auto"
    precision: str = "float32"
    shard_rows: int | None = None
    dedupe: bool = False
    memory: int | None = None
    recall: float = 0.95
    k: int = 50
    rule: Mapping[str, Any] | None = None
    row_noise: float = 0.0

    def __post_init__(self) -> None:
        """Raises:
        InputError: a setting that makes no build.
        """
        make_plain(self)
        if self.batch_size < 1 or self.pca_sample < 2:
            raise InputError("a build needs a batch size of at least 1 and a PCA sample of at least 2 images")
        check_choice("storage", self.storage, STORAGES)
        check_choice("precision", self.precision, PRECISIONS)
        if self.shard_rows is not None and self.shard_rows < 1:
            raise InputError(f"a shard needs at least 1 image, not {self.shard_rows}")
        if self.memory is not None and self.memory < 1 << 20:
            raise InputError(f"the index's memory is {self.memory} bytes, but must be at least 1 MiB")
        if not 0 < self.recall <= 1 or self.k < 1:
            raise InputError(f"recall {self.recall} at {self.k}: recall must be above 0 and at most 1, K at least 1")
        self.top(2)
        if not isinstance(self.row_noise, (int, float)) or not 0 <= self.row_noise < math.inf:
            raise InputError(
                f"row noise is {self.row_noise!r}, but must be a standard deviation of at least 0, in pixels of [0, "
                "1]: give --row-noise (row_noise) such as 0.25"
            )
        object.__setattr__(self, "row_noise", float(self.row_noise))
        if self.rule is not None:
            # Whole, so that a default that changes one day changes no database.
            object.__setattr__(self, "rule", Rule.of(self.rule).to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain values; without a rule and noise where there is none, as in jobs before there were any."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("rule", "row_noise")}

    def top(self, classes: int) -> int:
        """How many posteriors a row keeps, given the number of classes; 0 for all."""
        if self.posteriors == "auto":
            return 0 if classes <= DENSE_UP_TO else TOP
        if self.posteriors == "dense":
            return 0
        kept = self.posteriors.removeprefix("top-")
        if kept == self.posteriors or not kept.isdecimal() or int(kept) < 1:
            raise InputError(f"posteriors is {self.posteriors!r}, but must be auto, dense or top-M, such as top-20")
        return int(kept) if int(kept) < classes else 0


@dataclass(frozen=True)
class BuildTarget:
    """One database of a job: its folder, its feature, the length d of its vectors, whether it has a PCA.

    ``calibration`` is the text of the ``calibration.json`` that will stand in it, or None.
    """

    folder: Path
    feature: FeatureSpec
    dimension: int
    pca: bool
    calibration: str | None = None


@dataclass(frozen=True)
class BuildJob:
    """A build that has begun. Plain values: any process can work on it.

    Attributes:
        targets: the databases that share its forward passes.
        options: what was asked for.
        images: how many the source has, in its order; shard i covers i * shard_rows up to (i + 1) * shard_rows.
        data: ``name``, ``fingerprint`` and ``specs`` of the images.
        classes: the classifier's.
        classifier: ``fingerprint``, ``arch``, ``source`` and ``input_shape``.
        excluded: ``name``, ``fingerprint`` and ``eps`` of the images to keep out, or None.
        shard_rows: as settled.
        top: posteriors that a row keeps; 0 for all.
        precision: the forward pass's, as settled when the job began.
        reopen: whatever the caller needs to open images and classifier again, as plain values.
        before: images that the database was made from before these, where these are added to it.
    """

    targets: tuple[BuildTarget, ...]
    options: Options
    images: int
    data: dict[str, Any]
    classes: tuple[str, ...]
    classifier: dict[str, Any]
    excluded: dict[str, Any] | None
    shard_rows: int
    top: int
    precision: dict[str, Any] = field(default_factory=dict)
    reopen: dict[str, Any] = field(default_factory=dict)
    before: int = 0

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.images // self.shard_rows)

    def bounds(self, number: int) -> tuple[int, int]:
        """The source positions of a shard: from the first up to, but without, the second."""
        return number * self.shard_rows, min((number + 1) * self.shard_rows, self.images)

    def path(self, target: BuildTarget, number: int) -> Path:
        """Where a shard of a target is, or will be."""
        return target.folder / shard_name(number)

    def paths(self, target: BuildTarget) -> list[Path]:
        """Where the shards of a target are, or will be, in order."""
        return [self.path(target, number) for number in range(self.shards)]

    def settings(self, target: BuildTarget) -> dict[str, Any]:
        """What decides the result of a target, as plain values."""
        return settings_of(self.data, self.classifier, target.feature, self.options, self.excluded, target.calibration)

    def write(self) -> None:
        """Write ``job.json`` into every folder.

        Raises:
            DatabaseError: the disk is full or cannot be written.
        """
        for target in self.targets:
            value = asdict(self) | {"format": FORMAT, "version": VERSION, "settings": self.settings(target)}
            value |= {"target": {**asdict(target), "folder": "."}}
            del value["targets"]
            with writing(target.folder):
                write_json(target.folder / NAME, sealed(value))

    @classmethod
    def read(cls, folder: Path) -> BuildJob:
        """Read the unfinished job of a folder, for that folder alone.

        Raises:
            DatabaseError: there is none, or it cannot be read.
        """
        if not (folder / NAME).exists():
            raise DatabaseError(
                f"{folder} holds no unfinished build ({NAME} is missing): begin one with 'nndefense index build' or "
                "'nndefense index extract'"
            )
        try:
            value, _ = unsealed(read_json(folder / NAME))
            if value.pop("format") != FORMAT or value.pop("version") != VERSION:
                raise ValueError
            value.pop("settings")
            target = value.pop("target")
            target = BuildTarget(**target | {"folder": folder, "feature": FeatureSpec(**target["feature"])})
            options, classes = Options(**value.pop("options")), tuple(value.pop("classes"))
            return cls(targets=(target,), options=options, classes=classes, **value)
        except (DataError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DatabaseError(
                not_read(folder / NAME, error)
                or f"{folder / NAME} is damaged or of another version: begin again with 'nndefense index build "
                "--overwrite'"
            ) from error


def settings_of(
    data: Mapping[str, Any],
    classifier: Mapping[str, Any],
    feature: FeatureSpec,
    options: Options,
    excluded: Mapping[str, Any] | None,
    calibration: str | None,
) -> dict[str, Any]:
    """What decides the result of a build, one plain value for each setting."""
    return {
        "images": data["fingerprint"],
        "classifier": classifier["fingerprint"],
        "feature": str(feature),
        **options.to_json(),
        "exclude": f"{excluded['fingerprint']} within {excluded['eps']:g}" if excluded else None,
        "calibration": hashlib.sha256(calibration.encode()).hexdigest() if calibration else None,
    }


def key_of(settings: Mapping[str, Any]) -> str:
    """A sha256 of the settings: equal for builds that make the same files."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()


def check_same(folder: Path, asked: Mapping[str, Any]) -> None:
    """Make sure that the unfinished job of a folder is the one that is asked for.

    Raises:
        DatabaseError: it is another one (naming the settings that differ), or cannot be read.
    """
    job = BuildJob.read(folder)
    begun = job.settings(job.targets[0])
    differ = [name for name in {**begun, **asked} if asked.get(name) != begun.get(name)]
    if not differ:
        return
    told = ", ".join(
        f"{name.replace('_', ' ')} {_short(begun.get(name))}, now {_short(asked.get(name))}" for name in differ
    )
    raise DatabaseError(
        f"{folder} holds an unfinished build with other settings ({told}): continue it with the same ones, choose "
        "another folder, or begin again with --overwrite"
    )


def identity_of(dataset: ImageDataset, specs: Sequence[str]) -> dict[str, Any]:
    """What a database records of its images."""
    return {"name": dataset.name, "fingerprint": dataset.fingerprint, "specs": list(specs)}


def shard_size(options: Options, dimensions: Sequence[int], classes: int) -> int:
    """Source images per shard: at most 64 MiB of rows, a power of two where that fits, and whole batches."""
    if options.shard_rows is not None:
        return options.shard_rows
    top = options.top(classes)
    row = (2 if options.storage == "float16" else 4) * max(dimensions) + (6 * top or 4 * classes) + 96
    size = min(1 << (max(_SHARD_BYTES // row, 1).bit_length() - 1), _MOST_SHARD_ROWS)
    return max(size // options.batch_size, 1) * options.batch_size


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
