"""Evaluation: accuracies under attack with intervals, a results file, and a report to look at."""

from nndefense.evaluation.evaluate import Record, Subject, evaluate
from nndefense.evaluation.illustrate import illustrate
from nndefense.evaluation.report import GalleryRow, Neighbor, write_report
from nndefense.evaluation.results import assemble, summary
from nndefense.evaluation.statistics import wilson_interval
from nndefense.evaluation.threats import THREAT_MODELS, AttackSettings, ThreatModel

__all__ = [
    "THREAT_MODELS",
    "AttackSettings",
    "GalleryRow",
    "Neighbor",
    "Record",
    "Subject",
    "ThreatModel",
    "assemble",
    "evaluate",
    "illustrate",
    "summary",
    "wilson_interval",
    "write_report",
]
