"""What an epoch of training costs, against the bare passes that it is made of; and what TRADES saves.

The first table: an epoch of PGD-k adversarial training by ``train_classifier`` itself (order, steps, figures, the line
of history), against a bare loop with the same net, batches and precision: k passes with the gradient to the images, a
sign step and a clamp each, and one training step. The other: the steps of an epoch of TRADES, whose attack computes
the clean prediction once, against a version that computes it again at every step, as the authors' code does; both
through the training's own step. The last: a step of training by retrieval among 50,000 rows, against the same step of
its control, the same net through its head. The rows' embeddings, one forward pass once an epoch, are not in it.

Both sides are timed in one run, by turns. Printed are the ratio of the least times, since what else a machine does
only ever adds to a time, and the median over rounds of each round's ratio with its quartiles, which tell how much the
machine was shared. The first round warms up and is not counted.

Usage: python benchmarks/training.py [--threads N] [--rounds N] [--device D] [--precision P] [--only WORD]
    [--kind KIND] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks import kl
from nndefense.attacks.wrappers import attacked_in
from nndefense.datasets.arrays import ArrayDataset
from nndefense.models import Classifier, build_classifier, resolve_device
from nndefense.training import InnerAttack, Objective, Outcome, make_objective, train_classifier
from nndefense.training.batch import BankRows, Batch, BatchAttack
from nndefense.training.batches import EpochBatches
from nndefense.training.launcher import join
from nndefense.training.progress import Sums
from nndefense.training.settings import TrainingSettings
from nndefense.training.step import Stepper

CLASSES = tuple(str(number) for number in range(10))
LR, MOMENTUM = 0.01, 0.9
ROWS = 50_000


@dataclass(frozen=True)
class Case:
    """A net, images like those that it is for, and an attack of K steps."""

    title: str
    arch: str
    shape: tuple[int, int, int]
    images: int
    batch_size: int
    attack: InnerAttack

    def dataset(self) -> ArrayDataset:
        """Random images in whole steps of 1/255, as files have them, with random labels."""
        chance = np.random.default_rng(0)
        pixels = chance.integers(0, 256, (self.images, *self.shape[1:], self.shape[0]), dtype=np.uint8)
        return ArrayDataset(pixels, chance.integers(0, 10, self.images), name="random", classes=CLASSES)

    def classifier(self, arch: str | None = None) -> Classifier:
        """Fresh weights, the same every time, perhaps of another architecture."""
        return build_classifier(arch or self.arch, input_shape=self.shape, classes=CLASSES, seed=0)


def cases(scale: int) -> list[Case]:
    """A net of a few milliseconds a batch, where overhead shows, and a ResNet."""
    mnist = InnerAttack(eps=0.3, steps=10, step_size=0.075)
    cifar = InnerAttack(eps=8 / 255, steps=7, step_size=2 / 255)
    return [
        Case("small-cnn, 1 x 28 x 28, batch 128, PGD-10", "small-cnn", (1, 28, 28), 512 * scale, 128, mnist),
        Case("cifar-resnet18, 3 x 32 x 32, batch 16, PGD-7", "cifar-resnet18", (3, 32, 32), 32 * scale, 16, cifar),
    ]


@dataclass(frozen=True)
class Bench:
    """How to time."""

    device: torch.device
    precision: str
    rounds: int
    clock: Callable[[], float]

    def now(self) -> float:
        """The clock, once the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def forward(self) -> Any:
        """The context of the passes in the precision asked for."""
        kind = getattr(torch, self.precision)
        return torch.autocast(self.device.type, dtype=kind, enabled=kind != torch.float32)


