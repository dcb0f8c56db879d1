"""What the commands print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nndefense.evaluation import Evaluated, summary, write_report
from nndefense.files import write_json


def show(value: Any, text: str, as_json: bool) -> None:
    """Print the text for people, or the value as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def write(out: Path, results: dict[str, Any], evaluated: Evaluated, as_json: bool) -> None:
    """Write ``results.json`` and ``report.html``, and print the summary or, as JSON, the results."""
    write_json(out / "results.json", results)
    write_report(results, evaluated.gallery, out / "report.html")
    show(results, f"{summary(results)}\nresults: {out / 'results.json'}\nreport:  {out / 'report.html'}", as_json)
