"""The report of an evaluation: one HTML page that stands alone.

``page`` puts it together, from a module for each of its sections.
"""

from nndefense.evaluation.report.figures import accuracy_vs_eps, accuracy_vs_rows
from nndefense.evaluation.report.gallery import GalleryRow, Neighbor
from nndefense.evaluation.report.page import report_html, write_report
from nndefense.evaluation.report.table import Cell, Table2Row, table2
from nndefense.evaluation.report.verdict import Check, attack_checks, verdict

__all__ = [
    "Cell",
    "Check",
    "GalleryRow",
    "Neighbor",
    "Table2Row",
    "accuracy_vs_eps",
    "accuracy_vs_rows",
    "attack_checks",
    "report_html",
    "table2",
    "verdict",
    "write_report",
]
