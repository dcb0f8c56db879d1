"""The report of an evaluation: one HTML page that stands alone.

``page`` puts it together, from a module for each of its sections.
"""

from nndefense.evaluation.report.figures import accuracy_vs_eps, accuracy_vs_rows
from nndefense.evaluation.report.gallery import GalleryRow, Neighbor
from nndefense.evaluation.report.ladder import Rung, ladder, obscurity
from nndefense.evaluation.report.page import report_html, write_report
from nndefense.evaluation.report.table import Cell, Table2Row, table2
from nndefense.evaluation.report.verdict import verdict

__all__ = [
    "Cell",
    "GalleryRow",
    "Neighbor",
    "Rung",
    "Table2Row",
    "accuracy_vs_eps",
    "accuracy_vs_rows",
    "ladder",
    "obscurity",
    "report_html",
    "table2",
    "verdict",
    "write_report",
]
