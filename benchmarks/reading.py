"""How fast the builder's reader delivers images, against Pillow alone, with threads and with processes.

The floor is a bare loop in one thread that opens JPEG files with Pillow, decodes them to RGB and makes float tensors
of them; "decode" is the same loop without the tensors. Against it: ``index_build.reader.read`` with its threads (which
also hashes the pixels and keeps ids, labels and rejections), and torch's DataLoader with worker processes over the same
data set. In each round every one reads all images once, in random order of turns; ratios are of the same round.

The pictures are made here: smooth fields with grain, 224 x 224, JPEG quality 90. ``--dataset`` reads others.

Usage: python benchmarks/reading.py --workers 1 2 --out benchmarks/reading.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from index_build.reader import read
from nndefense.datasets import ImageFolderDataset, open_dataset
from nndefense.datasets.encoded import processors

BATCH = 64


def pictures(folder: Path, count: int, side: int) -> None:
    """Write JPEGs of smooth colour fields with grain, as many bytes a pixel as photographs have."""
    chance = np.random.default_rng(0)
    for number in range(count):
        field = Image.fromarray(chance.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((side, side), 3)
        grain = chance.normal(0, 8, (side, side, 1))
        pixels = (np.asarray(field) + grain).clip(0, 255).astype(np.uint8)
        home = folder / f"class{number % 4}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / f"{number:05d}.jpg", quality=90)


def subjects(dataset: ImageFolderDataset, workers: list[int], side: int) -> dict[str, Callable[[], int]]:
    """What is timed: functions that read every image once and return how many they have read."""
    paths = [dataset.path(row) for row in range(len(dataset))]
    rows = np.arange(len(dataset))

    def picture(path: Path) -> Image.Image:
        image = Image.open(path).convert("RGB")
        return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BILINEAR)

    def decode() -> int:
        return sum(picture(path).width > 0 for path in paths)

    def bare() -> int:
        count = 0
        for start in range(0, len(paths), BATCH):
            arrays = np.stack([np.asarray(picture(path)) for path in paths[start : start + BATCH]])
            count += len(torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div_(255))
        return count

    def threads(number: int) -> int:
        return sum(len(batch.ids) for batch in read(dataset, rows, BATCH, workers=number))

    def processes(number: int) -> int:
        return sum(len(labels) for _, labels in DataLoader(dataset, batch_size=BATCH, num_workers=number))

    found: dict[str, Callable[[], int]] = {"Pillow, tensors": bare, "Pillow, decode": decode}
    for number in workers:
        found[f"read, {number} thread{'s' * (number > 1)}"] = lambda number=number: threads(number)
        found[f"DataLoader, {number} process{'es' * (number > 1)}"] = lambda number=number: processes(number)
    return found


def measure(cases: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Of each: images a second and processor milliseconds an image (medians), and the ratio to the first one's speed.

    The ratios are medians over the rounds, with quartiles. Processor time counts all threads and processes.
    """
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    efforts: dict[str, list[float]] = {name: [] for name in cases}
    chance = random.Random(0)
    # The first round warms up: the files get into the page cache, torch starts its threads.
    for number in range(rounds + 1):
        for name in chance.sample(list(cases), len(cases)):
            begun, spent = time.perf_counter(), processor_seconds()
            count = cases[name]()
            if number:
                speeds[name].append(count / (time.perf_counter() - begun))
                efforts[name].append((processor_seconds() - spent) / count * 1e3)
    floor = next(iter(speeds.values()))
    result = {}
    for name, found in speeds.items():
        low, ratio, high = statistics.quantiles((a / b for a, b in zip(found, floor, strict=True)), n=4)
        speed, effort = statistics.median(found), statistics.median(efforts[name])
        spread = {"ratio": ratio, "low": low, "high": high}
        result[name] = {"images_per_second": speed, "processor_ms": effort, **spread}
    return result


def processor_seconds() -> float:
    """Of this process with all its threads, and of its ended children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    """Time every subject and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dataset", default=None, help="an image folder: imagefolder:PATH[:SPLIT]")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.dataset is None:
            pictures(Path(folder), options.images, options.side)
        opened = open_dataset(options.dataset or f"imagefolder:{folder}", size=options.side)
        if not isinstance(opened, ImageFolderDataset):
            parser.error("--dataset must be an image folder, without a slice")
        paths = [opened.path(row) for row in range(len(opened))]
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        rows = measure(subjects(opened, options.workers, options.side), options.rounds)
        print(f"{len(opened)} images of {kilobytes:.0f} kB, brought to {options.side} px; {processors()} processors")
    for name, row in rows.items():
        speed, spread = row["images_per_second"], f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        print(f"{name:24s} {speed:7.0f} images/s  {spread}  {row['processor_ms']:.2f} processor ms an image")
    if options.out:
        found: dict[str, Any] = {
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
            "machine": platform.machine(),
            "processors": processors(),
            "images": len(opened),
            "kilobytes": kilobytes,
            "rounds": options.rounds,
            "rows": rows,
        }
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
