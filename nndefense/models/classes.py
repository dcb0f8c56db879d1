"""Names of classes: read from a file, and matched between a data set and a classifier."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nndefense.errors import ModelError

# A sequence of names, or the path of a file that lists them.
Classes = Sequence[str] | str | Path

_NAME_COLUMNS = ("name", "class", "label")
_ID_COLUMNS = ("wnid", "class_id", "id", "synset")


def read_classes(path: str | Path) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Read the names of classes, and their ids where the file has them.

    A ``.csv`` file has a header with a column ``name`` (or ``class``, ``label``), perhaps ``wnid`` (or ``class_id``,
    ``id``, ``synset``), and perhaps ``index``, the class number from 0. Any other file has one name a line.

    Returns:
        the K names, and K ids or None.

    Raises:
        ModelError: the file is missing or not of that form.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ModelError(f"there is no file of classes at {path}: check the path") from None
    except (OSError, UnicodeDecodeError):
        raise ModelError(f"the file of classes {path} cannot be read: it must be a UTF-8 text or CSV file") from None
    if path.suffix.lower() == ".csv":
        return _read_csv(path, text)
    names = tuple(line.strip() for line in text.splitlines())
    while names and not names[-1]:
        names = names[:-1]
    if not names or "" in names:
        raise ModelError(f"the file of classes {path} is empty or has an empty line: write one class name a line")
    return names, None


def _read_csv(path: Path, text: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    rows = list(csv.DictReader(text.splitlines()))
    columns = {column.strip().lower(): column for column in (rows[0] if rows else {}) if column}
    name = next((columns[column] for column in _NAME_COLUMNS if column in columns), None)
    if name is None:
        raise ModelError(f"the CSV file of classes {path} needs a header with a column 'name' and one row a class")
    if "index" in columns:
        try:
            numbers = [int(row[columns["index"]]) for row in rows]
        except (TypeError, ValueError):
            raise ModelError(f"the column 'index' of {path} must hold class numbers from 0 on") from None
        if sorted(numbers) != list(range(len(rows))):
            raise ModelError(f"the column 'index' of {path} must hold each class number from 0 to {len(rows) - 1} once")
        rows = [row for _, row in sorted(zip(numbers, rows, strict=True), key=lambda pair: pair[0])]
    identity = next((columns[column] for column in _ID_COLUMNS if column in columns), None)
    names = tuple((row[name] or "").strip() for row in rows)
    if "" in names:
        raise ModelError(f"row {names.index('') + 1} of the file of classes {path} has no name: fill it in")
    if identity is None:
        return names, None
    return names, tuple((row[identity] or "").strip() for row in rows)


def given_classes(classes: Classes) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return names, and ids or None, from a sequence of names or from the path of a file."""
    if isinstance(classes, (str, Path)):
        return read_classes(classes)
    return tuple(str(name) for name in classes), None


def match_classes(
    wanted: Sequence[str], classes: Sequence[str], class_ids: Sequence[str] | None
) -> list[int] | tuple[str, str]:
    """Find each of a data set's classes among a classifier's: by name, else by id, else by number.

    Names match exactly, or failing that without regard to case, ``_`` and ``-``; a name that two of the classifier's
    classes have matches neither. Numbers serve only where both have equally many classes and no name says otherwise.

    Returns:
        the classifier's class numbers, or else the first class that is not found, and why.
    """
    if list(wanted) == list(classes):
        return list(range(len(classes)))
    tables = [_unique(classes), _unique([_plain(name) for name in classes]), _unique(class_ids or ())]
    found = [
        next((table[key] for table, key in zip(tables, (name, _plain(name), name), strict=True) if key in table), None)
        for name in wanted
    ]
    places = [place for place in found if place is not None]
    if len(places) == len(wanted):
        twice = [place for place, count in Counter(places).items() if count > 1]
        if not twice:
            return places
        return wanted[found.index(twice[0])], "shares the classifier's class with another one"
    # Names that do match must agree with the numbers, or the two lists are not in the same order.
    agrees = all(place is None or place == number for number, place in enumerate(found))
    if len(wanted) == len(classes) and agrees:
        return list(range(len(classes)))
    missing = wanted[found.index(None)]
    plain = [_plain(name) for name in classes]
    return missing, "is the name of several" if plain.count(_plain(missing)) > 1 else "is not one"


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _unique(names: Sequence[str]) -> dict[str, int]:
    counts = Counter(names)
    return {name: number for number, name in enumerate(names) if counts[name] == 1}
