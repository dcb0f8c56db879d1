"""The comparison: every defence of a published table on the same images, each met by an attacker who knows it."""

from nndefense.comparison.published import CAVEATS, PUBLISHED, PrintedRow
from nndefense.comparison.recipe import (
    ComparisonRecipe,
    RowSpec,
    Scope,
    changed,
    comparison_from,
    comparison_names,
    material_settings,
    shipped_comparison,
)
from nndefense.comparison.report import write_comparison
from nndefense.comparison.runner import Row, compare, make_row, read_comparison, run_comparison
from nndefense.comparison.table import TableRow, markdown_of, summary_of, table_of

__all__ = [
    "CAVEATS",
    "PUBLISHED",
    "ComparisonRecipe",
    "PrintedRow",
    "Row",
    "RowSpec",
    "Scope",
    "TableRow",
    "changed",
    "compare",
    "comparison_from",
    "comparison_names",
    "make_row",
    "markdown_of",
    "material_settings",
    "read_comparison",
    "run_comparison",
    "shipped_comparison",
    "summary_of",
    "table_of",
    "write_comparison",
]
