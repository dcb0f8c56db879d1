"""How reports write numbers, names and foreign text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

BLANK = "–"
_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_MEASURED = ("clean", "attacked", "worst")
_ACCURACIES = {"accuracy", "ci_low", "ci_high", *_MEASURED, *(f"bare_{name}" for name in _MEASURED)}


def escape(value: object) -> str:
    """``value`` as text that is safe in HTML, in an attribute and in XML; characters XML forbids become U+FFFD."""
    return html.escape(_NOT_PRINTABLE.sub("\ufffd", str(value)), quote=True)


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in [0, 1] as percent without the sign: ``0.1236`` is ``"12.4"``; None is a dash."""
    return BLANK if fraction is None else f"{100 * fraction:.{digits}f}"


def interval(low: float, high: float) -> str:
    """An interval of fractions in percent: ``"10.1–14.2"``."""
    return f"{percent(low)}–{percent(high)}"


def percent_in(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A fraction in percent with its interval, cut to what fractions can be: ``"97.37 [97.04, 97.66]"``."""
    return f"{percent(mean, digits)} [{percent(max(low, 0), digits)}, {percent(min(high, 1), digits)}]"


def points(mean: float, low: float, high: float) -> str:
    """A difference of fractions in percentage points with its interval, with signs."""
    return f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def p_text(p: float, least: float = 0.001) -> str:
    """A p-value; below ``least`` only that it is: ``"0.065"``, ``"< 0.001"``."""
    if p < least:
        return f"< {least:g}"
    return f"{p:.3f}" if least >= 0.001 else f"{p:.2g}"


def number(value: float) -> str:
    """A number as short as it can be read, with up to four significant digits: ``"0.2"``, ``"1.863"``, ``"1,437"``."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def rough(value: float) -> str:
    """A number with two digits that count, without an exponent: ``"0.45"``, ``"12"``, ``"1,600"``."""
    return f"{float(f'{value:.2g}'):,.10g}"


def count_text(value: float) -> str:
    """A count for an axis: ``"500"``, ``"2,000"``, ``"50k"``, ``"1.3M"``."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return number(value)


def plural(count: int, name: str) -> str:
    """A count with its noun: ``"1 step"``, ``"40 steps"``."""
    return f"{number(count)} {name}{'' if count == 1 else 's'}"


def date_text(created: str) -> str:
    """``2026-11-22T20:17:05+00:00`` as ``22 November 2026, 20:17``; anything else as it is."""
    try:
        moment = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return created
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def short(fingerprint: str) -> str:
    """The first twelve characters of a fingerprint; the last ones of anything longer that is not one, as of a path."""
    if all(letter in "0123456789abcdef" for letter in fingerprint.removeprefix("sha256:").lower()):
        return fingerprint.removeprefix("sha256:")[:12]
    return f"…{fingerprint[-20:]}" if len(fingerprint) > 24 else fingerprint


def norm_name(norm: str) -> str:
    """The field's name of a norm: ``"normalized-l2"`` is the normalised l2 of Dubey et al. (2019)."""
    names = {"normalized-l2": "normalised ℓ₂", "l2": "ℓ₂", "linf": "ℓ∞"}
    return names.get(norm, norm)


def budget(norm: str, eps: float | str) -> str:
    """A norm with a radius: ``"normalised ℓ₂ 0.06"``, ``"ℓ∞ 8/255"``."""
    return f"{norm_name(norm)} {eps if isinstance(eps, str) else number(eps)}"


def raw_budget(norm: str, eps_raw: float) -> str:
    """What a budget means for pixel values in [0, 1]: steps of 1/255 for l-infinity, else an absolute l2 radius."""
    return f"{number(round(255 * eps_raw, 2))}/255" if norm == "linf" else f"{eps_raw:.3g}"


def weighting_name(weighting: str) -> str:
    """``"cbw-d"`` is the paper's CBW-D; other names are words."""
    return weighting.upper() if weighting.startswith("cbw") else weighting


def rule_words(rule: Mapping[str, Any]) -> list[str]:
    """How neighbours decide, in a few words each: ``["k = 50", "CBW-D"]``, and whatever is beyond that.

    Args:
        rule: values of :class:`nndefense.database.Rule` by name; what is missing is not spoken of.
    """
    found = [] if rule.get("k") is None else [f"k = {rule['k']}"]
    if rule.get("weighting"):
        found.append(weighting_name(str(rule["weighting"])))
    if rule.get("weighting") == "cbw-d":
        usual = {"power": ("P", 3), "terms": ("M", 20)}
        found += [f"{sign} = {rule[name]:g}" for name, (sign, value) in usual.items() if rule.get(name, value) != value]
    found += ["votes of true labels"] if rule.get("votes") == "labels" else []
    if rule.get("temperature") is not None:
        found.append(f"kernel exp(-d²/{rule['temperature']:.4g})")
    if rule.get("alpha"):
        found.append(f"{100 * rule['alpha']:.3g} % of the classifier's own posterior")
    return found


def words(key: str) -> str:
    """A key of the results as a heading."""
    names = {
        "defense": "defence",
        "threat_model": "threat model",
        "eps": "ε",
        "eps_raw": "ε, raw",
        "ci_low": "95 % low",
        "ci_high": "95 % high",
        "database_rows": "database images",
        "bare_clean": "clean without defence",
        "bare_attacked": "attacked without defence",
        "bare_worst": "worst without defence",
    }
    return names.get(key, key.replace("_", " "))


def unit(key: str) -> str:
    """The unit of a column, where its heading needs one."""
    return "s" if key.endswith("seconds") else ""


def value_text(key: str, value: object) -> str:
    """One value of a table as text."""
    if value is None or value == "":
        return BLANK
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return weighting_name(str(value)) if key == "weighting" else str(value)
    if key in _ACCURACIES:
        return percent(value, 2 if key in ("accuracy", "ci_low", "ci_high") else 1)
    if key == "seed":
        return str(value)
    return f"{value:.2f}" if key.endswith("seconds") else number(value)
