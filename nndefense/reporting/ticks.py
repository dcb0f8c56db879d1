"""Round numbers for the axes of a figure."""

from __future__ import annotations

import math


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, evenly spaced by 1, 2 or 5 times a power of ten.

    Args:
        low, high: ends of the axis, low < high, finite.
        count: how many intervals to aim at (1 or more); there are never more than ``count`` of them.

    Returns:
        ascending multiples of the spacing inside [low, high].
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high and count >= 1):
        raise ValueError(f"an axis needs finite ends in ascending order, not {low} and {high}")
    rough = (high - low) / count
    exponent = math.floor(math.log10(rough))
    # The exponent may round down, hence 10 and 20 beside 1, 2 and 5.
    factor = next(factor for factor in (1, 2, 5, 10, 20) if factor * 10.0**exponent >= rough * (1 - 1e-9))
    step = factor * 10.0**exponent
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    # Rounding to the digits of the spacing turns 3 * 0.1 into 0.3.
    digits = max(0, -math.floor(math.log10(step)))
    return [min(max(round(index * step, digits), low), high) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers on a logarithmic axis: 1, 2, 5 times powers of ten, or only powers of ten on a long axis.

    Args:
        low, high: ends of the axis, 0 < low < high, finite.
        count: the most ticks that have room.

    Returns:
        ascending numbers inside [low, high]; may be empty on an axis shorter than a step.
    """
    if not (math.isfinite(high) and 0 < low < high and count >= 1):
        raise ValueError(f"a logarithmic axis needs positive ends in ascending order, not {low} and {high}")
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors, stride in [((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6), ((1,), 12)]:
        ticks = [factor * 10.0**exponent for exponent in exponents if exponent % stride == 0 for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= count:
            return ticks
    return ticks[:: math.ceil(len(ticks) / count)]
