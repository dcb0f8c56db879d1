"""Batches of an epoch in random order, labelled and unlabelled images together, augmented on the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.training.batch import BankRows, Batch
from nndefense.training.ensemble_attack import AttackedImages
from nndefense.training.launcher import Team
from nndefense.training.random_state import generator, reseed
from nndefense.training.settings import TrainingSettings

# A set of up to so many bytes is kept on the device as one tensor; on a GPU also one of a quarter of its free memory.
RESIDENT_BYTES = 2**30
_READ_BATCH = 1024
_LEVELS = 255

# Shifts or mirrors a batch: drawn once, then applied to it and to whatever must move with it.
Move = Callable[[Tensor], Tensor]


class DeviceImages:
    """A data set whose images are wanted on a device, many at a time.

    Small sets are kept there as one tensor, of bytes where all pixels are whole multiples of 1/255 (the values that
    come out are the same, bit for bit), else of floats. Large sets are read as they are needed.

    Args:
        dataset: N images C x H x W.
        device: where they are wanted.
        resident_bytes: the size up to which the whole set is kept there; by default by the device.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, resident_bytes: int | None = None) -> None:
        self.dataset = dataset
        self.device = device
        limit = _room(device) if resident_bytes is None else resident_bytes
        self.resident = _resident(dataset, device, limit)
        # A tensor, since a GPU divides by a number only nearly as a CPU does.
        self._levels = torch.tensor([_LEVELS], dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self.dataset)

    def at(self, rows: Tensor) -> Tensor:
        """The images n x C x H x W, float32, at ``rows`` (on the device) of a resident set."""
        assert self.resident is not None
        found = self.resident[rows]
        return found.float() / self._levels if found.dtype == torch.uint8 else found

    def fetch(self, rows: Tensor) -> Tensor:
        """The images at ``rows`` (on the CPU), on the device."""
        return self.read(rows).to(self.device) if self.resident is None else self.at(rows.to(self.device))

    def read(self, rows: Tensor) -> Tensor:
        """The images at ``rows`` from the data set itself, in memory from which a GPU copies in the background."""
        images, _ = self.dataset.batch(rows.numpy())
        return images.pin_memory() if self.device.type == "cuda" else images


@dataclass(frozen=True)
class StepShare:
    """What one process does in one step.

    Attributes:
        batch: its images.
        images, labelled: how many images, and labelled ones, all processes have in this step.
        own_labelled: how many labelled ones are in ``batch``; they come first.
    """

    batch: Batch
    images: int
    labelled: int
    own_labelled: int


