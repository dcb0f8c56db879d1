"""Two tables at the headline budget: the main one, of every defence, and the ladder, up to the worst case."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nndefense.attacks.registry import attack_name
from nndefense.evaluation.ladder import BARE, CERTIFIED, DEFENDED, INFORMED, RUNGS, WORST, paired
from nndefense.evaluation.report.abstention import abstention_text
from nndefense.evaluation.report.records import (
    Record,
    Results,
    accuracy_cell,
    accuracy_text,
    at_headline,
    headline_raw,
    lowest,
    other_defenses,
    records_of,
    settings_text,
    under_attack,
)
from nndefense.evaluation.report.verdict import obscurity
from nndefense.reporting import Cell, Table, folded, section
from nndefense.reporting.wording import (
    BLANK,
    budget,
    escape,
    interval,
    number,
    p_text,
    percent,
    percent_in,
    weighting_name,
)

KNOWS = {
    "clean": "nothing is attacked",
    "black": "a surrogate; neither classifier nor defence",
    "gray": "the classifier; not the retrieval",
    "white": "the defence, its database and its settings; follows a relaxed retrieval",
    "adaptive": "the defence, its database and its settings; attacks made for retrieval",
    "exact": "all of that; what any attack within the budget can do, by proof",
    "worst": "all of the above, image by image",
    "certified": "whatever there is to know: what is proven to stand",
}


_CALLED = {"black": "black box", "gray": "gray box", "white": "white box", "worst": "worst case"}
_BARE = {
    "white": "as gray box",
    "adaptive": "as gray box",
    "exact": "no proof of it",
    "certified": "no certificate of it",
}


@dataclass(frozen=True)
class LadderRow:
    """One rung at the headline budget: the lowest measured accuracy without and with the defence, and the paired p."""

    name: str
    bare: Record | None
    defended: Record | None
    p: float | None


def ladder(results: Results) -> list[LadderRow]:
    """The rungs of ``results`` that were measured for either, from clean to worst case."""
    rungs = []
    for name in RUNGS:
        bare, defended = (at_headline(results, defense, name, any_attack=True) for defense in (BARE, DEFENDED))
        if bare is not None or defended is not None:
            p = None if bare is None or defended is None else paired(defended, bare).p
            rungs.append(LadderRow(name, bare, defended, p))
    return rungs


def summary(results: Results) -> str:
    """The ladder of every defence of ``results`` at the headline budget, as text for a terminal: of several attacks the
    strongest.
    """
    names = list(dict.fromkeys(record["defense"] for record in results["records"]))
    cells = {(name, rung): at_headline(results, name, rung, any_attack=True) for name in names for rung in RUNGS}
    columns = [rung for rung in RUNGS if any(cells[name, rung] for name in names)]
    rows = []
    for name in names:
        found = [cells[name, column] for column in columns]
        rows.append((name, *(_told(r) if r else BLANK for r in found)))
    title = (
        f"{results['dataset']['name']}: accuracy in % on {results['dataset']['n']:,} images [95 % interval]; "
        f"{budget(results['headline']['norm'], results['headline']['eps'])}"
    )
    failed = [line for line in results["audit"] if line["passed"] is False]
    told = [f"{label} under {name}: {_told(found)} %" for label, name, found in side_by_side(results)]
    told += [said] if (said := obscurity(results)) else []
    told += [f"self-audit: {line['name']} FAILS: {line['text']}" for line in failed]
    told += [said] if (said := abstention_text(results)) else []
    return "\n".join([Table(("", *columns), tuple(rows), title).text(), *told])


def side_by_side(results: Results) -> list[tuple[str, str, Record]]:
    """Every defence, the bare net first, under the attack that leaves it least at the headline budget: what it is
    called, the attack, and the record.

    On the net that is one of those who have the net, such as AutoAttack, and on a defence as a rule one of those who
    know it. None where nobody who knows a defence was sent against any.
    """
    attacks = [name for name in RUNGS if name not in ("clean", "exact", WORST, CERTIFIED)]
    found = []
    for name, label in _labels(results).items():
        tried = (at_headline(results, name, rung, any_attack=True) for rung in attacks)
        records = [record for record in tried if record is not None]
        if records:
            least = lowest(records)
            found.append((label, attack_name(str(least["attack"])), least))
    return found if any(record["threat_model"] in INFORMED for _, _, record in found) else []


def _labels(results: Results) -> dict[str, str]:
    """What the bare net and the defences are called, without variants."""
    return {BARE: "no defence", DEFENDED: "nearest neighbours"} | {name: name for name in other_defenses(results)}


def _side_by_side(results: Results) -> str:
    found = side_by_side(results)
    if not found:
        return ""
    names = {label: name for name, label in _labels(results).items()}
    rows = tuple(
        (label, attack, accuracy_cell(record, ""), accuracy_cell(at_headline(results, names[label], WORST), "not run"))
        for label, attack, record in found
    )
    caption = "Side by side: each under the attack that leaves it least, and over all attacks image by image."
    return (
        Table(("", "the strongest attack on it", "accuracy", "worst case"), rows).html("plain sides stacked", caption)
        + "\n"
    )


def _told(record: Record) -> str:
    """An accuracy with its interval for the terminal; one with open images is a range."""
    text = percent_in(record["accuracy"], record["ci_low"], record["ci_high"], 1)
    return accuracy_text(record) + text[text.index(" ") :]


def ladder_section(results: Results) -> str:
    """The ladder as a table, with the attackers' knowledge and the paired test; behind it what the attacks cost."""
    rungs = ladder(results)
    columns = ("Attacker", "knows", "no defence", "defended", "p", "attack on the defence")
    table = Table(columns, tuple(_row(results, rung) for rung in rungs), kinds=tuple(rung.name for rung in rungs))
    caption = (
        f"Accuracy in % (95\u00a0% interval) at {budget(results['headline']['norm'], results['headline']['eps'])}; of "
        "several attacks the strongest. p: exact McNemar test of the defence against no defence on the same images. In "
        "the worst case an image counts as right only if every attack within the budget, and the clean image, left it "
        "right."
    )
    return section(
        "What it holds against whom",
        _side_by_side(results)
        + table.html("plain ladder stacked", caption)
        + _every_defense(results)
        + _sureness(rungs)
        + _costs(rungs),
        "ladder",
    )


