"""The files of a comparison: the table in Markdown, the figure, and one self-contained page."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from nndefense.comparison.figure import figure_of
from nndefense.comparison.table import (
    COLUMNS,
    PUBLISHED_COLUMNS,
    Cell,
    Results,
    budgets,
    markdown_of,
    table_of,
    unmatched,
    weaker_than_ignorant,
)
from nndefense.evaluation.report.document import document
from nndefense.evaluation.report.wording import date_text, escape, number, percent
from nndefense.files import write_atomically

TABLE, REPORT, FIGURE = "table.md", "report.html", "figure.png"
_DPI = 150
_WIDE = "white-space:normal;min-width:13rem"
_HEADS = {
    "clean": "clean",
    "gray": "gray box",
    "black": "black box",
    "informed": "knows the defence",
    "worst": "worst case",
}


def write_comparison(results: Results, out: Path) -> list[Path]:
    """Write ``table.md``, ``figure.png`` and ``report.html`` into an existing folder; all follows from the results."""
    figure = figure_of(results)
    paths = [out / TABLE, out / FIGURE, out / REPORT]
    vector = io.BytesIO()
    figure.savefig(vector, format="svg", metadata={"Date": None})
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI, metadata={"Software": None})
    contents = (markdown_of(results).encode(), picture.getvalue(), page_of(results, vector.getvalue()).encode())
    for path, content in zip(paths, contents, strict=True):
        _write(path, content)
    return paths


def _write(path: Path, content: bytes) -> None:
    def write(draft: Path) -> None:
        draft.write_bytes(content)

    write_atomically(path, write)


def page_of(results: Results, svg: bytes) -> str:
    """The page as text: no script, no connection, style and figure inside it."""
    recipe, dataset, headline = results["recipe"], results["dataset"], results["headline"]
    picture = base64.b64encode(svg).decode("ascii")
    about = "".join(f"<p>{escape(' '.join(text.split()))}</p>" for text in recipe["about"].split("\n\n"))
    title = f"{recipe['title']}: {dataset['name']}"
    body = f"""<header class="top">
<p class="eyebrow">{number(dataset["n"])} images of {escape(dataset["name"])} · {escape(headline["norm"])}
{number(headline["eps"])} · {escape(date_text(results["created"]))}</p>
<h1>{escape(title)}</h1>
</header>
<main>
<section style="margin-top:0">{about}</section>
<section><figure><img alt="Accuracy of every defence, clean, under the attack that ignores it, and in the worst case"
style="max-width:100%;background:#fff" src="data:image/svg+xml;base64,{picture}"></figure></section>
{_main_table(results)}
{_weak(results)}
{_published(results)}
{_others(results)}
{_defences(results)}
{_facts(results)}
</main>"""
    return document(title, body)


def _main_table(results: Results) -> str:
    headline = results["headline"]
    printed = results["published"]
    return f"""<section><h2>Measured</h2>
