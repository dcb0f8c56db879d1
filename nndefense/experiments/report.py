"""The files of an experiment, from its results: tables, the figure, and one self-contained page.

Published figures are of other nets, data and attacks, and stand in a table of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nndefense.attacks.registry import attack_name
from nndefense.experiments.answer import QUESTION, answer
from nndefense.experiments.figures import figure_of
from nndefense.experiments.spread import (
    Results,
    Spread,
    accuracy_of,
    certified_of,
    clean_of,
    confidence_of,
    gray_of,
    subjects_of,
)
from nndefense.files import write_bytes
from nndefense.locks import writes
from nndefense.reporting import Table, facts_list, figure, inline, page, paragraphs, picture, section
from nndefense.reporting.wording import BLANK, date_text, escape, p_text, percent, percent_in, plural, points

TABLE, REPORT, FIGURE = "table.md", "report.html", "figure"


def tables_of(results: Results) -> list[Table]:
    """All tables of ``results``: that of the layout, published figures, intervals, differences, costs."""
    first = {"tradeoff": [_tradeoff], "errors": [_errors]}.get(results["recipe"]["layout"], [])
    measured = [*(table(results) for table in first), _methods(results)]
    measured[0] = replace(measured[0], note=f"{measured[0].note} {trained_text(results)}".strip())
    return [measured[0], *_published(results), *measured[1:], *_differences(results), _costs(results)]


def _share(spread: Spread | None) -> str:
    return percent(spread.mean if spread else None, 2)


def _within(spread: Spread | None) -> str:
    return percent_in(spread.mean, spread.low, spread.high) if spread else BLANK


def trained_text(results: Results) -> str:
    """What was trained, in a sentence or one for each kind of net: architecture, images, epochs, steps, seconds."""
    kinds: dict[str, dict[str, None]] = {}
    for run in results["runs"]:
        kinds.setdefault(_trained(results, run), {})[run["method"]] = None
    whose = [f"{', '.join(methods)}: {text}" if len(kinds) > 1 else text for text, methods in kinds.items()]
    seconds = [run["training_seconds"] for run in results["runs"]]
    least, most = f"{min(seconds):,.0f}", f"{max(seconds):,.0f}"
    took = most if least == most else f"{least} to {most}"
    return f"Trained: {'; '.join(whose)}. {took} s a net on {results['machine']['device']}."


def _trained(results: Results, run: Results) -> str:
    size = f" ({run['parameters']:,} weights)" if "parameters" in run else ""
    steps = f", {run['steps_done']:,} steps of {run['settings']['batch_size']}" if "steps_done" in run else ""
    return (
        f"{run.get('architecture', results['recipe']['architecture'])}{size} on {_images_of(run)}, "
        f"{plural(run['epochs_done'], 'epoch')}{steps}"
    )


def _images_of(run: Results) -> str:
    pool = run.get("unlabelled")
    return f"{run['labels']:,} images" + (f" and {pool['n']:,} of the pool" if pool else "")


def _tradeoff(results: Results) -> Table:
    """The table of Tsipras et al. as the slides print it: a line for each radius, and the methods side by side."""
    labels = results["runs"][0]["labels"]

    def cell(method: str, threat: str, robust: bool) -> str:
        return _share((accuracy_of if robust else clean_of)(results, method, labels, threat))

    return _by_radius(results, cell, "Standard and robust accuracy", "In percent.")


def _by_radius(results: Results, cell: Callable[[str, str, bool], str], title: str, note: str) -> Table:
    recipe = results["recipe"]
    methods = [method["name"] for method in recipe["methods"]]
    kinds = (("standard acc.", False), ("robust acc.", True))
    columns = ["norm", "ε", *(f"{kind}: {method}" for kind, _ in kinds for method in methods)]
    rows: list[list[str]] = []
    norm = ""
    for threat, name in zip(recipe["threats"], [one["name"] for one in results["threats"]], strict=True):
        if threat["norm"] != norm:
            norm = threat["norm"]
            rows.append([norm, "0", cell("standard", name, False), *[BLANK] * (2 * len(methods) - 1)])
        rows.append(["", threat["text"], *(cell(method, name, robust) for _, robust in kinds for method in methods)])
    return Table(tuple(columns), tuple(map(tuple, rows)), title, note)


def _errors(results: Results) -> Table:
    """The table of Goodfellow et al.: the error of every net under the attack, and how sure it is of what is wrong."""
    runs = results["runs"]
    rows = []
    for method in results["recipe"]["methods"]:
        for threat in results["threats"]:
            of = (results, method["name"], runs[0]["labels"], threat["name"])
            sure = confidence_of(*of)
            if (robust := accuracy_of(*of)) is not None:
                clean = clean_of(*of)
                rows.append((method["name"], threat["title"], _wrong(clean), _wrong(robust), percent(sure, 1)))
    columns = ("net", "attack", "error, clean", "error, attacked", "mean confidence on the errors")
    note = (
        "In percent, of all images; the confidence is that in the wrong class, over the attacked images that are wrong."
    )
    return Table(columns, tuple(rows), "Error and confidence", note)


def _wrong(spread: Spread | None) -> str:
    return percent(1 - spread.mean if spread else None, 2)


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
    if recipe.get("certified"):
        columns.append("certified")
        kinds.append(certified_of)
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
    if recipe.get("certified"):
        note += f" Certified: proven by linear bounds, of the first {recipe['certified']} of these images."
    return Table(tuple(columns), tuple(rows), "Accuracies with intervals", note)


def _attacked(results: Results) -> str:
    images, recipe = results["images"], results["recipe"]
    text = f"Standard accuracy on {images['test']['n']:,} test images; robust accuracy on {images['attacked']['n']:,}"
    attacks = [
        f"{attack_name(one['name'])} of "
        + (plural(one["steps"], "step") if one.get("steps") else f"{one['queries']:,} queries")
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


def _published(results: Results) -> list[Table]:
    """Figures from papers, each with source and setting, apart from the measured ones: other nets and data."""
    recipe = results["recipe"]
    if not recipe["published"]:
        return []
    title = "Published figures"
    told = [[one.get(key) or recipe.get(f"published_{key}", "") for key in ("source", "setting")]
            for one in recipe["published"]]  # fmt: skip
    if recipe["layout"] == "tradeoff":
        found = {(one["method"], one["threat"]): one for one in recipe["published"]}

        def cell(method: str, threat: str, robust: bool) -> str:
            one = found.get((method, threat), found.get((method, "")))
            return BLANK if one is None else _printed(one["robust" if robust else "standard"])

        sources = "; ".join(dict.fromkeys(": ".join(filter(None, one)) for one in told))
        return [_by_radius(results, cell, title, f"In percent. {sources}.")]
    kinds = {"standard": "standard accuracy", "robust": "robust accuracy", "error": "error, attacked",
             "confidence": "mean confidence"}  # fmt: skip
    shown = [kind for kind in kinds if any(one.get(kind) is not None for one in recipe["published"])]
    rows = tuple(
        (one.get("name") or one["method"], *(_printed(one.get(kind)) for kind in shown), setting, source)
        for one, (source, setting) in zip(recipe["published"], told, strict=True)
    )
    columns = ("published for", *(kinds[kind] for kind in shown), "setting", "source")
    return [Table(columns, rows, title, "In percent; each for the net, the data and the attack of its own setting.")]


def _printed(value: float | None) -> str:
    return BLANK if value is None else f"{value:.2f}"


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
            run.get("architecture", results["recipe"]["architecture"]),
            _images_of(run),
            f"{run['epochs_done']}",
            f"{run['steps_done']:,}" if "steps_done" in run else BLANK,
            f"{run['training_seconds']:,.0f}",
            f"{seconds.get(run['name'], 0.0):,.0f}",
            "yes" if run["catastrophic_overfitting"] else "no",
            str(run["fingerprint"])[:12],
        )
        for run in results["runs"]
    ]
    columns = ("run", "objective", "net", "trained on", "epochs", "steps", "training, s", "attacks, s",
               "catastrophic overfitting", "weights")  # fmt: skip
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
