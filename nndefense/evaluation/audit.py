"""Self-audit: was the attack strong enough, and is the number what it says? (Carlini et al. 2019, section 5.)

Each check has a name and passes, fails, or could not be made; a report shows them all. Those here read records;
:mod:`~nndefense.evaluation.audit_runs` makes small runs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from nndefense.evaluation.evaluate import Record
from nndefense.evaluation.ladder import BARE, DEFENDED, from_hex

# The check whose failure runs of the audit's own may settle.
UNDEFENDED = "undefended net falls"


@dataclass(frozen=True)
class AuditLine:
    """One check: ``passed`` is None where it could not be made, and ``text`` says what was found."""

    name: str
    passed: bool | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        return asdict(self)


def audit_records(records: Sequence[Record], classes: int) -> list[AuditLine]:
    """The checks that need nothing but the records; ``classes`` is the number of classes that guessing chooses from."""
    return [
        _budget(records),
        _undefended(records, classes),
        _eight_bits(records),
        _larger_budgets(records),
        _stronger_than_transfer(records),
        _adaptive_is_strongest(records),
        *_exact(records),
    ]


def _budget(records: Sequence[Record]) -> AuditLine:
    attacked = [record for record in records if record.threat_model != "clean"]
    if not attacked:
        return AuditLine("budget", None, "No attack was run.")
    worst = max(record.budget_excess for record in attacked)
    most = f" by more than {worst:.1e} (raw pixels, allowed 1e-6)" if worst > 0 else ""
    text = f"No attacked image passes its budget{most}."
    return AuditLine("budget", worst <= 1e-6, text if worst <= 1e-6 else f"A budget is passed by {worst:.1e}.")


def _undefended(records: Sequence[Record], classes: int) -> AuditLine:
    strongest = strongest_on_bare(records)
    if strongest is None:
        return AuditLine(UNDEFENDED, None, "The classifier alone was not attacked.")
    chance = 1 / classes if classes else 0.0
    text = (
        f"The attack leaves the undefended net {100 * strongest.accuracy:.1f} % at {strongest.norm} {strongest.eps:g} "
        f"(guessing: {100 * chance:.1f} %)."
    )
    falls = strongest.ci_low <= chance
    text += "" if falls else " Either it is robust there or the attack is weak, which runs of the audit can tell apart."
    return AuditLine(UNDEFENDED, falls, text)


def strongest_on_bare(records: Sequence[Record]) -> Record | None:
    """The record of the gray-box attack and budget that leave the bare classifier least, or None."""
    return min(_of(records, BARE, "gray"), key=lambda record: record.accuracy, default=None)


def _eight_bits(records: Sequence[Record]) -> AuditLine:
    # Exact images lie a hair beyond the boundary, where any rounding may undo them: that is no weakness of an attack.
    tried = [
        r
        for r in records
        if r.accuracy_8bit is not None and r.defense in (BARE, DEFENDED) and r.threat_model != "exact"
    ]
    if not tried:
        return AuditLine("8-bit images", None, "Rounding to 8-bit pixels was not tried.")
    lost = [record for record in tried if (record.accuracy_8bit or 0.0) > record.ci_high]
    largest = max(abs((record.accuracy_8bit or 0.0) - record.accuracy) for record in tried)
    text = f"Rounding the attacked images to 8-bit pixels changes an accuracy by at most {100 * largest:.1f} points."
    if lost:
        names = ", ".join(f"{r.defense} {r.threat_model}" for r in lost)
        text = f"Rounding to 8-bit pixels undoes the attack on {names} beyond the interval."
    return AuditLine("8-bit images", not lost, text)


def _larger_budgets(records: Sequence[Record]) -> AuditLine:
    rises, compared = [], 0
    series: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.threat_model != "clean":
            series.setdefault((record.defense, record.threat_model, record.attack, record.norm), []).append(record)
    for (defense, threat_model, attack, _), found in series.items():
        for before, after in pairwise(sorted(found, key=lambda record: record.eps)):
            compared += 1
            if after.ci_low > before.ci_high:
                rises.append(f"{defense}, {threat_model} {attack}, eps {before.eps:g} to {after.eps:g}")
    if not compared:
        return AuditLine("larger budgets", None, "Each attack was run at one budget.")
    text = f"A larger budget raises an accuracy beyond its interval: {'; '.join(rises)}."
    return AuditLine("larger budgets", not rises, text if rises else "A larger budget never helps the defender.")


def _stronger_than_transfer(records: Sequence[Record]) -> AuditLine:
    both = [r for r in records if r.defense in (BARE, DEFENDED)]
    black = [r for r in both if r.threat_model == "black"]
    compared, weaker = _weaker(black, [r for r in both if r.threat_model in ("gray", "white", "adaptive")])
    text = f"The transferred attack is stronger: {', '.join(f'{r.defense} at {r.norm} {r.eps:g}' for r in weaker)}."
    if not compared:
        text = "No black-box attack stands beside a stronger one."
    elif not weaker:
        text = "With the model in hand no attack is weaker than the transferred one."
    return AuditLine("white box beats transfer", not weaker if compared else None, text)


def _adaptive_is_strongest(records: Sequence[Record]) -> AuditLine:
    ignorant = _of(records, DEFENDED, "gray") + _of(records, DEFENDED, "black")
    compared, weaker = _weaker(ignorant, _of(records, DEFENDED, "adaptive"))
    names = ", ".join(f"{r.threat_model} box at {r.norm} {r.eps:g}" for r in weaker)
    text = f"An attack that ignores the database is stronger: {names}."
    if not compared:
        text = "No adaptive attack was run, so the accuracies are upper bounds only."
    elif not weaker:
        text = "Against the defence nothing that ignores the database is stronger than the adaptive attack."
    return AuditLine("adaptive is the strongest", not weaker if compared else None, text)


def _exact(records: Sequence[Record]) -> list[AuditLine]:
    """Whether the adaptive attack comes within a point of what is possible, and nothing fell that is proven to hold."""
    ours = [record for record in records if record.defense == DEFENDED]
    missed: list[tuple[float, Record]] = []
    for exact in (record for record in ours if record.threat_model == "exact"):
        proven = from_hex(exact.certified, exact.n)
        for other in (r for r in ours if r.norm == exact.norm and r.eps <= exact.eps):
            if fallen := int((proven & ~from_hex(other.correct, other.n)).sum()):
                text = (
                    f"{fallen} images that are proven to stand at {exact.eps:g} fell to {other.attack}, {other.eps:g}."
                )
                return [AuditLine("exact accuracy", False, text)]
        adaptive = [r for r in ours if (r.threat_model, r.norm, r.eps) == ("adaptive", exact.norm, exact.eps)]
        missed += [(min(r.accuracy for r in adaptive) - exact.accuracy, exact)] if adaptive else []
    if not missed:
        return []
    most, where = max(missed, key=lambda found: found[0])
    text = (
        f"The adaptive attack leaves at most {100 * most:.1f} points more than what is possible (at {where.norm} "
        f"{where.eps:g}), and nothing fell that is proven to stand."
    )
    return [AuditLine("exact accuracy", most <= 0.01, text)]


def _weaker(ignorant: Sequence[Record], informed: Sequence[Record]) -> tuple[bool, list[Record]]:
    """Whether there is anything to compare, and which ignorant attacks beat all informed ones at their budget."""
    cells = [
        (
            record,
            [r.ci_low for r in informed if (r.defense, r.norm, r.eps) == (record.defense, record.norm, record.eps)],
        )
        for record in ignorant
    ]
    return any(lows for _, lows in cells), [record for record, lows in cells if lows and min(lows) > record.ci_high]


def _of(records: Sequence[Record], defense: str, threat_model: str) -> list[Record]:
    return [record for record in records if record.defense == defense and record.threat_model == threat_model]
