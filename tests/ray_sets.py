"""What workers of a Ray cluster are given by the tests: images over which they are lost or fail. They import this."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from helpers import DIGITS, digits
from numpy.typing import NDArray
from torch import Tensor

from index_build.ray_worker import tell_part
from nndefense.datasets import SourceError
from nndefense.datasets.arrays import ArrayDataset
from nndefense.errors import DataError

HOME = "NNDEFENSE_TEST_HOME"
"""The environment variable that names a folder which tests and workers share."""


class Treacherous(ArrayDataset):
    """Digits; who reads a certain one of them meets what the file ``armed`` says, if there is one."""

    def __init__(self, count: int, trigger: int, place: Path) -> None:
        images, labels = digits("train").batch(np.arange(count))
        super().__init__(images.numpy(), labels.numpy(), name="treacherous", classes=DIGITS)
        self._trigger, self._place = trigger, place

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        if self._trigger in rows:
            spring(self._place)
        return super()._read(rows)


class Spoilt(ArrayDataset):
    """Digits, of which those after the 40th cannot be read."""

    def __init__(self, count: int) -> None:
        images, labels = digits("train").batch(np.arange(count))
        super().__init__(images.numpy(), labels.numpy(), name="spoilt", classes=DIGITS)

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        if (rows > 40).any():
            raise DataError("it is spoilt")
        return super()._read(rows)


def workers(place: Path) -> list[int]:
    """The processes of the pools of a test's cluster."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            pid = int(entry.name)
            ours = f"{HOME}={place}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if ours and (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(pid)
    return found


def spring(place: Path) -> None:
    """Do what the file ``armed`` says."""
    with suppress(FileNotFoundError):
        deed = (place / "armed").read_text()
        if deed == "wait":
            # Once, for the test to kill this process.
            (place / "armed").rename(place / "taken")
            (place / "taken.part").write_text(str(os.getpid()))
            (place / "taken.part").rename(place / "pid")
            time.sleep(600)
        elif deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "gone":
            raise SourceError("the disk of treacherous is gone: put it back")
        elif deed == "bug":
            raise RuntimeError("two tensors\nof different mind")


def tell_part_late(job: Any, number: int, *rest: Any) -> str:
    """``tell_part``, with a trap in the second part."""
    if number == 1:
        spring(Path(os.environ[HOME]))
    return tell_part(job, number, *rest)
