"""The parts of the index benchmark that need whole builds: extract against a bare loop, peak memory, and a defended
prediction on a large database. Run by index.py; `python benchmarks/index_jobs.py IMAGES` is the child whose memory is
measured.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from index_vectors import PIECE, pieces, queries
from numpy.typing import NDArray
from torch import Tensor, nn

from index_build import extract as extracting
from index_build import grow_database, stages
from index_build.begin import begin
from index_build.job import Options
from index_build.mapper import ShardTools
from index_build.runner import building, complete
from nndefense.database import DatabaseWriter, ImageDatabase
from nndefense.database.index_training import choose_index
from nndefense.database.tuning import exact_neighbours, tune
from nndefense.datasets import ImageDataset
from nndefense.datasets.ids import NumberedIds
from nndefense.defenses import NearestNeighborDefense
from nndefense.features import PCA, FeatureSpec
from nndefense.memory import reused_memory
from nndefense.models import Classifier, build_classifier, load_classifier

TEN = tuple(str(number) for number in range(10))


class Procedural(ImageDataset):
    """Images of numbers drawn from their own number, as many as are asked for, none of them stored."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        super().__init__(name=f"procedural-{count}", classes=TEN, shape=shape,
                         ids=NumberedIds("procedural", count), labels=np.arange(count) % 10)  # fmt: skip

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        size = int(np.prod(self.shape))
        with np.errstate(over="ignore"):
            # The finishing steps of splitmix64, a known mixing of bits.
            bits = (rows.astype(np.uint64)[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)) + np.uint64(1)
            bits *= np.uint64(0x9E3779B97F4A7C15)
            bits ^= bits >> np.uint64(30)
            bits *= np.uint64(0xBF58476D1CE4E5B9)
            bits ^= bits >> np.uint64(27)
        shade = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        return torch.from_numpy(shade.reshape(len(rows), *self.shape))

    def _digest(self) -> str:
        return f"{len(self):064x}"


def extract(rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """The extract stage alone (read, map, reduce, write) against a bare loop over the same images in memory."""
    # Processor time of this process alone counts the threads that read, too.
    found = []
    resnet = load_classifier("torchvision:resnet50:none")
    small = build_classifier("small-cnn", input_shape=(1, 28, 28), classes=TEN, seed=0)
    for title, classifier, layer, count, batch, asked in (
        ("small-cnn, 32,768 images of 1 x 28 x 28", small, "block2", 32768, 128, "float32"),
        ("small-cnn, 32,768 images of 1 x 28 x 28", small, "block2", 32768, 128, "auto"),
        ("ResNet-50, 160 images of 3 x 224 x 224", resnet, "avgpool", 160, 16, "auto"),
    ):
        classifier.eval()
        # Of 8 bits, as pictures are.
        images = Procedural(count, classifier.input_shape).batch(np.arange(count))[0].mul_(255).round_().div_(255)
        dataset = Held(images)
        ratios: dict[bool, list[float]] = {False: [], True: []}
        rates = []
        precision = asked
        for number in range(rounds + 1):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "database"
                with building([folder]):
                    feature = FeatureSpec(layer, "avg", pca=0)
                    options = Options(batch_size=batch, precision=precision)
                    job = begin(dataset, classifier, {folder: feature}, options, progress=False)
                    precision = job.precision["precision"]
                    start = clock()
                    extracting.extract(job, ShardTools.of(job, dataset, classifier), progress=False)
                    ours = clock() - start
            rates.append(count / ours)
            for reused, kept in ratios.items():
                with reused_memory() if reused else nullcontext():
                    start = clock()
                    _bare(classifier, images, batch, precision, job.precision["channels_last"])
                    if number:
                        kept.append((clock() - start) / ours)
        plain, same = (statistics.median(ratios[reused]) for reused in (False, True))
        rate = statistics.median(rates[1:])
        print(
            f"extract, {title}: {precision}, {rate:,.1f} images/s; {plain:.3f} of a bare loop ({same:.3f} of one that "
            "keeps its memory too)",
            flush=True,
        )
        found.append({"what": f"extract, {title}", "precision": precision, "images_per_second": rate, "of_bare": plain,
                      "of_bare_with_reused_memory": same})  # fmt: skip
    return found


class Held(ImageDataset):
    """Images that are tensors already."""

    def __init__(self, images: Tensor) -> None:
        count = len(images)
        super().__init__(name="held", classes=[], shape=tuple(images.shape[1:]), ids=NumberedIds("held", count),
                         labels=np.full(count, -1))  # fmt: skip
        self.images = images

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self.images.numpy()[rows])

    def _digest(self) -> str:
        return "0" * 64


