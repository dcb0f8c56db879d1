"""What the commands print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nndefense.evaluation import summary


def show(value: Any, text: str, as_json: bool) -> None:
    """Print the text for people, or the value as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def show_results(out: Path, results: dict[str, Any], as_json: bool) -> None:
    """Print the summary of an evaluation and where its files are or, as JSON, the results."""
    show(results, f"{summary(results)}\nresults: {out / 'results.json'}\nreport:  {out / 'report.html'}", as_json)
