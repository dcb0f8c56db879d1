"""From a recipe to its results, resuming where it was stopped."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nndefense.bars import progress_bar
from nndefense.errors import InputError
from nndefense.evaluation import CellStore
from nndefense.evaluation import results as evaluated
from nndefense.experiments.data import Images
from nndefense.experiments.measure import Judge
from nndefense.experiments.recipe import ExperimentRecipe
from nndefense.experiments.spread import differences
from nndefense.experiments.train import Workshop, runs_of, threats_of
from nndefense.files import read_json, sealed, write_json
from nndefense.locks import writes
from nndefense.models import resolve_device
from nndefense.versions import library_versions

FORMAT, VERSION = "nndefense-experiment", 1
NAME = "results.json"
_IDENTITY = "experiment.json"


@writes("out", holds=("cells", "databases", "pseudo-labels", "trainings"))
def run(
    recipe: ExperimentRecipe,
    images: Images,
    out: Path,
    *,
    device: str | torch.device = "auto",
    progress: bool = True,
    command: str = "",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Train and measure all that a recipe names, and write ``results.json``.

    Whatever is finished in ``out`` is not done again: trainings with the same settings, and blocks of attacked images
    of the same net. A training that was stopped goes on from its checkpoint. So a run that was killed is continued by
    the same call, and its results are those of one that was not.

    Args:
        recipe: at one scale.
        images: opened by :func:`nndefense.experiments.open_images`.
        out: folder for results, trainings and finished cells.
        device: as for :func:`nndefense.models.resolve_device`.
        progress: whether to show bars.
        command: recorded.
        say: called with a line for people before every training and measurement.

    Returns:
        The results, as plain values.

    Raises:
        InputError: ``out`` holds the results of another recipe, or a part of the recipe cannot be used.
        ModelError: a loss is no longer finite, or a file is damaged.
    """
    _claim(out, recipe, images)
    target = resolve_device(device)
    workshop = Workshop(recipe, images, out, target, progress)
    runs = runs_of(recipe)
    records, measured = [], []
    begun = time.perf_counter()
    for number, one in enumerate(runs, 1):
        say(f"{number}/{len(runs)} {one.name}: training")
        trained, record = workshop.train(one)
        records.append(record)
        threats, uses = threats_of(recipe, one), 1 + sum(len(form.rows) for form in recipe.forms_of(one.method))
        judged = uses * (len(images.test) + len(images.attacked) * len(threats))
        with progress_bar(total=judged, desc="measuring", unit=" images", shown=progress) as bar:
            judge = Judge(recipe, images.test, images.attacked, CellStore(out / "cells", "experiments"), bar.update)
            whose = {"run": one.name, "trained_for": record["threat"], "labels": record["labels"], "seed": one.seed}
            found = {one.method.name: judge.measured(trained, threats)}
            for name, defense in workshop.defenses(one, trained):
                found[name] = judge.measured(defense, threats)
        for name, entries in found.items():
            measured += [{**whose, "method": name, **entry} for entry in entries]
            shares = ", ".join(
                f"{entry['threat'] or 'clean'} {100 * entry['accuracy']:.2f} %"
                for entry in entries if entry["kind"] != "gray"
            )  # fmt: skip
            say(f"{number}/{len(runs)} {one.name}, {name}: {shares}; {time.perf_counter() - begun:.0f} s in all")
    results: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "recipe": {"sha256": recipe.sha256, **recipe.to_json()},
        "threats": [{"name": threat.name, "title": threat.title} for threat in recipe.threats],
        "images": images.to_json(),
        "machine": machine(target),
        "versions": library_versions(),
        "runs": records,
        "measurements": measured,
        "seconds": {
            "training": round(sum(record["training_seconds"] for record in records), 1),
            "attacks": round(sum(entry.get("seconds", 0.0) for entry in measured), 1),
            "this_process": round(time.perf_counter() - begun, 1),
        },
    }
    results = sealed({**results, "differences": differences(results)})
    write_json(out / NAME, results)
    return results


def read_results(path: Path) -> dict[str, Any]:
    """Read the ``results.json`` at ``path`` that :func:`run` wrote.

    Raises:
        DataError: it is missing, damaged, changed or something else.
    """
    return evaluated.read_results(path, FORMAT, VERSION, "the results of an experiment", "nndefense reproduce")


def machine(device: torch.device) -> dict[str, Any]:
    """What it runs on, as far as its figures depend on it."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _claim(out: Path, recipe: ExperimentRecipe, images: Images) -> None:
    """Write down whose folder it is, or check that it is this recipe's."""
    # More seeds or labels, other attacks of the report and other words are the same trainings with something added.
    identity = {"recipe": recipe.name, "scale": recipe.scale, "images": images.train.fingerprint}
    path = out / _IDENTITY
    if not path.exists():
        write_json(path, identity)
        return
    found = read_json(path)
    if found != identity:
        raise InputError(
            f"{out} holds the experiment {found.get('recipe')} at scale {found.get('scale')}, or one on other images: "
            "choose another --out"
        )
