"""Attacks on the nearest-neighbour defence on MNIST, 60,000 rows: accuracy under each, and what a step costs.

Modes: ``ladder`` (clean, gray, adaptive, at each eps), ``attacks`` (every attack alone), ``overlap`` (what a part of
the rows is worth), ``speed`` (an adaptive step against a plain PGD step, in one run). All write JSON. Needs MNIST and a
folder made by ``nndefense demo --dataset mnist``; ``--layer`` builds a database of another feature first.

Usage: python benchmarks/retrieval_attacks.py ladder --run runs/mnist --n 1000 --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from index_build import build_database
from nndefense.attacks import pgd, retrieval
from nndefense.attacks.retrieval import Knowledge
from nndefense.database import ImageDatabase
from nndefense.datasets import open_dataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.features import FeatureSpec
from nndefense.models import load_classifier
from nndefense.statistics import wilson_interval

GRAY_STEPS = 20
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "gray": retrieval.gray,
    "rank margin": retrieval.rank_margin,
    "soft top-K": retrieval.soft_top_k,
    "straight-through": retrieval.straight_through,
    "push-pull": retrieval.push_pull,
    "ASK class scores": retrieval.class_scores,
    "feature drift": retrieval.feature_drift,
    "PGD-PR": retrieval.pgd_pr,
    "PGD-FS": retrieval.pgd_fs,
}


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("ladder", "attacks", "overlap", "speed"))
    parser.add_argument("--run", type=Path, default=Path("runs/mnist"), help="folder with classifier and database")
    parser.add_argument("--database", type=Path, default=None, help="another database of the same classifier")
    parser.add_argument("--layer", default=None, help="build that database first, if it is missing, from this layer")
    parser.add_argument("--pooling", default="grid4")
    parser.add_argument("--pca", type=int, default=64)
    parser.add_argument("-k", type=int, default=3)
    parser.add_argument("--weighting", default="uniform")
    parser.add_argument("--first", type=int, default=0, help="first test image")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--gray-cache", type=Path, default=None, help="folder in which gray-box images are kept")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(options.threads)
    classifier = load_classifier(options.run / "classifier")
    train, test = open_dataset("mnist:train"), open_dataset("mnist:test")
    path = options.database or options.run / "database"
    if options.layer and not path.exists():
        build_database(train, classifier, FeatureSpec(options.layer, options.pooling, pca=options.pca), path)
    database = ImageDatabase.open(path, classifier=classifier)
    defense = NearestNeighborDefense(classifier, database, options.k, options.weighting)
    x, y = test.batch(np.arange(options.first, options.first + options.n))
    result: dict[str, Any] = {
        "mode": options.mode,
        "classifier": classifier.fingerprint,
        "database": database.fingerprint,
        "rows": len(database),
        "feature": str(database.feature),
        "k": options.k,
        "weighting": options.weighting,
        "images": f"mnist:test {options.first} to {options.first + options.n - 1}",
        "n": options.n,
        "norm": "linf",
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cells": [],
    }
    if options.mode != "speed":
        result["cells"] += [cell("none", "clean", 0, classifier, x, y), cell("retrieval", "clean", 0, defense, x, y)]
    run = {"ladder": ladder, "attacks": attacks, "overlap": overlap, "speed": speed}[options.mode]
    for done in run(defense, x, y, train, test, options):
        result["cells"].append(done)
        print(json.dumps(done), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


def cell(subject: str, attack: str, eps: float, model: Any, images: Tensor, y: Tensor, **more: Any) -> dict[str, Any]:
    """One accuracy with its interval."""
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(images.split(100), y.split(100), strict=True))
    low, high = wilson_interval(right, len(y))
    return {
        "subject": subject, "attack": attack, "eps": eps, "right": right, "n": len(y), "accuracy": right / len(y),
        "ci_low": low, "ci_high": high, **more,
    }  # fmt: skip


def ladder(defense: Any, x: Tensor, y: Tensor, train: Any, test: Any, options: Any) -> Any:
    """Gray and adaptive at each eps; the adaptive attack is given the gray one's images to begin with."""
    surface = defense.surface(Knowledge.WHITE, images=train)
    for eps in options.eps:
        begun = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        # Gray-box images do not depend on the defence: two ladders can share them.
        kept = options.gray_cache and options.gray_cache / f"gray-{options.first}-{len(x)}-{eps}.npy"
        if kept and kept.exists():
            gray = torch.from_numpy(np.load(kept, allow_pickle=False))
        else:
            parts = zip(x.split(100), y.split(100), strict=True)
            gray = torch.cat(
                [pgd(defense.classifier, a, b, eps=eps, steps=GRAY_STEPS, generator=generator) for a, b in parts]
            )
            if kept:
                np.save(kept, gray.numpy())
        seconds = time.perf_counter() - begun
        settings = {"knowledge": "L0", "steps": GRAY_STEPS, "seconds": round(seconds, 1)}
        yield cell("none", "gray PGD", eps, defense.classifier, gray, y, **settings)
        yield cell("retrieval", "gray PGD", eps, defense, gray, y, **settings)
        found = retrieval.run_adaptive(surface, x, y, eps=eps, steps=options.steps, generator=generator, start=gray)
        assert float((found.images - x).abs().max()) <= eps + 1e-6
        assert float(found.images.min()) >= 0
        assert float(found.images.max()) <= 1
        yield cell(
            "retrieval", "adaptive", eps, defense, found.images, y, knowledge=surface.knowledge.value,
            steps=options.steps, broken=found.broken, counts=vars(found.counts),
            seconds=round(found.seconds, 1),
        )  # fmt: skip