class EpochBatches:
    """The batches of any epoch of a training, from any step on.

    The order depends on the seed and the epoch alone, the augmentation also on the step.

    Args:
        dataset: N images C x H x W.
        labels: int64 N, the numbers of the classifier's classes.
        settings: of the training.
        team: who shares each batch; where the batches are wanted.
        unlabelled: M images of the pool, or None.
        pseudo_labels: int64 M.
        resident_bytes: as for :class:`DeviceImages`.

    Attributes:
        sets, labels: the images and class numbers of the labelled set, and of the pool if there is one.
        others: the labelled images as static sources attacked them, for :attr:`Batch.others`; none at first.
        bank: the rows to retrieve from, in the order of the sets; none at first.

    Raises:
        InputError: a batch would be larger than a set, or smaller than the number of processes.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        labels: Tensor,
        settings: TrainingSettings,
        team: Team,
        *,
        unlabelled: ImageDataset | None = None,
        pseudo_labels: Tensor | None = None,
        resident_bytes: int | None = None,
    ) -> None:
        self.settings = settings
        self.team = team
        _check_fits("the batch size", settings.batch_size, dataset)
        self.per_batch = 0
        if unlabelled is not None:
            wanted = settings.unlabelled_per_batch
            self.per_batch = min(settings.batch_size, len(unlabelled)) if wanted is None else wanted
            _check_fits("the number of unlabelled images a batch,", self.per_batch, unlabelled)
        self.count = settings.steps_per_epoch or math.ceil(len(dataset) / settings.batch_size)
        smallest = settings.batch_size if settings.steps_per_epoch else len(dataset) // self.count
        smallest = min(smallest, self.per_batch or smallest)
        if smallest < team.size:
            raise InputError(
                f"a batch of {smallest} images cannot be shared by {team.size} processes: choose a larger batch size"
            )
        own = settings.batch_size * self.count if settings.steps_per_epoch else len(dataset)
        self.images_per_epoch = own + self.per_batch * self.count
        self.sets = [DeviceImages(dataset, team.device, resident_bytes)]
        self.labels = [labels.to(team.device)]
        if unlabelled is not None and pseudo_labels is not None:
            self.sets.append(DeviceImages(unlabelled, team.device, resident_bytes))
            self.labels.append(pseudo_labels.to(team.device))
        self.others: Sequence[AttackedImages] = ()
        self.bank: BankRows | None = None
        self._labelled = functools.lru_cache(maxsize=4)(self._mask)

    def epoch(self, number: int, first: int = 0) -> Iterator[StepShare]:
        """Yield the shares of one epoch, from its step ``first`` (from 0) on.

        Every labelled image comes once, unless the settings fix the number of steps. The batches differ in size by
        one image at most: a small last one would be noisy, and one of a single image has no variance to normalise by.
        Before each, torch's default generators are seeded from the seed, the epoch and the step; the caller keeps
        their state.
        """
        plan = [self._labelled_rows(number)]
        if self.per_batch:
            plan.append(self._stream(1, number, self.per_batch))
        steps = list(zip(*plan, strict=True))[first:]
        own = [tuple(self.team.share(rows) for rows in step) for step in steps]
        # One transfer an epoch, not one a step.
        moved = torch.cat([rows for step in own for rows in step]).to(self.team.device) if own else None
        starts = iter(torch.tensor([len(rows) for step in own for rows in step]).cumsum(0).tolist())
        place = 0
        for step, (rows, shares, images) in enumerate(zip(steps, own, self._read(own), strict=True), start=first):
            purpose = f"step {step}" if self.team.leads else f"step {step} of process {self.team.rank}"
            reseed(self.settings.seed, number, purpose, self.team.device)
            labels, parts, numbers = [], [], []
            for kind in range(len(shares)):
                assert moved is not None
                end = next(starts)
                where = moved[place:end]
                place = end
                numbers.append(where)
                labels.append(self.labels[kind][where])
                found = self.sets[kind].at(where) if images[kind] is None else images[kind]
                assert found is not None
                parts.append(found.to(self.team.device, non_blocking=True))
            yield self._share(rows, shares, parts, labels, numbers)

    def _share(
        self,
        rows: tuple[Tensor, ...],
        shares: tuple[Tensor, ...],
        parts: list[Tensor],
        labels: list[Tensor],
        numbers: list[Tensor],
    ) -> StepShare:
        mixed = len(parts) > 1
        images = torch.cat(parts) if mixed else parts[0]
        move = self._augmentation(images)
        images = move(images)
        own = len(shares[0])
        mask = self._labelled(own, len(images)) if mixed else None
        others = None
        if self.others and not mixed:
            others = functools.partial(self._attacked, shares[0], move)
        itself = None
        if self.bank is not None:
            starts = (0, len(self.sets[0]))
            itself = torch.cat([rows + start for rows, start in zip(numbers, starts, strict=False)])
        batch = Batch(images, torch.cat(labels) if mixed else labels[0], mask, numbers[0], others, self.bank, itself)
        return StepShare(batch, sum(map(len, rows)), len(rows[0]), own)

    def _augmentation(self, images: Tensor) -> Move:
        """What is done to a batch, drawn once, so that the same can be done to its attacked images."""
        moves = [drawn_shift(images)] if self.settings.augment else []
        if self.settings.flip:
            moves.append(drawn_flip(images))

        def move(batch: Tensor) -> Tensor:
            for one in moves:
                batch = one(batch)
            return batch.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else batch

        return move

    def _attacked(self, rows: Tensor, move: Move, number: int) -> Tensor:
        return move(self.others[number].read(rows).to(self.team.device))

    def _mask(self, labelled: int, images: int) -> Tensor:
        return torch.arange(images, device=self.team.device) < labelled

    def _labelled_rows(self, number: int) -> list[Tensor]:
        if self.settings.steps_per_epoch:
            return self._stream(0, number, self.settings.batch_size)
        order = torch.randperm(len(self.sets[0]), generator=generator(self.settings.seed, number, "order"))
        return list(torch.tensor_split(order, self.count))

    def _stream(self, kind: int, number: int, each: int) -> list[Tensor]:
        """The rows of an epoch's steps, ``each`` at a time, from an endless row of passes over a set."""
        size = len(self.sets[kind])
        begin, end = (number - 1) * self.count * each, number * self.count * each
        passes = range(begin // size, -(-end // size))
        orders = [
            torch.randperm(size, generator=generator(self.settings.seed, index, f"pass {kind}")) for index in passes
        ]
        rows = torch.cat(orders)[begin - passes[0] * size :][: end - begin]
        return list(torch.split(rows, each))

    def _read(self, steps: list[tuple[Tensor, ...]]) -> Iterator[list[Tensor | None]]:
        """The images of each step that are not on the device already."""
        if all(images.resident is not None for images in self.sets):
            for step in steps:
                yield [None] * len(step)
            return

        def fetch(step: tuple[Tensor, ...]) -> list[Tensor | None]:
            return [
                images.read(rows) if images.resident is None else None
                for images, rows in zip(self.sets, step, strict=True)
            ]

        # One thread reads the next batch while the net works on this one.
        with ThreadPoolExecutor(1, thread_name_prefix="nndefense-read") as pool:
            coming = pool.submit(fetch, steps[0]) if steps else None
            for following in (*steps[1:], None):
                if coming is None:
                    return
                found = coming.result()
                coming = pool.submit(fetch, following) if following is not None else None
                yield found


def drawn_shift(images: Tensor) -> Move:
    """Draw a shift by whole pixels for each image of n x C x H x W, up to 1/8 of the side each way.

    Drawn from torch's default generator of the images' device.

    Returns:
        A function that shifts any batch n x C x H x W on that device alike, filling with black.
    """
    n, channels, height, width = images.shape
    device = images.device
    down, right = height // 8, width // 8
    tops = torch.randint(2 * down + 1, (n, 1), device=device)
    lefts = torch.randint(2 * right + 1, (n, 1), device=device)
    rows = tops + torch.arange(height, device=device)
    columns = lefts + torch.arange(width, device=device)
    item = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]

    def shift(batch: Tensor) -> Tensor:
        padded = F.pad(batch, (right, right, down, down))
        return padded[item, channel, rows[:, None, :, None], columns[:, None, None, :]]

    return shift


