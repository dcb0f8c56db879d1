"""The settings of a training, checked once and recorded with its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

from nndefense.errors import InputError, make_plain, plain

#: The optimisers by name.
OPTIMIZERS = ("adam", "adamw", "sgd")
#: The schedules of the learning rate by name.
SCHEDULES = ("cosine", "step", "one-cycle", "none")
#: The types of numbers that a forward pass may compute in.
PRECISIONS = ("float32", "bfloat16", "float16")

# What the defaults aim at: enough steps for small nets on small sets, few passes over large ones.
_STEPS = 400
_MOST_EPOCHS = 20
_FEWEST_EPOCHS = 3
_MAY_BE_NONE = ("steps_per_epoch", "unlabelled_per_batch", "refresh_steps", "patience")


class SettingsOptions(TypedDict, total=False):
    """The fields of :class:`TrainingSettings` as the options of a training; each may be left out."""

    epochs: int | None
    batch_size: int | None
    lr: float
    weight_decay: float
    optimizer: str
    schedule: str
    augment: bool
    flip: bool
    seed: int
    momentum: float
    nesterov: bool
    warmup: float
    milestones: Sequence[float]
    gamma: float
    peak: float
    ema: float | None
    clip_norm: float | None
    precision: str
    channels_last: bool
    compile: bool
    steps_per_epoch: int | None
    unlabelled_per_batch: int | None
    refresh_steps: int | None
    keep_best: bool
    patience: int | None
    checks_per_epoch: int
    check_images: int
    stop_on_collapse: bool


@dataclass(frozen=True)
class TrainingSettings:
    """How a net is trained: all that the weights depend on beside net, data, objective and attacks.

    Attributes:
        epochs: passes over the labelled data.
        batch_size: labelled images a step, over all processes; an epoch is cut into batches of equal size (to within
            one image).
        lr: the learning rate, or the highest one of a schedule.
        weight_decay: L2 penalty for ``adam`` and ``sgd``; decoupled from the gradient for ``adamw``.
        optimizer: ``adam``, ``adamw``, or ``sgd`` with momentum.
        schedule: ``cosine`` lowers the learning rate step by step to 0 (Loshchilov and Hutter, ICLR 2017, without
            restarts), ``step`` multiplies it by ``gamma`` at every milestone, ``one-cycle`` raises it in a straight
            line up to the share ``peak`` of the training and lowers it to 0 (Smith and Topin 2017; as Wong et al.,
            ICLR 2020, use it for fast adversarial training), ``none`` keeps it. ``cyclic`` is another name of
            ``one-cycle``.
        augment: shift every image by up to 1/8 of its side, at random, with black borders.
        flip: mirror every second image left to right, at random.
        seed: of order, augmentation and whatever chance the net, the objective or the attack uses.
        momentum, nesterov: of ``sgd``.
        warmup: epochs (3 or 0.5) in which the learning rate rises to its schedule in a straight line.
        milestones: epochs at whose end ``step`` lowers the learning rate.
        gamma: by what factor.
        peak: where ``one-cycle`` is highest, as a share of the training.
        ema: decay of the weights' exponential moving average, such as 0.999, or None for none; with it, evaluation
            and the final weights are those of the average.
        clip_norm: the gradient is shortened to this l2 length where it is longer; None: never.
        precision: ``float32``, or ``bfloat16`` or ``float16`` for the forward and backward passes (weights and
            evaluation stay in float32; see :class:`nndefense.training.step.Precision`).
        channels_last: keep images and weights with the channels innermost, which is faster on most GPUs.
        compile: run the net through ``torch.compile``; the first steps take minutes.
        steps_per_epoch: the length of an epoch, where it is not to follow from the labelled set: its images are then
            taken over and over, in a new order each time.
        unlabelled_per_batch: images of the unlabelled pool a step, beside the labelled ones; None: as many as those,
            but no more than the pool has.
        refresh_steps: of a training by retrieval: after so many steps of an epoch, again and again, all rows are
            computed anew, beside once at its begin; None: only then.
        keep_best: the final weights are those of the check with the highest accuracy on the validation set, under
            the validation attack where there is one.
        patience: end the training after so many epochs without a new best; implies ``keep_best``.
        checks_per_epoch: how often an epoch is interrupted for a check of robust accuracy.
        check_images: how many images, drawn once, a check attacks at most.
        stop_on_collapse: end the training when catastrophic overfitting is found.
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
    momentum: float = 0.9
    nesterov: bool = True
    warmup: float = 0.0
    milestones: Sequence[float] = ()
    gamma: float = 0.1
    peak: float = 0.4
    ema: float | None = None
    clip_norm: float | None = None
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    steps_per_epoch: int | None = None
    unlabelled_per_batch: int | None = None
    refresh_steps: int | None = None
    keep_best: bool = False
    patience: int | None = None
    checks_per_epoch: int = 1
    check_images: int = 1000
    stop_on_collapse: bool = False

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for values that make no training."""
        make_plain(self)
        if self.schedule == "cyclic":
            object.__setattr__(self, "schedule", "one-cycle")
        # A list, as JSON gives it back, so that settings compare equal after a resume.
        object.__setattr__(self, "milestones", [float(epoch) for epoch in self.milestones])
        self._check_numbers()
        for name, value, choices in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in choices:
                raise InputError(f"there is no {name} {value!r}: choose one of {', '.join(choices)}")
        if self.schedule == "step" and not self.milestones:
            raise InputError("the schedule step needs milestones: name the epochs at which the learning rate falls")
        if self.milestones and not all(0 < epoch < self.epochs for epoch in self.milestones):
            raise InputError(
                f"the milestones {', '.join(f'{epoch:g}' for epoch in self.milestones)} must lie between 0 and the "
                f"{self.epochs} epochs"
            )
        if self.nesterov and self.momentum == 0 and self.optimizer == "sgd":
            raise InputError("Nesterov momentum needs a momentum above 0: give one, or turn Nesterov off")
        if self.patience is not None:
            object.__setattr__(self, "keep_best", True)

    def _check_numbers(self) -> None:
        for name, text in (
            ("epochs", "number of epochs"),
            ("batch_size", "batch size"),
            ("steps_per_epoch", "number of steps an epoch"),
            ("unlabelled_per_batch", "number of unlabelled images a batch"),
            ("refresh_steps", "number of steps between refreshes of the rows"),
            ("patience", "patience in epochs"),
            ("checks_per_epoch", "number of checks an epoch"),
            ("check_images", "number of images of a check"),
        ):
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                check_whole(text, value)
        check_whole("seed", self.seed, least=0)
        _between("learning rate", self.lr, above=0)
        _between("weight decay", self.weight_decay, least=0)
        _between("momentum", self.momentum, least=0, below=1)
        _between("warm-up in epochs", self.warmup, least=0, below=self.epochs)
        _between("factor gamma of the schedule", self.gamma, above=0)
        _between("peak of the one-cycle schedule", self.peak, above=0, below=1)
        if self.ema is not None:
            _between("decay of the moving average of the weights", self.ema, above=0, below=1)
        if self.clip_norm is not None:
            _between("length to which gradients are clipped", self.clip_norm, above=0)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)


def make_settings(images: int, options: Mapping[str, Any]) -> TrainingSettings:
    """The settings of a training on ``images`` labelled images.

    Raises:
        InputError: there is no such option, or its value cannot be used.
    """
    names = [field.name for field in fields(TrainingSettings)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise InputError(f"a training has no setting {unknown[0]!r}: choose from {', '.join(names)}")
    chosen = {name: plain(value) for name, value in options.items()}
    if chosen.get("batch_size") is None:
        chosen["batch_size"] = default_batch_size(images)
    batch = chosen["batch_size"]
    if chosen.get("epochs") is None:
        check_whole("batch size", batch)
        chosen["epochs"] = default_epochs(images, batch)
    return TrainingSettings(**chosen)


def setting_defaults() -> dict[str, Any]:
    """The default of every setting that has one, as plain JSON values."""
    plain = TrainingSettings(epochs=1, batch_size=1).as_dict()
    return {name: value for name, value in plain.items() if name not in ("epochs", "batch_size")}


def default_batch_size(images: int) -> int:
    """The batch size for a set of that many images: 128, or less where that leaves under about 20 steps an epoch."""
    return max(1, min(128, max(16, images // 20), images))


def default_epochs(images: int, batch_size: int) -> int:
    """The number of epochs for that many images: about 400 steps of ``batch_size``, but from 3 to 20 epochs."""
    steps = math.ceil(images / batch_size)
    return min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_STEPS / steps)))


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``; no state, so nothing to save or to restore.

    A rise, of the warm-up or of ``one-cycle``, counts the step itself, since one with a learning rate of 0 would be
    lost.
    """
    rising = settings.warmup * steps / settings.epochs
    return _scheduled(settings, step, steps) * (min(1.0, (step + 1) / rising) if rising > 0 else 1.0)


def _scheduled(settings: TrainingSettings, step: int, steps: int) -> float:
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (step / steps)))
    if settings.schedule == "step":
        epoch = step * settings.epochs / steps
        return settings.lr * settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
    if settings.schedule == "one-cycle":
        top = settings.peak * steps
        return settings.lr * min((step + 1) / top, (steps - step) / (steps - top), 1.0)
    return settings.lr


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise :class:`InputError` unless it is a whole number, and no truth value, of at least ``least``."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"the {name} must be a whole number from {least} up, not {value}")


def _between(
    name: str, value: float, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    if not (math.isfinite(value) and value >= least and above < value < below):
        lower = f"above {above:g}" if above > -math.inf else f"{least:g} or more"
        upper = f" and below {below:g}" if below < math.inf else ""
        raise InputError(f"the {name} must be {lower}{upper}, not {value}")
