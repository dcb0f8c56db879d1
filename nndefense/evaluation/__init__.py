"""Evaluation: accuracies under attack with intervals, a results file, and a report to look at."""

from nndefense.evaluation.cells import CellStore
from nndefense.evaluation.evaluate import Record, Subject, evaluate
from nndefense.evaluation.ladder import compare, worst_cases
from nndefense.evaluation.recipe import Recipe, Rung, read_recipe, rungs_for
from nndefense.evaluation.report import calibration_text, summary, write_report
from nndefense.evaluation.results import assemble
from nndefense.evaluation.runner import illustrate, run
from nndefense.evaluation.subjects import layer_subject, threats_of
from nndefense.evaluation.threats import AttackSettings, ThreatModel, run_attack
from nndefense.statistics import mcnemar_p, wilson_interval

__all__ = [
    "AttackSettings",
    "CellStore",
    "Recipe",
    "Record",
    "Rung",
    "Subject",
    "ThreatModel",
    "assemble",
    "calibration_text",
    "compare",
    "evaluate",
    "illustrate",
    "layer_subject",
    "mcnemar_p",
    "read_recipe",
    "run",
    "run_attack",
    "rungs_for",
    "summary",
    "threats_of",
    "wilson_interval",
    "worst_cases",
    "write_report",
]
