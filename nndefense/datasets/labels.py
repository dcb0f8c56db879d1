"""Labels as they are found beside images (numbers or names), as class numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets.store import Store
from nndefense.errors import DataError

_NUMBER = re.compile(r"-1|[0-9]{1,9}")


def written_labels(texts: Sequence[str]) -> list[int | str | None]:
    """Take labels written as text: numbers if all are whole numbers from -1, else names; nothing is unknown."""
    words = [text.strip() for text in texts]
    if all(_NUMBER.fullmatch(word) for word in words if word):
        return [int(word) if word else None for word in words]
    return [word or None for word in words]


def read_class_names(store: Store, path: str) -> list[str] | None:
    """Read a list of class names, a line each; None where there is no such file.

    Raises:
        DataError: it is no such list.
    """
    if not store.is_file(path):
        return None
    place = store.url(path)
    try:
        text = store.read_text(path)
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{place} cannot be read: it must be a UTF-8 text with one class name a line") from None
    names = [line.strip() for line in text.splitlines()]
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(f"{place} is empty, or has an empty or a repeated line: write one class name a line")
    return names


def class_numbers(
    labels: Sequence[int | str | None], names: Sequence[str] | None, title: str, names_from: str
) -> tuple[list[str], NDArray[np.int64]]:
    """Turn labels into numbers of classes.

    Args:
        labels: numbers, or names of classes, or None where unknown.
        names: the names of all classes in order, if they are given; else those that occur, sorted, or 0, 1, ...
        title: what messages call the data set.
        names_from: what messages call the place of ``names``.

    Returns:
        The names of the classes, and int64 labels, -1 where unknown.

    Raises:
        DataError: numbers and names are mixed, or do not fit ``names``.
    """
    words = sorted({label for label in labels if isinstance(label, str)})
    numbered = any(isinstance(label, int) for label in labels)
    if words and numbered:
        raise DataError(f"{title} has labels that are numbers and labels that are names: use one kind")
    classes = list(names) if names is not None else words
    unknown = sorted(set(words) - set(classes))
    if unknown:
        raise DataError(f"{title} has the class {unknown[0]!r}, which {names_from} does not list: add it")
    place = {word: number for number, word in enumerate(classes)}
    found = np.fromiter(
        (-1 if label is None else place[label] if isinstance(label, str) else label for label in labels),
        dtype=np.int64,
        count=len(labels),
    )
    if not classes:
        classes = [str(number) for number in range(int(found.max(initial=-1)) + 1)]
    elif found.max(initial=-1) >= len(classes):
        raise DataError(f"{title} has label {found.max()}, but {names_from} names {len(classes)} classes: add the rest")
    return classes, found
