"""The tables of an experiment, from its results: published and measured figures in separate columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nndefense.experiments.spread import Results, Spread, accuracy_of, clean_of

BLANK = "–"


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: what it shows.
        columns: their headings.
        rows: one text a column.
        note: how to read it; may be empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, the first column to the left and the others to the right."""
        rule = ["---", *["--:"] * (len(self.columns) - 1)]
        lines = [f"**{self.title}**", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([*lines, "", self.note] if self.note else lines) + "\n"

    def text(self) -> str:
        """The table for a terminal."""
        rows = [self.columns, *self.rows]
        widths = [max(len(row[number]) for row in rows) for number in range(len(self.columns))]
        lines = [
            "  ".join(f"{cell:<{width}}" if number == 0 else f"{cell:>{width}}"
                      for number, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]  # fmt: skip
        return "\n".join([self.title, *lines])


def tables_of(results: Results) -> list[Table]:
    """All tables of an experiment: the one of its layout first, then intervals, differences and costs."""
    first = [_tradeoff(results)] if results["recipe"]["layout"] == "tradeoff" else []
    return [*first, _methods(results), *_differences(results), _costs(results)]


def percent(share: float | None) -> str:
    """``0.97371`` as ``97.37``; None as a dash."""
    return BLANK if share is None else f"{100 * share:.2f}"


def interval_text(spread: Spread | None) -> str:
    """A share in percent with its interval, ``97.37 [97.04, 97.66]``."""
    if spread is None:
        return BLANK
    return f"{percent(spread.mean)} [{percent(max(spread.low, 0))}, {percent(min(spread.high, 1))}]"


def points_text(spread: Spread) -> str:
    """A difference in percentage points with its interval, with signs."""
    return f"{100 * spread.mean:+.2f} [{100 * spread.low:+.2f}, {100 * spread.high:+.2f}]"


def _tradeoff(results: Results) -> Table:
    """The table of Tsipras et al. as the slides print it: a line for each radius, and the methods side by side."""
    recipe = results["recipe"]
    methods = [method["name"] for method in recipe["methods"]]
    labels = results["runs"][0]["labels"]
    columns = ["norm", "ε"]
    for prefix in ("standard acc.", "robust acc."):
        columns += [f"{prefix}: {method}" for method in methods]
    if recipe["published"]:
        for prefix in ("published standard", "published robust"):
            columns += [f"{prefix}: {method}" for method in methods]
    rows: list[list[str]] = []
    norm = ""
    for threat, name in zip(recipe["threats"], [one["name"] for one in results["threats"]], strict=True):
        if threat["norm"] != norm:
            norm = threat["norm"]
            own = clean_of(results, "standard", labels, name)
            first = [percent(own.mean if own else None)] + [BLANK] * (len(methods) - 1)
            published = _published(results, "standard", name)
            rows.append(
                [norm, "0", *first, *[BLANK] * len(methods)]
                + ([published[0], *[BLANK] * (2 * len(methods) - 1)] if recipe["published"] else [])
            )
        cells = [clean_of(results, method, labels, name) for method in methods]
        cells += [accuracy_of(results, method, labels, name) for method in methods]
        row = ["", threat["text"], *[percent(cell.mean if cell else None) for cell in cells]]
        if recipe["published"]:
            found = [_published(results, method, name) for method in methods]
            row += [one[0] for one in found] + [one[1] for one in found]
        rows.append(row)
    note = "In percent."
    if recipe["published"]:
        note += f" Published: {recipe['published_source']}."
    return Table("Standard and robust accuracy", tuple(columns), tuple(map(tuple, rows)), note)


def _methods(results: Results) -> Table:
    """A line for each threat, number of labels and method, with intervals."""
    recipe, runs = results["recipe"], results["runs"]
    labels = sorted({run["labels"] for run in runs})
    several = len(labels) > 1
    published = bool(recipe["published"]) and recipe["layout"] != "tradeoff"
    columns = ["method", "threat", *(["labels"] if several else []), "standard accuracy", "robust accuracy"]
    columns += ["published standard", "published robust"] if published else []
    rows = []
    for threat in results["threats"]:
        for count in labels:
            for method in recipe["methods"]:
                name = method["name"]
                clean, robust = (of(results, name, count, threat["name"]) for of in (clean_of, accuracy_of))
                if clean is None and robust is None:
                    continue
                row = [name, threat["title"], *([f"{count:,}"] if several else [])]
                row += [interval_text(clean), interval_text(robust)]
                rows.append(tuple(row + (list(_published(results, name, threat["name"])) if published else [])))
    over = f"over {recipe['seeds']} seeds (Student)" if recipe["seeds"] > 1 else "over the images (Wilson)"
    note = f"In percent, with 95 % intervals {over}. {_attacked(results)}"
    if published:
        note += f" Published: {recipe['published_source']}."
    return Table("Accuracies with intervals", tuple(columns), tuple(rows), note)


def _attacked(results: Results) -> str:
    images, recipe = results["images"], results["recipe"]
    text = f"Standard accuracy on {images['test']['n']:,} test images; robust accuracy on {images['attacked']['n']:,}"
    attacks = [
        f"{one['name'].upper()} of {one['steps']} steps"
        + (f" with {one['restarts']} restarts" if one["restarts"] > 1 else "")
        + (f" on the {one['loss']} loss" if one["loss"] != "cross-entropy" else "")
        for one in recipe["evaluation"]
    ]
    if not attacks:
        rotations, shifts = recipe["grid"]
        attacks = [f"the grid of {rotations} rotations and {shifts} x {shifts} shifts"]
    return f"{text} under {', then '.join(attacks)}, the worst for each image."


def _published(results: Results, method: str, threat: str) -> tuple[str, str]:
    """The published standard and robust accuracy of a method, as text."""
    found = [one for one in results["recipe"]["published"] if one["method"] == method and one["threat"] in ("", threat)]

    def text(key: str) -> str:
        return next((f"{one[key]:.2f}" for one in found if one[key] is not None), BLANK)

    return text("standard"), text("robust")


def _differences(results: Results) -> list[Table]:
    rows: list[tuple[str, ...]] = []
    titles = {threat["name"]: threat["title"] for threat in results["threats"]}
    for one in results["differences"]:
        cells = [points_text(Spread(**{**one[kind], "values": tuple(one[kind]["values"])})) for kind in _KINDS]
        ps = [", ".join("< 1e-300" if p == 0 else f"{p:.2g}" for p in one[f"{kind}_mcnemar"]) for kind in _KINDS]
        rows.append(
            (f"{one['first']} − {one['second']}", titles[one["threat"]], f"{one['labels']:,}", cells[0], ps[0])
            + (cells[1], ps[1])
        )
    if not rows:
        return []
    columns = ["difference", "threat", "labels"]
    columns += ["standard acc., points", "its p, by seed", "robust acc., points", "its p, by seed"]
    note = "Paired on the same seeds and images; 95 % intervals; p: exact McNemar test on the images of one seed."
    return [Table("Differences", tuple(columns), tuple(rows), note)]


_KINDS = ("standard", "robust")


def _costs(results: Results) -> Table:
    """What each training and its measurement took."""
    seconds: dict[str, float] = {}
    for found in results["measurements"]:
        seconds[found["run"]] = seconds.get(found["run"], 0.0) + found.get("seconds", 0.0)
    rows = [
        (
            run["name"],
            run["objective"],
            f"{run['epochs_done']}",
            f"{run['training_seconds']:,.0f}",
            f"{seconds.get(run['name'], 0.0):,.0f}",
            "yes" if run["catastrophic_overfitting"] else "no",
            str(run["fingerprint"])[:12],
        )
        for run in results["runs"]
    ]
    columns = ("run", "objective", "epochs", "training, s", "attacks, s", "catastrophic overfitting", "weights")
    device = results["machine"]
    note = f"On {device['device']}, {device['threads']} threads."
    return Table("Trainings", columns, tuple(rows), note)


def markdown_of(results: Results, figures: Sequence[str] = ()) -> str:
    """The whole of an experiment in Markdown: what was run, tables, and figures by file name."""
    recipe = results["recipe"]
    head: list[str] = [f"# {recipe['title']} ({recipe['scale']} scale)", "", recipe["about"].strip(), ""]
    if results.get("command"):
        head += [f"`{results['command']}`", ""]
    body: list[Any] = [table.markdown() for table in tables_of(results)]
    pictures = [f"![{recipe['title']}]({name})\n" for name in figures]
    sources = ["Sources: " + "; ".join(recipe["sources"]) + ".\n"] if recipe["sources"] else []
    return "\n".join([*head, body[0], *pictures, *body[1:], *sources])
