"""Opening what a job works on: data sets as one, and the classifier of a source or of a database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nndefense.database import ImageDatabase, Manifest, classifier_of
from nndefense.datasets import ImageDataset, concatenate, holdout, open_dataset, open_recorded, recorded_specs
from nndefense.datasets.derived import Size
from nndefense.datasets.recorded import specs_at_hand
from nndefense.datasets.spec import MEASURED, VALIDATION, measured_spec, splits_of
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import DataError, InputError, NNDefenseError
from nndefense.images import shape_text
from nndefense.models import ARCHITECTURES, Classifier, load_classifier
from nndefense.pipeline.checks import check_disjoint, check_not_in_database

# Images that all have one size are trained on as they are, unless they are those of a camera.
_LARGEST_SIDE = 256
# Images held out to calibrate on, where the set has three times as many.
_HOLDOUT = 300
# And at most so many to set thresholds on.
_HELD_OUT = 1000


def open_classifier(
    source: str | Path | None,
    *,
    device: str = "auto",
    data_dir: Path | None = None,
    classes: Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    specs: Sequence[str] = (),
    database: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Classifier:
    """Load a classifier.

    Args:
        source: where it comes from, as for :func:`~nndefense.models.load_classifier`. With a database it may be None:
            then it is the one that the manifest names, unless that is Python code.
        device, classes: as for :func:`~nndefense.models.load_classifier`.
        data_dir: the folder of the data sets.
        input_shape: C, H, W of its images. None: those that the database was made with, where the net can take them;
            of a classifier of one's own that does not say, where there is no database, those of the first data set of
            ``specs``.
        specs: the data sets that it is for.
        database: the folder of the database that it is for.
        say: called with a line for people where the input shape is a guess.

    Raises:
        ModelError: it cannot be found or read, or is Python code that nobody named.
        InputError: neither a source nor a database is named.
    """
    if database is not None:
        manifest = Manifest.read(database)
        return classifier_of(database, manifest, source, device=device, classes=classes, input_shape=input_shape)
    if source is None:
        raise InputError("no classifier was named: give --classifier")

    def guessed() -> tuple[int, int, int]:
        found = open_dataset(specs[0], data_dir=data_dir).shape
        text = ",".join(map(str, found))
        say(f"{source} does not say its input shape: from {specs[0]} --input-shape {text} is taken")
        return found

    guess = guessed if specs else None
    return load_classifier(source, device=device, input_shape=input_shape, classes=classes, guess=guess)


def training_shape(
    specs: Sequence[str],
    arch: str,
    size: Size | None = None,
    *,
    data_dir: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
    hint: str = "; --size says otherwise",
) -> tuple[int, int, int]:
    """C, H, W of the images of a training: what ``like`` of :func:`open_datasets` takes.

    Args:
        specs: the data sets.
        arch: the architecture that is trained.
        size: one side, or (height, width), that was asked for. None: that of the images where all have one (of a set,
            200 are looked at) and no side has more than 256 pixels, else the architecture's own.
        data_dir: the folder of the data sets.
        say: called with a line for people where the size is the architecture's.
        hint: the end of that line.

    Raises:
        DataError: a data set cannot be opened, or none is named.
        InputError: an impossible size.
    """
    if not specs:
        raise DataError("no data set was named: give --dataset")
    opened = [open_dataset(spec, data_dir=data_dir, size=size) for spec in specs]
    first = opened[0].shape
    if size is not None or arch not in ARCHITECTURES:
        return first
    small = max(first[1:]) <= _LARGEST_SIDE
    if small and all(part.shape == first and part.has_one_size() for part in opened):
        return first
    side = ARCHITECTURES[arch].side
    why = "images of different sizes" if small else f"images of {shape_text(first[1:])}"
    say(f"{why} are brought to {side} x {side}, which {arch} was made for{hint}")
    return first[0], side, side


def open_datasets(
    specs: Sequence[str],
    *,
    data_dir: Path | None = None,
    like: Classifier | tuple[int, int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Open one or several data sets as one.

    Args:
        specs: what to open.
        data_dir: the folder of the data sets.
        like: the classifier whose images they shall be, or C, H, W; None leaves them as they are.
        limit: keep that many images, drawn at random.
        seed: of that draw.

    Raises:
        DataError: a data set that cannot be opened, none, or two images of one id.
    """
    if not specs:
        raise DataError("no data set was named: give --dataset")
    shape = like.input_shape if isinstance(like, Classifier) else like
    channels, size = (None, None) if shape is None else (shape[0], shape[1:])
    opened = [open_dataset(spec, data_dir=data_dir, size=size, channels=channels) for spec in specs]
    dataset = opened[0] if len(opened) == 1 else joined(opened)
    return dataset if limit is None else drawn(dataset, limit, seed)


def joined(datasets: Sequence[ImageDataset]) -> ImageDataset:
    """Several data sets as one; their ids must not collide, or a row of a database could not be told from another."""
    dataset = concatenate(list(datasets))
    if len(set(dataset.ids)) != len(dataset):
        raise DataError(
            f"two of {dataset.name} hold images with the same id: open folders that are laid out alike as splits of "
            "one folder (imagefolder:PATH:SPLIT)"
        )
    return dataset


