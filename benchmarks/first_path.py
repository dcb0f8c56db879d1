"""Ratios to the floor, measured side by side in one run: an attack step, a defended prediction, a database build.

Each pair is timed in turn, several times over, and the ratio of the medians is printed: on a shared machine the times
move, their ratio much less. Usage: python benchmarks/first_path.py [--threads N] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from index_build import build_database
from nndefense.attacks import pgd
from nndefense.database import ImageDatabase
from nndefense.datasets import ArrayDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.features import FeatureSpec
from nndefense.models import Classifier, build_classifier

STEPS = 5
CASES = {
    "small-cnn, 1 x 28 x 28": ("small-cnn", (1, 28, 28), 256),
    "cifar-resnet18": ("cifar-resnet18", (3, 32, 32), 16),
}


def main() -> None:
    """Run all pairs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=60_000, help="database rows for the defended prediction")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, (arch, shape, batch) in CASES.items():
        classifier = build_classifier(arch, input_shape=shape, classes=[str(i) for i in range(10)]).eval()
        images = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(batch) % 10
        rows.append(pair(f"PGD step, l_inf ({name})", options.repeats, *attack_pair(classifier, images, labels), STEPS))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                pair(
                    f"defended prediction, {options.rows:,} rows, K = 50 ({name})",
                    options.repeats,
                    *prediction_pair(classifier, images, Path(folder), options.rows),
                )
            )
            rows.append(pair(f"index build ({name})", options.repeats, *build_pair(classifier, shape, Path(folder))))
    width = max(len(row["what"]) for row in rows)
    print(f"{'':<{width}}    floor, ms   ours, ms   ratio")
    for row in rows:
        print(f"{row['what']:<{width}}  {row['floor_ms']:>11.2f}  {row['ours_ms']:>9.2f}  {row['ratio']:>6.3f}")
    if options.out:
        found = {"torch": torch.__version__, "threads": options.threads, "machine": platform.machine(), "rows": rows}
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def pair(what: str, repeats: int, floor: Callable[[], Any], ours: Callable[[], Any], units: int = 1) -> dict[str, Any]:
    """Time two functions alternately; ``units`` is how many units of work each call does."""
    times: dict[str, list[float]] = {"floor": [], "ours": []}
    for repeat in range(repeats + 1):
        for name, function in (("floor", floor), ("ours", ours)):
            begun = time.perf_counter()
            function()
            if repeat:  # the first round warms caches up
                times[name].append((time.perf_counter() - begun) / units * 1e3)
    low, high = (statistics.median(times[name]) for name in ("floor", "ours"))
    return {"what": what, "floor_ms": low, "ours_ms": high, "ratio": high / low}


def attack_pair(classifier: Classifier, images: Tensor, labels: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A bare loop of forward pass, input gradient and l_inf step, and :func:`pgd`, both from the clean images."""
    eps, size = 8 / 255, 2 / 255

    def floor() -> Tensor:
        x = images.clone()
        low, high = (images - eps).clamp_(0, 1), (images + eps).clamp_(0, 1)
        for _ in range(STEPS):
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(x), labels, reduction="sum"), x)
            x = torch.minimum(torch.maximum(x.detach() + size * gradient.sign(), low), high)
        return x

    def ours() -> Tensor:
        return pgd(classifier, images, labels, eps=eps, steps=STEPS, step_size=size, random_start=False)

    return floor, ours


def prediction_pair(
    classifier: Classifier, images: Tensor, folder: Path, rows: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The bare classifier's prediction, and the defence's on a database of ``rows`` procedural rows (exact search)."""
    layer = [name for name, _ in classifier.net.named_children()][-3]
    spec = FeatureSpec(layer, "avg", pca=0)
    example = torch.rand(2, *classifier.input_shape)
    random = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as probe:
        width = _small_database(classifier, spec, example, Path(probe)).dimension
    writer = ImageDatabase.create(folder / "rows", classifier=classifier, feature=spec)
    for first in range(0, rows, 10_000):
        count = min(10_000, rows - first)
        posteriors = torch.rand(count, 10, generator=random).softmax(1)
        ids = [f"row/{first + i:08d}" for i in range(count)]
        writer.add(torch.rand(count, width, generator=random), posteriors, ids, np.zeros(count, np.int64))
    writer.finish()
    defense = NearestNeighborDefense(classifier, ImageDatabase.open(folder / "rows"), k=50)

    def floor() -> Tensor:
        with torch.no_grad():
            return classifier(images)

    return floor, lambda: defense(images)


def _small_database(classifier: Classifier, spec: FeatureSpec, images: Tensor, folder: Path) -> ImageDatabase:
    dataset = ArrayDataset(images.numpy(), np.zeros(len(images), np.int64), name="probe", classes=classifier.classes)
    return build_database(dataset, classifier, spec, folder / "probe", progress=False)


def build_pair(
    classifier: Classifier, shape: tuple[int, int, int], folder: Path
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Bare forward passes over ready tensors, and a whole build (features, posteriors, HDF5, index, checksums)."""
    count = 2048 if shape[0] == 1 else 128
    images = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
    dataset = ArrayDataset(images, np.zeros(count, np.int64), name="images", classes=classifier.classes)
    layer = [name for name, _ in classifier.net.named_children()][-3]
    tensors = torch.from_numpy(images)

    def floor() -> None:
        with torch.no_grad():
            for first in range(0, count, 128):
                classifier(tensors[first : first + 128])

    def ours() -> None:
        spec = FeatureSpec(layer, "avg", pca=0)
        build_database(dataset, classifier, spec, folder / "build", overwrite=True, progress=False)

    return floor, ours


if __name__ == "__main__":
    main()
