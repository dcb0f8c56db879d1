"""The comparison: every defence of a published table on the same images, each met by an attacker who knows it."""

from nndefense.comparison.published import CAVEATS, PUBLISHED
from nndefense.comparison.recipe import (
    ComparisonRecipe,
    RowSpec,
    changed,
    comparison_from,
    comparison_names,
    comparison_values,
    material_settings,
    retrieved_by,
    shipped_comparison,
)
from nndefense.comparison.report import markdown_of, summary_of, write_comparison
from nndefense.comparison.rows import table_of
from nndefense.comparison.runner import compare, read_comparison, run_comparison

__all__ = [
    "CAVEATS",
    "PUBLISHED",
    "ComparisonRecipe",
    "RowSpec",
    "changed",
    "compare",
    "comparison_from",
    "comparison_names",
    "comparison_values",
    "markdown_of",
    "material_settings",
    "read_comparison",
    "retrieved_by",
    "run_comparison",
    "shipped_comparison",
    "summary_of",
    "table_of",
    "write_comparison",
]