def drawn(dataset: ImageDataset, limit: int | None, seed: int) -> ImageDataset:
    """At most ``limit`` images, drawn at random without replacement, in their own order.

    Args:
        dataset: to draw from.
        limit: how many, at least 1; None for all.
        seed: of the draw.

    Raises:
        InputError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit}, but must be at least 1")
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.subset(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit]))


def split(
    specs: Sequence[str],
    calibration: str | None = None,
    n_holdout: int | None = None,
    *,
    data_dir: Path | None = None,
    like: Classifier | tuple[int, int, int] | None = None,
    seed: int = 0,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Open the database's images and set apart those to calibrate on.

    Args:
        specs: the database's images, one data set or several.
        calibration: the data set to calibrate on, or None to hold images out of the first.
        n_holdout: how many, at least 1.
        data_dir: the folder of the data sets.
        like: the classifier whose images they shall be, or C, H, W; None leaves them as they are.
        seed: of the draw of those that are held out.
        say: called with a line for people.

    Returns:
        All database images; those of them that candidates are built from; the calibration images: a data set of
        their own where ``calibration`` names one, else ``n_holdout`` of the first set, held out. None stands for 300,
        or a third of the images where that is less, and ``say`` is called with a line that says so.
    """
    first, others = open_datasets(specs[:1], data_dir=data_dir, like=like), None
    if len(specs) > 1:
        others = open_datasets(specs[1:], data_dir=data_dir, like=like)
    rows = first if others is None else joined([first, others])
    if calibration is not None:
        # Never the test split unasked: what a setting is chosen on is not reported on.
        held = open_datasets(
            [measured_spec(calibration, data_dir=data_dir, among=VALIDATION)], data_dir=data_dir, like=like
        )
        check_disjoint(held, rows)
        return rows, rows, held.usable
    if n_holdout is None:
        n_holdout = min(_HOLDOUT, max(len(first) // 3, 1))
        if n_holdout < _HOLDOUT:
            say(f"{first.name} has {len(first):,} images: {n_holdout} of them are held out to calibrate on")
    kept, held_out = holdout(first, n_holdout, seed)
    rest = first.subset(kept) if others is None else joined([first.subset(kept), others])
    return rows, rest, first.subset(held_out).usable


def neighbor_pictures(
    database: ImageDatabase,
    data_dir: Path | None,
    like: Classifier,
    images: Sequence[str] = (),
    named: Sequence[str] = (),
    say: Callable[[str], object] = lambda text: None,
) -> ImageDataset | None:
    """The images that a database was built from: the ``images`` that the user names, else the recorded ones, where
    these may be opened (:func:`~nndefense.datasets.specs_at_hand`, which takes the other specs that the user has
    ``named``) and can be; otherwise None, and a line says so.

    Raises:
        DataError: those that the user names are not those.
    """
    data, folder = database.manifest.data, database.path
    places: dict[str, Any] = {"folder": folder, "images": images, "named": named}
    try:
        found = open_recorded(data, lambda: database.ids(database.row_numbers), like.input_shape, data_dir, **places)
    except NNDefenseError:
        # The pictures only illustrate; the report says that they are not at hand.
        if images:
            raise
        found = None
    if found is None and images:
        raise DataError(
            f"{' and '.join(images)} does not hold the images that {folder} was built from: give --images the data "
            "set that it was built from, or leave it out"
        )
    if found is None and (named := recorded_specs(data)):
        say(
            f"no images of the database are at hand, to show neighbours or to start attacks from: {folder} names "
            f"{' and '.join(named)}; give --images where they are"
        )
    return found


def held_out(
    dataset: ImageDataset,
    defense: NearestNeighborDefense | None,
    like: Classifier,
    spec: str | None = None,
    *,
    calibrated_on: Sequence[str] = (),
    named: Sequence[str] = (),
    data_dir: Path | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Clean images to set thresholds on, neither reported nor in the database: at most 1,000, drawn at random.

    Args:
        dataset: the images that are reported.
        defense: over the database, or None.
        like: the classifier whose images they shall be.
        spec: where they are. None: what the database was made from, as its manifest records it and as far as that may
            be opened; of those the ones that were held out of it to calibrate on, where any are left.
        calibrated_on: ids of the images that the database was calibrated on.
        named: specs that the user has named.
        data_dir: the folder of the data sets.
        seed: of the draw.

    Raises:
        DataError: the images that ``spec`` names are reported or stand in the database, or none are at hand.
    """
    if spec is not None:
        chosen = measured_spec(spec, data_dir=data_dir, among=VALIDATION)
        found = open_datasets([chosen], data_dir=data_dir, like=like)
        check_disjoint(dataset, found)
        if defense is not None:
            check_not_in_database(found, defense)
        return drawn(found, _HELD_OUT, seed).usable
    left: list[int] = []
    if defense is not None:
        data, database = defense.database.manifest.data, defense.database
        specs = specs_at_hand(data, database.path, named)
        if specs:
            found = open_datasets(specs, data_dir=data_dir, like=like)
            apart = {*database.ids(database.row_numbers)}
            # Folders laid out alike give equal ids to different images: what may be a reported one is left out.
            apart |= {*dataset.ids}
            left = [place for place, item in enumerate(found.ids) if item not in apart]
            calibrated = {*calibrated_on}
            left = [place for place in left if found.ids[place] in calibrated] or left
    if not left:
        raise DataError(
            "no clean images are at hand that are neither reported nor in the database, to set the thresholds of "
            "--abstain on: name some by --abstain-on"
        )
    return drawn(found.subset(left), _HELD_OUT, seed).usable


def reported_split(spec: str, remedy: str = "give --test", *, data_dir: Path | None = None) -> str:
    """The data set that is reported on unless another is named: the same one's test split, else its validation split.

    Args:
        spec: the data set.
        remedy: what the error tells to do.
        data_dir: the folder of the data sets.

    Raises:
        InputError: a data set without such a split.
    """
    try:
        base, split, _, splits = splits_of(spec, data_dir=data_dir)
    except DataError:
        base, split, splits = spec, None, ()
    chosen = next((name for name in MEASURED if name in splits and name != split), None)
    if chosen is None:
        raise InputError(f"which images of {spec} are the test images cannot be guessed: {remedy}")
    return f"{base}:{chosen}"