def _sureness(rungs: list[LadderRow]) -> str:
    """How sure the net and the defence are of what they answer, and of what they answer wrongly."""
    rows: list[tuple[str | Cell, ...]] = []
    for rung in rungs:
        sides = (record or {} for record in (rung.bare, rung.defended))
        found = [side.get(name) for side in sides for name in ("confidence", "confidence_wrong")]
        if any(value is not None for value in found):
            rows.append(
                (_CALLED.get(rung.name, rung.name), *("" if value is None else percent(value) for value in found))
            )
    caption = "Mean probability of the class that is answered, in %: over all images, and over the wrong answers."
    table = Table(("Attacker", "no defence", "where wrong", "defended", "where wrong"), tuple(rows))
    return "\n" + folded("How sure the answers are", table.html("plain sureness", caption)) if rows else ""


def _costs(rungs: list[LadderRow]) -> str:
    """What the attacks on the defence, or without one on the net, took."""
    rows: list[tuple[str | Cell, ...]] = []
    for rung in rungs:
        record = rung.defended or rung.bare
        if rung.name in ("clean", WORST, CERTIFIED) or record is None:
            continue
        passes = (record.get("forwards") or 0) + (record.get("backwards") or 0) + (record.get("queries") or 0)
        rows.append(
            (
                _CALLED.get(rung.name, rung.name),
                f"{record.get('attack_seconds') or 0:,.0f}\u00a0s",
                f"{passes / max(int(record['n']), 1):,.0f} an image" if passes else "",
                f"{record['peak_memory_mb']:,.0f}\u00a0MB" if record.get("peak_memory_mb") else "",
            )
        )
    table = Table(("Attacker", "time", "passes", "memory"), tuple(rows))
    return "\n" + folded("What the attacks cost", table.html("plain costs")) if rows else ""


