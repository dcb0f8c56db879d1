"""The calibrated setting, kept in a file beside the database that it was chosen for, and what holds without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from nndefense.database import WEIGHTINGS, ImageDatabase, Manifest, Rule, classifier_of
from nndefense.database.manifest import CALIBRATION
from nndefense.database.rule import Ruled
from nndefense.errors import DatabaseError, InputError
from nndefense.features import FeatureSpec
from nndefense.models import Classifier
from nndefense.models.architectures.embedded import DIMENSION
from nndefense.unwrapping import unwrapped


def default_k(rows: int) -> int:
    """K where nothing was calibrated or asked for: 50, or all rows of a smaller database."""
    return min(50, rows)


def learned_rule(classifier: Classifier, feature: FeatureSpec, rows: int) -> Rule | None:
    """The rule that a net was trained by, for a database of its embeddings with the distances that they have.

    Args:
        classifier: trained by an objective ``retrieval``; None is given for any other.
        feature: of the database; None is given for one of another layer, or with other distances.
        rows: of the database.
    """
    learned = classifier.info.get("retrieval")
    kept = feature.layer == "embedding" and feature.pooling == "flatten" and not (feature.whiten or feature.normalize)
    if not learned or not kept or 0 < feature.pca < DIMENSION:
        return None
    k, votes, temperature = min(learned["neighbors"], rows), learned["votes"], learned["temperature"]
    return Rule(k, "uniform", votes=votes, temperature=temperature)


@dataclass(frozen=True)
class StoredDefense(Ruled):
    """What a defence is made of, as its database's folder says.

    Attributes:
        classifier: the one that the database was made with.
        database: opened.
        rule: as asked for, else as calibrated, else as the manifest has it, else :func:`default_k` and ``cbw-d``.
        calibration: what it was chosen from; None where it was not, or another was asked for.
    """

    classifier: Classifier
    database: ImageDatabase
    rule: Rule
    calibration: dict[str, Any] | None


def open_stored(
    database: str | Path | ImageDatabase,
    classifier: str | Path | Classifier | None = None,
    *,
    k: int | None = None,
    weighting: str | None = None,
    votes: str | None = None,
    temperature: float | None = None,
    alpha: float | None = None,
    device: str = "auto",
    classes: str | Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    verify: bool = True,
) -> StoredDefense:
    """Open a database with its classifier and its setting: the one rule for every part of the library.

    Args:
        database: its folder, or a database that is open.
        classifier: the classifier or where it comes from. None: as for :func:`~nndefense.database.classifier_of`.
        k, weighting, votes, temperature, alpha: of the rule, in the place of the stored ones; an infinite temperature
            asks for no kernel.
        device, classes, input_shape: of a classifier that is not open yet.
        verify: as for :meth:`~nndefense.database.ImageDatabase.open`.

    Raises:
        DatabaseError: a database that is missing, damaged or made with another classifier, or whose calibration is.
        ModelError: the classifier cannot be found or read.
        InputError: a rule is asked for that cannot be used.
    """
    opened = database if isinstance(database, ImageDatabase) else None
    folder = Path(database).expanduser() if not isinstance(database, ImageDatabase) else database.path
    if isinstance(classifier, nn.Module):
        classifier = unwrapped(classifier)
    else:
        manifest = opened.manifest if opened is not None else Manifest.read(folder)
        classifier = classifier_of(
            folder, manifest, classifier, device=device, classes=classes, input_shape=input_shape
        )
    if opened is None:
        opened = ImageDatabase.open(folder, classifier=classifier, verify=verify)
    calibration = stored_calibration(folder, opened.manifest)
    asked = {"k": k, "weighting": weighting, "votes": votes, "temperature": temperature, "alpha": alpha}
    rule = stored_rule(folder, opened.manifest, calibration, rows=len(opened)).changed(**asked)
    return StoredDefense(classifier, opened, rule, calibration if set(asked.values()) == {None} else None)


def stored_rule(
    folder: Path, manifest: Manifest, calibration: Mapping[str, Any] | None, *, rows: int | None = None
) -> Rule:
    """The rule that a database is to be used with: as calibrated, else as its manifest has it, else the usual one.

    Args:
        folder: the database's.
        manifest: its manifest.
        calibration: :func:`stored_calibration` of it.
        rows: how many are searched, where not all.

    Raises:
        DatabaseError: the manifest has one that cannot be used.
    """
    rows = manifest.rows if rows is None else rows
    try:
        rule = Rule.of({"k": default_k(rows), **manifest.rule, **chosen_values(calibration)})
        if rule.k > manifest.rows:
            raise InputError(f"k is {rule.k:,}, but it has {manifest.rows:,} rows")
    except (InputError, TypeError) as error:
        raise DatabaseError(
            f"the manifest of {folder} has a rule that cannot be used ({error}): build it again"
        ) from error
    return rule


def chosen_values(calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a calibration chose of a rule, as :meth:`nndefense.database.Rule.of` takes it."""
    chosen = calibration["chosen"] if calibration else {}
    return {item.name: chosen[item.name] for item in fields(Rule) if item.name in chosen}


def stored_calibration(folder: Path, manifest: Manifest | None = None) -> dict[str, Any] | None:
    """The calibration that a database was made with, or None.

    Args:
        folder: the database's.
        manifest: its manifest, where that was read.

    Raises:
        DatabaseError: the file is missing though there was one, has changed, or is none of this database.
    """
    manifest, path = manifest or Manifest.read(folder), folder / CALIBRATION
    value: dict[str, Any] | None = manifest.read_beside(folder, CALIBRATION)
    if value is None:
        return None
    chosen = value.get("chosen") if isinstance(value, dict) else None
    if (
        not isinstance(chosen, dict)
        or type(chosen.get("k")) is not int
        or not 1 <= chosen["k"] <= manifest.rows
        or chosen.get("weighting") not in WEIGHTINGS
        or not _usable(value)
    ):
        raise DatabaseError(f"{path} is not a calibration of this database: remove it, or calibrate again")
    feature = {name: chosen[name] for name in ("layer", "pooling") if name in chosen}
    if feature != {name: manifest.feature[name] for name in feature}:
        raise DatabaseError(f"{path} was chosen for another layer or pooling than the database has: calibrate again")
    return value


def _usable(calibration: dict[str, Any]) -> bool:
    try:
        Rule.of(chosen_values(calibration))
    except InputError:
        return False
    return True
