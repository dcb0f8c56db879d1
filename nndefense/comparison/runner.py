"""From a recipe to its results: make every row, attack it, and write down all of it, resuming where it was stopped."""

from __future__ import annotations

import datetime
import time
from typing import Any

from tqdm import tqdm

from nndefense.comparison.published import CAVEATS, PUBLISHED, SETTING, TITLE
from nndefense.comparison.recipe import ComparisonRecipe
from nndefense.comparison.row import Row, make_row
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError
from nndefense.evaluation import AttackSettings, CellStore, evaluate, threats_of, worst_cases
from nndefense.evaluation.results import identity
from nndefense.files import make_folder, read_json, write_json
from nndefense.pipeline.materials import Materials
from nndefense.versions import library_versions

FORMAT, VERSION = "nndefense-comparison", 1
NAME = "results.json"


def run_comparison(
    recipe: ComparisonRecipe, materials: Materials, test: ImageDataset, command: str = ""
) -> dict[str, Any]:
    """Measure every row clean, under the black and the gray box, and under attackers who know it.

    What is finished in ``materials.out`` (nets, databases, cells) is not made again, so a run that was killed is
    continued by the same call.

    Args:
        recipe: the rows and how they are attacked.
        materials: opened images and nets, of the recipe's scope and seed, and where to put what is made.
        test: labelled images to report on.
        command: recorded.

    Returns:
        The results as plain values, which also stand in ``results.json``.

    Raises:
        NNDefenseError: images, nets or settings that do not fit together.
    """
    make_folder(materials.out)
    begun = time.perf_counter()
    rows = []
    for spec in recipe.rows:
        started = time.perf_counter()
        row = make_row(materials, spec)
        row.facts["seconds to make"] = round(time.perf_counter() - started, 1)
        rows.append(row)
    records = _measure(recipe, materials, test, rows)
    plain = [record.to_json() for record in records]
    plain += worst_cases(plain)
    classifier, surrogate, scope = materials.classifier, materials.surrogate, recipe.scope
    results: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "recipe": {"sha256": recipe.sha256, **recipe.to_json()},
        "dataset": _images(test),
        "training_set": _images(materials.train),
        "classifier": identity(classifier),
        "surrogate": identity(surrogate) if surrogate is not None else None,
        "headline": {"norm": scope.norm, "eps": scope.headline},
        "rows": [_described(row) for row in rows],
        "published": {
            "title": TITLE,
            "setting": SETTING,
            "rows": {
                name: {"name": row.name, "clean": row.clean, "gray": row.gray, "black": row.black, "note": row.note}
                for name, row in PUBLISHED.items()
            },
            "caveats": list(CAVEATS),
        },
        "records": plain,
        "versions": library_versions(),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    write_json(materials.out / NAME, results)
    return results


def read_comparison(path: Any) -> dict[str, Any]:
    """Read a ``results.json`` that :func:`run_comparison` wrote.

    Raises:
        DataError: it is missing, damaged or something else.
    """
    found = read_json(path)
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path} does not hold the results of a comparison: run nndefense evaluate table2 again")
    return found


def _measure(recipe: ComparisonRecipe, materials: Materials, test: ImageDataset, rows: list[Row]) -> list[Any]:
    scope, classifier, surrogate = recipe.scope, materials.classifier, materials.surrogate
    subjects = [row.subject for row in rows if row.subject is not None]
    pgd = AttackSettings("pgd", scope.norm, scope.eps, scope.steps, scope.restarts)
    informed = scope.informed_eps or scope.eps
    plan = {
        "gray": [pgd],
        "black": [pgd],
        "white": [AttackSettings("pgd", scope.norm, informed, scope.white_steps)],
        "adaptive": [AttackSettings("adaptive", scope.norm, informed, scope.adaptive_steps)],
    }
    maps = dict.fromkeys(("clean", *plan), classifier.label_map(test.classes))
    if surrogate is None:
        del plan["black"]
    else:
        maps["black"] = surrogate.label_map(test.classes)
    threats = threats_of(list(plan), subjects, classifier, surrogate)
    cells = 1 + sum(len(settings.eps) for threat in threats for settings in plan[threat.name])
    materials.say(f"attacking and measuring: {len(subjects)} defences, {cells} cells of {len(test):,} images")
    hidden = None if materials.progress else True
    with tqdm(total=cells * len(test), desc="measuring", unit=" images", delay=1, disable=hidden) as bar:
        return evaluate(
            test,
            subjects,
            threats,
            plan,
            headline_eps=scope.headline,
            headline_norm=scope.norm,
            classifier=classifier.fingerprint,
            label_maps=maps,
            seed=materials.seed,
            batch_size=scope.batch_size,
            device=materials.device,
            store=CellStore(materials.out / "cells"),
            progress=bar.update,
        )


def _described(row: Row) -> dict[str, Any]:
    return {
        "name": row.spec.name,
        "record": row.name,
        "kind": row.spec.kind,
        "published": row.spec.published,
        "informed": row.spec.informed,
        "reason": row.reason,
        "facts": row.facts,
        # The bare net's gray box is an attack that knows all there is.
        "white": (row.subject is not None and row.subject.white is not None) or row.spec.kind == "none",
    }


def _images(dataset: Any) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "n": len(dataset),
        "shape": list(dataset.shape),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
    }