<p>Accuracy in % with the Wilson 95 % interval, at {escape(headline["norm"])} {number(headline["eps"])}. Gray box: the
attack is computed on the bare net and ignores the defence. Black box: on a net that was trained apart. Knows the
defence: computed through the defence itself, the strongest of the attacks. Worst case: images that survive all of
them. The printed figures ({escape(printed["title"])}: {escape(printed["setting"])}) are another experiment.</p>
{_table(results, None, published=True)}</section>"""


def _others(results: Results) -> str:
    tables = [
        f"<details><summary>{escape(results['headline']['norm'])} {number(eps)}</summary>"
        f"{_table(results, eps, published=False)}</details>"
        for eps in budgets(results)[:-1]
        if eps > 0
    ]
    return f"<section><h2>Other budgets</h2>{''.join(tables)}</section>" if tables else ""


def _table(results: Results, eps: float | None, *, published: bool) -> str:
    heads = [f'<th scope="col">{head}</th>' for head in _HEADS.values()]
    heads += ['<th scope="col">ms an image</th>']
    if published:
        heads += [f'<th scope="col">printed: {column}</th>' for column in PUBLISHED_COLUMNS]
    lines = []
    for row in table_of(results, eps):
        cells = _merged([row.cells[column] for column in COLUMNS], _measured)
        cells += f"<td>{row.time}</td>"
        if published:
            cells += _merged([row.published[column] for column in PUBLISHED_COLUMNS], _printed)
        lines.append(f'<tr><th scope="row" style="{_WIDE}">{escape(row.name)}</th>{cells}</tr>')
    head = f'<tr><th scope="col">defence</th>{"".join(heads)}</tr>'
    return (
        f'<div class="scroll"><table class="plain dense"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
        "</div>"
    )


def _merged(cells: Sequence[Cell], written: Callable[[Cell], str]) -> str:
    """The cells of a row; neighbours that are empty for the same reason become one, which says it once."""
    found = ""
    for reason, run in itertools.groupby(cells, key=lambda cell: cell.reason):
        same = list(run)
        if reason:
            found += f'<td colspan="{len(same)}" style="white-space:normal"><small>{escape(reason)}</small></td>'
        else:
            found += "".join(written(cell) for cell in same)
    return found


def _measured(cell: Cell) -> str:
    if cell.accuracy is None or cell.low is None or cell.high is None:
        return "<td></td>"
    attack = f"<br><small>{escape(cell.attack)}</small>" if cell.attack else ""
    return f"<td>{percent(cell.accuracy)} <small>{percent(cell.low)}–{percent(cell.high)}</small>{attack}</td>"


def _printed(cell: Cell) -> str:
    return "<td></td>" if cell.accuracy is None else f"<td><i>{percent(cell.accuracy)}</i></td>"


def _weak(results: Results) -> str:
    weak = weaker_than_ignorant(results)
    if not weak:
        return ""
    return (
        f"<section><h2>Where the informed attack is too weak</h2><p>Against {escape(', '.join(weak))} the attack that "
        "knows the defence did worse than the one that ignores it, by more than chance. It could have ignored it too: "
        "only the worst case may be read there, and a stronger attack be tried.</p></section>"
    )


def _published(results: Results) -> str:
    rows = "".join(
        f'<tr><th scope="row" style="white-space:normal">{escape(row["name"])}</th>'
        + "".join(
            f"<td>{'blank' if row[column] is None else percent(row[column])}</td>" for column in PUBLISHED_COLUMNS
        )
        + "</tr>"
        for row in unmatched(results)
    )
    caveats = "".join(f"<li>{escape(caveat)}</li>" for caveat in results["published"]["caveats"])
    table = (
        '<p>Printed rows that have no counterpart here:</p><table class="plain dense">'
        '<thead><tr><th scope="col">printed row</th><th scope="col">clean</th><th scope="col">gray</th>'
        f'<th scope="col">black</th></tr></thead><tbody>{rows}</tbody></table>'
        if rows
        else ""
    )
    return (
        f'<section><h2>Reading the printed figures</h2>{table}<ul style="padding-left:1.2em">{caveats}</ul></section>'
    )


def _defences(results: Results) -> str:
    rows = "".join(
        f'<tr><th scope="row" style="white-space:normal">{escape(row.name)}</th>'
        f'<td style="white-space:normal">{escape(row.facts or row.cells["clean"].reason)}</td></tr>'
        for row in table_of(results)
    )
    return f'<section><h2>The defences</h2><table class="plain dense"><tbody>{rows}</tbody></table></section>'


def _facts(results: Results) -> str:
    scope = results["recipe"]["scope"]
    rows = [
        ("command", results["command"]),
        ("recipe", results["recipe"]["sha256"]),
        ("reported on", _images(results["dataset"])),
        ("made from", _images(results["training_set"])),
        ("classifier", _net(results["classifier"])),
        ("surrogate", _net(results["surrogate"]) if results["surrogate"] else "none given"),
        (
            "attacks",
            f"gray and black box: PGD, {scope['steps']} steps, {scope['restarts']} start; through the defence: PGD, "
            f"{scope['white_steps']} steps, {scope['draws']} draws a step where it is random; on retrieval: "
            f"{scope['adaptive_steps']} steps",
        ),
        ("seconds", f"{results['seconds']:,.0f} in the last process"),
        ("versions", ", ".join(f"{name} {value}" for name, value in results["versions"].items())),
    ]
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td style="white-space:normal">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<section><h2>What was run</h2><table class="plain dense"><tbody>{cells}</tbody></table></section>'


def _images(found: Results) -> str:
    return f"{found['name']}, {found['n']:,} images, {found['fingerprint']}"


def _net(found: Results) -> str:
    return f"{found['source']}, {found['arch']}, {found['fingerprint']}"
