"""A table that is written once, and read on a page, in Markdown or in a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nndefense.reporting.wording import BLANK, escape


@dataclass(frozen=True)
class Cell:
    """What stands in a cell where that is more than a text.

    Attributes:
        text: of the cell.
        small: beside it in small letters, such as an interval; in brackets where there are none.
        below: under it, on pages alone.
        reason: why there is no text; on pages, neighbours that are empty for one reason become one cell.
        whole: what the text abbreviates, to be seen by pointing at it.
        drawn: HTML that a page has after the text.
    """

    text: str = ""
    small: str = ""
    below: str = ""
    reason: str = ""
    whole: str = ""
    drawn: str = ""

    def html(self) -> str:
        """The inside of the cell on a page."""
        if self.reason:
            return f"<small>{escape(self.reason)}</small>"
        text = escape(self.text)
        if self.whole:
            text = f'<code title="{escape(self.whole)}">{text}</code>'
        if self.small or self.drawn:
            text = f'<span class="num">{text}</span>'
        small = f" <small>{escape(self.small)}</small>" if self.small else ""
        below = f"<br><small>{escape(self.below)}</small>" if self.below else ""
        return f"{text}{small}{below}{self.drawn}"

    def __str__(self) -> str:
        if self.reason:
            return f"{BLANK} ({self.reason})"
        return f"{self.text} ({self.small})" if self.small else self.text


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: their headings.
        rows: a cell a column; a row of one cell is the heading of those that follow.
        title: what it shows.
        note: how to read it; may be empty.
        kinds: of the rows, by which a page's style tells them apart; empty where all are alike.
        left: how many columns stand to the left in text; the others stand to the right.
    """

    columns: tuple[str | Cell, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    title: str = ""
    note: str = ""
    kinds: tuple[str, ...] = ()
    left: int = 1

    def html(self, style: str = "plain", caption: str = "") -> str:
        """The table for a page, without title and note; ``style`` names classes, ``caption`` is plain text.

        On a narrow screen the rows of a table with the class ``stacked`` are blocks, whose cells have their headings.
        """
        heads = "".join(
            f'<th scope="col">{_cell(head).html()}</th>' if str(head) else "<td></td>" for head in self.columns
        )
        head = f"<thead><tr>{heads}</tr></thead>\n" if heads else ""
        kinds = self.kinds or ("",) * len(self.rows)
        named = [str(head) for head in self.columns[1:]] if "stacked" in style.split() else []
        body = "\n".join(self._row(row, kind, named) for row, kind in zip(self.rows, kinds, strict=True))
        over = f"<caption><span>{escape(caption)}</span></caption>\n" if caption else ""
        return f'<div class="scroll"><table class="{style}">{over}{head}<tbody>\n{body}\n</tbody></table></div>'

    def _row(self, row: Sequence[str | Cell], kind: str, named: Sequence[str]) -> str:
        marked = f' class="{kind}"' if kind else ""
        first, *others = map(_cell, row)
        if not others:
            span = len(self.columns)
            return f'<tr class="group"><th colspan="{span}" scope="colgroup">{first.html()}</th></tr>'
        found = f'<th scope="row">{first.html()}</th>'
        heads = [f' data-head="{escape(head)}"' for head in named] or [""] * len(others)
        for reason, run in itertools.groupby(zip(others, heads, strict=True), key=lambda pair: pair[0].reason):
            same = list(run)
            if reason:
                over = f' colspan="{len(same)}"' if len(same) > 1 else ""
                found += f'<td class="blank"{over}{same[0][1]}>{same[0][0].html()}</td>'
            else:
                found += "".join(f"<td{head}>{cell.html()}</td>" for cell, head in same)
        return f"<tr{marked}>{found}</tr>"

    def markdown(self) -> str:
        """The table in Markdown under its title, with its note."""
        rule = ["---" if number < self.left else "--:" for number in range(len(self.columns))]
        title = [f"**{self.title}**", ""] if self.title else []
        cells = [[text.replace("|", "\\|") for text in row] for row in self._texts()]
        lines = [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]
        return "\n".join([*title, *lines, *(["", self.note] if self.note else [])]) + "\n"

    def text(self) -> str:
        """The table for a terminal, under its title; no line ends in spaces."""
        rows = self._texts()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if number < self.left else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.title, *lines] if self.title else lines)

    def _texts(self) -> list[list[str]]:
        """Headings and rows as texts, a heading of rows with empty ones beside it."""
        rows = [[str(cell) for cell in row] for row in (self.columns, *self.rows)]
        return [row + [""] * (len(self.columns) - 1) if len(row) == 1 else row for row in rows]

    def first(self, count: int) -> Table:
        """The table of its first ``count`` rows."""
        return replace(self, rows=self.rows[:count], kinds=self.kinds[:count])

    def after(self, count: int) -> Table:
        """The table without its first ``count`` rows."""
        return replace(self, rows=self.rows[count:], kinds=self.kinds[count:])


def _cell(value: str | Cell) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)
