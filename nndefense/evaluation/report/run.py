"""The sections on the run itself: its calibration, the self-audit, what was run, its limits, and every record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.ladder import CERTIFIED, INFORMED, WORST
from nndefense.evaluation.report.records import Record, Results, headline_raw, records_of, settings_text
from nndefense.reporting import Cell, Table, facts_list, fingerprint, folded, limits_list, section
from nndefense.reporting.wording import (
    budget,
    escape,
    norm_name,
    number,
    p_text,
    percent,
    plural,
    short,
    unit,
    value_text,
    words,
)

SHOWN_CANDIDATES = 12
_BARE_ROW = "no defence"
_ACCURACIES = ("clean", "attacked", "worst")
_USUAL = {"votes": "posteriors", "temperature": "none", "alpha": 0.0}
_MEASURED = (*_ACCURACIES, "images")
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
    rows = _calibrated_rows(calibration)
    keys = ["layer", "pooling", "k", "weighting", "dimension", *_MEASURED]
    keys += [key for key in dict.fromkeys(key for row in rows for key in row) if key not in keys]
    settings = [row for row in rows if row.get("layer") != _BARE_ROW]
    # The bare classifier's row has its name among the layers.
    apart = _MEASURED if settings == rows else ("layer", *_MEASURED)
    several = len(settings) > 1
    constant = [key for key in keys if several and key not in apart and len({str(r.get(key)) for r in settings}) == 1]
    columns = [key for key in keys if key not in constant and any(row.get(key) is not None for row in rows)]
    shared = [f"{words(key)} {value_text(key, rows[0][key])}" for key in constant if rows[0].get(key) is not None]
    shared_text = f"The same for all: {', '.join(shared)}. " if shared else ""
    if calibration.get("bare_clean") is not None and calibration.get("bare_attacked") is not None:
        bare = [f"{name} {percent(value)}" for name, value in _bare(calibration).items() if name in _ACCURACIES]
        shared_text += f"Without defence: {', '.join(bare)}. "
    if calibration.get("within_bound") is False:
        shared_text += "No candidate met the bound on lost clean accuracy, so the one that loses least was taken. "
    attack = _attack_text(calibration.get("attack") or {})
    candidates = Table(
        (*(Cell(words(key), unit(key)) for key in columns), ""),
        tuple(
            (*(value_text(key, row.get(key)) for key in columns), "" if number else "chosen")
            for number, row in enumerate(rows)
        ),
        kinds=tuple("" if number else "chosen" for number in range(len(rows))),
    )
    rest = candidates.after(SHOWN_CANDIDATES)
    more = folded(f"The other {len(rest.rows)} candidates", rest.html()) if rest.rows else ""
    objective = calibration.get("objective") or "an objective not recorded"
    source = calibration.get("dataset") or "a data set not recorded"
    under = f"; the attack: {attack}" if attack else ""
    verdict = f"<p><strong>{escape(verdict_text(calibration))}</strong></p>\n" if verdict_text(calibration) else ""
    about = f"""{verdict}<p>Out of {number(len(settings))} candidates, by <em>{escape(objective)}</em>
