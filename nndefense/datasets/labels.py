"""Labels as they are found beside images (numbers or names), as class numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets.store import Store
from nndefense.errors import DataError
from nndefense.files import MOST_CLASSES, text_lines

# What spreadsheets, pandas and R write in the place of a number that is missing.
_UNKNOWN = ("", "nan", "<na>")
_EMPTY = (*_UNKNOWN, "na", "n/a", "#n/a", "null", "none", "-")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)
LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label", "class_name", "category")
"""What a column or an entry that holds the label is called, in tables and in JSON; the first that is there is taken."""
_LIST_BYTES = 16 << 20

Label = int | float | str | None


def class_number(value: float, title: str) -> int:
    """Return a number found as a label as the number of a class: 3.0 is 3, and -1 and NaN are -1, the unknown.

    Raises:
        DataError: it has a fraction, or is not among -1 to :data:`~nndefense.files.MOST_CLASSES` - 1.
    """
    if value != value:
        return -1
    # Infinity does not get as far as int().
    if not -1 <= value < MOST_CLASSES or value != int(value):
        raise DataError(
            f"{title} has label {value}: store whole numbers from 0 to {MOST_CLASSES - 1:,}, or -1 where unknown"
        )
    return int(value)


def read_labels(found: Iterable[Label], names: Sequence[str] | None, title: str) -> dict[Label, int | str | None]:
    """Return what each label that was found means: the number of a class, its name, or None where unknown.

    A text is a name where ``names`` has it. Where all others are numbers (``7``, ``07``, ``7.0``, ``7e0``) they are
    numbers, and an empty text, NaN, NA, null, None or ``-`` is unknown; else they are names, and an empty text or NaN
    is unknown.

    Raises:
        DataError: a number is no class number, or numbers and names are mixed: a text among more numbers than names is
            a slip, since as names in text order 10 would come before 2.
    """
    distinct = set(found)
    listed = set(names or ())
    texts = {label: label.strip() for label in distinct if isinstance(label, str)}
    open_ = {text for text in texts.values() if text not in listed and text.casefold() not in _UNKNOWN}
    numbers = {text for text in open_ if _NUMBER.fullmatch(text)}
    words = {text for text in open_ - numbers if text.casefold() not in _EMPTY}
    typed = any(isinstance(label, int | float) for label in distinct)
    named = words | (listed & set(texts.values()))
    if (typed and named) or (numbers and len(numbers) >= len(named) > 0):
        example = f" ({min(named)!r} beside {min(numbers)!r})" if numbers else f" ({min(named)!r})"
        raise DataError(f"{title} has labels that are numbers and labels that are names{example}: use one kind")
    empty = _UNKNOWN if named else _EMPTY

    def meaning(label: Label) -> int | str | None:
        if label is None or isinstance(label, int | float):
            return None if label is None else class_number(label, title)
        text = texts[label]
        if text in listed or (named and text.casefold() not in empty):
            return text
        return None if text.casefold() in empty else class_number(float(text), title)

    return {label: meaning(label) for label in distinct}


def numbered_classes(labels: NDArray[np.int64], title: str) -> list[str]:
    """Return the classes ``0``, ``1``, ... that numbers without names stand for; none where all are unknown.

    Raises:
        DataError: a number is not below :data:`~nndefense.files.MOST_CLASSES`.
    """
    return [str(number) for number in range(class_number(labels.max(initial=-1).item(), title) + 1)]


def check_class_count(count: int, title: str) -> None:
    """Raise :class:`DataError` for more than :data:`~nndefense.files.MOST_CLASSES` classes."""
    if count > MOST_CLASSES:
        raise DataError(f"{title} names {count:,} classes, more than the {MOST_CLASSES:,} allowed: join or drop some")


def read_class_names(store: Store, path: str) -> list[str] | None:
    """Read a list of class names, a line each; None where there is no such file.

    Raises:
        DataError: it is no such list.
    """
    if not store.is_file(path):
        return None
    place = store.url(path)
    try:
        if store.size(path) > _LIST_BYTES:
            raise DataError(f"{place} has more than {_LIST_BYTES:,} bytes: write one class name a line")
        text = store.read_text(path)
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{place} cannot be read: it must be a UTF-8 text with one class name a line") from None
    names = [line.strip() for line in text_lines(text)]
    check_class_count(len(names), place)
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(f"{place} is empty, or has an empty or a repeated line: write one class name a line")
    return names


def class_numbers(
    labels: Sequence[Label], names: Sequence[str] | None, title: str, names_from: str
) -> tuple[list[str], NDArray[np.int64]]:
    """Turn labels into numbers of classes.

    Args:
        labels: numbers, or names of classes, or None where unknown, as for :func:`read_labels`.
        names: the names of all classes in order, if they are given; else those that occur, sorted, or 0, 1, ...
        title: what messages call the data set.
        names_from: what messages call the place of ``names``.

    Returns:
        The names of the classes, and int64 labels, -1 where unknown.

    Raises:
        DataError: numbers and names are mixed, are no class numbers, or do not fit ``names``.
    """
    meaning = read_labels(labels, names, title)
    words = sorted({label for label in meaning.values() if isinstance(label, str)})
    classes = list(names) if names is not None else words
    unknown = sorted(set(words) - set(classes))
    if unknown:
        raise DataError(f"{title} has the class {unknown[0]!r}, which {names_from} does not list: add it")
    place = {word: number for number, word in enumerate(classes)}
    numbers = {
        label: -1 if found is None else place[found] if isinstance(found, str) else found
        for label, found in meaning.items()
    }
    found = np.fromiter((numbers[label] for label in labels), dtype=np.int64, count=len(labels))
    if not classes:
        classes = numbered_classes(found, title)
    elif found.max(initial=-1) >= len(classes):
        raise DataError(f"{title} has label {found.max()}, but {names_from} names {len(classes)} classes: add the rest")
    return classes, found
