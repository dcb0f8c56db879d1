"""The section on calibration: the candidates, their accuracies, and the chosen one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nndefense.evaluation.report.records import Results
from nndefense.evaluation.report.wording import (
    attack_name,
    escape,
    norm_name,
    number,
    percent,
    plural,
    settings_text,
    unit,
    value_text,
    words,
)

SHOWN_CANDIDATES = 12


def calibration_section(results: Results) -> str:
    """How the settings were chosen; without a calibration, that they were given."""
    calibration = results.get("calibration")
    if not calibration:
        return (
            '<section id="calibration"><h2>How the settings were chosen</h2>'
            "<p>They were given, not calibrated in this run: nothing here says that they are good ones. "
            f"They are {escape(settings_text(results) or 'not recorded')}.</p></section>"
        )
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
    shown, rest = table[:SHOWN_CANDIDATES], table[SHOWN_CANDIDATES:]
    more = ""
    if rest:
        others = _candidates_html(rest, chosen, columns)
        more = f"<details><summary>The other {len(rest)} candidates</summary>{others}</details>"
    objective = calibration.get("objective") or "an objective not recorded"
    source = calibration.get("dataset") or "a data set not recorded"
    under = f"; the attack: {attack}" if attack else ""
    return f"""<section id="calibration">
<h2>How the settings were chosen</h2>
<p>Out of {number(len(table))} candidates, by <em>{escape(objective)}</em>
over {number(calibration.get("n") or 0)} images of {escape(source)}{escape(under)}. {escape(shared_text)}The chosen one
comes first, the others in the order of the calibration; accuracies in %.</p>
{_candidates_html(shown, chosen, columns)}
{more}
</section>"""


def _candidates_html(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], columns: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(words(key))}{unit(key)}</th>' for key in columns)
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(value_text(key, row.get(key)))}</td>" for key in columns)
        if _same_candidate(row, chosen):
            body.append(f'<tr class="chosen">{cells}<td class="pick">chosen</td></tr>')
        else:
            body.append(f"<tr>{cells}<td></td></tr>")
    lines = "\n".join(body)
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{head}<td></td></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


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
        parts.append(" ".join([norm_name(str(norm)), ", ".join(number(float(budget)) for budget in budgets)]).strip())
    steps = rest.pop("steps", None)
    if steps is not None:
        parts.append(plural(steps, "step"))
    parts += [f"{words(str(key))} {value_text(str(key), value)}" for key, value in rest.items() if value is not None]
    return ", ".join(parts)
