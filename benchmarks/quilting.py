"""What quilting one image costs, part by part, beside the floor: FAISS's exact search for the same patches.

The parts are timed apart: the search for the nearest patches by the database's own index, and the stitching. The floor
is one batched search of all patches of the image in a flat FAISS index. How far an inverted index falls short of the
exact one is told by its recall and by the mean distance of what it finds, over that of the nearest. Wall times are
those of the fastest of several runs; processor times are over all threads.

Usage: python benchmarks/quilting.py --dataset imagefolder:data/imagenette:train --query imagefolder:data/imagenette:val
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from index_build.patches import build_patches
from nndefense.datasets import open_dataset
from nndefense.defenses.quilting import PatchDatabase, Quilt, cut, lay_out, stitch


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="imagefolder:data/imagenette:train", help="images the patches come from")
    parser.add_argument("--query", default="imagefolder:data/imagenette:val", help="images to quilt")
    parser.add_argument("--database", type=Path, default=None, help="patch database [default: built for the purpose]")
    parser.add_argument("--patches", type=int, default=100_000)
    parser.add_argument("--index", default="auto")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--noise", type=float, default=8 / 255, help="uniform noise on the query, as an attack's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    found: dict[str, Any] = {
        "size": args.size,
        "k": args.k,
        "threads": args.threads,
        "machine": {"processor": platform.processor() or platform.machine(), "faiss": faiss.__version__},
    }
    with tempfile.TemporaryDirectory() as folder:
        patches = PatchDatabase.open(args.database) if args.database else _built(args, Path(folder), found)
        images, _ = open_dataset(args.query, data_dir=args.data_dir, size=args.size).batch([0])
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        found |= _measured(patches, (images + args.noise * noise).clamp(0, 1), args.k, args.runs)
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


def _built(args: argparse.Namespace, folder: Path, found: dict[str, Any]) -> PatchDatabase:
    dataset = open_dataset(args.dataset, data_dir=args.data_dir, size=args.size)
    built, cost = _timed(
        lambda: build_patches(dataset, folder / "patches", patches=args.patches, index=args.index, progress=False), 1
    )
    found["build"] = cost
    return built


def _measured(patches: PatchDatabase, images: torch.Tensor, k: int, runs: int) -> dict[str, Any]:
    layout = lay_out(images.shape[2], images.shape[3], patches.side, 2)
    queries = cut(images, layout).flatten(0, 1).flatten(1)
    (distances, rows), search = _timed(lambda: patches.search(queries, k), runs)
    chosen = patches.pixels(rows[:, 0])[None]
    _, stitching = _timed(lambda: stitch(chosen, layout), runs)

    def whole() -> torch.Tensor:
        # A new object each time: a quilt keeps the nearest patches of its last images.
        return Quilt(patches, k=k)(images)

    _, total = _timed(whole, runs)
    vectors = patches.pixels(torch.arange(len(patches))).flatten(1).numpy()
    flat = faiss.IndexFlatL2(vectors.shape[1])
    flat.add(vectors)
    (_, nearest), floor = _timed(lambda: flat.search(queries.numpy(), k), runs)
    exact = (queries[:, None] - torch.from_numpy(vectors[nearest])).square().sum(2).sqrt()
    same = [len(set(a) & set(b)) / k for a, b in zip(rows.tolist(), nearest.tolist(), strict=True)]
    return {
        "patches": len(patches),
        "index": patches.manifest.index,
        "positions": len(layout),
        "waves": len(layout.waves),
        "total": total,
        "search": search,
        "stitch": stitching,
        "flat_search": floor,
        "total_over_flat_search": round(total["wall_s"] / floor["wall_s"], 3),
        "recall": round(float(np.mean(same)), 4),
        "distance_over_nearest": round(float(distances.sum() / exact.sum()), 5),
    }


def _timed(work: Callable[[], Any], runs: int) -> tuple[Any, dict[str, float]]:
    walls, processors = [], []
    for _ in range(runs):
        wall, processor = time.perf_counter(), time.process_time()
        value = work()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return value, {"wall_s": round(min(walls), 4), "cpu_s": round(min(processors), 4)}


if __name__ == "__main__":
    main()
