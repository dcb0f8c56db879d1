"""The files of an experiment: a table in Markdown, the figure, and one self-contained page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from nndefense.experiments.figures import figure_of
from nndefense.experiments.spread import Results
from nndefense.experiments.tables import markdown_of, tables_of
from nndefense.files import write_bytes
from nndefense.reporting import Table, facts_list, figure, inline, page, paragraphs, picture, section
from nndefense.reporting.wording import date_text, escape

TABLE, REPORT, FIGURE = "table.md", "report.html", "figure"


def write_outputs(results: Results, out: Path) -> list[Path]:
    """Write ``table.md``, ``figure.png``, ``figure.svg`` and ``report.html`` beside ``results.json``.

    Everything follows from the results: the files can be made again without a training.

    Args:
        results: as :func:`nndefense.experiments.run` returns them or ``results.json`` holds them.
        out: an existing folder.

    Returns:
        The paths, in that order.
    """
    drawn = figure_of(results)
    contents = {
        out / TABLE: markdown_of(results, [f"{FIGURE}.png"]).encode(),
        out / f"{FIGURE}.png": picture(drawn, "png"),
        out / f"{FIGURE}.svg": picture(drawn, "svg"),
        out / REPORT: report_html(results, drawn).encode(),
    }
    for path, content in contents.items():
        write_bytes(path, content)
    return list(contents)


def report_html(results: Results, drawn: Figure) -> str:
    """The page as text: no script, no connection, style and figure inside it."""
    recipe = results["recipe"]
    title = f"{recipe['title']} ({recipe['scale']} scale)"
    first, *others = tables_of(results)
    sections = (
        section("", paragraphs(recipe["about"]) + paragraphs(f"Sources: {'; '.join(recipe['sources'])}.")),
        _table(first),
        section("", figure(inline(drawn, f"{title}: figure of the table's figures", first.text()))),
        *map(_table, others),
        section("What was run", _facts(results)),
    )
    return page(title, sections, facts=(results["images"]["test"]["name"], date_text(results["created"])))


def _table(table: Table) -> str:
    return section(table.title, table.html() + paragraphs(table.note))


def _facts(results: Results) -> str:
    """What is needed to do it again."""
    rows = {"command": results["command"], "recipe": results["recipe"]["sha256"]}
    for name, found in results["images"].items():
        if found is not None:
            rows[name] = f"{found['name']}, {found['n']:,} images, {found['fingerprint']}"
    for name in ("machine", "versions"):
        rows[name] = ", ".join(f"{key} {value}" for key, value in results[name].items())
    return facts_list((name, escape(value)) for name, value in rows.items())
