"""What the guard says of one image, and the same as plain JSON values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Top = tuple[tuple[str, float], ...]

# Digits that are kept in JSON: enough to see any difference that means something, and few enough to read.
_PROBABILITY_DECIMALS = 6
_DISTANCE_DIGITS = 7
_PERCENTILE_DECIMALS = 2


@dataclass(frozen=True)
class Opinion:
    """What the bare classifier says of an image.

    Attributes:
        class_name: the most probable class.
        class_index: its number.
        probabilities: C floats.
        top: the most probable classes with their probabilities, best first.
    """

    class_name: str
    class_index: int
    probabilities: tuple[float, ...]
    top: Top

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``class``, ``class_index``, ``probability`` and ``top``."""
        return _opinion(self)


@dataclass(frozen=True)
class Neighbor:
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
    row: int
    distance: float
    weight: float
    class_name: str
    class_index: int
    probability: float
    label: str | None
    top: Top

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``id``, ``row``, ``distance``, ``weight``, ``class``, ``class_index``, ``probability``,
        ``label`` and ``top``.
        """
        return {
            "id": self.id,
            "row": self.row,
            "distance": _distance(self.distance),
            "weight": _probability(self.weight),
            "class": self.class_name,
            "class_index": self.class_index,
            "probability": _probability(self.probability),
            "label": self.label,
            "top": _top(self.top),
        }


@dataclass(frozen=True)
class Defended:
    """The defence's prediction of one image, and what it rests on.

    Attributes:
        class_name: the most probable class, also where the guard abstains.
        class_index: its number.
        probabilities: C floats, the weighted mean of the neighbours' posteriors.
        top: the most probable classes with their probabilities, best first.
        neighbors: the nearest rows, nearest first; all K or as many as were asked for.
        bare: what the classifier alone says.
        agree: whether both name the same class.
        distance: how far the image lies from the database's images (see :mod:`nndefense.guard.percentile`).
        percentile: how many per cent of the clean calibration images lie nearer, 0 to 100; None without calibration.
        abstained: whether ``distance`` is beyond the threshold of the chosen false-rejection rate.
    """

    class_name: str
    class_index: int
    probabilities: tuple[float, ...]
    top: Top
    neighbors: tuple[Neighbor, ...]
    bare: Opinion
    agree: bool
    distance: float
    percentile: float | None
    abstained: bool

    def limited(self, top: int, neighbors: int) -> Defended:
        """The same with at most so many classes in each list and so many neighbours.

        Equal to what a prediction with these numbers gives, so that requests of different ones can share a batch.
        """
        return replace(
            self,
            top=self.top[:top],
            bare=replace(self.bare, top=self.bare.top[:top]),
            neighbors=tuple(replace(n, top=n.top[:top]) for n in self.neighbors[:neighbors]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded: probabilities and weights to 6 decimals, distances to 7 digits, percentiles to 2
        decimals.

        Keys: ``class``, ``class_index``, ``probability``, ``top`` (each ``class`` and ``probability``), ``bare`` (the
        same four), ``agree``, ``distance``, ``percentile`` (null without calibration), ``abstained`` and
        ``neighbors`` (see :meth:`Neighbor.to_json`).
        """
        return {
            **_opinion(self),
            "bare": self.bare.to_json(),
            "agree": self.agree,
            "distance": _distance(self.distance),
            "percentile": None if self.percentile is None else round(self.percentile, _PERCENTILE_DECIMALS),
            "abstained": self.abstained,
            "neighbors": [neighbor.to_json() for neighbor in self.neighbors],
        }


def _opinion(said: Opinion | Defended) -> dict[str, Any]:
    return {
        "class": said.class_name,
        "class_index": said.class_index,
        "probability": _probability(said.probabilities[said.class_index]),
        "top": _top(said.top),
    }


def _top(top: Top) -> list[dict[str, Any]]:
    return [{"class": name, "probability": _probability(value)} for name, value in top]


def _probability(value: float) -> float:
    return round(value, _PROBABILITY_DECIMALS)


def _distance(value: float) -> float:
    return float(f"{value:.{_DISTANCE_DIGITS}g}")
