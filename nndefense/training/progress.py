"""Checkpoints of a training that is not finished: ``training.json`` and the tensors that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.errors import InputError, ModelError
from nndefense.models import Classifier
from nndefense.models.checkpoint import DESCRIPTION_FILE, WEIGHTS_FILE
from nndefense.models.files import read_json, read_tensors, write_bytes, write_json, write_tensors

FORMAT = "nndefense-training"
VERSION = 1
STATE_FILE = "training.json"
HISTORY_FILE = "history.jsonl"
_TENSORS = "training-*.safetensors"
_REMEDY = "start the training again with --overwrite"


class TrainingFolder:
    """The folder of a training, from its first epoch to the finished classifier.

    Each epoch's tensors go to a file of their own before ``training.json`` names it, and only then does the last one
    go: whenever the process dies, ``training.json`` names a file that is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_path = folder / STATE_FILE

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
        for name in (DESCRIPTION_FILE, STATE_FILE, WEIGHTS_FILE, HISTORY_FILE):
            (self.folder / name).unlink(missing_ok=True)
        self._delete_tensors(keep=None)

    def save(
        self,
        classifier: Classifier,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        history: list[dict[str, Any]],
    ) -> None:
        """Write the state after ``len(history)`` epochs."""
        epoch = len(history)
        tensors = {f"model.{name}": tensor for name, tensor in classifier.state_dict().items()}
        tensors |= flat_state(optimizer)
        name = _TENSORS.replace("*", f"{epoch:04d}")
        state = {
            "format": FORMAT,
            "version": VERSION,
            "epoch": epoch,
            **identity,
            "history": history,
            "tensors": {"file": name, "sha256": write_tensors(self.folder / name, tensors)},
        }
        write_json(self.state_path, state)
        self._write_history(history)
        self._delete_tensors(keep=name)

    def state(self) -> dict[str, Any]:
        """Read ``training.json``.

        Raises:
            ModelError: it is missing or broken.
        """
        return read_json(self.state_path, FORMAT, VERSION, _REMEDY)

    def restore(
        self, state: dict[str, Any], classifier: Classifier, optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Any]]:
        """Give classifier and optimiser the saved state and return the history so far.

        Raises:
            ModelError: the files are damaged.
        """
        try:
            path = self.folder / Path(state["tensors"]["file"]).name
            tensors = read_tensors(path, state["tensors"]["sha256"], _REMEDY)
            classifier.load_state_dict(
                {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
            )
            restore_flat_state(optimizer, tensors)
            history = list(state["history"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{self.state_path} does not fit the classifier being trained: {_REMEDY}") from error
        return history

    def finish(self, history: list[dict[str, Any]]) -> None:
        """Delete what only serves to resume; the classifier must be there."""
        self._write_history(history)
        self.state_path.unlink(missing_ok=True)
        self._delete_tensors(keep=None)

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        """Write ``history.jsonl``, one line an epoch; whole each time, so that resuming repeats no line."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in history)
        write_bytes(self.folder / HISTORY_FILE, text.encode())

    def _delete_tensors(self, keep: str | None) -> None:
        for path in [*self.folder.glob(_TENSORS), *self.folder.glob(".*.part")]:
            if path.name != keep:
                path.unlink(missing_ok=True)


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


def restore_flat_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser the state that :func:`flat_state` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, key = rest.partition(".")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
