"""Means over seeds with their intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy import stats

from nndefense.evaluation.ladder import from_hex
from nndefense.statistics import mcnemar_p

Results = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds, or of one.

    Attributes:
        mean: over the seeds.
        low, high: 95 % interval: Student's over seeds, or Wilson's over the images where there is one seed.
        values: one a seed.
        over: ``seeds`` or ``images``.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    over: str


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of n >= 2 values by Student's t with n - 1 degrees of freedom."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def subjects_of(results: Results) -> tuple[str, ...]:
    """What was measured, by name: methods, and each with the forms that its nets were used in."""
    return tuple(dict.fromkeys(found["method"] for found in results["measurements"]))


def accuracy_of(results: Results, method: str, labels: int, threat: str) -> Spread | None:
    """A method's accuracy under a threat; None where it was not measured."""
    return _share(_measured(results, method, labels, threat, "robust"))


def certified_of(results: Results, method: str, labels: int, threat: str) -> Spread | None:
    """The share of images that is proven to stand; None where no proof was tried."""
    return _share(_measured(results, method, labels, threat, "certified"))


def gray_of(results: Results, method: str, labels: int, threat: str) -> Spread | None:
    """A form's accuracy on the images that are attacked on its net alone; None where it was not measured."""
    return _share(_measured(results, method, labels, threat, "gray"))


def clean_of(results: Results, method: str, labels: int, threat: str) -> Spread | None:
    """Clean accuracy of the nets that a method made against a threat, or of its only nets where it does not attack."""
    return _share(_measured(results, method, labels, threat, "standard"))


def confidence_of(results: Results, method: str, labels: int, threat: str) -> float | None:
    """A method's mean confidence in the wrong class, over its attacked images that are wrong and its seeds."""
    found = [one.get("confidence_wrong") for one in _measured(results, method, labels, threat, "robust")]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def differences(results: Results) -> list[dict[str, Any]]:
    """The first method less the second of every pair in ``results``, paired by seed and image.

    Each with threat and labels, ``standard`` and ``robust`` as :class:`Spread` of the difference, and ``mcnemar``: for
    each seed the exact p-value of the test whether both are right equally often on the same images.
    """
    recipe = results["recipe"]
    threats = [threat["name"] for threat in results["threats"]]
    labels = sorted({run["labels"] for run in results["runs"]})
    rows = []
    for (first, second), count, threat in product(recipe["compare"], labels, threats):
        row: dict[str, Any] = {"first": first, "second": second, "labels": count, "threat": threat}
        for kind in ("standard", "robust"):
            pairs = _pairs(results, first, second, count, threat, kind)
            if not pairs:
                break
            values = [one["accuracy"] - other["accuracy"] for one, other in pairs]
            bits = [(from_hex(a["outcomes"], a["n"]), from_hex(b["outcomes"], b["n"])) for a, b in pairs]
            row[kind] = asdict(_spread(values, _paired_interval(*bits[0])))
            row[f"{kind}_mcnemar"] = [mcnemar_p(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in bits]
        else:
            rows.append(row)
    return rows


def _paired_interval(first: Any, second: Any) -> tuple[float, float]:
    """The 95 % normal interval of the difference of two shares on the same n images."""
    change = first.astype(np.float64) - second
    half = 1.959963984540054 * float(change.std()) / math.sqrt(len(change))
    return float(change.mean()) - half, float(change.mean()) + half


def _pairs(
    results: Results, first: str, second: str, labels: int, threat: str, kind: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    one, other = (
        {found["seed"]: found for found in _measured(results, method, labels, threat, kind)}
        for method in (first, second)
    )
    return [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]


def _measured(results: Results, method: str, labels: int, threat: str, kind: str) -> list[dict[str, Any]]:
    """The clean measurements of a method for a threat (``standard``), or those under it (``robust``)."""
    return [
        found
        for found in results["measurements"]
        if (found["method"], found["labels"]) == (method, labels)
        and (
            (found["kind"] == "clean" and found["trained_for"] in (None, threat))
            if kind == "standard"
            else (found["kind"] == kind and found["threat"] == threat)
        )
    ]


def _share(found: list[dict[str, Any]]) -> Spread | None:
    values = [one["accuracy"] for one in sorted(found, key=lambda one: one["seed"])]
    return _spread(values, (found[0]["ci_low"], found[0]["ci_high"])) if values else None


def _spread(values: Sequence[float], alone: tuple[float, float]) -> Spread:
    """A figure of one seed or more; ``alone`` is its interval over the images, where there is one seed."""
    several = len(values) > 1
    low, high = student_interval(values) if several else alone
    return Spread(float(np.mean(values)), low, high, tuple(values), "seeds" if several else "images")
