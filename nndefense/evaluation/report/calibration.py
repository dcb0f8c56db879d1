"""The section on calibration: the candidates, their accuracies, and the chosen one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.report.records import Results, settings_text
from nndefense.reporting import Cell, Table, folded, section
from nndefense.reporting.wording import escape, norm_name, number, percent, plural, unit, value_text, words

SHOWN_CANDIDATES = 12
_TITLE = "How the settings were chosen"


def calibration_section(results: Results) -> str:
    """How the settings were chosen; without a calibration, that they were given."""
    calibration = results.get("calibration")
    if not calibration:
        given = (
            "They were given, not calibrated in this run: nothing here says that they are good ones. "
            f"They are {settings_text(results) or 'not recorded'}."
        )
        return section(_TITLE, f"<p>{escape(given)}</p>", "calibration")
    chosen = calibration["chosen"]
    table: list[Mapping[str, Any]] = list(calibration.get("table") or [chosen])
    if not any(_same_candidate(row, chosen) for row in table):
        table.insert(0, chosen)
    table.sort(key=lambda row: not _same_candidate(row, chosen))
    keys = ["layer", "pooling", "k", "weighting", "dimension", "clean", "attacked"]
    extra = [key for key in dict.fromkeys(key for row in table for key in row) if key not in keys]
    constant = [key for key in [*keys, *extra] if len(table) > 1 and len({str(row.get(key)) for row in table}) == 1]
    columns = [key for key in [*keys, *extra] if key not in constant and any(row.get(key) is not None for row in table)]
    shared = [f"{words(key)} {value_text(key, table[0][key])}" for key in constant if table[0].get(key) is not None]
    shared_text = f"The same for all: {', '.join(shared)}. " if shared else ""
    if calibration.get("bare_clean") is not None and calibration.get("bare_attacked") is not None:
        bare = [percent(float(calibration[key])) for key in ("bare_clean", "bare_attacked")]
        shared_text += f"Without defence: clean {bare[0]}, attacked {bare[1]}. "
    if calibration.get("within_bound") is False:
        shared_text += "No candidate met the bound on lost clean accuracy, so the one that loses least was taken. "
    attack = _attack_text(calibration.get("attack") or {})
    candidates = Table(
        (*(Cell(words(key), unit(key)) for key in columns), ""),
        tuple(
            (*(value_text(key, row.get(key)) for key in columns), "chosen" if _same_candidate(row, chosen) else "")
            for row in table
        ),
        kinds=tuple("chosen" if _same_candidate(row, chosen) else "" for row in table),
    )
    rest = candidates.after(SHOWN_CANDIDATES)
    more = folded(f"The other {len(rest.rows)} candidates", rest.html()) if rest.rows else ""
    objective = calibration.get("objective") or "an objective not recorded"
    source = calibration.get("dataset") or "a data set not recorded"
    under = f"; the attack: {attack}" if attack else ""
    about = f"""<p>Out of {number(len(table))} candidates, by <em>{escape(objective)}</em>
over {number(calibration.get("n") or 0)} images of {escape(source)}{escape(under)}. {escape(shared_text)}The chosen one
comes first, the others in the order of the calibration; accuracies in %.</p>"""
    return section(_TITLE, f"{about}\n{candidates.first(SHOWN_CANDIDATES).html()}\n{more}", "calibration")


def calibration_text(calibration: Mapping[str, Any], rows: int = SHOWN_CANDIDATES) -> str:
    """The table that a setting was chosen from, for a terminal."""
    head = (
        f"calibrated on {calibration['n']} images of {calibration['dataset']}: {calibration['objective']}\n"
        f"bare classifier: clean {percent(calibration['bare_clean'])} %, attacked "
        f"{percent(calibration['bare_attacked'])} %"
    )
    if not calibration["within_bound"]:
        head += "\nno setting keeps that bound; the one that loses least was chosen"
    found = calibration["table"]
    keys = ("layer", "pooling", "dimension", "k", "weighting", "clean", "attacked")
    table = Table(
        ("", "layer", "pooling", "dims", "k", "weighting", "clean", "attacked"),
        tuple(
            (">" if row == calibration["chosen"] else "", *(value_text(key, row[key]) for key in keys))
            for row in found[:rows]
        ),
        left=3,
    )
    rest = [f"... and {len(found) - rows} more"] if len(found) > rows else []
    return "\n".join([head, table.text(), *rest])


def _same_candidate(row: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    return all(row.get(key) == chosen.get(key) for key in ("layer", "pooling", "k", "weighting", "dimension"))


def _attack_text(attack: Mapping[str, Any]) -> str:
    """The settings of the calibration attack: name, norm and budget first, then whatever else is recorded."""
    rest = dict(attack)
    name, norm, eps = (rest.pop(key, None) for key in ("attack", "norm", "eps"))
    name = name if name is not None else rest.pop("name", None)
    parts = [attack_name(str(name))] if name is not None else []
    if norm is not None:
        budgets = eps if isinstance(eps, (list, tuple)) else [] if eps is None else [eps]
        parts.append(" ".join([norm_name(str(norm)), ", ".join(number(float(one)) for one in budgets)]).strip())
    steps = rest.pop("steps", None)
    if steps is not None:
        parts.append(plural(steps, "step"))
    parts += [f"{words(str(key))} {value_text(str(key), value)}" for key, value in rest.items() if value is not None]
    return ", ".join(parts)
