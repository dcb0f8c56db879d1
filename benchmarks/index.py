"""Index-building against its floors: ratios measured side by side in one run.

1. mapper: the mapper, and the whole extract stage, against a bare loop of the same net, batch and precision on ready
   tensors, and against a plain float32 loop. The builder keeps freed memory for the next batch (nndefense/memory.py),
   which a loop as one writes it does not; so the bare loop is also run with the same memory.
2. memory: the peak of a build at ten times the images, against the smaller one; anonymous memory, so that mapped files,
   which the system may drop, do not count.
3. search: `auto` against exact search, and its training, adding and tuning against autofaiss on the same vectors; and
   codes whose candidates are read again from a mapped file.
4. defended: a defended prediction against the bare classifier's.
5. scaling: the time of a query against the number of rows.
6. growing: adding a tenth of its rows to a database, against extracting those images alone.

Vectors are made by rule (index_vectors.py). With one thread times are processor time, which does not see what else the
machine does; with more, the clock's. Memory and defended stand in index_jobs.py and run from here. Parts that are run
one at a time go into one file: each replaces what the file held of it, with the threads and versions that it ran with.

Usage: python benchmarks/index.py [--only PART] [--rows N] [--threads N] [--autofaiss PYTHON] [--out FILE] ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import faiss
import index_jobs
import numpy as np
import torch
from index_vectors import pieces, queries
from torch import Tensor, nn

from index_build.mapper import Mapper
from nndefense.database.index_training import (
    build_index,
    choose_index,
    index_bytes,
    sample_rows,
    train_index,
    training_rows,
)
from nndefense.database.reranking import RerankedIndex
from nndefense.database.tuning import exact_neighbours, recall_at, tune
from nndefense.features import FeatureSpec
from nndefense.memory import reused_memory
from nndefense.models import Classifier, build_classifier, load_classifier

PARTS = ("mapper", "memory", "search", "defended", "scaling", "growing")
K = 50


def main() -> None:
    """Run the parts and print a line for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of search, memory, defended and growing")
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--most-rows", type=int, default=10_000_000, help="of scaling")
    parser.add_argument("--scaling-dimension", type=int, default=32)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--codes", action="append", help="of search: kinds to re-rank [default: IVF4096,PQ64]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--autofaiss", default=None, help="a Python that has autofaiss; without it that part is left out"
    )
    parser.add_argument("--plot", type=Path, default=None, help="of scaling: a PNG or SVG file")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    run: dict[str, Any] = {
        "torch": torch.__version__, "faiss": faiss.__version__, "threads": options.threads,
        "machine": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability(), "clock": clock.__name__,
        "processors": os.cpu_count(),
    }  # fmt: skip
    parts: dict[str, Callable[[], Any]] = {
        "mapper": lambda: mapper_part(options, clock),
        "memory": lambda: index_jobs.memory(options.rows),
        "search": lambda: search_part(options, clock),
        "defended": lambda: index_jobs.defended(options.rows, options.dimension, options.rounds, clock),
        "scaling": lambda: scaling_part(options, clock),
        "growing": lambda: index_jobs.growing(options.rows, clock),
    }
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for name in options.only or PARTS:
        found[name] = {"run": run, "found": parts[name]()}
        if options.out:
            # After each part, so that a run that is stopped leaves what it found.
            options.out.write_text(json.dumps(found, indent=2) + "\n")


# -- 1: the forward pass ----------------------------------------------------------------------------------------------


