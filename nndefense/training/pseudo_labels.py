"""Pseudo-labels in a file: which images of a pool have which label, how sure, by whom; and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets import ImageDataset
from nndefense.datasets.base import check_pool, shuffle_keys
from nndefense.datasets.ids import Ids, PickedIds
from nndefense.errors import DataError, InputError
from nndefense.locks import writes
from nndefense.models import Classifier
from nndefense.models.class_names import match_classes
from nndefense.training.pools import PseudoLabelledDataset, without_labels
from nndefense.training.pseudo_file import BLOCK, encode_ids, read_file, teachers_of, write_file

Array = NDArray[Any]
SHORT = ("keep", "equalize")


class PseudoLabels:
    """The pseudo-labels of a pool, or of a choice from it.

    Attributes:
        classes: the C names that labels are numbers of (the teacher's); ``class_ids``: their ids or None.
        rows: int64 n, the places in the pool, ascending.
        ids: n ids.
        labels: int64 n; -1 for none.
        confidence: float32 n, in [0, 1].
        near_rows: int64 n, the row of the nearest test image; -1 where none is near, or none was compared with.
        near_distances: float64 n, its L2 distance; infinity where none is near.
        parts: labels and confidence of each labeller that was combined, by name.
        job: how they were made: ``labeller``, ``pool``, ``exclude``, ``batch_size``.
        selection: how they were chosen, or None.
    """

    def __init__(
        self,
        columns: Mapping[str, Array],
        ids: Ids,
        classes: Sequence[str],
        class_ids: Sequence[str] | None,
        job: Any,
        selection: dict[str, Any] | None = None,
    ) -> None:
        self.rows, self.labels, self.confidence = columns["rows"], columns["label"], columns["confidence"]
        self.near_rows, self.near_distances = columns["near_row"], columns["near_distance"]
        names = [name.removesuffix("_label") for name in columns if name.endswith("_label")]
        self.parts = {name: (columns[f"{name}_label"], columns[f"{name}_confidence"]) for name in names}
        self._columns, self.ids, self.job = dict(columns), ids, job
        self.classes, self.class_ids = tuple(classes), None if class_ids is None else tuple(class_ids)
        self.selection = selection

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def open(cls, path: str | Path, *, teacher: Classifier | None = None) -> PseudoLabels:
        """Open a file; ids are read from it when they are asked for.

        Args:
            path: the file.
            teacher: when given, it must be the classifier that labelled.

        Raises:
            DataError: the file is missing, damaged, of another kind, or made by another teacher.
        """
        found = cls(*read_file(Path(path).expanduser()))
        if teacher is not None and teacher.fingerprint not in found.teachers:
            made = ", ".join(f"{source} ({print_[:12]})" for print_, source in found.teachers.items())
            raise DataError(
                f"{path} was labelled by another teacher ({made}) than this one ({teacher.source}, "
                f"{teacher.fingerprint[:12]}): load that one, or label the pool with this one"
            )
        return found

    @property
    def teachers(self) -> dict[str, str]:
        """Fingerprint and source of every classifier that the labels depend on."""
        return teachers_of(self.job)

    @property
    def excluded_ids(self) -> list[str]:
        """The ids of the images that are left out because they are near to a test image."""
        return self.ids.take(np.flatnonzero(self.near_rows >= 0))

    def select(
        self,
        per_class: int | None = None,
        *,
        min_confidence: float = 0.0,
        short: str = "keep",
        seed: int = 0,
        like: ImageDataset | Sequence[str] | None = None,
    ) -> PseudoLabels:
        """Choose the most confident images of each class (Carmon et al. 2019, step 2: 50,000 of each).

        Images without a label and those near to the test set are always left out. Among images of equal confidence at
        the cut, the seed draws. ``selection`` then holds the arguments and, by class, ``counts`` of what was chosen,
        the ``lowest`` confidence, how many the classes have that have ``too_few``, and how many images of the lowest
        confidence were left out where the draw chose (``tied``); and how many images were left out because they are
        near to the test set (``excluded``), ``unlabelled``, or ``foreign``, of a class that ``like`` has not.

        Args:
            per_class: so many of each class; None for all.
            min_confidence: only images of at least this confidence.
            short: where classes have fewer than ``per_class``: ``keep`` all that they have, or ``equalize``, which
                takes no more of any class than the smallest one has.
            seed: of the draw among equals.
            like: the labelled set or its classes; only its classes are chosen from.

        Raises:
            InputError: an argument out of range, no image remains, or ``like`` has classes that the teacher has not.
        """
        if per_class is not None and per_class < 1:
            raise InputError(f"the number of images of each class must be at least 1, not {per_class}")
        if not 0 <= min_confidence <= 1:
            raise InputError(f"the least confidence must lie in [0, 1], not {min_confidence}")
        if short not in SHORT:
            raise InputError(f"short classes cannot be treated as {short!r}: choose {' or '.join(SHORT)}")
        wanted = range(len(self.classes)) if like is None else self.numbers(like)
        usable = (self.near_rows < 0) & (self.labels >= 0)
        native = np.isin(self.labels, list(wanted))
        order = np.lexsort((shuffle_keys(len(self), seed), -self.confidence))
        order = order[(usable & (self.confidence >= min_confidence))[order]]
        ranked = {number: order[self.labels[order] == number] for number in wanted}
        limit = per_class
        if short == "equalize":
            limit = min(min(map(len, ranked.values())), per_class or len(self))
        taken = {number: rows[:limit] for number, rows in ranked.items()}
        chosen = np.sort(np.concatenate(list(taken.values())))
        if not len(chosen):
            raise InputError(
                f"no image remains of the {len(self):,} in the pool ({int((self.near_rows >= 0).sum()):,} near to the "
                f"test set, {int((self.labels < 0).sum()):,} without a label, least confidence {min_confidence:g}, "
                f"short classes: {short}): ask for less"
            )
        lowest = {number: float(self.confidence[rows[-1]]) for number, rows in taken.items() if len(rows)}
        tied = {
            number: int((self.confidence[ranked[number][len(taken[number]) :]] == least).sum())
            for number, least in lowest.items()
        }

        def named(numbers: Mapping[int, Any]) -> dict[str, Any]:
            return {self.classes[number]: value for number, value in numbers.items()}

        found = PseudoLabels(
            {name: column[chosen] for name, column in self._columns.items()},
            PickedIds(self.ids, chosen),
            self.classes,
            self.class_ids,
            self.job,
        )
        found.selection = {
            "per_class": per_class,
            "min_confidence": min_confidence,
            "short": short,
            "seed": seed,
            "counts": named({number: len(rows) for number, rows in taken.items()}),
            "lowest": named(lowest),
            "too_few": named({number: len(rows) for number, rows in ranked.items() if len(rows) < (per_class or 1)}),
            "tied": named({number: count for number, count in tied.items() if count}),
            "excluded": int((self.near_rows >= 0).sum()),
            "unlabelled": int(((self.near_rows < 0) & (self.labels < 0)).sum()),
            "foreign": int((usable & ~native).sum()),
        }
        return found

    def dataset(self, pool: ImageDataset, like: ImageDataset | Sequence[str] | None = None) -> PseudoLabelledDataset:
        """The images of the pool with their pseudo-labels, for ``train_classifier(unlabelled=...)``.

        Images without a label, near to the test set or of a class that ``like`` has not are left out. The labels that
        the pool itself may have are not looked at.

        Args:
            pool: the pool that was labelled, opened as it was then.
            like: the labelled set or its classes, which become those of the result, in their order; by default the
                teacher's.

        Raises:
            DataError: it is another pool, or its ids or pixels have changed.
            InputError: ``like`` has classes that the teacher has not, or no image remains.
        """
        pool = without_labels(pool.usable)
        check_pool(pool, self.job["pool"])
        classes = self.classes if like is None else _names(like)
        numbers = np.full(len(self.classes) + 1, -1, dtype=np.int64)
        numbers[self.numbers(classes)] = np.arange(len(classes))
        labels = numbers[self.labels]
        kept = (self.near_rows < 0) & (labels >= 0)
        if not kept.any():
            raise InputError(f"no image of {pool.name} has a pseudo-label that could be used: select others")
        return PseudoLabelledDataset(pool.subset(self.rows[kept]), labels[kept], self.confidence[kept], classes)

    @writes("path", file=True)
    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            DataError: the disk is full or cannot be written.
        """

        def blocks() -> Iterator[dict[str, Array]]:
            for first in range(0, len(self), BLOCK):
                block = {name: column[first : first + BLOCK] for name, column in self._columns.items()}
                yield block | {"ids": encode_ids(self.ids[first : first + BLOCK])}

        write_file(Path(path).expanduser(), len(self), blocks, self.classes, self.class_ids, self.job, self.selection)

    def numbers(self, like: ImageDataset | Sequence[str]) -> list[int]:
        """The teacher's number of each class of a labelled set.

        Raises:
            InputError: a class is none of the teacher's.
        """
        found = match_classes(_names(like), self.classes, self.class_ids)
        if found.missing is None:
            return [number for number in found.numbers if number is not None]
        name, why = found.missing
        raise InputError(
            f"the labelled set's class {name!r} {why} of the teacher's {len(self.classes)} classes "
            f"({self.classes[0]!r} to {self.classes[-1]!r}): label the pool with a teacher of the same classes"
        )


def _names(like: ImageDataset | Sequence[str]) -> tuple[str, ...]:
    return like.classes if isinstance(like, ImageDataset) else tuple(like)


def label_accuracy(found: PseudoLabels, pool: ImageDataset) -> dict[str, dict[str, Any]]:
    """How many pseudo-labels are the true ones; to judge them in an experiment, never to choose by.

    Args:
        found: the pseudo-labels.
        pool: the pool that was labelled, with its true labels; images without one do not count.

    Returns:
        ``right`` and ``n``, of ``all`` labels, of the ``surer half``, and of each labeller that was combined.

    Raises:
        DataError: it is another pool.
        InputError: the pool has no true labels, or classes that the teacher has not.
    """
    pool = pool.usable
    check_pool(pool, found.job["pool"])
    truth = np.append(found.numbers(pool), -1)[pool.labels[found.rows]]
    known = truth >= 0
    if not (known & (found.labels >= 0)).any():
        raise InputError(f"{pool.name} has no true labels to compare with")
    names = {"all": found.labels, **{name: labels for name, (labels, _) in found.parts.items()}}
    result = {}
    for name, labels in names.items():
        counted = known & (labels >= 0)
        result[name] = {"right": int((labels == truth)[counted].sum()), "n": int(counted.sum())}
    rows = np.flatnonzero(known & (found.labels >= 0))
    surest = rows[np.argsort(-found.confidence[rows], kind="stable")][: -(-len(rows) // 2)]
    result["surer half"] = {"right": int((found.labels == truth)[surest].sum()), "n": len(surest)}
    return result