def _every_defense(results: Results) -> str:
    """What every defence holds against whom, where there is more than the one over the database."""
    names = _labels(results)
    if len(names) == 2:
        return ""
    cells = {(name, rung): at_headline(results, name, rung, any_attack=True) for name in names for rung in RUNGS}
    rungs = [rung for rung in RUNGS if any(cells[name, rung] for name in names)]
    rows: list[tuple[str | Cell, ...]] = [
        (label, *(accuracy_cell(cells[name, rung], "not run") for rung in rungs))
        for name, label in names.items()
        if any(cells[name, rung] for rung in rungs)
    ]
    caption = "Every defence at the same budget; who knows a defence attacks it, and not another."
    heads = (_CALLED.get(rung, rung) for rung in rungs)
    return "\n" + Table(("", *heads), tuple(rows)).html("plain defenses stacked", caption)


def _row(results: Results, rung: LadderRow) -> tuple[str | Cell, ...]:
    record = rung.defended or rung.bare
    assert record is not None
    level = f" ({record['knowledge']})" if record.get("knowledge") else ""
    return (
        _CALLED.get(rung.name, rung.name),
        KNOWS[rung.name] + level,
        accuracy_cell(rung.bare, _BARE.get(rung.name, "not run")),
        accuracy_cell(rung.defended, "not run"),
        "" if rung.p is None else p_text(rung.p),
        _attacks(results, rung.name),
    )


def _attacks(results: Results, threat_model: str) -> str:
    """The attacks that were tried at the headline budget, the strongest first."""
    if threat_model in ("clean", "worst"):
        return ""
    headline = results["headline"]
    found = [
        record
        for record in under_attack(results, DEFENDED, threat_model, any_attack=True)
        if math.isclose(record["eps"], headline["eps"], rel_tol=1e-6)
    ]
    found.sort(key=lambda record: float(record["accuracy"]))
    return ", ".join(
        attack_name(str(record["attack"])) + (f" ({percent(record['accuracy'])})" if len(found) > 1 else "")
        for record in found
    )


THREAT_MODELS = ("clean", "gray", "black")


@dataclass(frozen=True)
class Accuracy:
    """An accuracy (fraction in [0, 1]) with its 95 % interval over ``n`` images, or None with the reason why not."""

    accuracy: float | None
    ci: tuple[float, float] | None
    n: int | None
    reason: str


@dataclass(frozen=True)
class Table2Row:
    """One defence of the main table. ``variant`` is the record's: what was varied, ``"calibrated"`` or ``""``."""

    defense: str
    variant: str
    label: str
    database_rows: int | None
    clean: Accuracy
    gray: Accuracy
    black: Accuracy

    @property
    def cells(self) -> tuple[Accuracy, Accuracy, Accuracy]:
        return self.clean, self.gray, self.black


def table2(results: Results) -> list[Table2Row]:
    """The main table of ``results``, in the shape of Table 2 of Dubey et al. (2019): one row a defence, at the headline
    budget.

    Returns:
        no defence first, the calibrated defence second, then the variants in the order of their first record, kept
        together by what they vary and, for database sizes, ascending. A cell that was not run has accuracy None and
        says why.
    """
    variants: dict[str, str] = {BARE: "", DEFENDED: "calibrated"}
    for record in records_of(results):
        variants.setdefault(str(record["defense"]), str(record.get("variant") or ""))
    rows = [_table_row(results, defense, variant) for defense, variant in variants.items()]
    groups = list(dict.fromkeys(row.variant for row in rows[2:]))
    others = sorted(
        (row for row in rows[2:] if any(cell.accuracy is not None for cell in row.cells)),
        key=lambda row: (groups.index(row.variant), (row.database_rows or 0) if row.variant == "rows" else 0),
    )
    return [*rows[:2], *others]


