"""The files of an experiment: a table in Markdown, the figure, and one self-contained page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nndefense.evaluation.report.document import document
from nndefense.evaluation.report.wording import date_text, escape
from nndefense.experiments.figures import figure_of
from nndefense.experiments.spread import Results
from nndefense.experiments.tables import Table, markdown_of, tables_of
from nndefense.files import write_atomically

TABLE, REPORT, FIGURE = "table.md", "report.html", "figure"
_DPI = 150


def write_outputs(results: Results, out: Path) -> list[Path]:
    """Write ``table.md``, ``figure.png``, ``figure.svg`` and ``report.html`` beside ``results.json``.

    Everything follows from the results: the files can be made again without a training.

    Args:
        results: as :func:`nndefense.experiments.run` returns them or ``results.json`` holds them.
        out: an existing folder.

    Returns:
        The paths, in that order.
    """
    figure = figure_of(results)
    paths = [out / TABLE, out / f"{FIGURE}.png", out / f"{FIGURE}.svg", out / REPORT]
    _write_text(paths[0], markdown_of(results, [paths[1].name]))
    for path, metadata in zip(paths[1:3], ({"Software": None}, {"Date": None}), strict=True):
        _save(figure, path, metadata)
    _write_text(paths[3], report_html(results, paths[2].read_bytes()))
    return paths


def report_html(results: Results, svg: bytes) -> str:
    """The page as text: no script, no connection, style and figure inside it.

    Args:
        results: of an experiment.
        svg: the figure; shown as a picture, so that nothing in it can act.
    """
    recipe = results["recipe"]
    title = f"{recipe['title']} ({recipe['scale']} scale)"
    tables = [_table(table) for table in tables_of(results)]
    picture = base64.b64encode(svg).decode("ascii")
    about = "".join(f"<p>{escape(text.strip())}</p>" for text in recipe["about"].split("\n\n") if text.strip())
    sources = f"<p>Sources: {escape('; '.join(recipe['sources']))}.</p>"
    body = f"""<header class="top">
<p class="eyebrow">{escape(results["images"]["test"]["name"])} · {escape(date_text(results["created"]))}</p>
<h1>{escape(title)}</h1>
</header>
<main>
<section>{about}{sources}</section>
{tables[0]}
<section><figure><img alt="{escape(title)}: figure of the table's figures" style="max-width:100%;background:#fff"
src="data:image/svg+xml;base64,{picture}"></figure></section>
{"".join(tables[1:])}
{_facts(results)}
</main>"""
    return document(title, body)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="scroll"><table class="plain"><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>{note}</section>\n"
    )


def _facts(results: Results) -> str:
    """What is needed to do it again."""
    images, recipe = results["images"], results["recipe"]
    rows: list[tuple[str, Any]] = [("command", results["command"]), ("recipe", recipe["sha256"])]
    rows += [
        (name, f"{found['name']}, {found['n']:,} images, {found['fingerprint']}")
        for name, found in images.items()
        if found is not None
    ]
    rows += [("machine", ", ".join(f"{key} {value}" for key, value in results["machine"].items()))]
    rows += [("versions", ", ".join(f"{key} {value}" for key, value in results["versions"].items()))]
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td style="white-space:normal">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<section><h2>What was run</h2><table class="plain"><tbody>{cells}</tbody></table></section>'


def _save(figure: Figure, path: Path, metadata: dict[str, None]) -> None:
    def write(part: Path) -> None:
        figure.savefig(part, format=path.suffix[1:], dpi=_DPI, metadata=metadata)

    write_atomically(path, write)


def _write_text(path: Path, text: str) -> None:
    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8", newline="\n")

    write_atomically(path, write)
