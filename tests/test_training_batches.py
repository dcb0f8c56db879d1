"""Batches: order, sharing, mixing with unlabelled images, augmentation, and where the images are kept."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nndefense.datasets.arrays import ArrayDataset
from nndefense.errors import InputError
from nndefense.training import TrainingSettings
from nndefense.training.batches import DeviceImages, EpochBatches, StepShare, drawn_flip, drawn_shift
from nndefense.training.launcher import Team
from nndefense.training.random_state import kept

CPU = torch.device("cpu")


def arrays(n: int, seed: int = 0, levels: int | None = None) -> ArrayDataset:
    generator = np.random.default_rng(seed)
    images = generator.random((n, 1, 8, 8), dtype=np.float32)
    if levels is not None:
        images = generator.integers(0, levels + 1, images.shape).astype(np.float32) / np.float32(levels)
    return ArrayDataset(images, [index % 2 for index in range(n)], name="made", classes=["a", "b"])


def made(
    n: int = 33, pool: int = 0, team: Team | None = None, resident_bytes: int | None = None, **settings: Any
) -> EpochBatches:
    """Batches whose labels are row numbers; those of the pool start from 1000."""
    return EpochBatches(
        arrays(n),
        torch.arange(n),
        TrainingSettings(**{"epochs": 3, "batch_size": 8} | settings),
        team or Team(CPU),
        unlabelled=arrays(pool, 1) if pool else None,
        pseudo_labels=1000 + torch.arange(pool) if pool else None,
        resident_bytes=resident_bytes,
    )


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    with kept(CPU):
        yield


def rows(batches: EpochBatches, number: int, first: int = 0) -> list[list[int]]:
    return [share.batch.labels.tolist() for share in batches.epoch(number, first)]


def test_every_image_once_an_epoch() -> None:
    batches = made(33)
    sizes = [len(step) for step in rows(batches, 1)]
    assert sizes == [7, 7, 7, 6, 6]  # no batch of a single image, which batch normalisation could not take
    orders = [list(itertools.chain(*rows(batches, number))) for number in (1, 2, 1)]
    assert sorted(orders[0]) == list(range(33))
    assert orders[0] == orders[2] != orders[1]
    for share in batches.epoch(2):
        assert torch.equal(share.batch.images, arrays(33).batch(share.batch.labels)[0])
        assert share.batch.labelled is None
        assert share.images == share.labelled == share.own_labelled == len(share.batch.labels)
    assert batches.images_per_epoch == 33


@pytest.mark.parametrize("resident_bytes", [None, 0])
def test_an_epoch_can_be_entered_at_any_step(resident_bytes: int | None) -> None:
    batches = made(33, pool=20, augment=True, flip=True, resident_bytes=resident_bytes)
    whole = list(batches.epoch(2))
    assert len(whole) == batches.count == 5
    for first in range(6):
        rest = list(batches.epoch(2, first))
        assert len(rest) == 5 - first
        for one, other in zip(whole[first:], rest, strict=True):
            assert torch.equal(one.batch.images, other.batch.images)
            assert torch.equal(one.batch.labels, other.batch.labels)


def test_each_step_has_its_own_chance() -> None:
    batches = made(33)
    drawn = [[torch.rand(3) for _ in batches.epoch(number)] for number in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert len({tuple(draw.tolist()) for step in (drawn[0], drawn[2]) for draw in step}) == 10
    second = made(33, team=Team(CPU, 1, 2))
    assert not torch.equal(next(torch.rand(3) for _ in second.epoch(1)), drawn[0][0])
    late = next(torch.rand(3) for _ in batches.epoch(1, 3))
    assert torch.equal(late, drawn[0][3])


def test_labelled_and_unlabelled_images_together() -> None:
    batches = made(16, pool=10, unlabelled_per_batch=3)
    seen: list[int] = []
    for number in (1, 2, 3):
        for share in batches.epoch(number):
            labels, labelled = share.batch.labels, share.batch.labelled
            assert labelled is not None
            assert labelled.tolist() == [True] * 8 + [False] * 3
            assert torch.equal(labelled, labels < 1000)
            assert (share.images, share.labelled, share.own_labelled) == (11, 8, 8)
            assert torch.equal(share.batch.images[8:], arrays(10, 1).batch(labels[8:] - 1000)[0])
            seen += (labels[8:] - 1000).tolist()
    # 18 images of a pool of 10: one whole pass, then the second.
    assert sorted(seen[:10]) == list(range(10))
    assert len(set(seen[10:18])) == 8
    assert batches.images_per_epoch == 22


def test_a_fixed_number_of_steps() -> None:
    batches = made(20, steps_per_epoch=4)
    orders = [row for number in (1, 2, 3) for step in rows(batches, number) for row in step]
    assert len(orders) == 96
    for start in range(0, 80, 20):
        assert sorted(orders[start : start + 20]) == list(range(20))
    assert orders[:20] != orders[20:40]
    assert batches.images_per_epoch == 32
    assert rows(batches, 2, 2) == rows(batches, 2)[2:]


def test_the_pool_fills_a_batch_by_default_as_far_as_it_goes() -> None:
    assert made(33, pool=20).per_batch == 8
    assert made(33, pool=5).per_batch == 5
    with pytest.raises(InputError, match="unlabelled images a batch, 6 is more than the 5 images"):
        made(33, pool=5, unlabelled_per_batch=6)
    with pytest.raises(InputError, match="the batch size 34 is more than the 33 images"):
        made(33, batch_size=34)


def test_processes_share_each_batch() -> None:
    alone = rows(made(33, pool=20, unlabelled_per_batch=5), 2)
    teams = [made(33, pool=20, unlabelled_per_batch=5, team=Team(CPU, rank, 3)) for rank in range(3)]
    for step, shares in enumerate(zip(*(list(batches.epoch(2)) for batches in teams), strict=True)):
        assert all(isinstance(share, StepShare) for share in shares)
        labelled = [row for share in shares for row in share.batch.labels[: share.own_labelled].tolist()]
        others = [row for share in shares for row in share.batch.labels[share.own_labelled :].tolist()]
        assert labelled + others == alone[step]
        assert max(len(share.batch.labels) for share in shares) <= 1 + 1 + min(len(s.batch.labels) for s in shares)
        assert {(share.images, share.labelled) for share in shares} == {(len(alone[step]), len(labelled))}
    with pytest.raises(InputError, match="cannot be shared by 9 processes"):
        made(33, team=Team(CPU, 0, 9))


def test_large_sets_are_read_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    data = arrays(33)
    threads = set()
    plain = data.batch

    def noted(indices: Any) -> tuple[Tensor, Tensor]:
        threads.add(threading.current_thread().name)
        return plain(indices)

    settings = TrainingSettings(epochs=1, batch_size=8, augment=True, flip=True)
    resident = EpochBatches(data, torch.arange(33), settings, Team(CPU))
    monkeypatch.setattr(data, "batch", noted)
    read = EpochBatches(data, torch.arange(33), settings, Team(CPU), resident_bytes=0)
    assert not threads
    for one, other in zip(read.epoch(1), resident.epoch(1), strict=True):
        assert torch.equal(one.batch.images, other.batch.images)
        assert torch.equal(one.batch.labels, other.batch.labels)
    assert len(threads) == 1
    assert next(iter(threads)).startswith("nndefense-read")


def test_a_failed_read_ends_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    data = arrays(33)

    def fail(_indices: Any) -> None:
        raise Stop

    monkeypatch.setattr(data, "batch", fail)
    batches = EpochBatches(
        data, torch.arange(33), TrainingSettings(epochs=1, batch_size=8), Team(CPU), resident_bytes=0
    )
    with pytest.raises(Stop):
        next(batches.epoch(1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nndefense-read")]


def test_images_are_kept_as_bytes_only_where_that_is_exact() -> None:
    eight_bit, others = arrays(3000, levels=255), arrays(3000)
    kept_bytes, kept_floats = DeviceImages(eight_bit, CPU), DeviceImages(others, CPU)
    assert kept_bytes.resident is not None
    assert kept_floats.resident is not None
    assert kept_bytes.resident.dtype == torch.uint8
    assert kept_floats.resident.dtype == torch.float32
    chosen = torch.tensor([5, 0, 2999])
    for images, data in ((kept_bytes, eight_bit), (kept_floats, others)):
        assert torch.equal(images.at(chosen), data.batch(chosen)[0])
        assert torch.equal(images.fetch(chosen), data.batch(chosen)[0])
    # Bytes at first, then pixels that are none: everything becomes floats, and stays exact.
    pixels = eight_bit.batch(range(3000))[0]
    pixels[2500, 0, 0, 0] = 0.123
    mixed = ArrayDataset(pixels.numpy(), eight_bit.labels, name="mixed", classes=["a", "b"])
    found = DeviceImages(mixed, CPU)
    assert torch.equal(found.at(torch.arange(3000)), mixed.batch(range(3000))[0])
    # A limit between the two sizes.
    limit = 2 * pixels.numel()
    assert DeviceImages(eight_bit, CPU, limit).resident is not None
    assert DeviceImages(others, CPU, limit).resident is None
    assert DeviceImages(mixed, CPU, limit).resident is None
    assert torch.equal(DeviceImages(others, CPU, limit).fetch(chosen), others.batch(chosen)[0])


def test_shifts_are_whole_pixels_up_to_an_eighth() -> None:
    torch.manual_seed(0)
    images = torch.zeros(200, 2, 16, 24)
    images[:, :, 8, 12] = 1
    moved = drawn_shift(images)(images)
    assert moved.shape == images.shape
    assert moved.sum() == 400
    places = moved[:, 0].flatten(1).argmax(1)
    down, right = places // 24, places % 24
    assert sorted(set((down - 8).tolist())) == [-2, -1, 0, 1, 2]
    assert sorted(set((right - 12).tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    assert torch.equal(moved[:, 0], moved[:, 1])
    small = images[:, :, :4, :4]
    assert torch.equal(drawn_shift(small)(small), small)


def test_flips() -> None:
    torch.manual_seed(0)
    images = torch.rand(200, 3, 4, 5)
    result = drawn_flip(images)(images)
    same = (result == images).flatten(1).all(1)
    mirrored = (result == images.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 60 < int(same.sum()) < 140


def test_channels_last() -> None:
    colour = ArrayDataset(np.zeros((8, 3, 4, 4), dtype=np.float32), [0] * 8, name="colour", classes=["a", "b"])
    settings = TrainingSettings(epochs=1, batch_size=8, channels_last=True)
    share = next(EpochBatches(colour, torch.zeros(8, dtype=torch.int64), settings, Team(CPU)).epoch(1))
    assert share.batch.images.is_contiguous(memory_format=torch.channels_last)
