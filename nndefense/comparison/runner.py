"""From a recipe to its results: make every row, attack it, and write down all of it, resuming where it was stopped."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nndefense import pipeline
from nndefense.bars import progress_bar
from nndefense.comparison.published import CAVEATS, PUBLISHED, SETTING, TITLE
from nndefense.comparison.recipe import ComparisonRecipe, RowSpec
from nndefense.comparison.report import write_comparison
from nndefense.datasets import ImageDataset, measured_spec
from nndefense.defenses.stored import stored_calibration
from nndefense.evaluation import AttackSettings, CellStore, Subject, evaluate, threats_of, worst_cases
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.evaluation.results import identity, read_results
from nndefense.evaluation.threats import attacks_by
from nndefense.files import sealed, write_json
from nndefense.locks import writes
from nndefense.models import Classifier, resolve_device
from nndefense.pipeline import Materials, defenses, make_defense, subject_of, with_known_seed
from nndefense.versions import library_versions


@dataclass(frozen=True)
class Row:
    """A defence of the comparison.

    Attributes:
        spec: what it was to be.
        subject: what is measured; None where it is not there.
        facts: what is to be known of it, as plain values.
        reason: why it is not there, for people; empty where it is.
    """

    spec: RowSpec
    subject: Subject | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        """What it is called in the records."""
        return BARE if self.spec.kind == "none" else self.spec.name


def make_rows(materials: Materials, spec: RowSpec) -> list[Row]:
    """Make a row's defence, or say why it is not there; a random one is a second row, in which its seed is known."""
    started = time.perf_counter()
    defense = defenses.get(spec.kind)
    if defense.trained and not materials.scope.training:
        reason = "not trained: this data set has no training settings here, or training was left out"
        return [Row(spec, reason=reason)]
    made = make_defense(defense, materials, spec.options)
    seconds, specs = round(time.perf_counter() - started, 1), [(spec, made)]
    if known := with_known_seed(made, materials.seed):
        specs.append((replace(spec, name=f"{spec.name}, seed known", published=None), known))
    rows = []
    for one, each in specs:
        rows_in, k = each.facts.get("rows"), each.facts.get("k")
        if one.kind == DEFENDED and rows_in == k:
            # Every row is a neighbour of every image: its size says nothing.
            one = replace(one, name=f"{one.name}, K = all rows")
        subject = subject_of(each, Row(one).name, one.kind, materials, informed=one.informed)
        # The time tells no defence from another.
        rows.append(Row(one, subject, {**each.facts, "seconds to make": seconds}))
    return rows


FORMAT, VERSION = "nndefense-comparison", 1
NAME = "results.json"
# Folders in that of a comparison, whose files nobody else writes.
_HOLDS = ("attacked-images", "candidates", "cells", "databases", "nets", "patches")


@writes("materials.out", holds=_HOLDS)
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
    begun = time.perf_counter()
    rows = [row for spec in recipe.rows for row in make_rows(materials, spec)]
    for row in rows:
        # A database that was made elsewhere may hold what is reported, or have been calibrated on it.
        if row.subject is not None and (path := row.spec.options.get("database")):
            pipeline.check_not_in_database(test, row.subject.model)  # type: ignore[arg-type]
            pipeline.check_not_calibrated_on(test, stored_calibration(Path(path)), Path(path))
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
            "rows": {name: asdict(row) for name, row in PUBLISHED.items()},
            "caveats": list(CAVEATS),
        },
        "records": plain,
        "versions": library_versions(),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    results = sealed(results)
    write_json(materials.out / NAME, results)
    return results


def read_comparison(path: Any) -> dict[str, Any]:
    """Read the ``results.json`` at ``path`` that :func:`run_comparison` wrote.

    Raises:
        DataError: it is missing, damaged, changed or something else.
    """
    return read_results(path, FORMAT, VERSION, "the results of a comparison", "nndefense evaluate table2")


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
    cells = 1 + sum(len(settings.eps) for threat in threats for settings in attacks_by(threat, plan))
    materials.say(f"attacking and measuring: {len(subjects)} defences, {cells} cells of {len(test):,} images")
    shown = materials.progress
    with progress_bar(total=cells * len(test), desc="measuring", unit=" images", shown=shown) as bar:
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
    }


def _images(dataset: Any) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "n": len(dataset),
        "shape": list(dataset.shape),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
    }


@writes("out", holds=_HOLDS, lend=True)
def compare(
    recipe: ComparisonRecipe,
    dataset: str,
    out: Path,
    *,
    train_sets: Sequence[str] = (),
    classifier: str | None = None,
    surrogate: str | None = None,
    classes: Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    say: Callable[[str], object] = lambda text: None,
    progress: bool = True,
    command: str = "",
) -> tuple[dict[str, Any], list[Path]]:
    """Run a comparison and write its files.

    Args:
        recipe: what is compared, and how.
        dataset: a set with splits of its own, or, with ``train_sets``, the images to report on.
        out: folder for everything; what is finished in it is not made again.
        train_sets: the images that fill databases and train nets; none for the training split of ``dataset``.
        classifier, surrogate: sources of ready nets; without them nets are trained.
        classes, input_shape, data_dir, device: as for :func:`~nndefense.pipeline.open_classifier`.
        say: called with a line for people before everything that takes long.
        progress: whether to show bars.
        command: recorded.

    Returns:
        The results, and the files that hold them: ``results.json``, table, figure and page.

    Raises:
        NNDefenseError: something cannot be opened, or does not fit together.
    """
    sources = list(train_sets) or [dataset]
    if train_sets:
        reported = measured_spec(dataset, data_dir=data_dir)
    else:
        reported = pipeline.reported_split(dataset, "give the others by --train-set", data_dir=data_dir)
    target = resolve_device(device)
    classifier = classifier or recipe.scope.net or None

    def opened(source: str | None) -> Classifier | None:
        if source is None:
            return None
        return pipeline.open_classifier(
            source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=sources, say=say
        )

    model, other = opened(classifier), opened(surrogate)
    if model is not None:
        pipeline.check_surrogate(other, model)
    arch = str(recipe.scope.classifier.get("arch", ""))
    like = model or pipeline.training_shape(sources, arch, data_dir=data_dir, say=say, hint="")
    images = pipeline.open_datasets(sources, data_dir=data_dir, like=like).usable
    test = pipeline.open_datasets([reported], data_dir=data_dir, like=like)
    pipeline.check_disjoint(test, images)
    materials = pipeline.Materials(
        recipe.scope,
        images,
        out,
        target,
        recipe.seed,
        given=model,
        given_surrogate=other,
        specs=tuple(sources),
        say=say,
        progress=progress,
    )
    reported_on = pipeline.drawn(test, recipe.scope.limit, recipe.seed).usable
    results = run_comparison(recipe, materials, reported_on, command)
    return results, [out / "results.json", *write_comparison(results, out)]
