"""Runner: all stages one after another, for one database or for several that share their forward passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from index_build.add import PartReport, add, merge, sealed, tidy
from index_build.begin import begin
from index_build.extract import Extracted, extract
from index_build.fit import fit_index
from index_build.job import NAME, BuildJob, Options
from index_build.mapper import ShardTools
from index_build.ray_engine import RayEngine, engine_of
from nndefense.database import ImageDatabase
from nndefense.database.faiss_tools import check_device
from nndefense.database.manifest import Manifest
from nndefense.database.repeats import SPILL
from nndefense.database.tuning import measure
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, InputError
from nndefense.features import FeatureSpec
from nndefense.locks import locked
from nndefense.models import Classifier
from nndefense.unwrapping import unwrapped

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BuildSettings(TypedDict, total=False):
    """What a build is asked for by name, for those who check types; see :func:`build_databases`."""

    specs: Sequence[str]
    overwrite: bool
    max_rejected: int | str | None
    exclude: ImageDataset | None
    exclude_eps: float | None
    workers: int | None
    engine: str
    ray_address: str | None
    ray_workers: int | None
    reopen: Mapping[str, Any] | None
    calibrations: Mapping[Path, Mapping[str, Any]] | None
    progress: bool
    index: str
    batch_size: int
    pca_sample: int
    seed: int
    storage: str
    posteriors: str
    precision: str
    shard_rows: int | None
    dedupe: bool
    memory: int | None
    recall: float
    k: int
    rule: Mapping[str, Any] | None
    row_noise: float


def build_database(
    dataset: ImageDataset,
    classifier: Classifier,
    feature: FeatureSpec,
    out: str | Path,
    *,
    index_device: str = "cpu",
    **settings: Unpack[BuildSettings],
) -> ImageDatabase:
    """Build one database.

    Args:
        dataset: the images; their labels are stored as the classifier's class numbers.
        classifier: images N x C x H x W in [0, 1] -> logits; its device is used.
        feature: layer, pooling and dimensions of the vectors.
        out: the folder.
        index_device: where the index is trained: ``cpu``, ``cuda``, ``cuda:0`` or ``all-gpus``.
        **settings: ``specs``, ``overwrite``, ``exclude``, ``progress`` and all others of :func:`build_databases`, and
            its errors.
    """
    return build_databases(
        dataset, classifier, {Path(out).expanduser(): feature}, index_device=index_device, **settings
    )[0]


def build_databases(
    dataset: ImageDataset,
    classifier: Classifier,
    features: Mapping[Path, FeatureSpec],
    *,
    index_device: str = "cpu",
    **settings: Unpack[BuildSettings],
) -> list[ImageDatabase]:
    """Build a database for each feature, all from the same forward passes.

    Killed or stopped by an error at any moment, the same call continues where it stood: at most the unfinished shard is
    made again, and the result has the same bytes as an uninterrupted build's.

    The images are read twice where a PCA is fitted: first a random sample of them, then all. Memory holds a batch,
    the sample's vectors, one shard of each database, and the index.

    Args:
        dataset: the images; their labels are stored as the classifier's class numbers.
        classifier: images -> logits; its device is used.
        features: for each folder the feature to store there.
        specs: the data set specs that open the images again, for whoever wants to show them.
        overwrite: replace finished databases, and unfinished builds with other settings, in those folders.
        max_rejected: more images than that, which cannot be read, end the build (a number, or a share like ``5%``);
            None: any. They are listed in ``rejected.jsonl``.
        exclude: images, such as a test set's, that must not stand in the database, nor any near them.
        exclude_eps: the L2 distance, in pixels of [0, 1], that counts as near; 0 for equal images only.
        workers: threads that read and decode images; None for one for each CPU.
        index_device: where the index is trained: ``cpu``, ``cuda``, ``cuda:0`` or ``all-gpus``.
        engine: ``local``, or ``ray``: extract and add run on a Ray cluster, whose machines see the folders and the
            images under the same paths; the files are the same.
        ray_address: ``HOST:PORT`` of the cluster to join; None starts one on this machine.
        ray_workers: processes that share the cluster's processors; None: one for each machine, or each GPU where the
            classifier is on one.
        reopen: whatever the caller needs to open images and classifier again, as plain values.
        calibrations: for any of those folders the calibration that its feature was chosen by, as plain values; it
            stands in ``calibration.json`` before there is a manifest, so that the database never opens without it.
        progress: show bars.
        settings: what decides the result, by its names in :class:`~index_build.job.Options`: ``index``, ``batch_size``,
            ``pca_sample``, ``seed``, ``storage``, ``posteriors``, ``precision``, ``shard_rows``, ``dedupe``,
            ``memory``, ``recall``, ``k``, ``rule``, ``row_noise``.

    Returns:
        The databases, opened, in the order of ``features``.

    Raises:
        DataError: an empty data set, a source that vanished, or too many images that cannot be read.
        InputError: a setting, feature, index or image that does not fit.
        DatabaseError: a folder that already holds a database or an unfinished build with other settings, that somebody
            else is building in, or that cannot be written; or a Ray cluster that cannot be reached, or gives up.
    """
    # Asked now: without such a device the index would fail hours later.
    check_device(index_device)
    places = {Path(folder).expanduser(): feature for folder, feature in features.items()}
    progress = settings.get("progress", True)
    with extracted(dataset, classifier, places, **settings) as (job, _, ray):
        for target in job.targets:
            make = ray.parts(target.folder, device=index_device) if ray else None
            complete(target.folder, device=index_device, make=make, progress=progress)
    return [ImageDatabase.open(folder, verify=False) for folder in places]


@contextmanager
def extracted(
    dataset: ImageDataset,
    classifier: Classifier,
    features: Mapping[Path, FeatureSpec],
    *,
    specs: Sequence[str] = (),
    overwrite: bool = False,
    max_rejected: int | str | None = None,
    exclude: ImageDataset | None = None,
    exclude_eps: float | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    ray_workers: int | None = None,
    reopen: Mapping[str, Any] | None = None,
    calibrations: Mapping[Path, Mapping[str, Any]] | None = None,
    progress: bool = True,
    **options: Any,
) -> Iterator[tuple[BuildJob, list[Extracted], RayEngine | None]]:
    """Hold the locks of a build that has begun or is taken up, whose rows are complete.

    Arguments and errors are those of :func:`build_databases`. Gives the job, the rows of each of its targets (none
    where all are merged already), and Ray's engine where that is asked for.
    """
    for name in sorted(set(options) - set(Options.__dataclass_fields__)):
        raise TypeError(f"build_databases() has no argument {name!r}")
    chosen, classifier = Options(**options), unwrapped(classifier)
    with building(list(features)), engine_of(engine, address=ray_address, workers=ray_workers) as ray:
        job = begin(
            dataset, classifier, features, chosen, specs=specs, exclude=exclude, exclude_eps=exclude_eps,
            max_rejected=max_rejected, overwrite=overwrite, workers=workers, reopen=reopen,
            calibrations=calibrations, progress=progress,
        )  # fmt: skip
        found: list[Extracted] = []
        settings = job.settings(job.targets[0])
        if any(sealed(target.folder, settings) is None for target in job.targets):
            tools = ShardTools.of(job, dataset, classifier, exclude, workers=workers)
            make = ray.shards(job, dataset, classifier, exclude, readers=workers) if ray else None
            found = extract(job, tools, max_rejected=max_rejected, make=make, progress=progress)
        yield job, found, ray


@contextmanager
def building(folders: Sequence[Path]) -> Iterator[None]:
    """Hold the locks of all folders of a build.

    Raises:
        DatabaseError: somebody else builds in one of them, or one cannot be written.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("two databases of a build have the same folder: give each one of its own")
    with ExitStack() as stack:
        for folder in sorted(folders):
            stack.enter_context(locked(folder, error=DatabaseError))
            for spilled in folder.glob(f"{SPILL}*"):
                shutil.rmtree(spilled, ignore_errors=True)
        yield


