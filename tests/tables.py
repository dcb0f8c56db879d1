"""Pages of docs whose tables are the cases of a test module: they stand in one place, and the page shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from nndefense.reporting import Table

DOCS = Path(__file__).resolve().parent.parent / "docs"
# A heading with what stands below it up to a table or another heading; and the table.
_SECTION = re.compile(r"^(## (?P<heading>.+)\n(?:(?!\||#).*\n)*)(?:\|.*\n)*\n*", re.MULTILINE)


def with_tables(text: str, tables: Mapping[str, Table]) -> str:
    """A page's text with these tables below their headings, which must be there; other headings keep what they have."""
    left = set(tables)

    def section(match: re.Match[str]) -> str:
        heading = match["heading"]
        if heading not in tables:
            return match[0]
        left.remove(heading)
        return f"{match[1].rstrip()}\n\n{tables[heading].markdown()}\n"

    written = _SECTION.sub(section, text).rstrip() + "\n"
    assert not left, f"the page has no headings {sorted(left)}"
    return written


def check(name: str, tables: Mapping[str, Table]) -> None:
    """Assert that a page has these tables."""
    text = (DOCS / name).read_text(encoding="utf-8")
    assert text == with_tables(text, tables), f"docs/{name} shows other rows: run this test's module as a script"


def write(name: str, tables: Mapping[str, Table]) -> None:
    """Write these tables into a page."""
    text = with_tables((DOCS / name).read_text(encoding="utf-8"), tables)
    (DOCS / name).write_text(text, encoding="utf-8")
