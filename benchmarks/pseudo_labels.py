"""How often pseudo-labels are right: by a teacher, by its nearest labelled images, and by both, against the labels.

For each number of labels and each seed: the labelled images are drawn class by class, a teacher is trained on them, and
a database is built of them, with nothing else. Both label a pool of other images, whose true labels are looked at only
at the end. Printed is the mean over the seeds with its 95 % interval (Student's t), and also that of the paired
difference to the teacher: "all" of the labels given, or the "half" of the pool that the rule is most sure of.

Usage: python benchmarks/pseudo_labels.py [--dataset SPEC] [--labels 100,300,1000] [--seeds N] [--pool N]
       [--layer NAME] [--pooling NAME] [--k K] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from index_build import build_database
from nndefense.datasets import ImageDataset, open_dataset
from nndefense.features import FeatureSpec
from nndefense.models import build_classifier
from nndefense.training import train_classifier
from nndefense.training.labellers import Combined, Retrieval, Teacher
from nndefense.training.pools import complement
from nndefense.training.pseudo_job import write_pseudo_labels
from nndefense.training.pseudo_labels import PseudoLabels
from nndefense.versions import library_versions

RULES = ("teacher", "retrieval", "product", "agreement")


def main() -> None:
    """Measure all cells and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--labels", default="100,300,1000")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pool", type=int, default=10**9, help="at most so many images of the pool")
    parser.add_argument("--layer", default="block3")
    parser.add_argument("--pooling", default="avg")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = open_dataset(options.dataset, data_dir=options.data_dir)
    cells = []
    for n in map(int, options.labels.split(",")):
        runs = [measure(dataset, n, seed, options) for seed in range(options.seeds)]
        cells.append({"labels": n, "pool": runs[0]["n"], "runs": runs, "summary": summary(runs)})
        print(text(cells[-1]), flush=True)
    if options.out is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("out", "data_dir")}
        found = {"settings": settings, "cells": cells, "versions": library_versions()}
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(dataset: ImageDataset, n: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One teacher, one database and one pool: the share of right labels by each rule, of all and of the surer half."""
    labelled, pool = complement(dataset, n, seed)
    pool = pool.subset(np.arange(min(len(pool), options.pool)))
    teacher = build_classifier("small-cnn", input_shape=dataset.shape, classes=dataset.classes, seed=seed)
    train_classifier(teacher, labelled, seed=seed, augment=True, device="cpu", progress=False)
    truth = dataset.labels[[dataset.index_of(item) for item in pool.ids]]
    found: dict[str, Any] = {"seed": seed, "n": len(pool)}
    with tempfile.TemporaryDirectory(prefix="nndefense-") as folder:
        feature = FeatureSpec(options.layer, options.pooling, pca=0)
        database = build_database(labelled, teacher, feature, Path(folder) / "db", progress=False)
        retrieval = Retrieval(teacher, database, options.k)
        for rule in ("product", "agreement"):
            both = Combined(Teacher(teacher), retrieval, rule)
            labels = write_pseudo_labels(both, pool, Path(folder) / f"{rule}.h5", progress=False)
            found[rule] = shares(labels.labels, labels.confidence, truth)
            found |= {name: shares(part, sure, truth) for name, (part, sure) in labels.parts.items()}
            if rule == "product":
                found["balanced"] = balanced(labels, truth)
    return found


def shares(labels: np.ndarray, confidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Right labels among those given, among the surer half of the whole pool, and the share that is given."""
    given = labels >= 0
    surest = np.argsort(-confidence, kind="stable")[: len(labels) // 2]
    right = labels == truth
    return {"all": float(right[given].mean()), "half": float(right[surest].mean()), "given": float(given.mean())}


def balanced(labels: PseudoLabels, truth: np.ndarray) -> dict[str, float]:
    """The most confident of each class, as many as a twentieth of the pool."""
    chosen = labels.select(max(len(truth) // 20, 1))
    return {"all": float((chosen.labels == truth[chosen.rows]).mean()), "given": len(chosen) / len(truth)}


def summary(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and 95 % interval over seeds, of each share and of each difference to the teacher; in per cent."""
    values = {}
    for rule in RULES:
        for which in ("all", "half", "given"):
            values[f"{rule} {which}"] = [run[rule][which] for run in runs]
    values["product, balanced half"] = [run["balanced"]["all"] for run in runs]
    for rule in RULES[1:3]:
        for which in ("all", "half"):
            values[f"{rule} - teacher, {which}"] = [run[rule][which] - run["teacher"][which] for run in runs]
    result = {}
    for name, numbers in values.items():
        mean, error = 100 * float(np.mean(numbers)), 0.0
        if len(numbers) > 1:
            t = float(stats.t.ppf(0.975, len(numbers) - 1))
            error = 100 * t * float(np.std(numbers, ddof=1)) / len(numbers) ** 0.5
        result[name] = [mean, mean - error, mean + error]
    return result


def text(cell: dict[str, Any]) -> str:
    """One cell as lines."""
    lines = [f"{cell['labels']} labels, pool of {cell['pool']}, {len(cell['runs'])} seeds"]
    lines += [
        f"  {name:<28} {mean:7.2f}  ({low:.2f} to {high:.2f})" for name, (mean, low, high) in cell["summary"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