def drawn_flip(images: Tensor) -> Move:
    """Draw with probability 1/2 for each image whether it is mirrored left to right; as :func:`drawn_shift`."""
    mirror = torch.rand(len(images), device=images.device) < 0.5
    return lambda batch: torch.where(mirror[:, None, None, None], batch.flip(3), batch)


def _resident(dataset: ImageDataset, device: torch.device, limit: int) -> Tensor | None:
    """All images as one tensor on the device; None where they are too large for it."""
    pixels = len(dataset) * math.prod(dataset.shape)
    if pixels > limit:
        return None
    kept = torch.empty((len(dataset), *dataset.shape), dtype=torch.uint8, device=device)
    for images, _, rows in dataset.batches(_READ_BATCH):
        place = slice(int(rows[0]), int(rows[-1]) + 1)
        if kept.dtype == torch.uint8:
            small = (images * _LEVELS).round().to(torch.uint8)
            if torch.equal(small.float() / torch.tensor([_LEVELS], dtype=torch.float32), images):
                kept[place] = small.to(device)
                continue
            if 4 * pixels > limit:
                return None
            kept = kept.float() / torch.tensor([_LEVELS], dtype=torch.float32, device=device)
        kept[place] = images.to(device)
    return kept


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return RESIDENT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return max(RESIDENT_BYTES, free // 4)


def _check_fits(what: str, size: int, dataset: ImageDataset) -> None:
    if size > len(dataset):
        raise InputError(
            f"{what} {size} is more than the {len(dataset)} images of {dataset.name}: choose a smaller one"
        )
