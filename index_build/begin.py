"""Beginning a build, or finding the one that was begun: what a folder holds, and what has to be settled first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from index_build import pieces
from index_build.add import sealed
from index_build.extract import EXTRACTED, rejection_limit
from index_build.fit import fit_pcas, probe_images, reduced_length
from index_build.job import (
    NAME,
    BuildJob,
    BuildTarget,
    Options,
    check_same,
    identity_of,
    settings_of,
    shard_size,
)
from index_build.mapper import Mapper, tell_unplaced
from nndefense.database import check_vacant
from nndefense.database.index_training import check_factory, sample_rows
from nndefense.database.manifest import NAME as MANIFEST
from nndefense.database.near_images import NearSearch
from nndefense.database.writer import PCA_FILE, clear, made_by, pca_writer, writing
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.features import FeatureSpec
from nndefense.files import json_text
from nndefense.memory import reused_memory
from nndefense.models import Classifier


@reused_memory()
def begin(
    dataset: ImageDataset,
    classifier: Classifier,
    features: Mapping[Path, FeatureSpec],
    options: Options,
    *,
    specs: Sequence[str] = (),
    exclude: ImageDataset | None = None,
    exclude_eps: float | None = None,
    max_rejected: int | str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    reopen: Mapping[str, Any] | None = None,
    calibrations: Mapping[Path, Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> BuildJob:
    """Begin a build, or take up the one that these folders hold; the caller holds their locks.

    A job is written down once its PCAs are fitted, and nothing in the folders is touched before.

    Args:
        options: the settings that decide the result.
        exclude_eps: by default as for :class:`~nndefense.database.near_images.NearSearch`.
        max_rejected: as for :func:`~index_build.extract.extract`, of the PCA's sample.
        dataset, classifier, features, and all others: as for :func:`~index_build.runner.build_databases`.

    Returns:
        The job, for those of the folders that are not finished by it.

    Raises:
        DataError: an empty data set, or one of which no image can be used.
        InputError: a feature, index or image that does not fit the classifier, or a calibration of no such folder.
        DatabaseError: a folder with a finished database, or with an unfinished build of other settings.
    """
    if len(dataset) == 0:
        raise DataError(f"the data set {dataset.name} is empty: there is nothing to build a database from")
    rejection_limit(max_rejected, len(dataset))
    if options.rule and options.rule["k"] > len(dataset):
        raise InputError(f"the rule has k = {options.rule['k']:,}, but there are {len(dataset):,} images: lower k")
    data, made = identity_of(dataset, specs), made_by(classifier)
    excluded = excluded_by(exclude, exclude_eps)
    kept = {Path(folder).expanduser(): json_text(value) for folder, value in (calibrations or {}).items()}
    if set(kept) - set(features):
        raise InputError("calibrations names folders that are not built: use those of features")
    asked = {
        folder: settings_of(data, made, feature, options, excluded, kept.get(folder))
        for folder, feature in features.items()
    }
    standing = _standing(asked, overwrite)
    if standing is not None:
        return standing
    # The checks that need no forward pass come before the first one.
    tell_unplaced(dataset, classifier)
    mapper = Mapper(classifier.eval(), list(features.values()), classifier.device, precision=options.precision)
    chosen = sample_rows(len(dataset), options.pca_sample, options.seed)
    if options.precision == "auto":
        mapper.resolve(probe_images(dataset, chosen, options.batch_size))
    assert mapper.choice is not None
    lengths = [vectors.shape[1] for vectors in mapper(probe_images(dataset, chosen, 1)).vectors]
    targets = [
        BuildTarget(folder, feature, reduced_length(feature, length), False, kept.get(folder))
        for (folder, feature), length in zip(features.items(), lengths, strict=True)
    ]
    for target in targets:
        if options.index != "auto":
            check_factory(options.index, target.dimension)
    pcas = fit_pcas(mapper, dataset, lengths, options, max_rejected=max_rejected, workers=workers, progress=progress)
    job = BuildJob(
        targets=tuple(replace(target, pca=pca is not None) for target, pca in zip(targets, pcas, strict=True)),
        options=options,
        images=len(dataset),
        data=data,
        classes=tuple(classifier.classes),
        classifier=made,
        excluded=excluded,
        shard_rows=shard_size(options, [target.dimension for target in targets], len(classifier.classes)),
        top=options.top(len(classifier.classes)),
        precision=asdict(mapper.choice),
        reopen=dict(reopen or {}),
    )
    for target, pca in zip(job.targets, pcas, strict=True):
        with writing(target.folder):
            clear(target.folder)
        if pca is not None:
            pieces.finish(target.folder / PCA_FILE, pca_writer(pca))
    job.write()
    return job


def _standing(asked: Mapping[Path, Mapping[str, Any]], overwrite: bool) -> BuildJob | None:
    """The job that the folders hold already, or None where one is to be begun."""
    begun = []
    for folder, settings in asked.items():
        if (folder / NAME).exists():
            try:
                check_same(folder, settings)
            except DatabaseError:
                if not overwrite:
                    raise
                return None
            begun.append(folder)
    rest = [folder for folder in asked if folder not in begun]
    if begun and rest:
        # Killed while the databases of one job were being finished one after another, or while it was being begun.
        done = [folder for folder in rest if sealed(folder, asked[folder])]
        if len(done) < len(rest):
            if not overwrite and any(_has_rows(folder) for folder in begun):
                raise DatabaseError(
                    f"{begun[0]} holds an unfinished build, but {next(f for f in rest if f not in done)} does not hold "
                    "its other part: continue it for the same folders, or begin again with --overwrite"
                )
            for folder in rest:
                check_vacant(folder, overwrite=overwrite)
            return None
    elif not begun:
        for folder in rest:
            check_vacant(folder, overwrite=overwrite)
        return None
    jobs = [BuildJob.read(folder) for folder in begun]
    job = replace(jobs[0], targets=tuple(job.targets[0] for job in jobs))
    pcas = [target.folder / PCA_FILE for target in job.targets if target.pca]
    if overwrite and any(pieces.finished(path, checksum=True) is None for path in pcas):
        return None
    return job


def _has_rows(folder: Path) -> bool:
    return any((folder / name).exists() for name in (EXTRACTED, MANIFEST)) or any(folder.glob("rows-*.h5"))


def excluded_by(exclude: ImageDataset | None, eps: float | None) -> dict[str, Any] | None:
    """What a job records of the images to keep out.

    Raises:
        InputError: a distance that cannot be one, or without images.
    """
    if exclude is None:
        if eps is not None:
            raise InputError("a distance to excluded images was given, but no images to exclude")
        return None
    # The search itself is made with the tools; here its arguments are checked, and the default distance settled.
    search = NearSearch(exclude, eps, memory=0)
    return {"name": exclude.name, "fingerprint": exclude.fingerprint, "eps": search.eps}
