"""What several test modules share: real digits, a classifier trained on them, and rows for a database."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset, open_dataset
from nndefense.features import PCA, FeatureSpec
from nndefense.files import sealed
from nndefense.models import Classifier, build_classifier
from nndefense.training import train_classifier

DIGITS = tuple(str(digit) for digit in range(10))
BLOCK2 = FeatureSpec("block2", pca=0)


@functools.lru_cache(maxsize=2)
def digits(split: str) -> ImageDataset:
    """The digits that come with scikit-learn: 1 x 8 x 8."""
    return open_dataset(f"digits:{split}")


@functools.lru_cache(maxsize=1)
def trained() -> Classifier:
    """A small classifier that knows the digits; shared by all tests, so copy it before changing it."""
    classifier = build_classifier("small-cnn", input_shape=(1, 8, 8), classes=DIGITS, seed=0)
    # The first test to ask may stand inside torch.no_grad().
    with torch.enable_grad():
        return train_classifier(classifier, digits("train"), epochs=3, batch_size=64, device="cpu", progress=False)


def untrained(seed: int = 0, arch: str = "small-cnn") -> Classifier:
    """A classifier with fresh weights for images 1 x 8 x 8."""
    return build_classifier(arch, input_shape=(1, 8, 8), classes=DIGITS, seed=seed)


def images(split: str, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` images and labels of the digits."""
    return digits(split).batch(np.arange(first, first + count))


@dataclass(frozen=True)
class Table:
    """Made-up rows of a database."""

    features: Tensor
    posteriors: Tensor
    ids: Sequence[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, first: int, last: int) -> Table:
        """Rows ``first`` up to ``last``."""
        part = slice(first, last)
        return Table(self.features[part], self.posteriors[part], self.ids[part], self.labels[part])

    def columns(self) -> tuple[Tensor, Tensor, Sequence[str], Tensor]:
        """What ``add`` takes."""
        return self.features, self.posteriors, self.ids, self.labels


def table(count: int, dimension: int = 16, seed: int = 0) -> Table:
    """Random rows with 10 classes and labels from -1; every id is another one, of varying length."""
    generator = torch.Generator().manual_seed(seed)
    return Table(
        torch.randn(count, dimension, generator=generator),
        (3 * torch.randn(count, 10, generator=generator)).softmax(1),
        [f"{'bild-ü' if i % 3 else 'x'}/{seed}-{i}" for i in range(count)],
        torch.randint(-1, 10, (count,), generator=generator),
    )


def write(
    folder: Path, rows: Table, *, classifier: Classifier | None = None, pca: PCA | None = None, **options: Any
) -> ImageDatabase:
    """A finished database of these rows, opened."""
    classifier = classifier or untrained()
    writer = ImageDatabase.create(folder, classifier=classifier, feature=BLOCK2, pca=pca, **options)
    writer.add(*rows.columns())
    writer.finish()
    return ImageDatabase.open(folder)


def assert_holds(database: ImageDatabase, rows: Table) -> None:
    """Every column of every row is there, in order, and each vector finds itself."""
    everything = np.arange(len(rows))
    assert len(database) == len(rows)
    assert torch.equal(database.posteriors(everything), rows.posteriors)
    assert database.ids(everything) == list(rows.ids)
    assert torch.equal(database.labels(everything), rows.labels)
    distances, found = database.search(rows.features, 1)
    assert torch.equal(found[:, 0], torch.arange(len(rows)))
    assert float(distances.max()) < 1e-2
    database.verify()


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a record as one who means it to be so, digest and all: what is checked then is what it says."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(sealed(value)))


def nearest_by_loop(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search as slowly as possible: float64 distances of every pair, then a stable sort."""
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - rows[None].astype(np.float64), axis=2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order
