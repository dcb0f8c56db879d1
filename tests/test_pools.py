"""Pools: balanced splits, labels that are gone for good, and images near a test set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import digits
from hypothesis import given, settings
from hypothesis import strategies as st

from nndefense.database.near_images import Near, NearSearch, near_threshold
from nndefense.datasets import ArrayDataset, ImageDataset
from nndefense.datasets.base import check_pool, pool_identity
from nndefense.errors import DataError, InputError
from nndefense.training.pools import (
    PseudoLabelledDataset,
    balanced_rows,
    complement,
    without_labels,
)


def made(images: np.ndarray, labels: object = None, ids: list[str] | None = None, name: str = "made") -> ArrayDataset:
    """Float images N x C x H x W as a data set of ten classes."""
    numbers = np.full(len(images), -1) if labels is None else labels
    return ArrayDataset(images.astype(np.float32), numbers, name=name, classes=[str(n) for n in range(10)], ids=ids)


def noise(n: int, side: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, side, side), dtype=np.float32)


# --- splits


@pytest.mark.parametrize("n", [1, 10, 25, 100, 777, 1296])
def test_complement(n: int) -> None:
    train = digits("train")
    labelled, pool = complement(train, n, seed=3)
    assert len(labelled) == n
    assert sorted([*labelled.ids, *pool.ids]) == sorted(train.ids)
    counts = np.bincount(labelled.labels, minlength=10)
    have = np.bincount(train.labels, minlength=10)
    # Equal to within one image, but for classes that have no more.
    assert all(
        count in (counts.max(), counts.max() - 1) or count == all_ for count, all_ in zip(counts, have, strict=True)
    )
    images, labels = labelled.batch([0])
    assert torch.equal(images[0], train[train.index_of(labelled.ids[0])][0])
    assert labels[0] == train.labels[train.index_of(labelled.ids[0])]
    assert labelled.classes == train.classes
    assert set(pool.labels.tolist()) == {-1}
    assert pool.classes == ()


def test_complement_depends_on_the_seed_alone_and_is_nested() -> None:
    train = digits("train")
    rows = {n: set(balanced_rows(train.labels, n, 5).tolist()) for n in (7, 50, 53, 400)}
    assert rows[7] < rows[50] < rows[53] < rows[400]
    assert rows[50] == set(balanced_rows(train.labels, 50, 5).tolist())
    assert rows[50] != set(balanced_rows(train.labels, 50, 6).tolist())
    # Which classes get the remainder is drawn too.
    remainders = {tuple(np.sort(train.labels[balanced_rows(train.labels, 3, seed)])) for seed in range(8)}
    assert len(remainders) > 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=2, max_size=60), st.integers(0, 50), st.data())
def test_balance_of_any_labels(labels: list[int], seed: int, data: st.DataObject) -> None:
    numbers = np.array(labels)
    known = int((numbers >= 0).sum())
    n = data.draw(st.integers(0, known)) if known else 0
    if n == 0:
        return
    rows = balanced_rows(numbers, n, seed)
    assert len(rows) == len(set(rows.tolist())) == n
    counts = np.bincount(numbers[rows], minlength=5)
    have = np.bincount(numbers[numbers >= 0], minlength=5)
    assert all(counts[c] >= counts.max() - 1 or counts[c] == have[c] for c in range(5))


def test_labels_unknown_go_to_the_pool() -> None:
    dataset = made(noise(6), [0, -1, 1, 0, -1, 1])
    labelled, pool = complement(dataset, 4, seed=0)
    assert sorted(labelled.labels.tolist()) == [0, 0, 1, 1]
    assert pool.ids == ["made/00001", "made/00004"]
    for n in (0, 5, 6):
        with pytest.raises(InputError, match="from 1 to 4"):
            complement(dataset, n)
    with pytest.raises(InputError, match="from 1 to 1296"):
        complement(digits("train"), 1297)


# --- labels that are gone


def test_nothing_of_the_true_labels_is_left() -> None:
    images, ids = noise(20), [f"i{n}" for n in range(20)]
    first = made(images, np.arange(20) % 10, ids)
    second = made(images, np.arange(20)[::-1] % 10, ids)
    assert first.fingerprint != second.fingerprint
    bare = [without_labels(dataset) for dataset in (first, second)]
    assert bare[0].fingerprint == bare[1].fingerprint
    assert bare[0].labels.tolist() == [-1] * 20
    assert [label for _, label in (bare[0][3], bare[0].subset([4])[0])] == [-1, -1]
    assert torch.equal(bare[0].batch([7])[0], torch.from_numpy(images[7:8]))
    assert without_labels(bare[0]) is bare[0]
    assert pool_identity(first) == pool_identity(second)
    again = [PseudoLabelledDataset(d, [1] * 20, np.ones(20, np.float32), ["a", "b"]) for d in (first, second)]
    assert again[0].fingerprint == again[1].fingerprint
    assert again[0].labels.tolist() == [1] * 20
    assert again[0].fingerprint != bare[0].fingerprint


def test_a_pool_is_known_by_its_ids_and_pixels() -> None:
    images = noise(20)
    identity = pool_identity(made(images))
    check_pool(made(images, name="made"), identity)

    def refused(pool: ImageDataset, what: str) -> None:
        with pytest.raises(DataError, match=f"other {what}") as error:
            check_pool(pool, identity)
        assert "\n" not in str(error.value)

    refused(made(images[:19]), "number of images and ids and pixels")
    refused(made(images, ids=[f"x{n}" for n in range(20)]), "ids; open")
    refused(made(images[::-1], ids=[f"made/{n:05d}" for n in range(20)]), "pixels; open")
    refused(made(noise(20, 5)), "shape and pixels")


# --- images near a test set


def brute(pool: np.ndarray, tests: np.ndarray) -> np.ndarray:
    differences = pool[:, None].astype(np.float64) - tests[None].astype(np.float64)
    return np.sqrt((differences.reshape(len(pool), len(tests), -1) ** 2).sum(2))


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_near_is_exact(memory: int) -> None:
    pool, tests = noise(300, seed=1), noise(70, seed=2)
    distances = brute(pool, tests)
    for eps in (0.0, float(np.quantile(distances.min(1), 0.2)), 1.0, 10.0):
        found = NearSearch(made(tests), eps, memory=memory)(torch.from_numpy(pool))
        inside = distances.min(1) <= eps
        assert ((found.rows >= 0).numpy() == inside).all()
        assert (found.rows.numpy()[inside] == distances.argmin(1)[inside]).all()
        np.testing.assert_allclose(found.distances.numpy()[inside], distances.min(1)[inside], atol=1e-9)
        assert found.distances[~torch.from_numpy(inside)].isinf().all()


def near_images(pool: ImageDataset, references: ImageDataset, eps: float, *, batch_size: int = 512) -> Near:
    """Search for all images of a pool, batch by batch."""
    search = NearSearch(references, eps)
    found = [search(images) for images, _, _ in pool.batches(batch_size)]
    return Near(torch.cat([f.rows for f in found]), torch.cat([f.distances for f in found]))


def test_equal_images_are_found_and_their_neighbours_in_8_bits_are_not() -> None:
    tests = np.round(noise(50, 16) * 255) / 255
    pool = np.concatenate([noise(10, 16, seed=9), tests[[3, 40]], tests[[5]]]).astype(np.float32)
    pool[-1, 0, 0, 0] += 1 / 255 if pool[-1, 0, 0, 0] < 0.5 else -1 / 255
    found = near_images(made(pool), made(tests), 0.0, batch_size=4)
    assert found.rows.tolist() == [-1] * 10 + [3, 40, -1]
    assert found.distances[10:12].tolist() == [0, 0]
    # With one step of 8 bits allowed, it is one too, at exactly that distance.
    assert near_images(made(pool), made(tests), 1.001 / 255).rows.tolist()[-1] == 5


def test_the_threshold_lies_inside() -> None:
    tests, pool = np.zeros((1, 1, 2, 2)), np.full((1, 1, 2, 2), 0.25)
    assert near_images(made(pool), made(tests), 0.5).rows.tolist() == [0]
    assert near_images(made(pool), made(tests), math.nextafter(0.5, 0)).rows.tolist() == [-1]


def test_the_papers_threshold() -> None:
    assert near_threshold((3, 32, 32)) == pytest.approx(2000 / 255)
    assert near_threshold((1, 28, 28)) == pytest.approx(2000 / 255 * math.sqrt(784 / 3072))
    search = NearSearch(made(noise(3)))
    assert search.eps == near_threshold((1, 4, 4))
    assert search.as_dict()["l2"] == search.eps


def test_mistakes_of_the_search() -> None:
    with pytest.raises(InputError, match="0 or more"):
        NearSearch(made(noise(3)), -1.0)
    with pytest.raises(InputError, match="0 or more"):
        NearSearch(made(noise(3)), math.nan)
    with pytest.raises(InputError, match="has no images"):
        NearSearch(made(noise(3)).subset([]), 1.0)
    with pytest.raises(InputError, match="1 x 5 x 5, but those of made 1 x 4 x 4"):
        NearSearch(made(noise(3)), 1.0)(torch.from_numpy(noise(2, 5)))
