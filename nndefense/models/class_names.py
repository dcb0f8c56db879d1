"""A data set's classes found among a classifier's, by their names."""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WNID = re.compile("n[0-9]{8}")
_WNID_BEFORE = re.compile("^n[0-9]{8}[-_ ]+(?=.)")
_IMAGENET = 1000
# Lists of ImageNet's names differ in some; in the order of another data set hardly any fits.
_ALIKE = 0.8


@dataclass(frozen=True)
class Matched:
    """What :func:`match_classes` found.

    Attributes:
        numbers: for each of the data set's classes its number among the classifier's; None where it is none of them.
        missing: the first class that is none of them, and why; None where all are.
        doubt: a sentence on the order that was taken, where another one is just as likely; else ``""``.
    """

    numbers: list[int | None]
    missing: tuple[str, str] | None = None
    doubt: str = ""


def match_classes(wanted: Sequence[str], classes: Sequence[str], class_ids: Sequence[str] | None) -> Matched:
    """Find each of a data set's classes among a classifier's.

    Names and ids decide where both have them: they match exactly, or without regard to case, ``_`` and ``-``, or as one
    of several names (``T-shirt`` and ``T-shirt/top``); a name that two classes have matches neither. Where one side has
    numbers for names, these are places: of the classifier's outputs, or of the data set's classes where there are
    equally many. Names that are none of the classifier's are never taken for those at the same place. WordNet ids of
    ImageNet's 1,000 classes (n01440764) and their names stand for each other.
    """
    if not wanted or list(wanted) == list(classes):
        return Matched(list(range(len(wanted))))
    made_up = list(classes) == [str(number) for number in range(len(classes))] and not class_ids
    numbers = [int(name) for name in wanted] if all(re.fullmatch("[0-9]{1,9}", name) for name in wanted) else None
    if made_up and numbers is None and len(wanted) == len(classes) and not set(wanted) & set(classes):
        order = f"{wanted[0]!r} is taken for the first, {wanted[-1]!r} for the last"
        doubt = f"the classifier's outputs have numbers for names, so the data set's order is taken for theirs: {order}"
        return Matched(list(range(len(classes))), doubt=f"{doubt}; if that is wrong, name the classifier's classes")
    found = _by_name(wanted, classes, class_ids)
    by_number = numbers is not None and (
        made_up or (len(wanted) == len(classes) and not any(place is not None for place in found))
    )
    if numbers is not None and by_number and len(set(numbers)) == len(numbers) and max(numbers) < len(classes):
        doubt = ""
        if numbers != sorted(numbers):
            doubt = (
                f"the data set's classes are numbers, taken for the places of the classifier's outputs (class "
                f"{wanted[-1]!r} for output {numbers[-1]}); a net trained on folders in text order has another order: "
                "name its classes then"
            )
        return Matched(list(numbers), doubt=doubt)
    places = [place for place in found if place is not None]
    twice = [place for place, count in Counter(places).items() if count > 1]
    if twice:
        return Matched(found, (wanted[found.index(twice[0])], "shares the classifier's class with another one"))
    if None not in found:
        return Matched(found)
    missing = wanted[found.index(None)]
    several = [_plain(name) for name in classes].count(_plain(missing)) > 1
    return Matched(found, (missing, "is the name of several" if several else "is not one"))


def _by_name(wanted: Sequence[str], classes: Sequence[str], class_ids: Sequence[str] | None) -> list[int | None]:
    alias: dict[str, str] = {}
    if any(_WNID.fullmatch(name) for name in (*wanted, *classes)):
        class_ids, alias = class_ids or _imagenet_order(classes), _aliases()
    exact, plain, ids = _unique(classes), _unique([_plain(name) for name in classes]), _unique(class_ids or ())
    every = {_plain(name) for name in classes}
    parts = _unique([part for name in classes for part in _parts(name)])
    owner = {part: number for number, name in enumerate(classes) for part in _parts(name) if part in parts}

    def place(name: str) -> int | None:
        for table, key in ((exact, name), (plain, _plain(name)), (ids, name)):
            if key in table:
                return table[key]
        # The name is of several classes, and must not be found as a part of one of them.
        if _plain(name) in every:
            return None
        owners = {owner[part] for part in _parts(name) if part in owner}
        return owners.pop() if len(owners) == 1 else None

    places = [place(name) for name in wanted]
    if alias:
        others: Sequence[str | None] = _imagenet_order(wanted) or [_alias(name, alias) for name in wanted]
        places = [place(other) if at is None and other else at for at, other in zip(places, others, strict=True)]
    return places


def readable_names(classes: Sequence[str]) -> list[str]:
    """Classes by the names that people read, each unlike the others: ImageNet's for WordNet's ids, and no ``_``.

    An id before a name (``n02085936-Maltese_dog``) is left out; where that makes two alike, their numbers stand behind.
    """
    ids = any(_WNID.match(name) for name in classes)
    known = dict(imagenet_classes()) if ids else {}
    shorter = [_WNID_BEFORE.sub("", name) for name in classes]
    found = [known.get(name, " ".join(short.split("_")).strip()) for name, short in zip(classes, shorter, strict=True)]
    counts = Counter(found)
    return [
        name if name and counts[name] == 1 else f"{name} (class {number})".strip() for number, name in enumerate(found)
    ]


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """WordNet id and name of the 1,000 classes of ILSVRC 2012 (Russakovsky et al. 2015), in the order of their numbers.

    The numbers follow the ids, sorted; ``imagenet_wnids.txt`` lists them as the file names of the repository
    EliSchwartz/imagenet-sample-images do, which has a picture of each class. The names are those of torchvision's
    weights; without torchvision there are none.
    """
    try:
        from torchvision.models import AlexNet_Weights
    except ImportError:
        return ()
    text = importlib.resources.files("nndefense.models").joinpath("imagenet_wnids.txt").read_text(encoding="ascii")
    return tuple(zip(text.split(), AlexNet_Weights.IMAGENET1K_V1.meta["categories"], strict=True))


@functools.cache
def _aliases() -> dict[str, str]:
    """ImageNet's id -> name, name -> id, and plain name -> id where one class alone has it."""
    known = imagenet_classes()
    plain = _unique([_plain(name) for _, name in known])
    by_plain = {name: known[number][0] for name, number in plain.items()}
    return by_plain | {name: wnid for wnid, name in known} | dict(known)


def _alias(name: str, alias: Mapping[str, str]) -> str | None:
    """The id or name that stands for a name, or for one of the names that it lists."""
    if name in alias:
        return alias[name]
    found = {alias[part] for part in _parts(name) if part in alias}
    return found.pop() if len(found) == 1 else None


def _imagenet_order(classes: Sequence[str]) -> Sequence[str] | None:
    """The ids of classes that are ImageNet's 1,000 in their order, however they are named."""
    known = imagenet_classes()
    if len(classes) != _IMAGENET or not known:
        return None
    alike = sum(bool(_parts(name) & _parts(other)) for name, (_, other) in zip(classes, known, strict=True))
    return [wnid for wnid, _ in known] if alike >= _ALIKE * _IMAGENET else None


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _parts(name: str) -> set[str]:
    """The names that one name lists: ``T-shirt/top``, ``tench, Tinca tinca``."""
    return {part for part in map(_plain, re.split(r"[/,;|]", name)) if part}


def _unique(names: Sequence[str]) -> dict[str, int]:
    counts = Counter(names)
    return {name: number for number, name in enumerate(names) if counts[name] == 1}