over {number(calibration.get("n") or 0)} images of {escape(source)}{escape(under)}. {escape(shared_text)}The chosen one
comes first, the others in the order of the calibration; accuracies in %.</p>"""
    return section(_TITLE, f"{about}\n{candidates.first(SHOWN_CANDIDATES).html()}\n{more}", "calibration")


def calibration_text(calibration: Mapping[str, Any], rows: int = SHOWN_CANDIDATES) -> str:
    """The table of ``rows`` candidates that a setting was chosen from (``calibration``), for a terminal; where nothing
    helps, the first line says so.
    """
    head = [verdict_text(calibration)] if verdict_text(calibration) else []
    head += [f"calibrated on {calibration['n']} images of {calibration['dataset']}: {calibration['objective']}"]
    if not calibration["within_bound"]:
        head += ["no setting keeps that bound; the one that loses least was chosen"]
    found = _calibrated_rows(calibration)
    keys = ["layer", "pooling", "dimension", "k", "weighting"]
    keys += [key for key in dict.fromkeys(key for row in found for key in row) if key not in (*keys, *_MEASURED)]
    keys += [key for key in _MEASURED if any(row.get(key) is not None for row in found)]
    table = Table(
        ("", *("dims" if key == "dimension" else words(key) for key in keys)),
        tuple(
            ("" if number else ">", *(value_text(key, row.get(key)) if key in row else "" for key in keys))
            for number, row in enumerate(found[:rows])
        ),
        left=3,
    )
    rest = [f"... and {len(found) - rows} more"] if len(found) > rows else []
    return "\n".join([*head, table.text(), *rest])


def verdict_text(calibration: Mapping[str, Any]) -> str:
    """That no setting is better than the bare classifier, in plain words; empty where one is, or it was not tested."""
    paired = calibration.get("paired")
    if not paired or paired["better"]:
        return ""
    informed = calibration.get("bare_worst") is not None
    key, attack = ("worst", "the strongest attack on each") if informed else ("attacked", "the gray-box attack")
    none = f"none of {plural(len(calibration['table']), 'setting')} is"
    if not calibration["within_bound"]:
        none = "no setting keeps the bound on clean accuracy, and the one that loses least is not"
    kept = [percent(value) for value in (calibration["chosen"][key], calibration[f"bare_{key}"])]
    return (
        f"Nothing helps: {none} shown to keep more images than the bare classifier under {attack} (the best one keeps "
        f"{kept[0]} %, the bare classifier {kept[1]} % of {number(calibration['n'])}; paired test, p = "
        f"{p_text(paired['p'])})."
    )


def _calibrated_rows(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of a calibration: the chosen setting, the bare classifier where it was measured, and the others."""
    table = [dict(row) for row in (calibration["chosen"], *(calibration.get("table") or ()))]
    # Rows have what is not usual of their rules.
    usual = {name: value for name, value in _USUAL.items() if any(name in row for row in table)}
    table = [usual | row for row in table]
    setting = {key for row in table for key in row if key not in _MEASURED}
    others = [row for row in table[1:] if any(row.get(key) != table[0].get(key) for key in setting)]
    bare = [_bare(calibration)] if calibration.get("bare_clean") is not None else []
    return [table[0], *bare, *others]


def _bare(calibration: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: calibration.get(f"bare_{name}") for name in _ACCURACIES}
    found = {name: value for name, value in found.items() if value is not None}
    return {"layer": _BARE_ROW, **found, **({"images": calibration["n"]} if "worst" in found else {})}


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


def run_section(results: Results) -> str:
    """Data, models, database, attacks, seeds and times of the run, and the checks on the attack."""
    dataset, headline = results["dataset"], results["headline"]
    shape = " × ".join(str(size) for size in dataset.get("shape") or ())
    classes = list(dataset.get("classes") or ())
    named = ", ".join(str(name) for name in classes[:10])
    named = f"{named[:160].rstrip(' ,')}, …" if len(classes) > 10 or len(named) > 160 else named
    seeds = sorted({str(record["seed"]) for record in results["records"] if record.get("seed") is not None})
    database, defense = results.get("database") or {}, results.get("defense") or {}
    surrogate = results.get("surrogate")
    shape_note = f", {shape} (channels × height × width)" if shape else ""
    about_database = [
        f"{number(database['rows'])} images" if database.get("rows") is not None else "",
        str(database.get("data") or ""),
        f"features {database['layer']}, {database.get('pooling', '')}" if database.get("layer") else "",
        f"{number(database['dimension'])} dimensions" if database.get("dimension") else "",
        f"{database['index']} index" if database.get("index") else "",
    ]
    items: list[tuple[str, str]] = [
        (
            "Data set",
            f"{escape(dataset['name'])}, {number(dataset['n'])} images{escape(shape_note)}"
            f"{_fingerprint(dataset.get('fingerprint'))}",
        ),
        ("Classes", f"{number(len(classes))}: {escape(named)}" if classes else ""),
        ("Classifier", _network(results.get("classifier"))),
        ("Surrogate", _network(surrogate) if surrogate else "none given, so no black-box attack"),
        (
            "Database",
            escape("; ".join(fact for fact in about_database if fact)) + _fingerprint(database.get("fingerprint")),
        ),
        (
            "Defence",
            escape(", ".join(f"{words(str(key))} {value_text(str(key), value)}" for key, value in defense.items())),
        ),
        ("Attacks", "<br>".join(escape(text) for text in _attack_texts(results)) or "none"),
        ("Headline budget", f"{budget(headline['norm'], headline['eps'])}{headline_raw(results)}"),
        ("Seeds", escape(", ".join(seeds)) or "not recorded"),
        ("Time", _time_text(results)),
        ("Versions", escape(", ".join(f"{name} {value}" for name, value in (results.get("versions") or {}).items()))),
        ("Command", f"<code>{escape(results['command'])}</code>" if results.get("command") else ""),
    ]
    return section("What was run", facts_list(items), "run")


