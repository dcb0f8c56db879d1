"""What the guard's percentile and abstention are worth: on clean images, under PGD, and against an attacker who knows.

Clean: are the percentiles of images that it was not calibrated on uniform, and how many does it reject? PGD on the bare
classifier: how many attacked images does it reject, and how many wrong answers does it let through? Adaptive: the
attacker knows everything, the threshold too. He wins an image where the defence names a wrong class and does not
abstain, with any image that the adaptive attack on the retrieval finds or that gradient steps find on the way to rows
of other classes: those steps flip the answer by making the distance small.

Usage: python benchmarks/guard.py --database runs/demo/database --dataset digits:test --out benchmarks/guard.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.retrieval import Knowledge, run_adaptive
from nndefense.datasets import open_dataset
from nndefense.evaluation import AttackSettings, run_attack
from nndefense.guard import Guard
from nndefense.guard.prediction import Defended
from nndefense.statistics import wilson_interval

NORM = "normalized-l2"
RATES = (0.01, 0.05, 0.1)
STEPS = 20
TARGETS = 12


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=Path, default=Path("runs/demo/database"))
    parser.add_argument("--classifier", default=None)
    parser.add_argument("--dataset", default="digits:test")
    parser.add_argument("--calibration", default=None, help="data set to calibrate on [default: the stored guard.json]")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--n", type=int, default=None, help="images [default: all]")
    parser.add_argument("--adaptive-n", type=int, default=100, help="images for the adaptive attacker, 0 for none")
    parser.add_argument("--eps", default="0.05,0.1,0.15,0.2,0.3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    begun = time.perf_counter()
    guard = Guard.open(args.database, args.classifier, device="cpu", calibration=args.calibration is None)
    if args.calibration is not None:
        guard.calibrate(open_dataset(args.calibration, data_dir=args.data_dir))
    if guard.calibration is None:
        parser.error(f"{args.database} has no guard.json: give --calibration")
    dataset = open_dataset(args.dataset, data_dir=args.data_dir)
    order = np.random.default_rng(args.seed).permutation(len(dataset))[: args.n or len(dataset)]
    images, labels = dataset.batch(np.sort(order))
    labels = guard.classifier.label_map(dataset.classes)[labels]
    budgets = [float(eps) for eps in args.eps.split(",")]
    clean = guard.predict(images, neighbors=1)
    found: dict[str, Any] = {
        "database": str(args.database),
        "rows": len(guard.database),
        "k": guard.k,
        "weighting": guard.weighting,
        "calibrated_on": {"dataset": guard.calibration.dataset["name"], "n": len(guard.calibration)},
        "dataset": args.dataset,
        "n": len(images),
        "clean": {**_uniform(guard, clean), **_measured(guard, clean, labels, clean)},
        "pgd": [],
        "adaptive": [],
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
    }
    for eps in budgets:
        settings = AttackSettings("pgd", NORM, (eps,), STEPS, 1)
        generator = torch.Generator().manual_seed(args.seed)
        attacked = run_attack(settings, guard.classifier, images, labels, eps, generator).images
        said = guard.predict(attacked, neighbors=1)
        found["pgd"].append({"eps": eps, **_measured(guard, said, labels, clean)})
    for eps in budgets if args.adaptive_n else ():
        few = slice(0, args.adaptive_n)
        found["adaptive"].append({"eps": eps, **_adaptive(guard, images[few], labels[few], eps, args.seed)})
    found["seconds"] = round(time.perf_counter() - begun, 1)
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


def _uniform(guard: Guard, said: list[Defended]) -> dict[str, Any]:
    """Two samples of one distribution? Then percentiles are uniform, up to their grid."""
    assert guard.calibration is not None
    ours = [one.distance for one in said]
    test = stats.ks_2samp(guard.calibration.distances, ours)
    percentiles = [one.percentile for one in said]
    return {
        "ks": round(float(test.statistic), 4),
        "ks_p": round(float(test.pvalue), 4),
        "deciles": [round(float(np.mean([p < d for p in percentiles])), 3) for d in range(10, 100, 10)],
    }


def _measured(guard: Guard, said: list[Defended], labels: Tensor, clean: list[Defended]) -> dict[str, Any]:
    assert guard.calibration is not None
    truth = labels.tolist()
    distances, before = (np.array([one.distance for one in side]) for side in (said, clean))
    right = np.array([one.class_index == label for one, label in zip(said, truth, strict=True)])
    bare = np.array([one.bare.class_index == label for one, label in zip(said, truth, strict=True)])
    disagree = np.array([not one.agree for one in said])
    out: dict[str, Any] = {
        "bare_accuracy": float(bare.mean()),
        "accuracy": float(right.mean()),
        "median_percentile": float(np.median([one.percentile for one in said])),
        # How often an attacked image lies farther than a clean one.
        "auc": round(float(stats.mannwhitneyu(distances, before).statistic / (len(distances) * len(before))), 4),
        "disagree": float(disagree.mean()),
        "rates": [],
    }
    for rate in RATES:
        if rate < 1 / (len(guard.calibration) + 1):
            continue
        rejected = distances > guard.calibration.threshold(rate)
        low, high = wilson_interval(int(rejected.sum()), len(rejected))
        out["rates"].append(
            {
                "rate": rate,
                "rejected": float(rejected.mean()),
                "ci": [round(low, 4), round(high, 4)],
                "wrong_and_accepted": float((~right & ~rejected).mean()),
                "wrong_that_are_rejected": float(rejected[~right].mean()) if (~right).any() else None,
                "accuracy_of_accepted": float(right[~rejected].mean()) if (~rejected).any() else None,
            }
        )
    return out


def _adaptive(guard: Guard, images: Tensor, labels: Tensor, eps: float, seed: int) -> dict[str, Any]:
    """The share of images on which the attacker gets a wrong answer that is not rejected, at each rate."""
    assert guard.calibration is not None
    surface = guard.defense.surface(Knowledge.WHITE)
    generator = torch.Generator().manual_seed(seed)
    result = run_adaptive(surface, images, labels, eps=eps, norm=NORM, steps=STEPS, generator=generator)
    # The smallest distance of any image of the ball that was seen to be misclassified.
    nearest = np.full(len(images), np.inf)
    _note(guard, nearest, result.images, labels)
    unaware = nearest.copy()
    for target in _targets(guard, images, labels):
        _approach(guard, nearest, images, labels, target, eps)
    out: dict[str, Any] = {"n": len(images), "accuracy": float(np.isinf(nearest).mean()), "rates": []}
    for rate in RATES:
        if rate < 1 / (len(guard.calibration) + 1):
            continue
        threshold = guard.calibration.threshold(rate)
        won, low_high = nearest <= threshold, wilson_interval(int((nearest <= threshold).sum()), len(images))
        out["rates"].append(
            {
                "rate": rate,
                "unaware_wrong_and_accepted": float((unaware <= threshold).mean()),
                "wrong_and_accepted": float(won.mean()),
                "ci": [round(bound, 4) for bound in low_high],
            }
        )
    return out


def _note(guard: Guard, nearest: np.ndarray[Any, Any], images: Tensor, labels: Tensor) -> None:
    for place, (one, label) in enumerate(zip(guard.stream(images, neighbors=0), labels.tolist(), strict=True)):
        if one.class_index != label:
            nearest[place] = min(nearest[place], one.distance)


def _targets(guard: Guard, images: Tensor, labels: Tensor) -> list[Tensor]:
    """For each image its nearest rows of other classes, the nearest first: TARGETS tensors N x d."""
    database = guard.database
    numbers = database.row_numbers
    rows, classes = database.features(numbers).double(), database.posteriors(numbers).argmax(1)
    with torch.no_grad():
        vectors = guard.defense.extractor(images).double()
    far = torch.cdist(vectors, rows).masked_fill(classes[None] == labels[:, None], math.inf)
    places = far.topk(TARGETS, dim=1, largest=False).indices
    return [rows[places[:, i]].float() for i in range(TARGETS)]


def _approach(
    guard: Guard, nearest: np.ndarray[Any, Any], images: Tensor, labels: Tensor, target: Tensor, eps: float
) -> None:
    """Walk towards one row in feature space, inside the ball, and note what is misclassified on the way."""
    radii = norms.radius(images, eps, NORM)
    inside = norms.projector(images, radii, NORM)
    moved = images.clone()
    for step in range(2 * STEPS):
        leaf = moved.clone().requires_grad_()
        (guard.defense.extractor(leaf) - target).square().sum().backward()
        assert leaf.grad is not None
        length = radii * 0.5 * (1 + math.cos(math.pi * step / (2 * STEPS))) / 2
        moved = inside(moved - norms.per_image(length, moved) * norms.steepest(leaf.grad, NORM)).detach()
        if step % 5 == 4:
            _note(guard, nearest, moved, labels)


if __name__ == "__main__":
    main()
