"""The epochs of a training: steps, checks, checkpoints, and the line of history of each."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nndefense.errors import InputError, ModelError, warn
from nndefense.training.batches import EpochBatches
from nndefense.training.display import LOOK_SECONDS, Curves, Display
from nndefense.training.kernel_retrieval import Unsaturated
from nndefense.training.progress import BEST, HistoryRow, Standing, Sums, TrainingFolder, part_of
from nndefense.training.random_state import kept
from nndefense.training.row_bank import RowBank
from nndefense.training.settings import check_whole, learning_rate
from nndefense.training.step import Stepper
from nndefense.training.validation import CatastrophicOverfitting, ValidationChecks, collapsed


@dataclass(frozen=True)
class Checkpoints:
    """When a state is saved within an epoch, beside the one at its end.

    Attributes:
        steps: after so many steps; None: not by steps.
        seconds: when so many seconds have gone by since the last; None: not by time.

    Raises:
        InputError: no whole number of steps from 1 up, or no seconds above 0.
    """

    steps: int | None
    seconds: float | None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_whole("number of steps between checkpoints", self.steps)
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise InputError(f"the seconds between checkpoints must be above 0, not {self.seconds}")

    def due(self, step: int, seconds: float) -> bool:
        """Whether to save after step ``step`` of an epoch, ``seconds`` after the last time."""
        by_steps = self.steps is not None and step % self.steps == 0
        return by_steps or (self.seconds is not None and seconds >= self.seconds)


@dataclass
class TrainingRun:
    """A training from where it stands to its end.

    Attributes:
        stepper, batches, watch, checkpoints: its parts.
        folder: where checkpoints go, or None; given to the leading process alone.
        identity: what checkpoints record beside the state.
        shown: whether to show progress.
        bank: the rows of a training by retrieval, or None.
    """

    stepper: Stepper
    batches: EpochBatches
    watch: ValidationChecks
    folder: TrainingFolder | None
    checkpoints: Checkpoints
    identity: dict[str, Any]
    shown: bool
    bank: RowBank | None = None

    def __post_init__(self) -> None:
        self.settings, self.device = self.stepper.settings, self.stepper.team.device
        self.standing = Standing(Sums(self.device))
        # Evenly over the epoch, the last at its end.
        each = self.settings.checks_per_epoch
        self.check_steps = {max(1, self.batches.count * part // each) for part in range(1, each + 1)}

    def restore(self, folder: TrainingFolder, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ModelError: the files are damaged.
        """
        tensors = folder.tensors(state)
        with folder.fitting():
            self.stepper.load(tensors)
            self.stepper.precision.load(state["precision"])
            if self.bank is not None:
                self.bank.load(tensors)
            best = {name: tensor.to(self.device) for name, tensor in part_of(tensors, BEST).items()}
            self.standing = Standing.from_dict(state, best or None, self.device)

    def save(self) -> None:
        """Write a checkpoint, if there is a folder."""
        if self.folder is not None:
            extra = {**self.identity, "precision": self.stepper.precision.state()}
            tensors = self.stepper.tensors()
            if self.bank is not None and not self._refreshes():
                tensors |= self.bank.tensors()
            self.folder.save(tensors, self.standing, extra)

    def finish(self, board: Curves | None, on_epoch: Callable[[HistoryRow], None] | None) -> None:
        """Train to the end; the classifier then has its final weights."""
        display = Display(
            self.settings.epochs, self.batches.count, self.batches.images_per_epoch, self.done, shown=self.shown
        )
        while len(self.standing.history) < self.settings.epochs and not self._ended():
            row = self._epoch(display, board)
            display.line(row)
            self.save()
            if board is not None:
                board.add(self.done, row, "epoch")
            if on_epoch is not None:
                on_epoch(dict(row))
        best = self.standing.best
        self.stepper.settle(None if best is None else best.weights)

    @property
    def done(self) -> int:
        """Steps of the whole training that are done."""
        return len(self.standing.history) * self.batches.count + self.standing.step

    def _refreshes(self) -> bool:
        """Whether the next step of the epoch begins with rows computed anew, and so needs no stored ones."""
        each = self.settings.refresh_steps
        return self.standing.step == 0 or (each is not None and self.standing.step % each == 0)

    def _ended(self) -> bool:
        """Whether the training ends before its last epoch."""
        patience = self.settings.patience
        tired = patience is not None and self.standing.epochs_without_best() >= patience
        return tired or (self.settings.stop_on_collapse and self.standing.collapsed)

    def _epoch(self, display: Display, board: Curves | None) -> HistoryRow:
        standing, stepper, count = self.standing, self.stepper, self.batches.count
        epoch, steps = standing.epoch, self.settings.epochs * count
        rate = learning_rate(self.settings, self.done, steps)
        looked = saved = begun = time.perf_counter()

        def pause() -> None:
            nonlocal begun
            now = time.perf_counter()
            standing.sums.seconds += now - begun
            begun = now

        with display.bar(epoch, standing.sums.images) as bar, kept(self.device):
            for share in self.batches.epoch(epoch, standing.step):
                rate = learning_rate(self.settings, self.done, steps)
                if self.bank is not None and self._refreshes():
                    self.bank.refresh(stepper.classifier)
                stepper(share, rate, self.done + 1, standing.sums)
                standing.step += 1
                bar.update(share.images)
                now = time.perf_counter()
                if now - looked >= LOOK_SECONDS:
                    means = self._means()
                    last = standing.checks[-1] if standing.checks else None
                    if last is None and standing.history and standing.history[-1].get("checks"):
                        last = standing.history[-1]["checks"][-1]
                    bar.set_postfix_str(display.figures(means, last, self.done))
                    if board is not None:
                        board.add(self.done, {**means, "lr": rate}, "step")
                    looked = now
                if standing.step in self.check_steps and self.watch.active:
                    self._means()
                    pause()
                    self._check()
                    begun = time.perf_counter()
                if standing.step < count and self.checkpoints.due(standing.step, now - saved):
                    self._means()
                    pause()
                    self.save()
                    begun = saved = time.perf_counter()
            means = self._means()
            pause()
        return self._close(means, rate)

    def _close(self, means: dict[str, float], rate: float) -> HistoryRow:
        """End the epoch: the accuracy on the validation set, and the line of history."""
        standing = self.standing
        seconds = standing.sums.seconds
        row: HistoryRow = {
            "epoch": standing.epoch,
            "accuracy": None,
            **{name: mean if math.isfinite(mean) else None for name, mean in means.items()},
            "lr": rate,
            "seconds": round(seconds, 3),
            "images_per_second": round(standing.sums.images / max(seconds, 1e-9), 1),
        }
        if standing.checks:
            row["checks"] = standing.checks
            if self.watch.held_out:
                row["robust_validation_accuracy"] = standing.checks[-1]["robust_accuracy"]
            if self.watch.single is not None:
                row["catastrophic_overfitting"] = any(check["catastrophic_overfitting"] for check in standing.checks)
        if self.watch.held_out:
            with self._final_weights():
                row["validation_accuracy"] = self.watch.validation_accuracy(self._answers())
                if self.settings.keep_best and not self.watch.active:
                    standing.offer(row["validation_accuracy"], self.stepper.classifier)
        standing.history.append(row)
        standing.step = 0
        standing.sums = Sums(self.device)
        standing.checks = []
        return row

    def _check(self) -> None:
        """Attack the images held out; keep the weights if they are the best so far, and tell of a collapse."""
        standing = self.standing
        with self._final_weights():
            check = {"step": standing.step, **self.watch.check(self._answers())}
            if self.settings.keep_best:
                standing.offer(check["robust_accuracy"], self.stepper.classifier)
        if "single_step_accuracy" in check:
            single, robust = check["single_step_accuracy"], check["robust_accuracy"]
            found = collapsed(single, robust, standing.top)
            check["catastrophic_overfitting"] = found
            if found and not standing.collapsed and self.stepper.team.leads:
                warn(
                    f"catastrophic overfitting in epoch {standing.epoch}: the accuracy is {single:.3f} under the "
                    f"single attack step of the training, but {robust:.3f} under several; train with more steps, a "
                    "smaller eps or a lower learning rate, or keep the best weights of the checks",
                    CatastrophicOverfitting,
                )
            standing.collapsed |= found
        standing.top = max(standing.top, check["robust_accuracy"])
        standing.checks.append(check)

    def _answers(self) -> nn.Module:
        """What is checked: the retrieval where that is trained, else the classifier."""
        classifier = self.stepper.classifier
        return classifier if self.bank is None else Unsaturated(self.bank.answers(classifier))

    def _final_weights(self) -> contextlib.AbstractContextManager[None]:
        """The weights that the classifier would have if the training ended here."""
        average = self.stepper.average
        return contextlib.nullcontext() if average is None else average.in_place()

    def _means(self) -> dict[str, float]:
        """The epoch's figures so far; raises :class:`ModelError` where the loss is no number any more."""
        means = self.standing.sums.means()
        if not math.isfinite(means.get("loss", 0.0)):
            raise ModelError(
                f"the loss is no longer a finite number in epoch {self.standing.epoch} of {self.settings.epochs}: "
                f"train with a lower learning rate than {self.settings.lr:g}, and check that no image holds NaN; "
                "the last checkpoint is as it was"
            )
        return means


@contextlib.contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN try which convolutions are fastest; batches come in two sizes at most, so it pays at once.

    Not where deterministic algorithms are asked for, since what is fastest differs from time to time.
    """
    before = torch.backends.cudnn.benchmark
    wanted = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
