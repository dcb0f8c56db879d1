"""What the commands print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nndefense.cli import inputs
from nndefense.database import ImageDatabase
from nndefense.evaluation import Evaluated, summary, write_report
from nndefense.files import write_json


def show(value: Any, text: str, as_json: bool) -> None:
    """Print the text for people, or the value as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def describe(database: ImageDatabase, as_json: bool) -> None:
    """Print what a database is."""
    manifest = database.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    calibration = inputs.stored_calibration(database.path)
    chosen = {name: calibration["chosen"][name] for name in ("k", "weighting")} if calibration else None
    found = {
        "database": str(database.path),
        "rows": len(database),
        "dimension": database.dimension,
        "classes": len(database.classes),
        "feature": manifest.feature,
        "classifier": manifest.classifier,
        "data": manifest.data,
        "index": manifest.index,
        "storage": manifest.storage,
        "rejected": manifest.rejected,
        "fingerprint": database.fingerprint,
        "bytes": size,
        "created": manifest.created,
        "versions": manifest.versions,
        "calibrated": chosen,
    }
    text = (
        f"{database.path}: {len(database):,} rows x {database.dimension} dimensions, {len(database.classes)} classes\n"
        f"feature    {database.feature}\n"
        f"index      {manifest.index['factory']} ({manifest.index['metric']})\n"
        f"data       {manifest.data['name']}\n"
        f"classifier {manifest.classifier['source']} ({manifest.classifier['fingerprint'][:12]})\n"
        f"size       {size / 1e6:.1f} MB, built {manifest.created}"
    )
    if "search" in manifest.index:
        text += f"\n{search_text(manifest.index['search'])}"
    if manifest.rejected:
        told = ", ".join(f"{count:,} {kind}" for kind, count in manifest.rejected.items())
        text += f"\nleft out   {told}"
    if chosen:
        text += f"\ncalibrated k {chosen['k']}, weighting {chosen['weighting']}"
    show(found, text, as_json)


def search_text(search: dict[str, Any]) -> str:
    """What was measured of an index, as one line."""
    setting = ", ".join(f"{name} {value}" for name, value in search["setting"].items())
    return (
        f"search     {f'{setting}: ' if setting else ''}recall@{search['k']} {search['recall']:.3f} "
        f"(wanted {search['wanted']:g}), {search['queries_per_second']:,.0f} queries/s"
    )


def write(out: Path, results: dict[str, Any], evaluated: Evaluated, as_json: bool) -> None:
    """Write ``results.json`` and ``report.html``, and print the summary or, as JSON, the results."""
    write_json(out / "results.json", results)
    write_report(results, evaluated.gallery, out / "report.html")
    show(results, f"{summary(results)}\nresults: {out / 'results.json'}\nreport:  {out / 'report.html'}", as_json)
