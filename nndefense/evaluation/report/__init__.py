"""The report of an evaluation: one HTML page that stands alone.

``page`` puts it together, from a module for each of its sections.
"""

from nndefense.evaluation.report.figures import accuracy_vs_eps, accuracy_vs_rows
from nndefense.evaluation.report.gallery import GalleryNeighbor, GalleryRow
from nndefense.evaluation.report.page import report_html, verdict, write_report
from nndefense.evaluation.report.run import calibration_text
from nndefense.evaluation.report.table import ladder, obscurity, summary, table2

__all__ = [
    "GalleryNeighbor",
    "GalleryRow",
    "accuracy_vs_eps",
    "accuracy_vs_rows",
    "calibration_text",
    "ladder",
    "obscurity",
    "report_html",
    "summary",
    "table2",
    "verdict",
    "write_report",
]
