"""Which classifier a database was made with, and where it is."""

from __future__ import annotations

import json
from pathlib import Path

from nndefense.database.manifest import Manifest
from nndefense.errors import ModelError
from nndefense.files import read_whole
from nndefense.models import Classifier, load_classifier
from nndefense.models.load import asks_nobody, is_named
from nndefense.own_code import PYTHON

_FOLDER, _DESCRIPTION = "classifier", "classifier.json"


def classifier_of(
    folder: Path,
    manifest: Manifest,
    source: str | Path | None,
    *,
    device: str = "auto",
    classes: str | Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
) -> Classifier:
    """Load the classifier of a database.

    Args:
        folder: the database's folder.
        manifest: its manifest.
        source: where the classifier comes from, as for :func:`~nndefense.models.load_classifier`. None: the folder that
            the manifest names, or the folder ``classifier`` beside or in the database, whichever has the weights that
            the database was made with.
        device, classes, input_shape: as for :func:`~nndefense.models.load_classifier`. Code of one's own that does not
            name its classes has those of the database.

    Raises:
        ModelError: it is not to be found; or it is Python code, or would be fetched, and nobody named it.
    """
    if not manifest.classifier["fingerprint"]:
        raise ModelError(imported(folder))
    channels, height, width = manifest.classifier["input_shape"]
    shape = input_shape or (channels, height, width)
    found = str(source) if source is not None else source_of(folder, manifest)
    classifier = load_classifier(
        found, device=device, classes=classes, input_shape=shape if found.startswith(PYTHON) else input_shape
    )
    made_up = tuple(map(str, range(len(manifest.classes))))
    if found.startswith(PYTHON) and classes is None and classifier.classes == made_up:
        classifier.classes = manifest.classes
    # A net for other images is left as it is: its fingerprint, compared later, says better what is wrong.
    if shape[0] == classifier.input_shape[0] and not classifier.fixed_size:
        classifier.input_shape = shape
    return classifier


def source_of(folder: Path, manifest: Manifest | None = None) -> str:
    """Where the classifier of the database in ``folder``, with that ``manifest``, is: what :func:`classifier_of` takes
    where none is named.

    Raises:
        ModelError: it is not to be found, or is Python code, or would be fetched, and nobody named it.
    """
    manifest = manifest or Manifest.read(folder)
    if not manifest.classifier["fingerprint"]:
        raise ModelError(imported(folder))
    named = str(manifest.classifier["source"])
    if named.startswith(PYTHON):
        # A manifest is data: opening it must not run code that it names.
        raise ModelError(
            f"the classifier of {folder} is Python code ({named}), which runs only if you name it: give --classifier"
        )
    if is_named(named):
        if not asks_nobody(named):
            raise ModelError(
                f"the classifier of {folder} is {named}, which would be fetched, and that only if you name it: give "
                f"--classifier {named}"
            )
        return named
    # A path with two slashes first is that of another machine.
    places = [Path(named)] if named and not named.startswith(("//", "\\\\")) else []
    for place in (*places, folder.parent / _FOLDER, folder / _FOLDER):
        if _fingerprint(place) == manifest.classifier["fingerprint"]:
            return str(place)
    raise ModelError(
        f"the classifier of {folder} ({named or 'its source was not recorded'}, "
        f"{manifest.classifier['fingerprint'][:12]}) is not to be found: give --classifier"
    )


def imported(folder: Path) -> str:
    """What to say where a database of imported vectors is asked for its classifier."""
    return (
        f"{folder} holds imported vectors, and no classifier is known that makes them, so that it is searched by "
        "vectors alone: import them with --classifier, --layer and --dataset"
    )


def _fingerprint(folder: Path) -> str | None:
    """What a classifier's folder says of its weights; they are compared when they are loaded."""
    try:
        found = json.loads(read_whole(folder / _DESCRIPTION))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(found)