def main() -> None:
    """Time every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--scale", type=int, default=1, help="images an epoch, as a multiple of the smallest epoch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="cases whose title has this word")
    parser.add_argument("--kind", default=None, choices=list(KINDS), help="one table alone")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    # One thread's processor time does not see what else the machine does.
    alone = device.type == "cpu" and options.threads == 1
    bench = Bench(device, options.precision, options.rounds, time.process_time if alone else time.perf_counter)
    rows = []
    for case in cases(options.scale):
        if options.only in case.title:
            kinds = KINDS if options.kind is None else {options.kind: KINDS[options.kind]}
            rows += [row for measured in kinds.values() for row in measured(bench, case)]
    for row in rows:
        times = f"{row['ours_ms']:9.1f} ms against {row['other_ms']:9.1f} ms"
        print(f"{row['what']}\n  {times} a step at least  ratio {row['least']:.3f}")
        print(f"  of rounds: median {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
    if options.out:
        found = {
            "torch": torch.__version__,
            "threads": options.threads,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": options.precision,
            "machine": platform.machine(),
            "clock": bench.clock.__name__,
            "rounds": options.rounds,
            "rows": rows,
        }
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def epoch_against_bare(bench: Bench, case: Case) -> list[dict[str, Any]]:
    """An epoch of adversarial training, and after each one an epoch of the bare loop."""
    dataset, classifier = case.dataset(), case.classifier()
    steps = -(-case.images // case.batch_size)
    bare = bare_epoch(bench, case, dataset)
    ours: list[float] = []
    other: list[float] = []
    begun = 0.0

    def between(_row: dict[str, Any]) -> None:
        nonlocal begun
        ended = bench.now()
        ours.append(ended - begun)
        bare()
        begun = bench.now()
        other.append(begun - ended)

    train_classifier(
        classifier,
        dataset,
        objective="adversarial",
        attack=case.attack,
        device=bench.device,
        progress=False,
        on_epoch=between,
        epochs=bench.rounds + 1,
        batch_size=case.batch_size,
        lr=LR,
        schedule="none",
        optimizer="sgd",
        momentum=MOMENTUM,
        precision=bench.precision,
    )
    return [compared(f"{case.title}: an epoch of adversarial training against bare passes", ours, other, steps)]


def bare_epoch(bench: Bench, case: Case, dataset: ArrayDataset) -> Callable[[], None]:
    """K input gradients and one training step a batch, and nothing else."""
    net = case.classifier().to(bench.device)
    images, labels = dataset.batch(np.arange(case.images))
    images, labels = images.to(bench.device), labels.to(bench.device)
    weights = list(net.parameters())
    solver = torch.optim.SGD(weights, lr=LR, momentum=MOMENTUM, nesterov=True)
    eps, size = case.attack.eps, case.attack.step_size or 0.0

    def epoch() -> None:
        for rows in torch.randperm(case.images).split(case.batch_size):
            x, y = images[rows.to(bench.device)], labels[rows.to(bench.device)]
            low, high, moved = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1), x
            with bench.forward():
                net.eval().requires_grad_(False)
                for _ in range(case.attack.steps):
                    moved.requires_grad_(True)
                    (gradient,) = torch.autograd.grad(F.cross_entropy(net(moved), y, reduction="sum"), moved)
                    moved = torch.clamp(moved.detach() + size * gradient.sign(), low, high)
                net.train().requires_grad_(True)
                solver.zero_grad()
                loss = F.cross_entropy(net(moved), y)
            loss.backward()
            solver.step()

    return epoch


def trades_against_recomputing(bench: Bench, case: Case) -> list[dict[str, Any]]:
    """The steps of an epoch of TRADES, with the clean prediction once or at every step of the attack."""
    attack = InnerAttack(**{**vars(case.attack), "start": "gaussian"})
    ours, other = by_turns(bench, case, case.arch, attack, make_objective("trades"), recomputing(attack))
    what = f"{case.title}: TRADES with one clean prediction against one at every step"
    return [compared(what, ours, other, -(-case.images // case.batch_size))]


def retrieval_against_head(bench: Bench, case: Case) -> list[dict[str, Any]]:
    """The steps of an epoch by retrieval among as many rows as CIFAR-10 has, and by the head of the same net."""
    arch, found = f"nn-{case.arch}", []
    vectors, labels = torch.randn(ROWS, 64), torch.arange(ROWS) % len(CLASSES)
    bank = BankRows(vectors.to(bench.device), labels.to(bench.device))
    for ours, other in (
        ("retrieval", "adversarial"),
        ("retrieval-trades", "trades"),
        ("retrieval-standard", "standard"),
    ):
        attack = InnerAttack(**{**vars(case.attack), "start": "gaussian"})
        times = by_turns(bench, case, arch, attack, make_objective(ours), make_objective(other), bank)
        what = f"{case.title}: {ours} among {ROWS:,} rows against {other}"
        found.append(compared(what, *times, -(-case.images // case.batch_size)))
    return found


def by_turns(
    bench: Bench,
    case: Case,
    arch: str,
    attack: InnerAttack,
    ours: Objective,
    other: Objective,
    bank: BankRows | None = None,
) -> tuple[list[float], list[float]]:
    """The times of rounds of an epoch's steps with each of two objectives, through the training's own step."""
    dataset = case.dataset()
    settings = TrainingSettings(
        epochs=1,
        batch_size=case.batch_size,
        lr=LR,
        optimizer="sgd",
        momentum=MOMENTUM,
        precision=bench.precision,
    )
    team = join(bench.device)
    batches = EpochBatches(dataset, torch.from_numpy(dataset.labels), settings, team)
    batches.bank = bank
    steppers = [
        Stepper(case.classifier(arch).to(bench.device), objective, attack, settings, team)
        for objective in (ours, other)
    ]
    times: tuple[list[float], list[float]] = ([], [])
    chance = random.Random(0)
    for _ in range(bench.rounds + 1):
        for turn in chance.sample(range(2), 2):
            sums, begun = Sums(bench.device), bench.now()
            for number, share in enumerate(batches.epoch(1), 1):
                steppers[turn](share, LR, number, sums)
            times[turn].append(bench.now() - begun)
    return times


def recomputing(attack: InnerAttack) -> Objective:
    """TRADES whose inner loop computes the clean prediction anew at every step: 2K passes instead of K + 1."""
    size = attack.step_size or 0.0

    def objective(model: nn.Module, batch: Batch, _: BatchAttack | None) -> Outcome:
        low, high = (batch.images - attack.eps).clamp_(0, 1), (batch.images + attack.eps).clamp_(0, 1)
        moved = batch.images + attack.start_scale * torch.randn_like(batch.images)
        with attacked_in(model):
            for _step in range(attack.steps):
                with torch.no_grad():
                    clean: Tensor = model(batch.images)
                moved.requires_grad_(True)
                (gradient,) = torch.autograd.grad(kl(model(moved), clean).sum(), moved)
                moved = torch.clamp(moved.detach() + size * gradient.sign(), low, high)
        robust, clean = model(moved), model(batch.images)
        natural = F.cross_entropy(clean, batch.labels)
        boundary = kl(robust, clean).mean()
        return Outcome(natural + 6.0 * boundary, clean=clean.detach(), robust=robust.detach())

    return objective


def compared(what: str, ours: list[float], other: list[float], steps: int) -> dict[str, Any]:
    """Least times a step and their ratio, and the median of each round's ratio with its quartiles."""
    ours, other = ours[1:], other[1:]
    low, ratio, high = statistics.quantiles((a / b for a, b in zip(ours, other, strict=True)), n=4)
    return {
        "what": what,
        "ours_ms": min(ours) / steps * 1e3,
        "other_ms": min(other) / steps * 1e3,
        "least": min(ours) / min(other),
        "ratio": ratio,
        "low": low,
        "high": high,
    }


#: What is measured of each case, by name.
KINDS = {
    "epochs": epoch_against_bare,
    "trades": trades_against_recomputing,
    "retrieval": retrieval_against_head,
}


if __name__ == "__main__":
    main()
