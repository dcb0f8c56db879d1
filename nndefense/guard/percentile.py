"""How far an image lies from the database, measured against clean images; and when that is too far.

The distance of an image is that of its feature vector to the nearest row. Against the distances of clean images that
neither stand in the database nor trained the net, it becomes a percentile and, where wanted, a reason to abstain: the
threshold is the conformal quantile, so that of images that come from where the calibration images come from, at most
the chosen rate is rejected, in finite samples and for any distribution (Vovk, Gammerman and Shafer 2005; Lei et al.
2018, section 2.2).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nndefense.database.manifest import GUARD, NAME, Manifest, keep_beside
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.files import DIGEST, read_json, sealed, sha256_of, tell_unsealed, unsealed, write_json
from nndefense.statistics import conformal_threshold, values_needed

#: The name of the guard's file in a database's folder.
FILE = GUARD
FORMAT, VERSION = "nndefense-guard", 1
_AGAIN = "calibrate again with 'nndefense guard calibrate'"


@dataclass(frozen=True)
class Percentile:
    """The distances of clean images, and what they were measured with.

    Attributes:
        distances: n distances to the nearest row, ascending.
        manifest: :attr:`~nndefense.database.manifest.Manifest.identity` of the database's manifest; of older versions
            the sha256 of that file.
        classifier: fingerprint of the classifier.
        dataset: ``name``, ``fingerprint`` and ``specs`` of the images.
        samples: ids of some of the images, to show.
        reject_rate: the false-rejection rate to abstain at where none is named, or None for no abstention.
        created: time of the calibration, ISO 8601 in UTC.
    """

    distances: tuple[float, ...]
    manifest: str
    classifier: str
    dataset: dict[str, Any] = field(default_factory=dict)
    samples: tuple[str, ...] = ()
    reject_rate: float | None = None
    created: str = ""

    def __post_init__(self) -> None:
        values = self.distances
        if not values or not all(math.isfinite(d) and d >= 0 for d in values) or list(values) != sorted(values):
            raise InputError("a calibration needs at least one distance, all finite, at least 0 and ascending")
        if self.reject_rate is not None:
            check_rate(self.reject_rate)

    def __len__(self) -> int:
        return len(self.distances)

    def of(self, distance: float) -> float:
        """How many per cent of the calibration images lie nearer than ``distance``, 0 to 100."""
        return 100 * bisect_left(self.distances, distance) / len(self)

    def threshold(self, rate: float) -> float:
        """The distance beyond which an image is rejected: the ceil((n + 1)(1 - rate))-th smallest of the n.

        Raises:
            InputError: a rate that is not between 0 and 1, or too small for so few images: below 1 / (n + 1) even the
                farthest of them would not be far enough.
        """
        check_rate(rate)
        found = conformal_threshold(self.distances, rate)
        if found is None:
            raise InputError(
                f"a false-rejection rate of {rate:g} needs at least {values_needed(rate):,} calibration "
                f"images, but there are {len(self):,}: calibrate on more, or choose a higher rate"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The values of the file, with their digest."""
        return sealed({"format": FORMAT, "version": VERSION, **asdict(self)})

    def write(self, path: Path) -> None:
        """Write the file ``path``, whole or not at all; as ``guard.json`` of a database it is bound to that database.

        Raises:
            InputError: the place cannot be written.
        """
        value = self.to_json()
        try:
            if path.name == FILE and (path.parent / NAME).exists():
                keep_beside(path.parent, FILE, value)
            else:
                write_json(path, value)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): choose another file") from error

    @classmethod
    def read(cls, path: Path) -> Percentile:
        """Read such a file from ``path``.

        Raises:
            DataError: it is missing, damaged, changed since it was written, or something else.
        """
        value = read_json(path)
        if isinstance(value, dict) and value.get("format") == FORMAT and DIGEST not in value:
            tell_unsealed(path, path)
        return cls.of_values(value, path)

    @classmethod
    def of_values(cls, value: Any, path: Path) -> Percentile:
        """What the ``value`` of a file says; ``path`` stands in errors, which are as for :meth:`read`."""
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise DataError(f"{path} is not a calibration of the guard, or of another version: {_AGAIN}")
        try:
            values, _ = unsealed(value)
            del values["format"], values["version"]
            distances = tuple(float(distance) for distance in values.pop("distances"))
            samples = tuple(str(item) for item in values.pop("samples"))
            return cls(distances=distances, samples=samples, **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}): restore it, or {_AGAIN}") from error

    def check_database(self, folder: Path, manifest: Manifest) -> None:
        """Raise :class:`DatabaseError` unless the distances were measured in the database of this
        ``folder`` and ``manifest``.
        """
        fits = self.manifest == manifest.identity or self.manifest == sha256_of(folder / NAME)
        if not fits or self.classifier != manifest.classifier["fingerprint"]:
            raise DatabaseError(
                f"the calibration of the guard belongs to another state of the database {folder}: run "
                "'nndefense guard calibrate' again, or remove it"
            )


def check_rate(rate: float) -> None:
    """Raise :class:`InputError` unless a false-rejection rate lies between 0 and 1."""
    if not 0 < rate < 1:
        raise InputError(f"the false-rejection rate is {rate}, but must be above 0 and below 1, such as 0.05")
