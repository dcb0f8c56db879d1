"""Where a training stands, and its checkpoints: ``training.json`` and the tensors that it names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.errors import InputError, ModelError
from nndefense.locks import LOCK
from nndefense.models.checkpoint import DESCRIPTION_FILE, WEIGHTS_FILE
from nndefense.models.files import read_json, read_tensors, write_bytes, write_json, write_tensors
from nndefense.models.state import tensors_in
from nndefense.parts import sweep

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
        weights = {name: tensor.detach().clone() for name, tensor in tensors_in(net).items()}
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


FORMAT = "nndefense-training"
VERSION = 2
STATE_FILE = "training.json"
HISTORY_FILE = "history.jsonl"
BEST = "best."
# All that is written beside the tensors; what makes the folder one comes first.
_FILES = (DESCRIPTION_FILE, STATE_FILE, WEIGHTS_FILE, HISTORY_FILE)
_TENSORS = "training-*.safetensors"
_REMEDY = "start the training again with --overwrite of the command that trains, or by deleting the folder"


class TrainingFolder:
    """The folder of a training, from its first step to the finished classifier.

    Every state's tensors go to a file of their own before ``training.json`` names it, and only then does the last one
    go: whenever the process dies, ``training.json`` names files that are whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_path = folder / STATE_FILE
        self._best: tuple[tuple[int, int], dict[str, str]] | None = None

    def is_unfinished(self) -> bool:
        """Whether there is a training to go on with."""
        return self.state_path.exists()

    def is_finished(self) -> bool:
        """Whether there is a classifier."""
        return (self.folder / DESCRIPTION_FILE).exists()

    def is_bare(self) -> bool:
        """Whether there is nothing but tensors that no state names yet: what a kill leaves of a training's begin."""
        own = {LOCK, *(path.name for path in self.folder.glob(_TENSORS))}
        return {path.name for path in self.folder.iterdir()} <= own

    def check_free(self) -> None:
        """Raise :class:`InputError` if a training or a classifier would be overwritten."""
        if self.is_unfinished():
            raise InputError(
                f"{self.folder} holds a training that is not finished: go on with --resume, start anew with "
                "--overwrite, or choose another --out"
            )
        if self.is_finished() or (self.folder / WEIGHTS_FILE).exists():
            raise InputError(
                f"{self.folder} already holds a classifier: choose another --out, or replace it with --overwrite"
            )

    def clear(self) -> None:
        """Delete an earlier training and classifier, the file that makes them one first."""
        for name in _FILES:
            (self.folder / name).unlink(missing_ok=True)
        self._delete_tensors(keep=set())

    def save(self, tensors: dict[str, Tensor], standing: Standing, extra: dict[str, Any]) -> None:
        """Write a state that can be resumed.

        Args:
            tensors: everything that is a tensor, beside the best weights.
            standing: where the training stands.
            extra: whatever else belongs into ``training.json``.

        Raises:
            InputError: the disk is full, or the folder cannot be written; the last state is still there.
            ModelError: a weight is no longer finite; the last state is still there.
        """
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"the weights are no longer finite numbers ({name.partition('.')[2]}): go on from the last "
                    "checkpoint (--resume of the command that trains) if it was the machine, else train "
                    "with a lower learning rate"
                )
        position = (len(standing.history), standing.step)
        name = _named(*position)
        best = self._write_best(standing)
        state = {
            "format": FORMAT,
            "version": VERSION,
            **extra,
            **standing.as_dict(),
            "tensors": {"file": name, "sha256": write_tensors(self.folder / name, tensors)},
            "best_tensors": best,
        }
        write_json(self.state_path, state)
        self._write_history(standing.history)
        self._delete_tensors(keep={name, best["file"] if best else name})

    def state(self) -> dict[str, Any]:
        """Read ``training.json``.

        Raises:
            ModelError: it is missing or broken.
        """
        return read_json(self.state_path, FORMAT, VERSION, _REMEDY)[0]

    def tensors(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors that a state names, on the CPU; those of the best weights as ``best.NAME``.

        Raises:
            ModelError: the files are damaged.
        """
        with self.fitting():
            tensors = self._read(state["tensors"])
            best = state["best_tensors"]
            if best is not None:
                tensors |= {f"{BEST}{name}": tensor for name, tensor in self._read(best).items()}
                self._best = ((int(state["best"]["epoch"]), int(state["best"]["step"])), dict(best))
        return tensors

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Turn whatever a state that does not fit raises into a :class:`ModelError`."""
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(f"{self.state_path} does not fit the classifier being trained: {_REMEDY}") from error

    def finish(self, history: list[dict[str, Any]]) -> None:
        """Delete what only serves to resume; the classifier must be there."""
        self._write_history(history)
        self.state_path.unlink(missing_ok=True)
        self._delete_tensors(keep=set())

    def _read(self, entry: dict[str, str]) -> dict[str, Tensor]:
        return read_tensors(self.folder / Path(entry["file"]).name, entry["sha256"], _REMEDY)

    def _write_best(self, standing: Standing) -> dict[str, str] | None:
        """Write the best weights, if they are other ones than those that were written last."""
        best = standing.best
        if best is None:
            return None
        position = (best.epoch, best.step)
        if self._best is None or self._best[0] != position:
            name = _named(*position, "best-")
            self._best = (position, {"file": name, "sha256": write_tensors(self.folder / name, dict(best.weights))})
        return self._best[1]

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        """Write ``history.jsonl``, one line an epoch; whole each time, so that resuming repeats no line."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in history)
        write_bytes(self.folder / HISTORY_FILE, text.encode())

    def _delete_tensors(self, keep: set[str]) -> None:
        for path in self.folder.glob(_TENSORS):
            if path.name not in keep:
                path.unlink(missing_ok=True)
        # And what a process that was killed while it wrote has left.
        sweep(self.folder)


def _named(epochs: int, steps: int, kind: str = "") -> str:
    """The name of a tensor file, by finished epochs (for the best weights: the epoch's number) and steps since."""
    return _TENSORS.replace("*", f"{kind}{epochs:04d}" + (f"-{steps:06d}" if steps else ""))


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, under what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors ``optimizer.<parameter number>.<key>``.

    The groups' settings (learning rate and so on) are not in it: they follow from the settings of the training.
    """
    return {
        f"optimizer.{number}.{key}": value
        for number, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_flat_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state that :func:`flat_state` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part_of(tensors, "optimizer.").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, values in state.items():
        for key, value in values.items():
            if value.shape == weights[index].shape and value.dim() > 0:
                # In the weights' own layout in memory.
                values[key] = torch.empty_like(weights[index], dtype=value.dtype).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
