"""What a training shows: a bar, a line an epoch, and curves for TensorBoard."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nndefense import bars
from nndefense.errors import InputError
from nndefense.training.progress import HistoryRow

# Reading figures makes a GPU wait for its queue, so they are looked at this often, in seconds.
LOOK_SECONDS = 0.5


@dataclass
class Display:
    """The bar of the running epoch and the lines of those before, on standard error.

    Attributes:
        epochs: of the training.
        steps: of an epoch.
        images: of an epoch.
        done: steps of the whole training that are done already.
        shown: whether anything is shown.
    """

    epochs: int
    steps: int
    images: int
    done: int
    shown: bool

    def __post_init__(self) -> None:
        self._started, self._said = time.perf_counter(), -float("inf")

    def bar(self, epoch: int, done: int) -> Any:
        """A bar for an epoch of which ``done`` images are done."""
        return bars.progress_bar(
            total=self.images,
            initial=done,
            desc=f"epoch {epoch}/{self.epochs}",
            unit="img",
            # The one time left is the training's, in the figures, and not the epoch's.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
            leave=False,
            delay=0,
            shown=self.shown,
        )

    def left(self, done: int) -> str:
        """The time that the rest of the training takes at the pace so far, after ``done`` steps of all epochs."""
        seconds = (time.perf_counter() - self._started) / max(1, done - self.done)
        return str(tqdm.format_interval(round(seconds * (self.epochs * self.steps - done))))

    def figures(self, means: dict[str, float], check: dict[str, Any] | None, done: int) -> str:
        """The figures beside the bar; those of the last check where the steps themselves give none."""
        parts = [f"loss {means['loss']:.4f}"]
        for name, key in (("clean", "accuracy"), ("robust", "robust_accuracy")):
            if key in means:
                parts.append(f"{name} {means[key]:.4f}")
            elif check is not None and key in check:
                parts.append(f"{name} {check[key]:.4f} at the last check")
        return ", ".join([*parts, f"{self.left(done)} left"])

    def line(self, row: HistoryRow) -> None:
        """One line an epoch, which stays; without a terminal at most one a minute, and the last."""
        now, last = time.perf_counter(), row["epoch"] == self.epochs
        if not self.shown or not (last or sys.stderr.isatty() or now - self._said >= bars.MINUTE):
            return
        self._said = now
        parts = [f"epoch {row['epoch']}/{self.epochs}", f"loss {row['loss']:.4f}"]
        for name, key in (
            ("accuracy", "accuracy"),
            ("robust", "robust_accuracy"),
            ("validation", "validation_accuracy"),
            ("robust validation", "robust_validation_accuracy"),
        ):
            if row.get(key) is not None:
                parts.append(f"{name} {row[key]:.4f}")
        parts.append(f"{row['images_per_second']:.0f} images/s")
        if row["epoch"] < self.epochs:
            parts.append(f"{self.left(row['epoch'] * self.steps)} left")
        tqdm.write(", ".join(parts), file=sys.stderr)


class Curves:
    """Curves for TensorBoard, by step of the whole training.

    Args:
        folder: of the training; the curves go to ``tensorboard`` in it.
        first: the step that is done already; what an interrupted training wrote beyond it is hidden.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        writer = tensorboard_module().SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=first + 1 if first else None)
        self.close = self._writer.close

    def add(self, step: int, values: dict[str, Any], group: str) -> None:
        """Add a point to the curve ``group/name`` of every number."""
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{group}/{name}", value, step)


def tensorboard_module() -> Any:
    """PyTorch's module for TensorBoard; raises :class:`InputError` unless that can be used."""
    try:
        return importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise InputError("TensorBoard is not installed: pip install tensorboard") from None
