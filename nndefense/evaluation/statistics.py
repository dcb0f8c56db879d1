"""Intervals for accuracies."""

from __future__ import annotations

import math

from nndefense.errors import InputError

# The 97.5 % point of the standard normal distribution, for two-sided 95 % intervals.
Z95 = 1.959963984540054


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson, JASA 1927), 95 % two-sided by default.

    Unlike the normal approximation it stays in [0, 1] and is not empty at 0 or n successes.

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
