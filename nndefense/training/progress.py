"""Checkpoints of a training that is not finished: ``training.json`` and the tensors that it names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.errors import InputError, ModelError
from nndefense.files import PART
from nndefense.models.checkpoint import DESCRIPTION_FILE, WEIGHTS_FILE
from nndefense.models.files import read_json, read_tensors, write_bytes, write_json, write_tensors
from nndefense.training.state import Standing

FORMAT = "nndefense-training"
VERSION = 2
STATE_FILE = "training.json"
HISTORY_FILE = "history.jsonl"
BEST = "best."
# All that is written beside the tensors; what makes the folder one comes first.
_FILES = (DESCRIPTION_FILE, STATE_FILE, WEIGHTS_FILE, HISTORY_FILE)
_TENSORS = "training-*.safetensors"
_REMEDY = "start the training again with --overwrite"


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
                    "checkpoint with --resume if it was the machine, else train with a lower learning rate"
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
        return read_json(self.state_path, FORMAT, VERSION, _REMEDY)

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
        # And what a process that was killed while it wrote has left.
        for pattern in (_TENSORS, *(f"{name}.*{PART}" for name in (_TENSORS, *_FILES))):
            for path in self.folder.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)


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