def mapper_part(options: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """ResNet-50 at 224 pixels and a small CNN, each in what `auto` finds to be fastest."""
    resnet = load_classifier("torchvision:resnet50:none")
    small = build_classifier("small-cnn", input_shape=(1, 28, 28), classes=[str(i) for i in range(10)], seed=0)
    rows = []
    for title, classifier, layer, shape, batches in (
        ("ResNet-50, batch 16 of 3 x 224 x 224", resnet, "avgpool", (16, 3, 224, 224), 2),
        ("small-cnn, batch 128 of 1 x 28 x 28", small, "block2", (128, 1, 28, 28), 8),
    ):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        mapper = Mapper(classifier.eval(), [FeatureSpec(layer, "avg", pca=0)], torch.device("cpu"), precision="auto")
        with reused_memory():
            choice = mapper.resolve(images)
        bare = bare_loop(classifier, choice.precision, choice.channels_last, images)
        plain = bare_loop(classifier, "float32", False, images)
        seconds = in_turns(
            {"ours": (lambda: mapper(images), True), "bare": (bare, False), "bare_reused": (bare, True),  # noqa: B023
             "plain": (plain, False)},
            options.rounds, batches, clock,
        )  # fmt: skip
        rate = len(images) * batches / statistics.median(seconds["ours"])
        ratio = {name: median_ratio(seconds[name], seconds["ours"]) for name in ("bare", "bare_reused", "plain")}
        print(
            f"{title}: {choice.precision}{', channels last' if choice.channels_last else ''}, {rate:.1f} images/s; "
            f"{ratio['bare']:.3f} of a bare loop ({ratio['bare_reused']:.3f} of one that keeps its memory too), "
            f"{ratio['plain']:.2f} times a plain float32 loop"
        )
        rows.append({"what": title, "choice": dataclasses.asdict(choice), "images_per_second": rate,
                     "of_bare": ratio["bare"],
                     "of_bare_with_reused_memory": ratio["bare_reused"], "times_plain": ratio["plain"]})  # fmt: skip
    rows += index_jobs.extract(options.rounds, clock)
    return rows


def median_ratio(times: list[float], ours: list[float]) -> float:
    """The median of the rounds' ratios: what the machine does beside changes from round to round."""
    return statistics.median(b / a for a, b in zip(ours, times, strict=True))


def bare_loop(classifier: Classifier, precision: str, channels_last: bool, images: Tensor) -> Callable[[], Any]:
    """A forward pass on tensors that are ready, as one writes it down."""
    import copy

    net: nn.Module = copy.deepcopy(classifier)
    ready = images
    if channels_last:
        net, ready = net.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    kind = getattr(torch, precision)

    @torch.no_grad()
    def run() -> None:
        with torch.autocast(
            "cpu", dtype=torch.bfloat16 if kind == torch.float32 else kind, enabled=kind != torch.float32
        ):
            net(ready).float().softmax(1)

    return run


def in_turns(
    calls: dict[str, tuple[Callable[[], Any], bool]], rounds: int, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one that does not count; each says whether it keeps its memory."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, (call, reused) in calls.items():
            with reused_memory() if reused else nullcontext():
                # Of a long loop the first batch is one of many.
                call()
                start = clock()
                for _ in range(repeats):
                    call()
                if number:
                    times[name].append(clock() - start)
    return times


# -- 3: searching -----------------------------------------------------------------------------------------------------


def search_part(options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """`auto` at the wanted recall against exact search, then autofaiss on the same rows."""
    rows, dimension = options.rows, options.dimension
    vectors = np.concatenate(list(pieces(rows, dimension)))
    asked, held_out = np.split(queries(2000, dimension), 2)
    exact = build_index("Flat", dimension, vectors[:0], [vectors])
    start = clock()
    truth = exact.search(asked, K)[1]
    exact_rate = len(asked) / (clock() - start)
    held = held_out, exact.search(held_out, K)[1]
    choice = choose_index(rows, dimension)
    found = {
        "exact_queries_per_second": exact_rate,
        "why": choice.why,
        **searched(choice.factory, vectors, (asked, truth), held, exact_rate, options, clock),
    }
    with tempfile.TemporaryDirectory() as name:
        np.save(Path(name) / "rows.npy", vectors)
        stored = np.load(Path(name) / "rows.npy", mmap_mode="r")
        found["codes"] = [
            searched(factory, vectors, (asked, truth), held, exact_rate, options, clock, stored)
            for factory in options.codes or ["IVF4096,PQ64"]
        ]
    ours = found["built_s"]
    found["autofaiss"] = other = autofaiss(options, vectors, asked, truth)
    if "built_s" in other:
        found["time_against_autofaiss"] = ours / other["built_s"]
        at = other["at_recall"]
        print(
            f"  autofaiss: {other['kind']} with {other['lists']} lists, {other['built_s']:.0f} s, so ours takes "
            f"{found['time_against_autofaiss']:.2f} of its time; at recall {at['recall']:.4f} it does "
            f"{at['queries_per_second']:,.0f} queries/s (as built {other['as_built']['recall']:.4f}, "
            f"{other['as_built']['queries_per_second']:,.0f})"
        )
    else:
        print(f"  autofaiss: {other['left_out']}")
    return found


def searched(
    factory: str, vectors: Any, asked: Any, held_out: Any, exact_rate: float, options: argparse.Namespace,
    clock: Callable[[], float], stored: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Train, add, tune on some queries with their truth and measure on others; with ``stored`` rows, re-ranked."""
    rows, dimension = vectors.shape
    # What autofaiss is compared in: training, adding and tuning; the truth to tune by is part of it.
    spent = {}
    start = clock()
    index = train_index(factory, dimension, vectors[sample_rows(rows, training_rows(factory, dimension, rows))])
    spent["train"] = clock() - start
    start = clock()
    index.add(vectors)
    spent["add"] = clock() - start
    if stored is not None:
        index = RerankedIndex(index.index, lambda numbers: stored[numbers])
    start = clock()
    tuned = tune(index, *held_out, recall=options.recall, seconds=0)
    spent["tune"] = clock() - start + len(held_out[0]) / exact_rate
    best = min(timed(lambda: index.search(asked[0], K), clock) for _ in range(options.rounds))
    recall = recall_at(index.search(asked[0], K)[1], asked[1])
    rate, size = len(asked[0]) / best, index_bytes(factory, rows, dimension) / rows
    print(
        f"{rows:,} x {dimension}: {factory}, {size:.0f} bytes a row, {tuned.search}: recall@{K} {recall:.4f} on other "
        f"queries, {rate:,.0f} queries/s, {rate / exact_rate:.1f} times exact search ({exact_rate:,.0f}); train "
        f"{spent['train']:.0f} s, add {spent['add']:.0f} s, tune {spent['tune']:.0f} s",
        flush=True,
    )
    return {
        "rows": rows, "dimension": dimension, "factory": factory, "bytes_a_row": size, "search": tuned.search,
        "recall": recall, "queries_per_second": rate, "times_exact": rate / exact_rate, "seconds": spent,
        "built_s": sum(spent.values()),
    }  # fmt: skip


def autofaiss(options: argparse.Namespace, vectors: Any, asked: Any, truth: Any) -> dict[str, Any]:
    """What autofaiss does with the same vectors, in its own environment."""
    if not options.autofaiss:
        return {"left_out": "not compared: name a Python that has it with --autofaiss"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows").mkdir()
        np.save(folder / "rows" / "0.npy", vectors)
        np.save(folder / "queries.npy", asked)
        np.save(folder / "truth.npy", truth)
        script = Path(__file__).with_name("index_autofaiss.py")
        done = subprocess.run(
            [options.autofaiss, str(script), name, str(options.threads), str(options.recall)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            return {"left_out": f"it failed: {lines[-1]}"}
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    start = clock()
    call()
    return clock() - start


# -- 5: rows ----------------------------------------------------------------------------------------------------------


def scaling_part(options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds a query at the wanted recall, from 10^4 rows tenfold, of `auto` and of exact search."""
    dimension, rows, table = options.scaling_dimension, 10_000, []
    asked = queries(1000, dimension)
    while rows <= options.most_rows:
        truth = exact_neighbours(asked, pieces(rows, dimension), K)
        choice = choose_index(rows, dimension)
        chosen = sample_rows(rows, training_rows(choice.factory, dimension, rows))
        index = train_index(choice.factory, dimension, taken(chosen, rows, dimension))
        first = 0
        for some in pieces(rows, dimension):
            index.add(some, first=first)
            first += len(some)
        tuned = tune(index, asked, truth, recall=options.recall, seconds=0)
        best = min(timed(lambda: index.search(asked, K), clock) for _ in range(options.rounds))  # noqa: B023
        exact = None
        if rows <= 1_000_000:
            flat = build_index("Flat", dimension, asked[:0], pieces(rows, dimension))
            exact = 1e3 * timed(lambda: flat.search(asked[:200], K), clock) / 200  # noqa: B023
        ms = 1e3 * best / len(asked)
        beside = "" if exact is None else f", exact {exact:.3f}"
        print(
            f"{rows:>10,} x {dimension}: {choice.factory} {tuned.search}, recall {tuned.recall:.3f}, "
            f"{ms:.4f} ms a query{beside}",
            flush=True,
        )
        table.append({"rows": rows, "factory": choice.factory, "search": tuned.search, "recall": tuned.recall, "ms": ms,
                      "exact_ms": exact})  # fmt: skip
        rows *= 10
    listed = [row for row in table if row["factory"] != "Flat"]
    slope = exact_slope = None
    if len(listed) > 1:
        slope = fitted(listed, "ms")
    exact_rows = [row for row in table if row["exact_ms"]]
    if len(exact_rows) > 1:
        exact_slope = fitted(exact_rows, "exact_ms")
    print(f"slope of log time against log rows: auto (where it uses lists) {slope}, exact {exact_slope}")
    if options.plot:
        plot(table, options.plot)
    return {"dimension": dimension, "table": table, "slope": slope, "exact_slope": exact_slope}


def taken(chosen: Any, rows: int, dimension: int) -> Any:
    """The chosen rows, without holding the others."""
    kept, first = [np.empty((0, dimension), np.float32)], 0
    for some in pieces(rows, dimension):
        inside = chosen[(chosen >= first) & (chosen < first + len(some))] - first
        kept.append(some[inside])
        first += len(some)
    return np.concatenate(kept)


def fitted(table: list[dict[str, Any]], what: str) -> float:
    """The slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log([row["rows"] for row in table]), np.log([row[what] for row in table]), 1)[0])


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds against rows, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog([r["rows"] for r in table], [r["ms"] for r in table], "o-", label="auto, recall@50 of at least 0.95")
    exact = [r for r in table if r["exact_ms"]]
    axes.loglog([r["rows"] for r in exact], [r["exact_ms"] for r in exact], "s--", label="exact, up to 10^6 rows")
    axes.set(xlabel="rows", ylabel="ms a query, in batches of 1,000")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"plotted in {path}")


if __name__ == "__main__":
    sys.exit(main())
