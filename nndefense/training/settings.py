"""The settings of a training, checked once and recorded with its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nndefense.errors import InputError

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "none")

# What the defaults aim at: enough steps for small nets on small sets, few passes over large ones.
_STEPS = 400
_MOST_EPOCHS = 20
_FEWEST_EPOCHS = 3


@dataclass(frozen=True)
class TrainingSettings:
    """How a net is trained.

    Attributes:
        epochs: passes over the data.
        batch_size: images a step; an epoch is cut into batches of equal size (to within one image).
        lr: the learning rate, or the highest one of a schedule.
        weight_decay: L2 penalty for ``adam`` and ``sgd``; decoupled from the gradient for ``adamw``.
        optimizer: ``adam``, ``adamw``, or ``sgd`` with Nesterov momentum 0.9.
        schedule: ``cosine`` lowers the learning rate step by step to 0 (Loshchilov and Hutter, ICLR 2017, without
            restarts), ``none`` keeps it.
        augment: shift every image by up to 1/8 of its side, at random, with black borders.
        flip: mirror every second image left to right, at random.
        seed: of order, augmentation and whatever chance the net or the objective uses.
    """

    epochs: int
    batch_size: int
    lr: float = 2e-3
    weight_decay: float = 0.0
    optimizer: str = "adam"
    schedule: str = "cosine"
    augment: bool = False
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for values that make no training."""
        for name, value in (("number of epochs", self.epochs), ("batch size", self.batch_size)):
            if not _whole(value) or value < 1:
                raise InputError(f"the {name} must be a whole number from 1 up, not {value}")
        if not math.isfinite(self.lr) or self.lr <= 0:
            raise InputError(f"the learning rate must be above 0, not {self.lr}")
        if not math.isfinite(self.weight_decay) or self.weight_decay < 0:
            raise InputError(f"the weight decay must be 0 or more, not {self.weight_decay}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"there is no optimizer {self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"there is no schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not _whole(self.seed) or self.seed < 0:
            raise InputError(f"the seed must be a whole number from 0 up, not {self.seed}")

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    def lr_at(self, progress: float) -> float:
        """The learning rate when a share ``progress`` in [0, 1] of all steps is done."""
        if self.schedule == "none":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


def default_batch_size(images: int) -> int:
    """The batch size for a set of that many images: 128, or less where that leaves under about 20 steps an epoch."""
    return max(1, min(128, max(16, images // 20), images))


def default_epochs(images: int, batch_size: int) -> int:
    """The number of epochs for a set of that many images: about 400 steps, but from 3 to 20 epochs."""
    steps = math.ceil(images / batch_size)
    return min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_STEPS / steps)))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