def complete(
    folder: Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    make: Callable[[Sequence[int]], Iterable[PartReport]] | None = None,
    progress: bool = True,
) -> Manifest:
    """The stages after extract: fit the index, add, merge, verify.

    Args:
        folder: of an unfinished build whose rows are complete.
        workers, device, make, progress: as for :func:`~index_build.add.add`.

    Raises:
        DatabaseError, InputError: as the stages do.
    """
    job = BuildJob.read(folder)
    if sealed(folder, job.settings(job.targets[0])) is None:
        fit_index(folder, device=device)
        add(folder, workers=workers, device=device, make=make, progress=progress)
        merge(folder)
    finish(folder)
    return Manifest.read(folder)


def finish(
    folder: Path,
    *,
    recall: float | None = None,
    k: int | None = None,
    queries: NDArray[np.float32] | None = None,
    queries_from: str = "",
) -> dict[str, Any]:
    """Check a database against its manifest, and measure its index where that was not done or is asked for.

    With this an unfinished build is finished: what only it needed is removed.

    Args:
        folder: a database, or an unfinished build whose index is merged.
        recall, k, queries, queries_from: as for :func:`~nndefense.database.tuning.measure`; None: those of the build.

    Returns:
        ``rows``, ``files`` and ``index_rows`` as found, and ``search`` where it was measured.

    Raises:
        DatabaseError: naming what is wrong and what to do.
    """
    found = ImageDatabase.open(folder, verify=False).verify()
    unfinished = (folder / NAME).exists()
    manifest = Manifest.read(folder)
    asked = recall is not None or k is not None or queries is not None
    if (asked or (unfinished and "search" not in manifest.index)) and found["rows"] > 1:
        made = manifest.build
        found["search"] = measure(
            folder,
            recall=recall if recall is not None else made.get("recall", Options.recall),
            k=k if k is not None else made.get("k", Options.k),
            queries=queries,
            queries_from=queries_from,
            seed=made.get("seed", 0),
        )
    elif "search" in manifest.index:
        found["search"] = manifest.index["search"]
    if unfinished:
        tidy(folder)
    return found
