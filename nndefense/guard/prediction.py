"""What the guard says of one image: its shape is declared here, once, for Python and for JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

S = TypeVar("S", bound="Said")


@dataclass(frozen=True)
class InJSON:
    """How a field is written in JSON, and what may be expected of it there.

    The digits are enough to see any difference that means something, and few enough to read.

    Attributes:
        name: its name there, where that is another one; empty for a field that is left out.
        least, most: its range, ends included.
        decimals: how many digits behind the point are kept.
        digits: how many are kept in all, instead.
        text: what it is, for the description of an API.
    """

    name: str | None = None
    least: float | None = None
    most: float | None = None
    decimals: int = 6
    digits: int | None = None
    text: str | None = None


Top = tuple[tuple[str, float], ...]
_Name = Annotated[str, InJSON("class")]
_Number = Annotated[int, InJSON(least=0)]
_Probability = Annotated[float, InJSON(least=0, most=1)]


@cache
def fields_in_json(shape: Any) -> tuple[tuple[str, Any, InJSON], ...]:
    """Of every field that JSON has, in its order: the name in Python, the type, and how it is written."""
    hints = get_type_hints(shape, include_extras=True).items()
    found = (
        (name, *(get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, InJSON()))) for name, hint in hints
    )
    return tuple((name, kind, how) for name, kind, how in found if how.name != "")


class Said:
    """A part of what is said of an image, and the same as plain JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded: probabilities and weights to 6 decimals, distances to 7 digits, percentiles to 2
        decimals. The keys are the fields, but ``class`` for ``class_name``; ``top`` is a list of ``class`` and
        ``probability``; the probabilities of all classes are left out.
        """
        shape: Any = type(self)
        return {key: write(getattr(self, name)) for key, name, write in _writers(shape)}

    @classmethod
    def from_json(cls: type[S], value: dict[str, Any]) -> S:
        """The same again, with the digits that JSON has and without the probabilities of all classes.

        Raises:
            KeyError: a value is missing.
        """
        shape: Any = cls
        return cls(**{name: _read(value[how.name or name], kind) for name, kind, how in fields_in_json(shape)})


@dataclass(frozen=True, kw_only=True)
class Opinion(Said):
    """What a classifier says of an image.

    Attributes:
        class_name: the most probable class.
        class_index: its number.
        probability: its probability.
        top: the most probable classes with their probabilities, best first.
        probabilities: C floats; none where it was read from JSON.
    """

    class_name: _Name
    class_index: _Number
    probability: _Probability
    top: Top
    probabilities: Annotated[tuple[float, ...], InJSON("")] = ()


@dataclass(frozen=True, kw_only=True)
class Neighbor(Said):
    """One row of the database on which a prediction rests.

    Attributes:
        id: the row's id.
        row: its number in the database.
        distance: Euclidean distance between its feature vector and the image's.
        weight: its share of the K neighbours' total weight, 0 to 1.
        class_name: the class that the classifier gives it.
        class_index: the number of that class.
        probability: the classifier's probability of that class.
        label: the name of its own class, or None where that is unknown.
        top: the most probable classes of its posterior with their probabilities, best first.
    """

    id: str
    row: _Number
    distance: Annotated[float, InJSON(least=0, digits=7)]
    weight: Annotated[float, InJSON(least=0, most=1, text="Its share of all K neighbours' weight.")]
    class_name: _Name
    class_index: _Number
    probability: _Probability
    label: Annotated[str | None, InJSON(text="Its own class; null where unknown.")]
    top: Top


@dataclass(frozen=True, kw_only=True)
class Defended(Opinion):
    """The defence's prediction of one image, and what it rests on: the most probable class (also where the guard
    abstains) by the weighted mean of the neighbours' posteriors.

    Attributes:
        bare: what the classifier alone says.
        agree: whether both name the same class.
        distance: how far the image lies from the database's images (see :mod:`nndefense.guard.percentile`).
        percentile: how many per cent of the clean calibration images lie nearer, 0 to 100; None without calibration.
        abstained: whether ``distance`` is beyond the threshold of the chosen false-rejection rate.
        neighbors: the nearest rows, nearest first; all K or as many as were asked for.
    """

    bare: Annotated[Opinion, InJSON(text="What the classifier alone says.")]
    agree: Annotated[bool, InJSON(text="Whether both name the same class.")]
    distance: Annotated[float, InJSON(least=0, digits=7, text="How far the image lies from those of the database.")]
    percentile: Annotated[
        float | None,
        InJSON(
            least=0,
            most=100,
            decimals=2,
            text="How many per cent of clean calibration images lie nearer; null without calibration.",
        ),
    ]
    abstained: Annotated[bool, InJSON(text="Whether it lies beyond the chosen false-rejection rate.")]
    neighbors: tuple[Neighbor, ...]

    def limited(self, top: int, neighbors: int) -> Defended:
        """The same with at most ``top`` classes in each list and so many ``neighbors``.

        Equal to what a prediction with these numbers gives, so that callers who want different ones can share a batch.
        """
        return replace(
            self,
            top=self.top[:top],
            bare=replace(self.bare, top=self.bare.top[:top]),
            neighbors=tuple(replace(n, top=n.top[:top]) for n in self.neighbors[:neighbors]),
        )


@cache
def _writers(shape: Any) -> tuple[tuple[str, str, Callable[[Any], Any]], ...]:
    """Of every field that JSON has: its name there, its name here, and what makes the one value of the other."""
    return tuple((how.name or name, name, _writer(kind, how)) for name, kind, how in fields_in_json(shape))


def _writer(kind: Any, how: InJSON) -> Callable[[Any], Any]:
    decimals, form = how.decimals, f".{how.digits}g"
    if kind == Top:
        return lambda top: [{"class": name, "probability": round(value, decimals)} for name, value in top]
    if kind == tuple[Neighbor, ...]:
        return lambda neighbors: [one.to_json() for one in neighbors]
    if kind is Opinion:
        return Opinion.to_json
    if kind is float:
        return (
            (lambda value: round(value, decimals)) if how.digits is None else (lambda value: float(f"{value:{form}}"))
        )
    if kind == float | None:
        return lambda value: None if value is None else round(value, decimals)
    return lambda value: value


def _read(value: Any, kind: Any) -> Any:
    if kind == Top:
        return tuple((one["class"], one["probability"]) for one in value)
    if kind == tuple[Neighbor, ...]:
        return tuple(map(Neighbor.from_json, value))
    return Opinion.from_json(value) if kind is Opinion else value
