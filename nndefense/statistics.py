"""Intervals for rates, the paired test of two of them, and the threshold that a rate of rejection asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nndefense.errors import InputError

# The 97.5 % point of the standard normal distribution, for two-sided 95 % intervals.
Z95 = 1.959963984540054


def wilson_interval(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson, JASA 1927), ``z`` standard deviations wide: 95 %.

    The successes need not be a whole number. Unlike the normal approximation it stays in [0, 1] and is not empty at
    0 or n successes.

    Raises:
        InputError: n < 1, or successes not between 0 and n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"an interval needs 0 <= successes <= n and n >= 1, but was given {successes} of {n}")
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the bound is exact, but rounding would leave 1e-17 of it.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test: are two classifiers equally often right on the same images?

    Under that hypothesis each image that one of them alone gets right is a fair coin (McNemar, Psychometrika 1947).

    Args:
        only_first: images that the first alone gets right.
        only_second: images that the second alone gets right.

    Raises:
        InputError: a count below 0.
    """
    if min(only_first, only_second) < 0:
        raise InputError(f"counts of images must be at least 0, but are {only_first} and {only_second}")
    n, fewer = only_first + only_second, min(only_first, only_second)
    # Whole numbers throughout: neither the binomial coefficients nor the powers of two fit a float.
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**n))


def conformal_threshold(values: Sequence[float], rate: float) -> float | None:
    """The value beyond which to reject, so that at most ``rate`` of what comes from where the values do is rejected.

    It is the ceil((n + 1)(1 - rate))-th smallest of the n values, ties included, in finite samples and for any
    distribution (Vovk, Gammerman and Shafer 2005; Lei et al. 2018, section 2.2). None where n < 1 / rate - 1, when even
    the largest of them would be rejected too often.

    Args:
        values: n of them, ascending.
        rate: above 0 and below 1.
    """
    # Rounded first: 0.05 is not exactly a twentieth, and 100 * 0.95 must be 95.
    place = math.ceil(round((len(values) + 1) * (1 - rate), 9))
    return None if place > len(values) else values[max(place, 1) - 1]


def values_needed(rate: float) -> int:
    """How many values :func:`conformal_threshold` needs for a rate: 99 for 0.01."""
    return max(math.ceil(round(1 / rate, 9)) - 1, 1)
