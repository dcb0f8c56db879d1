"""The report of an evaluation: one HTML page that stands alone.

``page`` puts it together, from a module for each of its sections.
"""

from nndefense.evaluation.report.figures import accuracy_vs_eps, accuracy_vs_rows
from nndefense.evaluation.report.gallery import GalleryNeighbor, GalleryRow
from nndefense.evaluation.report.page import report_html, write_report
from nndefense.evaluation.report.run import calibration_text
from nndefense.evaluation.report.table import ladder, summary, table2
from nndefense.evaluation.report.verdict import obscurity, verdict

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