def audit_section(results: Results) -> str:
    """The self-audit: each check with its verdict."""
    about = "<p>A weak attack flatters every defence. These checks are necessary, not sufficient.</p>"
    signs = {True: ("✓", "holds", "right"), False: ("✗", "fails", "wrong"), None: ("–", "not known", "open")}
    lines = []
    for line in results.get("audit") or ():
        mark, word, kind = signs[line["passed"]]
        lines.append(
            f'<li class="{kind}"><span class="mark"><span aria-hidden="true">{mark}</span> {word}</span> '
            f"<span><b>{escape(line['name'])}.</b> {escape(line['text'])}</span></li>"
        )
    listed = "\n".join(lines)
    return section("Was the attack strong enough?", f'{about}\n<ul class="checks">\n{listed}\n</ul>', "audit")


def _attack_texts(results: Results) -> list[str]:
    """Each attack that was run, with its settings and all its budgets."""
    attacks: dict[tuple[Any, ...], set[float]] = {}
    for record in records_of(results):
        if record["threat_model"] not in ("clean", CERTIFIED, WORST):
            counts = record.get("steps"), record.get("query_limit"), record.get("restarts")
            key = (record["attack"], record["norm"], *counts)
            attacks.setdefault(key, set()).add(float(record["eps"]))
    texts = []
    for (attack, norm, steps, queries, restarts), budgets in attacks.items():
        many = f", {plural(steps, 'step')}" if steps else ""
        many += f", {number(queries)} queries for each image" if queries else ""
        many += f", {plural(restarts, 'random start')}" if restarts else ""
        listed = ", ".join(number(eps) for eps in sorted(budgets))
        texts.append(f"{attack_name(str(attack))}{many}, {norm_name(str(norm))}, ε {listed}")
    return texts


def _network(network: Mapping[str, Any] | None) -> str:
    if not network:
        return ""
    arch = f", {escape(network['arch'])}" if network.get("arch") else ""
    return f"{escape(network.get('source', 'not recorded'))}{arch}{_fingerprint(network.get('fingerprint'))}"


def _fingerprint(value: object) -> str:
    return f" {fingerprint(value)}" if value else ""


def _time_text(results: Results) -> str:
    """Seconds spent on attacking and on classifying; the defences share an attack, so each attack counts once."""
    attacking: dict[tuple[Any, ...], float] = {}
    classifying = 0.0
    for record in results["records"]:
        key = tuple(record.get(name) for name in ("dataset", "threat_model", "attack", "norm", "eps", "seed"))
        attacking[key] = max(attacking.get(key, 0.0), float(record.get("attack_seconds") or 0.0))
        classifying += float(record.get("seconds") or 0.0)
    total = sum(attacking.values())
    if total <= 0:
        return f"{classifying:,.0f} s" if classifying > 0 else ""
    return f"{total:,.0f} s attacking, {classifying:,.0f} s classifying"