def attacks(defense: Any, x: Tensor, y: Tensor, train: Any, test: Any, options: Any) -> Any:
    """Every attack alone, and the whole plan."""
    for eps in options.eps:
        for name, attack in [*ATTACKS.items(), ("adaptive", retrieval.adaptive)]:
            surface = defense.surface(Knowledge.WHITE, images=train)
            generator = torch.Generator().manual_seed(0)
            begun = time.perf_counter()
            images = attack(surface, x, y, eps=eps, steps=options.steps, generator=generator)
            seconds = round(time.perf_counter() - begun, 1)
            counts = vars(surface.counts)
            yield cell("retrieval", name, eps, defense, images, y, steps=options.steps, counts=counts, seconds=seconds)


def overlap(defense: Any, x: Tensor, y: Tensor, train: Any, test: Any, options: Any) -> Any:
    """The soft top-K from two starts and the paper's own attacks, by the share of the rows that the attacker has.

    His own images, in place of the rows that he lacks, are the last 4,000 test images.
    """
    own, _ = test.batch(np.arange(6000, 10000))
    names = {"soft top-K": retrieval.soft_top_k, "PGD-PR": retrieval.pgd_pr, "PGD-FS": retrieval.pgd_fs}
    for eps in options.eps:
        for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
            surface = defense.surface(Knowledge.PARTIAL, overlap=share, own_images=own)
            for name, attack in names.items():
                images = attack(surface, x, y, eps=eps, steps=options.steps, generator=torch.Generator().manual_seed(0))
                yield cell("retrieval", name, eps, defense, images, y, overlap=share, rows=surface.rows.count)


def speed(defense: Any, x: Tensor, y: Tensor, train: Any, test: Any, options: Any) -> Any:
    """Seconds of one step for one image: plain PGD on the classifier, and the adaptive attack's stages.

    Medians of interleaved repeats. Images whose clean class is right at a small eps, so that none drops out early.
    """
    surface = defense.surface(Knowledge.WHITE)
    steps, eps, x, y = 30, 0.02, x[:100], y[:100]

    def bare() -> None:
        images = x
        for _ in range(steps):
            images = images.detach().requires_grad_(True)
            loss = F.cross_entropy(defense.classifier(images), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images)
            images = (x + (images.detach() + 0.002 * gradient.sign() - x).clamp(-eps, eps)).clamp(0, 1)

    timed: dict[str, Callable[[], object]] = {
        "bare loop": bare,
        "PGD": lambda: pgd(defense.classifier, x, y, eps=eps, steps=steps, generator=torch.Generator().manual_seed(0)),
        "rank margin": lambda: retrieval.rank_margin(surface, x, y, eps=eps, steps=steps),
        "soft top-K": lambda: retrieval.soft_top_k(surface, x, y, eps=eps, steps=steps),
        "straight-through": lambda: retrieval.straight_through(surface, x, y, eps=eps, steps=steps),
        "push-pull": lambda: retrieval.push_pull(surface, x, y, eps=eps, steps=steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    taken: dict[str, int] = {name: steps * len(x) for name in timed}
    for _ in range(3):
        for name, call in timed.items():
            surface.counts.reset()
            begun = time.process_time()
            call()
            seconds[name].append(time.process_time() - begun)
            taken[name] = surface.counts.backwards or taken[name]
    for name, values in seconds.items():
        # The first round warms up; searches and the last look through the true pipeline are part of the attack's time.
        each = statistics.median(values[1:]) / taken[name]
        base = statistics.median(seconds["PGD"][1:]) / taken["PGD"]
        yield {"what": name, "ms_per_step_and_image": 1e3 * each, "ratio_to_pgd": each / base, "steps": steps}


if __name__ == "__main__":
    main()
