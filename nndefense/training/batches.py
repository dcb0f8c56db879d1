"""Batches of an epoch in random order, augmented, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.datasets import ImageDataset
from nndefense.training.random_state import generator
from nndefense.training.settings import TrainingSettings

# A set of up to so many bytes is kept on the device as one tensor.
RESIDENT_BYTES = 2**30
_READ_BATCH = 1024


class EpochBatches:
    """The batches of any epoch of a training.

    Order and augmentation depend on the seed and the number of the epoch alone.

    Args:
        dataset: N images C x H x W.
        labels: int64 N, the numbers of the classifier's classes.
        settings: of the training.
        device: where the batches are wanted.
        resident_bytes: the size up to which the whole set is kept there.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        labels: Tensor,
        settings: TrainingSettings,
        device: torch.device,
        *,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self.dataset = dataset
        self.labels = labels.to(device)
        self.settings = settings
        self.device = device
        self.count = math.ceil(len(dataset) / settings.batch_size)
        self.images: Tensor | None = None
        if 4 * len(dataset) * math.prod(dataset.shape) <= resident_bytes:
            self.images = torch.empty((len(dataset), *dataset.shape), device=device)
            for images, _, rows in dataset.batches(_READ_BATCH):
                self.images[int(rows[0]) : int(rows[-1]) + 1] = images.to(device)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images n x C x H x W and labels n of one epoch, every image once.

        The batches differ in size by one image at most: a small last one would be noisy, and one of a single image
        has no variance to normalise by.
        """
        order = torch.randperm(len(self.dataset), generator=generator(self.settings.seed, number, "order"))
        chance = generator(self.settings.seed, number, "augment")
        batches = torch.tensor_split(order, self.count)
        for rows, images in zip(batches, self._read(batches), strict=True):
            if self.settings.augment:
                images = shifted(images, chance)
            if self.settings.flip:
                images = flipped(images, chance)
            yield images, self.labels[rows.to(self.device)]

    def _read(self, batches: tuple[Tensor, ...]) -> Iterator[Tensor]:
        if self.images is not None:
            for rows in batches:
                yield self.images[rows.to(self.device)]
            return
        # One thread reads the next batch while the net works on this one.
        with ThreadPoolExecutor(1, thread_name_prefix="nndefense-read") as pool:
            coming = pool.submit(self.dataset.batch, batches[0].numpy())
            for following in (*batches[1:], None):
                images, _ = coming.result()
                if following is not None:
                    coming = pool.submit(self.dataset.batch, following.numpy())
                yield images.to(self.device)


def shifted(images: Tensor, chance: torch.Generator) -> Tensor:
    """Shift each image of n x C x H x W by whole pixels, up to 1/8 of the side each way, filling with black."""
    n, channels, height, width = images.shape
    down, right = height // 8, width // 8
    padded = F.pad(images, (right, right, down, down))
    tops = torch.randint(2 * down + 1, (n,), generator=chance)
    lefts = torch.randint(2 * right + 1, (n,), generator=chance)
    rows = (tops[:, None] + torch.arange(height)).to(images.device)
    columns = (lefts[:, None] + torch.arange(width)).to(images.device)
    item = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[item, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flipped(images: Tensor, chance: torch.Generator) -> Tensor:
    """Mirror each image of n x C x H x W left to right with probability 1/2."""
    mirror = (torch.rand(len(images), generator=chance) < 0.5).to(images.device)
    return torch.where(mirror[:, None, None, None], images.flip(3), images)
