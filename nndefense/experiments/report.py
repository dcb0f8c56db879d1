"""The files of an experiment, from its results: tables, the figure, and one self-contained page.

Published figures stand apart from measured ones: in a table of their own, or where that is the published
one again, in columns of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nndefense.attacks.registry import attack_name
from nndefense.experiments.answer import QUESTION, answer
from nndefense.experiments.figures import figure_of
from nndefense.experiments.spread import Results, Spread, accuracy_of, clean_of, gray_of, subjects_of
from nndefense.files import write_bytes
from nndefense.locks import writes
from nndefense.reporting import Table, facts_list, figure, inline, page, paragraphs, picture, section
from nndefense.reporting.wording import BLANK, date_text, escape, p_text, percent, percent_in, points

TABLE, REPORT, FIGURE = "table.md", "report.html", "figure"


def tables_of(results: Results) -> list[Table]:
    """All tables of an experiment: the one of its layout first, then intervals, differences and costs."""
    first = [_tradeoff(results)] if results["recipe"]["layout"] == "tradeoff" else []
    return [*first, _methods(results), *_published_apart(results), *_differences(results), _costs(results)]


def _share(spread: Spread | None) -> str:
    return percent(spread.mean if spread else None, 2)


def _within(spread: Spread | None) -> str:
    return percent_in(spread.mean, spread.low, spread.high) if spread else BLANK


def _tradeoff(results: Results) -> Table:
    """The table of Tsipras et al. as the slides print it: a line for each radius, and the methods side by side."""
    recipe = results["recipe"]
    methods = [method["name"] for method in recipe["methods"]]
    labels = results["runs"][0]["labels"]
    kinds = ["standard acc.", "robust acc."]
    kinds += ["published standard", "published robust"] if recipe["published"] else []
    columns = ["norm", "ε", *(f"{kind}: {method}" for kind in kinds for method in methods)]
    rows: list[list[str]] = []
    norm = ""
    for threat, name in zip(recipe["threats"], [one["name"] for one in results["threats"]], strict=True):
        if threat["norm"] != norm:
            norm = threat["norm"]
            own = clean_of(results, "standard", labels, name)
            first = [_share(own)] + [BLANK] * (len(methods) - 1)
            published = _published(results, "standard", name)
            rows.append(
                [norm, "0", *first, *[BLANK] * len(methods)]
                + ([published[0], *[BLANK] * (2 * len(methods) - 1)] if recipe["published"] else [])
            )
        cells = [clean_of(results, method, labels, name) for method in methods]
        cells += [accuracy_of(results, method, labels, name) for method in methods]
        row = ["", threat["text"], *map(_share, cells)]
        if recipe["published"]:
            found = [_published(results, method, name) for method in methods]
            row += [one[0] for one in found] + [one[1] for one in found]
        rows.append(row)
    note = "In percent."
    if recipe["published"]:
        note += f" Published: {recipe['published_source']}."
    return Table(tuple(columns), tuple(map(tuple, rows)), "Standard and robust accuracy", note)


def _methods(results: Results) -> Table:
    """A line for each threat, number of labels and method, with intervals."""
    recipe, runs = results["recipe"], results["runs"]
    labels = sorted({run["labels"] for run in runs})
    several = len(labels) > 1
    columns = ["method", "threat", *(["labels"] if several else []), "standard accuracy", "robust accuracy"]
    kinds = [clean_of, accuracy_of]
    if recipe.get("forms"):
        columns.insert(-1, "gray box")
        kinds.insert(1, gray_of)
    rows = []
    for threat in results["threats"]:
        for count in labels:
            for name in subjects_of(results):
                found = [of(results, name, count, threat["name"]) for of in kinds]
                if any(found):
                    row = [name, threat["title"], *([f"{count:,}"] if several else [])]
                    rows.append((*row, *map(_within, found)))
    over = f"over {recipe['seeds']} seeds (Student)" if recipe["seeds"] > 1 else "over the images (Wilson)"
    note = f"In percent, with 95 % intervals {over}. {_attacked(results)}"
    return Table(tuple(columns), tuple(rows), "Accuracies with intervals", note)


def _attacked(results: Results) -> str:
    images, recipe = results["images"], results["recipe"]
    text = f"Standard accuracy on {images['test']['n']:,} test images; robust accuracy on {images['attacked']['n']:,}"
    attacks = [
        f"{attack_name(one['name'])} of "
        + (f"{one['steps']} steps" if one.get("steps") else f"{one['queries']:,} queries")
        + (f" with {one['restarts']} restarts" if one["restarts"] > 1 else "")
        + (f" on the {one['loss']} loss" if one["loss"] != "cross-entropy" else "")
        for one in recipe["evaluation"]
    ]
    if not attacks:
        rotations, shifts = recipe["grid"]
        attacks = [f"the grid of {rotations} rotations and {shifts} x {shifts} shifts"]
    if recipe.get("forms"):
        attacks.append(f"on a form the adaptive attack of {recipe['adaptive_steps']} steps, which knows everything")
    return f"{text} under {', then '.join(attacks)}, the worst for each image."


def _published_apart(results: Results) -> list[Table]:
    """Figures from papers, each with its source: they are of other nets and data, and stand beside no measured one."""
    recipe = results["recipe"]
    if not recipe["published"] or recipe["layout"] == "tradeoff":
        return []
    titles = {threat["name"]: threat["title"] for threat in results["threats"]}
    rows = tuple(
        (
            one["method"], titles.get(one["threat"], "all" if len(titles) > 1 else next(iter(titles.values()))),
            *(BLANK if one[kind] is None else f"{one[kind]:.2f}" for kind in ("standard", "robust")),
            one["source"] or recipe["published_source"],
        )
        for one in recipe["published"]
    )  # fmt: skip
    columns = ("like the method", "threat", "standard accuracy", "robust accuracy", "source")
    return [Table(columns, rows, "Published figures", "In percent; each for the net and the data of its source.")]


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
        cells = [points(one[kind]["mean"], one[kind]["low"], one[kind]["high"]) for kind in _KINDS]
        ps = [", ".join(p_text(p, 1e-300) for p in one[f"{kind}_mcnemar"]) for kind in _KINDS]
        rows.append(
            (f"{one['first']} − {one['second']}", titles[one["threat"]], f"{one['labels']:,}", cells[0], ps[0])
            + (cells[1], ps[1])
        )
    if not rows:
        return []
    columns = ["difference", "threat", "labels"]
    columns += ["standard acc., points", "its p, by seed", "robust acc., points", "its p, by seed"]
    note = "Paired on the same seeds and images; 95 % intervals; p: exact McNemar test on the images of one seed."
    return [Table(tuple(columns), tuple(rows), "Differences", note)]


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
    return Table(columns, tuple(rows), "Trainings", note)


def markdown_of(results: Results, figures: Sequence[str] = ()) -> str:
    """The whole of an experiment in Markdown: what was run, tables, and figures by file name."""
    recipe = results["recipe"]
    head: list[str] = [f"# {recipe['title']} ({recipe['scale']} scale)", "", recipe["about"].strip(), ""]
    if results.get("command"):
        head += [f"`{results['command']}`", ""]
    if recipe.get("forms"):
        head += [f"**{QUESTION}** {answer(results)}", ""]
    body: list[Any] = [table.markdown() for table in tables_of(results)]
    pictures = [f"![{recipe['title']}]({name})\n" for name in figures]
    sources = ["Sources: " + "; ".join(recipe["sources"]) + ".\n"] if recipe["sources"] else []
    return "\n".join([*head, body[0], *pictures, *body[1:], *sources])


@writes("out")
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
    answered = [section(QUESTION, paragraphs(answer(results)))] if recipe.get("forms") else []
    sections = (
        *answered,
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
