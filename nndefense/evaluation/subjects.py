"""What is compared: the bare classifier, the defence, and its variants."""

from __future__ import annotations

import numpy as np

from nndefense.defenses import NearestNeighborDefense
from nndefense.evaluation.evaluate import Subject
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.models import Classifier


def bare_subject(classifier: Classifier) -> Subject:
    """The classifier without any defence."""
    return Subject(BARE, classifier, "none")


def subjects_of(defense: NearestNeighborDefense, *, sizes: bool = True, seed: int = 0) -> list[Subject]:
    """The bare classifier, the defence, its other weightings and, with ``sizes``, smaller databases."""
    found = [bare_subject(defense.classifier), _subject(DEFENDED, "calibrated", defense)]
    return found + _weightings(defense) + (_sizes(defense, seed) if sizes else [])


def layer_subject(defense: NearestNeighborDefense) -> Subject:
    """A defence on another layer, to be compared."""
    feature = defense.database.feature
    return _subject(f"{DEFENDED} ({feature.layer}, {feature.pooling})", "layer", defense)


def _weightings(defense: NearestNeighborDefense) -> list[Subject]:
    """The same defence with the other two weightings."""
    return [
        _subject(
            f"{DEFENDED} ({weighting})",
            "weighting",
            NearestNeighborDefense(defense.classifier, defense.database, defense.k, weighting),
        )
        for weighting in ("uniform", "cbw-e", "cbw-d")
        if weighting != defense.weighting
    ]


def _sizes(defense: NearestNeighborDefense, seed: int, sizes: int = 4) -> list[Subject]:
    """The same defence on smaller databases, each a random third of the next; K is lowered where it must be."""
    database, order = defense.database, np.random.default_rng(seed).permutation(len(defense.database))
    counts = [len(database) // 3**power for power in range(sizes, 0, -1)]
    return [
        _subject(
            f"{DEFENDED} (rows={count})",
            "rows",
            NearestNeighborDefense(
                defense.classifier, database.subset(order[:count]), min(defense.k, count), defense.weighting
            ),
        )
        for count in counts
        if count >= 10
    ]


def _subject(name: str, variant: str, defense: NearestNeighborDefense) -> Subject:
    return Subject(
        name,
        defense,
        variant,
        database=defense.database.fingerprint,
        database_rows=len(defense.database),
        every_eps=variant == "calibrated",
    )
