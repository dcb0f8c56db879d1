"""How results are shown: one page, one table, one way to draw and one set of words, for plain values of any kind."""

from nndefense.reporting import charts
from nndefense.reporting.charts import inline, picture
from nndefense.reporting.page import facts_list, figure, fingerprint, folded, limits_list, page, paragraphs, section
from nndefense.reporting.table import Cell, Table

__all__ = [
    "Cell",
    "Table",
    "charts",
    "facts_list",
    "figure",
    "fingerprint",
    "folded",
    "inline",
    "limits_list",
    "page",
    "paragraphs",
    "picture",
    "section",
]