def _table_row(results: Results, defense: str, variant: str) -> Table2Row:
    cells = {threat_model: _cell(results, defense, threat_model) for threat_model in THREAT_MODELS}
    sizes = [record.get("database_rows") for record in records_of(results) if record["defense"] == defense]
    rows = next((int(size) for size in sizes if size), None)
    inner = defense.partition("(")[2].rpartition(")")[0]
    if defense == BARE:
        label = "No defence"
    elif defense == DEFENDED:
        label = "Nearest neighbours" if results.get("calibration") is None else "Nearest neighbours, calibrated"
    elif variant == "rows" and rows is not None:
        label = f"{number(rows)} images"
    else:
        label = weighting_name(inner) or defense
    return Table2Row(defense, variant, label, rows if defense != BARE else None, **cells)


def _cell(results: Results, defense: str, threat_model: str) -> Accuracy:
    record = at_headline(results, defense, threat_model)
    if record is not None:
        interval = (float(record["ci_low"]), float(record["ci_high"]))
        return Accuracy(float(record["accuracy"]), interval, int(record["n"]), "")
    if threat_model == "black" and results.get("surrogate") is None:
        return Accuracy(None, None, None, "no surrogate given")
    if threat_model != "clean" and under_attack(results, defense, threat_model):
        return Accuracy(None, None, None, "not run at this budget")
    return Accuracy(None, None, None, "not run")


def table_section(results: Results) -> str:
    """The main table with its caption and key."""
    rows = table2(results)
    headline = results["headline"]
    surrogate = results.get("surrogate")
    transfer = (
        f"it is computed on another network, the surrogate ({escape(surrogate.get('source', ''))}), and carried over."
        if surrogate
        else "it would be computed on another network, a surrogate, and carried over; none was given."
    )
    headings = {
        "weighting": "Other weightings",
        "layer": "Other features",
        "rows": "Other database sizes",
        "k": "Other numbers of neighbours",
        "defense": "Other defences",
    }
    lines: list[tuple[str | Cell, ...]] = []
    kinds, group = [], ""
    for row in rows:
        kind = {BARE: "none", DEFENDED: "chosen"}.get(row.defense, "variant")
        if kind == "variant" and row.variant != group:
            group = row.variant
            lines.append((headings.get(group, group.capitalize() or "Other defences"),))
            kinds.append("group")
        below = settings_text(results) if row.defense == DEFENDED else ""
        lines.append((Cell(row.label, below=below), *map(_drawn, row.cells)))
        kinds.append(kind)
    table = Table(("", "Clean", "Gray box", "Black box"), tuple(lines), kinds=tuple(kinds))
    counts = sorted({cell.n for row in rows for cell in row.cells if cell.n is not None})
    if not counts:
        over = "no images"
    elif len(counts) == 1:
        over = f"all {number(counts[0])} images"
    else:
        over = f"{number(counts[0])} to {number(counts[-1])} images"
    attack = f"{attack_name(str(headline['attack']))}, {budget(headline['norm'], headline['eps'])}"
    caption = (
        f"Accuracy in % over {over}, also those that were wrong before the attack, with the Wilson 95\u00a0% interval. "
        f"Attack: {attack}{headline_raw(results)}."
    )
    key = f"""<p class="key"><b>Gray box:</b> the attack is computed on the classifier itself, with its weights, and
ignores the retrieval. <b>Black box:</b> {transfer} Where a cell was measured more than once, the lowest accuracy is
shown.</p>"""
    return section("Accuracy with and without the defence", f"{table.html('main', caption)}\n{key}", "accuracy")


def _drawn(cell: Accuracy) -> Cell:
    if cell.accuracy is None or cell.ci is None:
        return Cell(reason=cell.reason)
    low, high = (max(0.0, min(1.0, bound)) for bound in cell.ci)
    strip = f"--at:{100 * cell.accuracy:.2f}%;--lo:{100 * low:.2f}%;--to:{100 * (high - low):.2f}%"
    drawn = f'<span class="strip" style="{strip}" aria-hidden="true"></span>'
    return Cell(percent(cell.accuracy), interval(low, high), drawn=drawn)
