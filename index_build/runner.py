"""Runner: read, map, reduce and write, for one database or for several that share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from index_build.mapper import Mapper
from index_build.reader import read
from nndefense.database import DatabaseWriter, ImageDatabase, check_vacant
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError, InputError
from nndefense.features import PCA, FeatureSpec, fit_pca, reduced
from nndefense.models import Classifier

PCA_SAMPLE = 4096


def build_database(
    dataset: ImageDataset,
    classifier: Classifier,
    feature: FeatureSpec,
    out: str | Path,
    *,
    specs: Sequence[str] = (),
    index: str = "Flat",
    batch_size: int = 128,
    pca_sample: int = PCA_SAMPLE,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> ImageDatabase:
    """Build one database; see :func:`build_databases`."""
    return build_databases(
        dataset,
        classifier,
        {Path(out): feature},
        specs=specs,
        index=index,
        batch_size=batch_size,
        pca_sample=pca_sample,
        seed=seed,
        overwrite=overwrite,
        progress=progress,
    )[0]


def build_databases(
    dataset: ImageDataset,
    classifier: Classifier,
    features: dict[Path, FeatureSpec],
    *,
    specs: Sequence[str] = (),
    index: str = "Flat",
    batch_size: int = 128,
    pca_sample: int = PCA_SAMPLE,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> list[ImageDatabase]:
    """Build a database for each feature, all from the same forward passes.

    The images are read twice where a PCA is fitted: first a random sample of them, then all. Memory holds a batch,
    the sample's vectors, and one shard of each database.

    Args:
        dataset: the images; their labels are stored as the classifier's class numbers.
        classifier: images -> logits; its device is used.
        features: for each folder the feature to store there.
        specs: the data set specs that open the images again, for whoever wants to show them.
        index: FAISS's factory string; ``Flat`` is exact.
        batch_size: images per forward pass.
        pca_sample: how many images a PCA is fitted on.
        seed: draws that sample.
        overwrite: replace finished databases in those folders.
        progress: show a bar.

    Returns:
        The databases, opened, in the order of ``features``.

    Raises:
        DataError: an empty data set or an image that cannot be read.
        InputError: a feature, index or image that does not fit the classifier.
        DatabaseError: a folder that already holds a database or cannot be written.
    """
    if len(dataset) == 0:
        raise DataError(f"the data set {dataset.name} is empty: there is nothing to build a database from")
    if batch_size < 1 or pca_sample < 2:
        raise InputError("a build needs a batch size of at least 1 and a PCA sample of at least 2 images")
    # The checks that need no forward pass come before the first one.
    for folder in features:
        check_vacant(folder, overwrite=overwrite)
    classes = classifier.label_map(dataset.classes) if dataset.classes else torch.empty(0, dtype=torch.int64)
    device = next((t.device for t in [*classifier.parameters(), *classifier.buffers()]), torch.device("cpu"))
    mapper = Mapper(classifier.eval(), list(features.values()), device)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:pca_sample])
    pcas = _fit(mapper, dataset, chosen, batch_size, progress)
    data = {"name": dataset.name, "fingerprint": dataset.fingerprint, "specs": list(specs)}
    writers = [
        DatabaseWriter(
            folder, classifier=classifier, feature=feature, pca=pca, data=data, index=index, overwrite=overwrite
        )
        for (folder, feature), pca in zip(features.items(), pcas, strict=True)
    ]
    with _bar(len(dataset), "extracting features", progress) as bar:
        for batch in read(dataset, batch_size):
            mapped = mapper(batch.images)
            labels = _mapped_labels(batch.labels, classes)
            for writer, feature, pca, vectors in zip(writers, mapper.features, pcas, mapped.vectors, strict=True):
                writer.add(reduced(vectors, feature, pca), mapped.posteriors, batch.ids, labels)
            if bar is not None:
                bar.update(len(batch.ids))
    for writer in writers:
        writer.finish()
    return [ImageDatabase.open(folder, verify=False) for folder in features]


def _fit(
    mapper: Mapper, dataset: ImageDataset, chosen: np.ndarray, batch_size: int, progress: bool
) -> list[PCA | None]:
    """Fit the PCA of every feature that needs one on the chosen images."""
    # Whether a PCA is needed depends on the vectors' length, which one image tells.
    probe = mapper(dataset.batch(chosen[:1])[0]).vectors
    needed = [
        bool(feature.pca) and (feature.whiten or vectors.shape[1] > feature.pca)
        for feature, vectors in zip(mapper.features, probe, strict=True)
    ]
    if not any(needed):
        return [None] * len(needed)
    samples: list[list[Tensor]] = [[] for _ in needed]
    with _bar(len(chosen), "sampling for PCA", progress) as bar:
        for batch in read(dataset, batch_size, chosen):
            for sample, wanted, vectors in zip(samples, needed, mapper(batch.images).vectors, strict=True):
                if wanted:
                    sample.append(vectors)
            if bar is not None:
                bar.update(len(batch.ids))
    pcas: list[PCA | None] = []
    for feature, sample in zip(mapper.features, samples, strict=True):
        pcas.append(fit_pca(torch.cat(sample), feature) if sample else None)
        sample.clear()
    return pcas


def _mapped_labels(labels: Tensor, classes: Tensor) -> Tensor:
    """The data set's class numbers as the classifier's; -1 stays -1."""
    known = labels >= 0
    mapped = torch.full_like(labels, -1)
    mapped[known] = classes[labels[known]].to(labels)
    return mapped


def _bar(total: int, what: str, progress: bool) -> tqdm | nullcontext[None]:
    # disable=None hides the bar where standard error is a file or a pipe.
    return tqdm(total=total, desc=what, unit=" images", delay=1, disable=None) if progress else nullcontext()
