"""Which records of ``results.json`` a number of the report comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nndefense.evaluation.ladder import WORST, bits, from_hex
from nndefense.reporting import Cell
from nndefense.reporting.wording import interval, number, percent, raw_budget, rule_words

Results = Mapping[str, Any]  # results.json as a dict
Record = Mapping[str, Any]  # one of its records


def records_of(results: Results) -> list[Record]:
    """The records of the report's data set, so that numbers from two data sets never share a column."""
    records: list[Record] = list(results["records"])
    name = results["dataset"]["name"]
    if len({record.get("dataset") for record in records}) > 1:
        records = [record for record in records if record.get("dataset") == name] or records
    return records


def other_defenses(results: Results) -> list[str]:
    """The defences that were measured beside the one over the database and its variants."""
    return list(dict.fromkeys(str(r["defense"]) for r in records_of(results) if r.get("variant") == "defense"))


def lowest(records: Sequence[Record]) -> Record:
    """The record of lowest accuracy (of one or more records): of repeated measurements the worst case counts."""
    return min(records, key=lambda record: float(record["accuracy"]))


def under_attack(results: Results, defense: str, threat_model: str, *, any_attack: bool = False) -> list[Record]:
    """Every record of one defence and threat model under the headline norm.

    For ``"gray"`` and ``"black"`` only those of the headline attack, unless ``any_attack`` is set.

    Returns:
        the records, in the order of their budget; records of one budget keep the order in which they were measured.
    """
    headline = results["headline"]
    free = any_attack or threat_model not in ("gray", "black")
    found = [
        record
        for record in records_of(results)
        if record["defense"] == defense
        and record["threat_model"] == threat_model
        and (threat_model == "clean" or record["norm"] == headline["norm"])
        and (free or record["attack"] == headline["attack"])
    ]
    return sorted(found, key=lambda record: float(record["eps"]))


def at_headline(results: Results, defense: str, threat_model: str, *, any_attack: bool = False) -> Record | None:
    """The record for a cell of a table: clean, or the (headline) attack at the headline budget; the lowest counts."""
    found = under_attack(results, defense, threat_model, any_attack=any_attack)
    if threat_model != "clean":
        eps = results["headline"]["eps"]
        found = [record for record in found if math.isclose(record["eps"], eps, rel_tol=1e-6)]
    return lowest(found) if found else None


def accuracy_cell(record: Record | None, absent: str) -> Cell:
    """The accuracy of a record with its interval; without one, why not."""
    if record is None:
        return Cell(reason=absent)
    drawn = record.get("draw_seeds") and record["threat_model"] != WORST
    most = f"right on most draws: {percent(float(bits(record).mean()))}" if drawn else ""
    return Cell(accuracy_text(record), interval(record["ci_low"], record["ci_high"]), most)


def accuracy_text(record: Record) -> str:
    """The accuracy of a record in %; where images are open, from that of the certified ones up to it."""
    text = percent(record["accuracy"])
    if not open_images(record):
        return text
    return f"{percent(from_hex(record['certified'], record['n']).mean())}–{text}"


def open_images(record: Record) -> int:
    """How many images of an exact record are neither proven to stand nor known to fall."""
    if not record.get("certified"):
        return 0
    right, proven = (from_hex(record[name], record["n"]) for name in ("correct", "certified"))
    return int((right & ~proven).sum())


def settings_text(results: Results) -> str:
    """The settings of the calibrated defence in a few words: layer, pooling, k, weighting, database size."""
    database, defense = results.get("database") or {}, results.get("defense") or {}
    parts = [str(database[key]) for key in ("layer", "pooling") if database.get(key)]
    parts += rule_words(defense)
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
