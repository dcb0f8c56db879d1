"""One row of a comparison: a defence as it is measured, or the reason why it is not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nndefense.comparison.recipe import RowSpec
from nndefense.evaluation import Subject
from nndefense.evaluation.ladder import BARE
from nndefense.pipeline import Materials, defenses, make_defense, subject_of


@dataclass(frozen=True)
class Row:
    """A defence of the comparison.

    Attributes:
        spec: what it was to be.
        subject: what is measured; None where it is not there.
        facts: what is to be known of it, as plain values.
        reason: why it is not there, for people; empty where it is.
    """

    spec: RowSpec
    subject: Subject | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        """What it is called in the records."""
        return BARE if self.spec.kind == "none" else self.spec.name


def make_row(materials: Materials, spec: RowSpec) -> Row:
    """Make a row's defence, or say why it is not there."""
    defense = defenses.get(spec.kind)
    if defense.trained and not materials.scope.training:
        reason = "not trained: this data set has no training settings here, or training was left out"
        return Row(spec, reason=reason)
    made = make_defense(defense, materials, spec.options)
    subject = subject_of(made, Row(spec).name, spec.kind, materials, informed=spec.informed)
    return Row(spec, subject, made.facts)
