"""Where a training stands: position, sums of the running epoch, history, and the best weights so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# One epoch as a line of history.jsonl.
HistoryRow = dict[str, Any]


class Sums:
    """Sums over the steps of an epoch, kept on the device: reading them makes a GPU wait, adding to them does not.

    Args:
        device: where the sums are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Apple's GPUs have no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self.images = 0
        self.seconds = 0.0

    def add(self, name: str, total: Tensor, count: int) -> None:
        """Add to the sum ``name`` a scalar that stands for ``count`` images."""
        if name not in self._totals:
            self._totals[name] = torch.zeros((), dtype=self._dtype, device=self._device)
            self._counts[name] = 0
        self._totals[name] += total
        self._counts[name] += count

    def means(self) -> dict[str, float]:
        """Every sum divided by its number of images; this waits for the device."""
        if not self._totals:
            return {}
        values = torch.stack(list(self._totals.values())).tolist()
        return {name: value / self._counts[name] for name, value in zip(self._totals, values, strict=True)}

    def state(self) -> dict[str, Any]:
        """The sums as plain JSON values, exactly."""
        return {
            "totals": {name: float(total) for name, total in self._totals.items()},
            "counts": dict(self._counts),
            "images": self.images,
            "seconds": self.seconds,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Sums:
        """The sums that :meth:`state` described."""
        sums = cls(device)
        sums._totals = {
            name: torch.tensor(total, dtype=sums._dtype, device=device) for name, total in state["totals"].items()
        }
        sums._counts = {name: int(count) for name, count in state["counts"].items()}
        sums.images, sums.seconds = int(state["images"]), float(state["seconds"])
        return sums


@dataclass(frozen=True)
class Best:
    """The weights of the check with the highest score.

    Attributes:
        score: the accuracy on the validation set, robust where it is attacked.
        epoch: of the check, from 1.
        step: steps of that epoch that were done.
        weights: a ``state_dict`` on the device.
    """

    score: float
    epoch: int
    step: int
    weights: Mapping[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """All but the weights, as plain JSON values."""
        return {"score": self.score, "epoch": self.epoch, "step": self.step}


@dataclass
class Standing:
    """All that changes while a training goes on, beside the weights and the optimiser.

    Attributes:
        sums: of the running epoch.
        step: steps of the running epoch that are done.
        history: the finished epochs.
        checks: the checks of the running epoch.
        best: the best weights so far, where they are kept.
        top: the highest robust accuracy of any check, from which a collapse is told.
        collapsed: whether catastrophic overfitting was found.
    """

    sums: Sums
    step: int = 0
    history: list[HistoryRow] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None
    top: float = 0.0
    collapsed: bool = False

    @property
    def epoch(self) -> int:
        """The number of the running epoch, from 1."""
        return len(self.history) + 1

    def offer(self, score: float, net: nn.Module) -> bool:
        """Keep the net's weights if the score is above the best one; return whether it is."""
        if self.best is not None and score <= self.best.score:
            return False
        weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        self.best = Best(score, self.epoch, self.step, weights)
        return True

    def epochs_without_best(self) -> int:
        """How many finished epochs have gone by since the one with the best weights."""
        return 0 if self.best is None else len(self.history) - self.best.epoch

    def as_dict(self) -> dict[str, Any]:
        """The standing as plain JSON values, without the best weights."""
        return {
            "epoch": len(self.history),
            "step": self.step,
            "sums": self.sums.state(),
            "history": self.history,
            "checks": self.checks,
            "best": None if self.best is None else self.best.as_dict(),
            "top": self.top,
            "collapsed": self.collapsed,
        }

    @classmethod
    def from_dict(
        cls, state: Mapping[str, Any], best_weights: Mapping[str, Tensor] | None, device: torch.device
    ) -> Standing:
        """The standing that :meth:`as_dict` described."""
        best = None
        if best_weights is not None:
            kept = state["best"]
            best = Best(float(kept["score"]), int(kept["epoch"]), int(kept["step"]), best_weights)
        return cls(
            sums=Sums.from_state(state["sums"], device),
            step=int(state["step"]),
            history=list(state["history"]),
            checks=list(state["checks"]),
            best=best,
            top=float(state["top"]),
            collapsed=bool(state["collapsed"]),
        )
