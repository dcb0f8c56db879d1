"""How the report writes numbers, names and foreign text."""

from __future__ import annotations

import html
import math
import re
from datetime import datetime

from nndefense.evaluation.report.records import Results, records_of

_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_ACCURACIES = {"accuracy", "ci_low", "ci_high", "clean", "attacked", "bare_clean", "bare_attacked"}


def escape(value: object) -> str:
    """``value`` as text that is safe in HTML, in an attribute and in XML; characters XML forbids become U+FFFD."""
    return html.escape(_NOT_PRINTABLE.sub("\ufffd", str(value)), quote=True)


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in [0, 1] as percent without the sign: ``0.1236`` is ``"12.4"``."""
    return f"{100 * fraction:.{digits}f}"


def number(value: float) -> str:
    """A number as short as it can be read, with up to four significant digits: ``"0.2"``, ``"1.863"``, ``"1,437"``."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


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


def attack_name(attack: str) -> str:
    """An attack as papers write it: ``"pgd"`` is ``"PGD"``."""
    names = {
        "square": "Square",
        "autoattack": "AutoAttack",
        "deepfool": "DeepFool",
        "cw": "C&W",
        "drift": "feature drift",
    }
    return names.get(attack) or (attack.upper() if len(attack.split("-")[0]) <= 4 else attack.replace("-", " "))


def raw_budget(norm: str, eps_raw: float) -> str:
    """What a budget means for pixel values in [0, 1]: steps of 1/255 for l-infinity, else an absolute l2 radius."""
    return f"{number(round(255 * eps_raw, 2))}/255" if norm == "linf" else f"{eps_raw:.3g}"


def weighting_name(weighting: str) -> str:
    """``"cbw-d"`` is the paper's CBW-D; other names are words."""
    return weighting.upper() if weighting.startswith("cbw") else weighting


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
    }
    return names.get(key, key.replace("_", " "))


def unit(key: str) -> str:
    """The unit of a column as HTML, where its heading needs one."""
    return " <small>s</small>" if key.endswith("seconds") else ""


def value_text(key: str, value: object) -> str:
    """One value of a table as text."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return weighting_name(str(value)) if key == "weighting" else str(value)
    if key in _ACCURACIES:
        return percent(value, 2 if key in ("accuracy", "ci_low", "ci_high") else 1)
    if key == "seed":
        return str(value)
    return f"{value:.2f}" if key.endswith("seconds") else number(value)


def settings_text(results: Results) -> str:
    """The settings of the calibrated defence in a few words: layer, pooling, k, weighting, database size."""
    database, defense = results.get("database") or {}, results.get("defense") or {}
    parts = [str(database[key]) for key in ("layer", "pooling") if database.get(key)]
    if defense.get("k") is not None:
        parts.append(f"k = {defense['k']}")
    if defense.get("weighting"):
        parts.append(weighting_name(str(defense["weighting"])))
    if database.get("rows") is not None:
        parts.append(f"{number(database['rows'])} images")
    return ", ".join(parts)


def headline_raw(results: Results) -> str:
    """The headline budget in raw units, in brackets, where a record holds it."""
    headline = results["headline"]
    for record in records_of(results):
        same = record["norm"] == headline["norm"] and math.isclose(record["eps"], headline["eps"], rel_tol=1e-6)
        if same and record.get("eps_raw") and record["threat_model"] != "clean":
            raw = raw_budget(str(headline["norm"]), float(record["eps_raw"]))
            if headline["norm"] == "normalized-l2":
                return f" (on average an ℓ₂ radius of {raw}, pixels in [0, 1])"
            return f" ({raw} of the pixel range)" if headline["norm"] == "linf" else " (pixels in [0, 1])"
    return ""
