"""From neighbours to predictions: the weighted mean of their posteriors, and everything that explains it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nndefense.database import ImageDatabase, Rule
from nndefense.guard.percentile import Percentile
from nndefense.guard.prediction import Defended, Neighbor, Opinion, Top

Floats = NDArray[np.float64]


class Verdicts:
    """Makes predictions from the rows that were found, in float64 and image by image the same in every batch."""

    def __init__(self, database: ImageDatabase, rule: Rule) -> None:
        self.database, self.rule, self.classes = database, rule, database.classes

    def __call__(
        self,
        bare: NDArray[np.float32],
        rows: NDArray[np.int64],
        distances: Floats,
        top: int,
        shown: int,
        calibration: Percentile | None,
        threshold: float | None,
    ) -> list[Defended]:
        """One prediction for each of N images.

        Args:
            bare: N x C, the classifier's probabilities.
            rows: N x K, the neighbours, nearest first.
            distances: N x K.
            top: classes in each list.
            shown: neighbours in each prediction, at most K.
            calibration: what gives the percentiles, or None.
            threshold: the distance beyond which to abstain, or None.
        """
        # In float64 and in order, so that no digit depends on the other images.
        votes, weights = (part.double() for part in self.rule.voters(self.database, rows))
        away, own = torch.from_numpy(distances), bare.astype(np.float64)
        answer = self.rule.probabilities(votes, weights, away, torch.from_numpy(own), in_order=True)
        probabilities: Floats = answer.numpy()
        shares: Floats = self.rule.shares(weights, away, in_order=True).numpy()
        stored = votes if self.rule.votes == "posteriors" else self.database.posteriors(rows).double()
        posteriors: Floats = stored.numpy()
        neighbors = self._neighbors(rows, distances, shares, posteriors, top, shown)
        tops, bare_tops = self._tops(probabilities, top), self._tops(own, top)
        winners, bare_winners = probabilities.argmax(1).tolist(), own.argmax(1).tolist()
        nearest = distances[:, 0].tolist()
        return [
            Defended(
                class_name=self.classes[winner],
                class_index=winner,
                probability=values[winner],
                probabilities=tuple(values),
                top=tops[i],
                neighbors=tuple(neighbors[i * shown : (i + 1) * shown]),
                bare=Opinion(
                    class_name=self.classes[bare_winner],
                    class_index=bare_winner,
                    probability=bare_values[bare_winner],
                    probabilities=tuple(bare_values),
                    top=bare_tops[i],
                ),
                agree=winner == bare_winner,
                distance=nearest[i],
                percentile=None if calibration is None else calibration.of(nearest[i]),
                abstained=threshold is not None and nearest[i] > threshold,
            )
            for i, (winner, values, bare_winner, bare_values) in enumerate(
                zip(winners, probabilities.tolist(), bare_winners, own.tolist(), strict=True)
            )
        ]

    def _neighbors(
        self,
        rows: NDArray[np.int64],
        distances: Floats,
        shares: Floats,
        posteriors: Floats,
        top: int,
        shown: int,
    ) -> list[Neighbor]:
        """The first ``shown`` neighbours of each image, one image after another."""
        if not shown:
            return []
        rows = rows[:, :shown].ravel()
        posteriors = posteriors[:, :shown].reshape(len(rows), -1)
        winners = posteriors.argmax(1)
        columns: list[list[Any]] = [
            self.database.ids(rows),
            rows.tolist(),
            distances[:, :shown].ravel().tolist(),
            shares[:, :shown].ravel().tolist(),
            winners.tolist(),
            posteriors[np.arange(len(rows)), winners].tolist(),
            self.database.labels(rows).tolist(),
            self._tops(posteriors, top),
        ]
        return [
            Neighbor(
                id=item,
                row=row,
                distance=distance,
                weight=weight,
                class_name=self.classes[winner],
                class_index=winner,
                probability=probability,
                label=self.classes[label] if label >= 0 else None,
                top=best,
            )
            for item, row, distance, weight, winner, probability, label, best in zip(*columns, strict=True)
        ]

    def _tops(self, probabilities: Floats, top: int) -> list[Top]:
        """The most probable classes of each of M rows, best first; of equally probable ones the first in order."""
        top = min(top, probabilities.shape[1])
        places = _first(probabilities, top)
        values = np.take_along_axis(probabilities, places, 1)
        name = self.classes.__getitem__
        return [
            tuple(zip(map(name, line), numbers, strict=True))
            for line, numbers in zip(places.tolist(), values.tolist(), strict=True)
        ]


def _first(values: Floats, count: int) -> NDArray[np.int64]:
    """The places of the ``count`` largest values of each row, largest first; of equal ones the first in order."""
    if 4 * count >= values.shape[1]:
        return np.argsort(-values, axis=1, kind="stable")[:, :count]
    places = np.sort(np.argpartition(-values, count - 1, axis=1)[:, :count], axis=1)
    chosen = np.take_along_axis(values, places, 1)
    places = np.take_along_axis(places, np.argsort(-chosen, axis=1, kind="stable"), 1)
    # Of values that equal the last chosen one, a partition may have taken any.
    last = chosen.min(1, keepdims=True)
    tied = np.flatnonzero((values == last).sum(1) != (chosen == last).sum(1))
    places[tied] = np.argsort(-values[tied], axis=1, kind="stable")[:, :count]
    return places