def records_section(results: Results) -> str:
    """Every record as a table, folded away."""
    records: list[Record] = list(results["records"])
    preferred = ["dataset", "defense", "variant", "threat_model", "attack", "steps", "norm", "eps", "eps_raw", "n"]
    preferred += ["accuracy", "ci_low", "ci_high", "seed", "seconds", "database_rows"]
    present = dict.fromkeys(key for record in records for key in record)
    columns = [key for key in preferred if key in present] + [key for key in present if key not in preferred]
    table = Table(
        tuple(Cell(words(key), unit(key)) for key in columns),
        tuple(tuple(_record_cell(key, record.get(key)) for key in columns) for record in records),
    )
    about = f"{number(len(records))} measurements; accuracies in %, raw budgets for pixels in [0, 1]"
    return section("Every number", folded(about, table.html("plain dense")), "records")


def _record_cell(key: str, value: object) -> str | Cell:
    if isinstance(value, Mapping):
        value = value.get("fingerprint") or value.get("source")
    text = value_text(key, value)
    whole = text if key in ("classifier", "database", "surrogate") and len(text) > 16 else ""
    return Cell(short(text), whole=whole) if whole else text


def limits_section(results: Results) -> str:
    """The limits of the run, as a list."""
    calibration, database = results.get("calibration"), results.get("database") or {}
    attackers = {record["threat_model"] for record in results["records"]}
    limits = [
        (
            "The exact accuracy is that of this setting.",
            "That no attack does better is proven for these images, this database and these budgets, with a margin for "
            "rounding, and on the ground that the feature is affine in the pixels, which was found by probing it. It "
            "says nothing about other budgets, norms or features.",
        )
        if "exact" in attackers
        else (
            "No attack is the strongest there is.",
            "The adaptive attacks know the database and its settings, and every attacked image was judged by the true "
            "defence. Another attack may still find what these did not: read the worst case as an upper bound.",
        )
        if attackers & {*INFORMED}
        else (
            "No attack here knows of the database.",
            "The gray-box attack uses the classifier's weights and the black-box attack a surrogate; both ignore the "
            "retrieval. An attacker who knows the database, or can guess at part of it, can aim at the retrieval "
            "itself. Such adaptive attacks are not part of this report, and the authors of the method describe two "
            "that break it. Read the accuracies under attack as upper bounds.",
        ),
        (
            "The settings were chosen under attack.",
            "Layer, pooling, number of neighbours and weighting are those that did best on the calibration images, "
            f"{number(calibration.get('n', 0))} of {calibration.get('dataset', 'a data set not recorded')}. "
            "Another attack or budget might ask for others.",
        )
        if calibration
        else (
            "The settings were not calibrated in this run.",
            "Other layers, numbers of neighbours or weightings may do better or worse.",
        ),
        (
            "The database is small.",
            f"It holds {number(database['rows'])} images; the method was proposed for up to billions. "
            "Digit and MNIST-scale databases say nothing about web-scale ones, neither for nor against.",
        )
        if (database.get("rows") or 0) < 10_000_000 and database.get("rows") is not None
        else (
            "Size is not everything.",
            "Another database of the same size, gathered otherwise, can give other numbers.",
        ),
        (
            "The paper's Table 2 is not comparable.",
            "The table above has its shape only. The paper's is about ImageNet, ResNet-50 and normalised ℓ₂ 0.06, and "
            "its rows come from several models and protocols.",
        ),
        (
            "The intervals cover the choice of images only.",
            "They do not cover training the classifier again, other seeds, a stronger attack or another classifier. "
            "Images in the database that nearly repeat a test image, if there are any, hand the defence the answer.",
        ),
    ]
    return section("What these numbers do not show", limits_list(limits), "limits")
