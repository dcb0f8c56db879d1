"""The report of an evaluation: one self-contained HTML page, from the numbers of ``results.json``.

The page opens no connection and runs no script: style, figures and pictures are inside the file. Its words follow from
the numbers: they are computed by pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nndefense.errors import InputError
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.evaluation.report.abstention import abstention_section
from nndefense.evaluation.report.figures import figure_section
from nndefense.evaluation.report.gallery import GalleryRow, gallery_section
from nndefense.evaluation.report.records import Results, at_headline
from nndefense.evaluation.report.run import (
    audit_section,
    calibration_section,
    limits_section,
    records_section,
    run_section,
)
from nndefense.evaluation.report.table import ladder_section, table_section
from nndefense.evaluation.report.verdict import informed_record, obscurity, verdict, verdict_parts
from nndefense.evaluation.results import FORMAT, VERSION
from nndefense.files import write_bytes
from nndefense.reporting import page
from nndefense.reporting.wording import date_text, escape, number, percent


def write_report(results: dict[str, Any], gallery: Sequence[GalleryRow], path: Path) -> None:
    """Write the report as one self-contained HTML file.

    The file appears whole or not at all: it is written beside ``path`` and then renamed. Missing folders are made.

    Args:
        results: a ``results.json`` as a dict; calibration and surrogate may be None, records may be few.
        gallery: rows to show, in this order; may be empty.
        path: the HTML file; replaced if it exists.

    Raises:
        InputError: ``results`` is not a results file of this project, or a picture has a wrong shape.
        OSError: the file cannot be written.
    """
    content = report_html(results, gallery).encode()
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def report_html(results: Results, gallery: Sequence[GalleryRow] = ()) -> str:
    """The page of :func:`write_report` with its ``gallery``, as text; the same arguments always give the same text.

    Raises:
        InputError: results of another format or version, or of an evaluation that is not whole.
    """
    if results.get("format") != FORMAT or results.get("version") != VERSION:
        raise InputError(f"these results are not {FORMAT} version {VERSION}: write them with this version's evaluation")
    for key in ("dataset", "headline", "records"):
        if results.get(key) is None:
            raise InputError(f"these results have no {key!r}: run the evaluation again")
    dataset = results["dataset"]
    facts = [str(dataset["name"]), f"{number(dataset['n'])} images"]
    if results.get("created"):
        facts.append(date_text(str(results["created"])))
    sections = (
        ladder_section(results),
        *([said] if (said := abstention_section(results)) else []),
        table_section(results),
        figure_section(results),
        gallery_section(results, gallery),
        calibration_section(results),
        audit_section(results),
        run_section(results),
        limits_section(results),
        records_section(results),
    )
    title = f"Nearest-neighbour defence on {dataset['name']}"
    return page(title, sections, facts=facts, lead=_lead(results), description=verdict(results))


def _lead(results: Results) -> str:
    """The verdict and what qualifies it."""
    sentence = "".join(
        f'<strong class="{kind}">{escape(text)}</strong>' if kind else escape(text)
        for kind, text in verdict_parts(results)
    )
    sentence = sentence.replace(" %", "\u00a0%").replace(" points", "\u00a0points")
    sentence = sentence.replace("nearest-neighbour", '<span class="whole">nearest-neighbour</span>')
    notes = []
    if said := obscurity(results, after=True):
        whole = escape(said).replace("p = ", "p\u00a0=\u00a0")
        notes.append(f'<strong class="obscurity">{whole}</strong>')
    gray = at_headline(results, BARE, "gray") and at_headline(results, DEFENDED, "gray")
    bare, defended = (at_headline(results, defense, "black") for defense in (BARE, DEFENDED))
    if gray and bare is not None and defended is not None:
        notes.append(
            f"Under the black-box attack it is {percent(bare['accuracy'])}\u00a0% without the defence and "
            f"{percent(defended['accuracy'])}\u00a0% with it."
        )
    notes.append(
        'None of the attacks knows that a database is searched: read <a href="#limits">what these numbers do not '
        "show</a> before relying on them."
        if informed_record(results) is None
        else 'See <a href="#ladder">what it holds against whom</a>.'
    )
    return f'<p class="verdict">{sentence}</p>\n<p class="note">{" ".join(notes)}</p>'