@torch.no_grad()
def _bare(classifier: Classifier, images: Tensor, batch: int, precision: str, channels_last: bool) -> None:
    kind = getattr(torch, precision)
    form = torch.channels_last if channels_last else torch.contiguous_format
    net = copy.deepcopy(classifier).to(memory_format=form)
    with torch.autocast("cpu", dtype=torch.bfloat16 if kind == torch.float32 else kind, enabled=kind != torch.float32):
        for some in images.split(batch):
            net(some.contiguous(memory_format=form)).float().softmax(1)


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(rows: int) -> dict[str, Any]:
    """The peak of a whole build of ``rows`` images and of a tenth of them, each in a process of its own.

    The index counts apart: verify opens it, and one of less than 1 GiB is read into memory for that.
    """
    found = {}
    for count in (rows // 10, rows):
        done = subprocess.run([sys.executable, __file__, str(count)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        one = found[count] = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"build of {count:,} images: peak {one['extract_mb']:,.0f} MB while extracting, {one['index_mb']:,.0f} MB "
            f"after it, of which {one['index_file_mb']:,.0f} MB are the index; {one['seconds']:.0f} s",
            flush=True,
        )
    more, less = (
        max(one["extract_mb"], one["index_mb"] - one["index_file_mb"]) for one in (found[rows], found[rows // 10])
    )
    print(f"peak memory at {rows:,} images, index aside: {more / less:.2f} times that at {rows // 10:,}")
    return {"builds": {str(count): value for count, value in found.items()}, "ratio": more / less}


def _child(count: int) -> None:
    peaks, stage, over = {"extract_mb": 0.0, "index_mb": 0.0}, "extract_mb", threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            now = sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
            peaks[stage] = max(peaks[stage], now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    classifier = Classifier(net, arch="two-layers", input_shape=(1, 8, 8), classes=TEN)
    dataset = Procedural(count, (1, 8, 8))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name) / "database"
        # Flat: the sample that finds inverted lists grows with the rows, as it should.
        with building([folder]):
            options = Options(index="Flat", batch_size=512)
            job = begin(dataset, classifier, {folder: FeatureSpec("2", "flatten", pca=0)}, options, progress=False)
            extracting.extract(job, ShardTools.of(job, dataset, classifier), progress=False)
            stage = "index_mb"
            complete(folder, progress=False)
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    print(json.dumps(peaks | {"index_file_mb": count * 256 * 4 / 2**20, "seconds": seconds}))


# -- a defended prediction --------------------------------------------------------------------------------------------


def defended(rows: int, dimension: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """A prediction of ResNet-50 and the defended one, 32 images of 3 x 224 x 224 at once, K = 50."""
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet50(num_classes=len(TEN))
    classifier = Classifier(net, arch="resnet50", input_shape=(3, 224, 224), classes=TEN).eval()
    width = 2048
    axes = torch.linalg.qr(torch.randn(width, dimension)).Q
    pca = PCA(torch.zeros(width), axes, torch.ones(dimension))
    images = torch.rand(32, 3, 224, 224)
    choice = choose_index(rows, dimension)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name) / "database"
        data = {"name": "procedural", "fingerprint": "", "specs": []}
        writer = DatabaseWriter(folder, classifier=classifier, feature=FeatureSpec("avgpool", "avg", pca=dimension),
                                pca=pca, data=data, index=choice.factory)  # fmt: skip
        first = 0
        for some in pieces(rows, dimension):
            posteriors = torch.randn(len(some), len(TEN)).softmax(1)
            ids = [f"procedural/{first + i}" for i in range(len(some))]
            writer.add(torch.from_numpy(some), posteriors, ids, np.full(len(some), -1))
            first += PIECE
        writer.finish()
        database = ImageDatabase.open(folder, verify=False)
        asked = queries(200, dimension)
        index: Any = database._index
        tuned = tune(index, asked, exact_neighbours(asked, pieces(rows, dimension), 50), seconds=0)
        defense = NearestNeighborDefense(classifier, database, k=50)
        times: list[list[float]] = [[], []]
        with torch.no_grad():
            for number in range(rounds + 1):
                for call, kept in zip(
                    (lambda: classifier(images).softmax(1), lambda: defense(images)), times, strict=True
                ):
                    start = clock()
                    call()
                    if number:
                        kept.append(clock() - start)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    print(
        f"defended ResNet-50, {rows:,} rows, {choice.factory} {tuned.search} (recall {tuned.recall:.3f}), batch 32: "
        f"{ratio:.3f} times the bare prediction ({statistics.median(times[0]):.2f} s)"
    )
    return {"rows": rows, "factory": choice.factory, "search": tuned.search, "recall": tuned.recall, "ratio": ratio}


# -- a database that grows ---------------------------------------------------------------------------------------------


def growing(rows: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Adding a tenth of its rows to a database of ``rows`` x 256, against extracting those images alone."""
    classifier = build_classifier("small-cnn", input_shape=(1, 28, 28), classes=TEN, seed=0).eval()
    feature, images = FeatureSpec("block2", "grid2", pca=0), Procedural(rows // 10, classifier.input_shape)
    choice = choose_index(rows, 256)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder, first = Path(name) / "database", 0
        writer = DatabaseWriter(folder, classifier=classifier, feature=feature, index=choice.factory)
        for some in pieces(rows, 256):
            posteriors = torch.randn(len(some), len(TEN)).softmax(1)
            ids = [f"before/{first + i}" for i in range(len(some))]
            writer.add(torch.from_numpy(some), posteriors, ids, np.full(len(some), -1))
            first += len(some)
        writer.finish()
        start = clock()
        stages.extract(images, classifier, feature, Path(name) / "alone", workers=1, progress=False)
        middle = clock()
        added = grow_database(images, classifier, folder, workers=1, progress=False)
        alone, grown = middle - start, clock() - middle
        assert added.rows == rows + len(images) == len(ImageDatabase.open(folder, verify=False))
    print(
        f"growing, {len(images):,} images of small-cnn to {rows:,} rows x 256, {choice.factory}: {grown:.1f} s, "
        f"{grown / alone:.3f} times the {alone:.1f} s of extracting them alone"
    )
    return {"rows": rows, "added": len(images), "factory": choice.factory, "ratio": grown / alone, "alone": alone}


if __name__ == "__main__":
    _child(int(sys.argv[1]))
