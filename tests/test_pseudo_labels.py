"""Pseudo-labels: what they are, that they come from images alone, the file, the choice, and every refusal."""

from __future__ import annotations

import json
import multiprocessing
import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from command import fails, nndefense
from helpers import BLOCK2, DIGITS, digits, trained, untrained
from PIL import Image
from torch import Tensor, nn

from index_build import build_database
from nndefense.database import ImageDatabase
from nndefense.database.near_images import NearSearch
from nndefense.datasets import ArrayDataset, ImageDataset, concatenate, write_hdf5
from nndefense.datasets.base import pool_identity
from nndefense.datasets.ids import PackedIds
from nndefense.errors import DatabaseError, DataError, InputError, ModelError, NNDefenseError
from nndefense.models import Classifier, save_classifier
from nndefense.training import train_classifier
from nndefense.training.labellers import Combined, Guess, Retrieval, Teacher
from nndefense.training.pools import complement
from nndefense.training.pseudo_job import write_pseudo_labels
from nndefense.training.pseudo_labels import PseudoLabels, label_accuracy


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def split() -> tuple[ImageDataset, ImageDataset]:
    """A hundred labelled digits and a pool of 300 others."""
    labelled, pool = complement(digits("train"), 100, seed=0)
    return labelled, pool.subset(range(300))


@pytest.fixture(scope="module")
def database(split: tuple[ImageDataset, ImageDataset], tmp_path_factory: pytest.TempPathFactory) -> ImageDatabase:
    """The hundred labelled digits under the classifier of all tests."""
    return build_database(split[0], trained(), BLOCK2, tmp_path_factory.mktemp("labelled") / "db", progress=False)


class Shaded(ImageDataset):
    """A data set whose labels nobody may look at once it is made."""

    def __init__(self, images: ImageDataset) -> None:
        self._images = images
        super().__init__(name="pool", classes=images.classes, shape=images.shape, ids=images.ids, labels=images.labels)
        del self.__dict__["labels"]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        # The base class would hand the labels out beside the images.
        raise AssertionError("the pool's own labels were read")

    def _read(self, rows: np.ndarray) -> Tensor:
        return self._images._read(rows)

    def _digest(self) -> str:
        raise AssertionError("this fingerprint depends on the labels")


def guesses(labels: Sequence[int], confidence: Sequence[float], **columns: Any) -> PseudoLabels:
    """Made-up pseudo-labels of a pool."""
    n = len(labels)
    table = {
        "rows": np.arange(n),
        "label": np.array(labels),
        "confidence": np.array(confidence, dtype=np.float32),
        "near_row": np.full(n, -1),
        "near_distance": np.full(n, np.inf),
        **{name: np.asarray(column) for name, column in columns.items()},
    }
    job = {
        "labeller": {"by": "teacher", "teacher": {"fingerprint": "f" * 64, "source": "runs/net"}},
        "pool": {"n": n, "name": "pool", "ids_sha256": "", "shape": [1, 8, 8]},
        "exclude": None,
    }
    return PseudoLabels(table, PackedIds([f"i{row}" for row in range(n)]), ("a", "b", "c"), None, job)


# --- the labellers


def test_the_teachers_labels_and_confidence(split: tuple[ImageDataset, ImageDataset]) -> None:
    images, _ = split[1].batch(range(50))
    with torch.no_grad():
        softmax = trained()(images).double().softmax(1)
    first, second = softmax.topk(2, dim=1).values.unbind(1)
    for confidence, expected in (("probability", first), ("margin", first - second)):
        guess = Teacher(trained(), confidence)(images, split[1].ids[:50])
        assert guess.labels.tolist() == softmax.argmax(1).tolist()
        torch.testing.assert_close(guess.confidence.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_teacher_in_training_is_used_in_evaluation_and_put_back() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10), nn.BatchNorm1d(10))
    classifier = Classifier(net, arch="x", input_shape=(1, 8, 8), classes=DIGITS).train()
    net[1].eval()
    images, _ = digits("train").batch(range(8))
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    first, second = (Teacher(classifier)(images, [""] * 8) for _ in range(2))
    assert torch.equal(first.confidence, second.confidence)
    assert [module.training for module in net] == [True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    with torch.no_grad():
        net[2].weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        Teacher(classifier)(images, [""] * 8)


@pytest.mark.parametrize("votes", ["distance", "uniform", "cbw-e", "cbw-d"])
def test_votes_of_the_neighbours(split: tuple[ImageDataset, ImageDataset], database: ImageDatabase, votes: str) -> None:
    images, _ = split[1].batch(range(40))
    guess = Retrieval(trained(), database, 7, votes)(images, split[1].ids[:40])
    with torch.no_grad():
        vectors = database.extractor(trained())(images).double()
    rows = torch.arange(len(database))
    distances = torch.cdist(vectors, database.features(rows).double())
    for image in range(40):
        order = distances[image].argsort()[:7]
        near = distances[image, order]
        weights = {"distance": near[0] / near, "uniform": torch.ones(7)}.get(votes)
        if weights is None:
            weights = database.weights(order, votes)
        totals = torch.zeros(10).index_add_(0, database.labels(order), weights.float())
        assert guess.confidence[image] == pytest.approx(float(totals.max() / totals.sum()), abs=1e-4)
        assert totals[guess.labels[image]] == pytest.approx(float(totals.max()), abs=1e-4)


def test_a_tied_vote_goes_to_the_nearest(database: ImageDatabase) -> None:
    retrieval = Retrieval(trained(), database, 4, "uniform")
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]])
    neighbours = torch.tensor([[1, 0, 0, 1], [0, 1, 2, 1], [0, 0, 0, 0]])
    guess = retrieval.guess(shares, neighbours)
    assert guess.labels.tolist() == [1, 1, 0]
    assert guess.confidence.tolist() == [0.5, 0.5, 1.0]


def test_only_the_labelled_vote(split: tuple[ImageDataset, ImageDataset], tmp_path: Path) -> None:
    labelled, _ = split
    labels = labelled.labels.copy()
    labels[50:] = -1
    half = ArrayDataset(
        labelled.batch(range(100))[0].numpy(), labels, name="half", classes=DIGITS, ids=list(labelled.ids)
    )
    database = build_database(half, trained(), BLOCK2, tmp_path / "db", progress=False)
    images, ids = split[1].batch(range(60))[0], split[1].ids[:60]
    by_label = Retrieval(trained(), database, 5)
    assert by_label.voters == 50
    named = Retrieval(trained(), database, 5, labelled=half.subset(range(50)))
    assert torch.equal(by_label(images, ids).labels, named(images, ids).labels)
    fewer = Retrieval(trained(), database, 5, labelled=half.subset(range(30)))
    assert fewer.voters == 30
    assert fewer.as_dict() != named.as_dict()
    for message, arguments in (
        ("holds 30 of the 330", {"labelled": concatenate([half.subset(range(30)), split[1]])}),
        ("no image in .* has a label to vote with", {"labelled": half.subset(range(50, 60))}),
        ("from 1 to the 50 labelled", {"k": 51}),
        ("no votes 'x': choose one of distance, uniform", {"votes": "x"}),
    ):
        with pytest.raises(InputError, match=message) as error:
            Retrieval(trained(), database, **{"k": 5, **arguments})
        one_line(error)
    with pytest.raises(DatabaseError, match="another classifier"):
        Retrieval(untrained(), database)


def test_an_image_does_not_find_its_own_label(tmp_path: Path) -> None:
    """A database of the whole training set would give every image of the pool its true label."""
    train = digits("train").subset(range(200))
    everything = build_database(train, trained(), BLOCK2, tmp_path / "db", progress=False)
    labelled, pool = complement(train, 50, seed=1)
    with pytest.raises(DataError, match=r"stands in the database .* with its true label") as error:
        write_pseudo_labels(Retrieval(trained(), everything, 5), pool, tmp_path / "p.h5", progress=False)
    one_line(error)
    assert not (tmp_path / "p.h5").exists()
    found = write_pseudo_labels(
        Retrieval(trained(), everything, 5, labelled=labelled), pool, tmp_path / "p.h5", progress=False
    )
    assert len(found) == 150


def test_combinations(split: tuple[ImageDataset, ImageDataset], database: ImageDatabase) -> None:
    images, ids = split[1].batch(range(300))[0], split[1].ids[:300]
    # An unsure teacher, so that the two do differ.
    teacher, retrieval = Teacher(untrained()), Retrieval(trained(), database, 5)
    p = teacher.probabilities(images)
    s, _ = retrieval.shares(images, ids)
    mine, theirs = teacher(images, ids), retrieval(images, ids)
    same = mine.labels == theirs.labels
    assert 0 < int(same.sum()) < 300
    agreement = Combined(teacher, retrieval, "agreement")(images, ids)
    assert torch.equal(agreement.labels, torch.where(same, mine.labels, -1))
    torch.testing.assert_close(agreement.confidence, mine.confidence * theirs.confidence * same)
    product = Combined(teacher, retrieval, "product")(images, ids)
    q = p.double() * ((5 * s.double() + 0.1) / 6)
    q /= q.sum(1, keepdim=True)
    assert product.labels.tolist() == q.argmax(1).tolist()
    torch.testing.assert_close(product.confidence.double(), q.max(1).values, atol=1e-6, rtol=1e-5)
    assert torch.equal(product.parts["teacher"][0], mine.labels)
    assert torch.equal(product.parts["retrieval"][1], theirs.confidence)
    with pytest.raises(InputError, match="no rule 'sum'"):
        Combined(teacher, retrieval, "sum")
    with pytest.raises(InputError, match="no confidence 'x'"):
        Teacher(trained(), "x")
    other = Classifier(untrained().net, arch="x", input_shape=(1, 8, 8), classes=[f"c{n}" for n in range(10)])
    with pytest.raises(InputError, match="have other classes"):
        Combined(Teacher(other), retrieval)


# --- the job


@pytest.mark.parametrize("by", ["teacher", "retrieval", "product", "agreement"])
def test_a_pool_is_labelled(
    split: tuple[ImageDataset, ImageDataset], database: ImageDatabase, tmp_path: Path, by: str
) -> None:
    teacher, retrieval = Teacher(trained()), Retrieval(trained(), database, 5)
    labeller = {"teacher": teacher, "retrieval": retrieval}.get(by) or Combined(teacher, retrieval, by)
    out = tmp_path / "deep" / "p.h5"
    found = write_pseudo_labels(labeller, split[1], out, batch_size=32, part_images=100, progress=False)
    direct = labeller(split[1].batch(range(300))[0], split[1].ids[:])
    assert found.labels.tolist() == direct.labels.tolist()
    np.testing.assert_allclose(found.confidence, direct.confidence.numpy(), atol=1e-5)
    assert found.rows.tolist() == list(range(300))
    assert found.ids == split[1].ids
    assert found.ids.take(np.array([250, 3, 250])) == [split[1].ids[250], split[1].ids[3], split[1].ids[250]]
    assert found.classes == DIGITS
    assert set(found.parts) == (set() if by in ("teacher", "retrieval") else {"teacher", "retrieval"})
    assert found.job["labeller"]["by"] == by
    assert found.teachers == {trained().fingerprint: trained().source}
    assert sorted(path.name for path in out.parent.iterdir()) == ["p.h5"]
    truth = digits("train").labels[[digits("train").index_of(item) for item in found.ids]]
    sure = found.labels >= 0
    assert (found.labels[sure] == truth[sure]).mean() > 0.85


def test_the_true_labels_do_not_leak(
    split: tuple[ImageDataset, ImageDataset], database: ImageDatabase, tmp_path: Path
) -> None:
    train = digits("train")
    rows = [train.index_of(item) for item in split[1].ids]
    pixels, ids = train.batch(rows)[0].numpy(), list(split[1].ids)
    wrong = (train.labels[rows] + 3) % 10
    labeller = Combined(Teacher(trained()), Retrieval(trained(), database, 5))
    files = []
    for number, labels in enumerate((train.labels[rows], wrong)):
        pool = ArrayDataset(pixels, labels, name="pool", classes=DIGITS, ids=ids)
        path = tmp_path / f"{number}.h5"
        found = write_pseudo_labels(labeller, pool, path, exclude=NearSearch(digits("test"), 1.0), progress=False)
        files.append((path.read_bytes(), found.dataset(pool).fingerprint, found.dataset(pool).labels.tolist()))
    assert files[0] == files[1]
    # And nobody so much as looks at them.
    shaded = Shaded(ArrayDataset(pixels, train.labels[rows], name="pool", classes=DIGITS, ids=ids))
    found = write_pseudo_labels(labeller, shaded, tmp_path / "2.h5", exclude=NearSearch(digits("test"), 1.0))
    assert (tmp_path / "2.h5").read_bytes() == files[0][0]
    dataset = found.select(10).dataset(shaded, like=digits("train"))
    assert dataset.batch([0])[1].tolist() == dataset.labels[:1].tolist()


class Counting:
    """A labeller that counts its images, and stops after so many."""

    def __init__(self, stop: int | None = None) -> None:
        self.teacher, self.seen, self.stop = Teacher(trained()), 0, stop
        self.classifier = trained()

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Guess:
        if self.stop is not None and self.seen + len(images) > self.stop:
            raise KeyboardInterrupt
        self.seen += len(images)
        return self.teacher(images, ids)

    def as_dict(self) -> dict[str, Any]:
        return self.teacher.as_dict()


def test_finished_parts_are_not_repeated(split: tuple[ImageDataset, ImageDataset], tmp_path: Path) -> None:
    pool, out = split[1], tmp_path / "p.h5"
    options: dict[str, Any] = {"batch_size": 16, "part_images": 64, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        write_pseudo_labels(Counting(stop=200), pool, out, **options)
    assert not out.exists()
    assert len(list((tmp_path / "p.h5.parts").glob("part-*.npz"))) == 3
    # A part that was damaged, and what a killed process left behind.
    damaged = tmp_path / "p.h5.parts" / "part-000001.npz"
    damaged.write_bytes(damaged.read_bytes()[:300])
    (tmp_path / "p.h5.parts" / "part-000003.npz.99999.part").write_bytes(b"x")
    second = Counting()
    write_pseudo_labels(second, pool, out, **options)
    assert second.seen == 300 - 2 * 64
    whole = Counting()
    write_pseudo_labels(whole, pool, tmp_path / "other.h5", **options)
    assert whole.seen == 300
    assert out.read_bytes() == (tmp_path / "other.h5").read_bytes()
    assert not (tmp_path / "p.h5.parts").exists()
    # The same job again opens the file.
    third = Counting()
    assert write_pseudo_labels(third, pool, out, **options).labels.tolist() == PseudoLabels.open(out).labels.tolist()
    assert third.seen == 0


def test_another_job_is_refused(split: tuple[ImageDataset, ImageDataset], tmp_path: Path) -> None:
    pool, out = split[1], tmp_path / "p.h5"
    options: dict[str, Any] = {"batch_size": 16, "part_images": 64, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        write_pseudo_labels(Counting(stop=100), pool, out, **options)
    with pytest.raises(InputError, match=r"p.h5.parts belongs to a job with another batch size: .*--overwrite"):
        write_pseudo_labels(Counting(), pool, out, **{**options, "batch_size": 32})
    write_pseudo_labels(Counting(), pool, out, **options)
    for changed, what in (
        ({"labeller": Teacher(trained(), "margin")}, "labeller"),
        ({"pool": pool.subset(range(299))}, "pool"),
        ({"exclude": NearSearch(digits("test"), 1.0)}, "test set"),
    ):
        arguments: dict[str, Any] = {"labeller": Counting(), "pool": pool, **options, **changed}
        with pytest.raises(InputError, match=f"another {what}: ") as error:
            write_pseudo_labels(out=out, **arguments)
        one_line(error)
        write_pseudo_labels(out=tmp_path / "new" / f"{what}.h5", **arguments)
    write_pseudo_labels(Teacher(trained(), "margin"), pool, out, overwrite=True, **options)
    assert PseudoLabels.open(out).job["labeller"]["confidence"] == "margin"


class Slow(Teacher):
    """A teacher that takes its time."""

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Guess:
        time.sleep(0.01)
        return super().__call__(images, ids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """kill -9 again and again; the file appears in the end, whole, and equal to that of one quiet run."""
    pool, out = digits("test").subset(range(120)), tmp_path / "p.h5"
    options: dict[str, Any] = {"batch_size": 5, "part_images": 10, "progress": False}
    labeller = Slow(trained())
    kept, random = [0], np.random.default_rng(0)
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(
            target=write_pseudo_labels, args=(labeller, pool, out), kwargs=options
        )
        process.start()
        # Killed at a random moment after a few more parts than the one before it.
        while process.is_alive() and len(list(tmp_path.glob("p.h5.parts/part-*.npz"))) < kept[-1] + 2:
            time.sleep(0.002)
        time.sleep(0.03 * random.random())
        process.kill()
        process.join()
        kept.append(len(list(tmp_path.glob("p.h5.parts/part-*.npz"))))
        assert not out.exists()
    assert kept == sorted(set(kept))
    write_pseudo_labels(labeller, pool, out, **options)
    write_pseudo_labels(Teacher(trained()), pool, tmp_path / "quiet.h5", **options)
    assert out.read_bytes() == (tmp_path / "quiet.h5").read_bytes()


def test_a_full_disk(split: tuple[ImageDataset, ImageDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(part: Path, data: bytes) -> int:
        if part.name.startswith("job.json"):
            return write(part, data)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match=r"No space left .* goes on from here"):
            write_pseudo_labels(Teacher(trained()), split[1], tmp_path / "p.h5", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(DataError, match=r"bytes are needed.*free some space"):
            write_pseudo_labels(Teacher(trained()), split[1], tmp_path / "p.h5", progress=False)
    assert not (tmp_path / "p.h5").exists()
    counting = Counting()
    write_pseudo_labels(counting, split[1], tmp_path / "p.h5", progress=False)
    assert counting.seen == 0  # everything stood in the parts


def test_what_cannot_be_labelled(split: tuple[ImageDataset, ImageDataset], tmp_path: Path) -> None:
    colour = ArrayDataset(np.zeros((3, 3, 8, 8), np.float32), [-1] * 3, name="colour", classes=())
    small = ArrayDataset(np.zeros((3, 1, 9, 9), np.float32), [-1] * 3, name="small", classes=())
    cases: list[tuple[type[NNDefenseError], str, dict[str, Any]]] = [
        (InputError, "colour does not fit the teacher: images are colour", {"pool": colour}),
        (DataError, "no images to label", {"pool": split[1].subset([])}),
        (InputError, "1 x 8 x 8, but those of small 1 x 9 x 9", {"exclude": NearSearch(small, 1.0)}),
        (InputError, "at least 1 image", {"batch_size": 0}),
        (InputError, "at least 1 image", {"part_images": 0}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message) as error:
            write_pseudo_labels(
                **{"labeller": Teacher(trained()), "pool": split[1], "out": tmp_path / "p.h5", **arguments}
            )
        one_line(error)
    assert not list(tmp_path.iterdir())


# --- images near the test set


def test_images_of_the_test_set_are_left_out(tmp_path: Path) -> None:
    test = digits("test")
    planted = test.batch([7, 8])[0].numpy()
    planted[1, 0, 0, 0] += 0.01
    others = digits("train").batch(range(40))[0].numpy()
    pool = ArrayDataset(np.concatenate([others[:20], planted, others[20:]]), [-1] * 42, name="pool", classes=())
    found = write_pseudo_labels(
        Teacher(trained()), pool, tmp_path / "p.h5", exclude=NearSearch(test, 0.02), batch_size=10, progress=False
    )
    assert found.excluded_ids == ["pool/00020", "pool/00021"]
    assert found.near_rows[[20, 21]].tolist() == [7, 8]
    assert found.near_distances[20] == 0
    assert found.near_distances[21] == pytest.approx(0.01, rel=1e-4)
    assert np.isinf(found.near_distances[:20]).all()
    chosen = found.select()
    assert chosen.selection is not None
    assert chosen.selection["excluded"] == 2
    assert not {20, 21} & set(chosen.rows.tolist())
    assert not {"pool/00020", "pool/00021"} & set(found.dataset(pool).ids)
    assert len(found.dataset(pool)) == 40


# --- the choice


def test_the_most_confident_of_each_class() -> None:
    labels = [0, 0, 0, 1, 1, 1, 2, 0]
    found = guesses(labels, [0.1, 0.9, 0.5, 0.2, 0.3, 0.4, 0.8, 0.7])
    chosen = found.select(2)
    assert chosen.rows.tolist() == [1, 4, 5, 6, 7]
    assert chosen.labels.tolist() == [0, 1, 1, 2, 0]
    assert chosen.ids == ["i1", "i4", "i5", "i6", "i7"]
    report = chosen.selection
    assert report is not None
    assert report["counts"] == {"a": 2, "b": 2, "c": 1}
    assert report["too_few"] == {"c": 1}
    assert report["lowest"] == pytest.approx({"a": 0.7, "b": 0.3, "c": 0.8})
    assert report["tied"] == {}
    assert found.select(2, short="equalize").rows.tolist() == [1, 5, 6]
    assert found.select(2, min_confidence=0.35).rows.tolist() == [1, 5, 6, 7]
    assert found.select().rows.tolist() == list(range(8))
    assert found.select(1).select(1).rows.tolist() == found.select(1).rows.tolist()


def test_ties_are_drawn_by_the_seed_and_said() -> None:
    found = guesses([0] * 20 + [1] * 3, [0.9] * 2 + [0.5] * 18 + [0.5] * 3)
    chosen = [set(found.select(5, seed=seed).rows.tolist()) for seed in range(6)]
    assert all({0, 1, 20, 21, 22} <= rows and len(rows) == 8 for rows in chosen)
    assert len(set(map(frozenset, chosen))) > 1
    assert set(found.select(5, seed=2).rows.tolist()) == chosen[2]
    report = found.select(5).selection
    assert report is not None
    assert report["tied"] == {"a": 15}
    # The draw does not favour the beginning of the pool.
    drawn = np.concatenate([found.select(5, seed=seed).rows for seed in range(200)])
    counts = np.bincount(drawn, minlength=20)[2:20]
    assert counts.min() > 15
    assert counts.max() < 60


def test_what_has_no_label_or_another_class_is_left_out() -> None:
    found = guesses([0, -1, 1, 2, 2], [0.9, 0.0, 0.8, 0.7, 0.6], near_row=[-1, -1, 4, -1, -1])
    chosen = found.select(1, like=["c", "a"])
    assert chosen.rows.tolist() == [0, 3]
    chosen = found.select(like=["a", "b"])
    assert chosen.rows.tolist() == [0]
    report = chosen.selection
    assert report is not None
    assert (report["excluded"], report["unlabelled"], report["foreign"]) == (1, 1, 2)
    assert report["too_few"] == {"b": 0}


def test_mistakes_of_the_choice() -> None:
    found = guesses([0, 1, 1], [0.4, 0.5, 0.6])
    for message, arguments in (
        ("at least 1, not 0", {"per_class": 0}),
        (r"in \[0, 1\], not 2", {"min_confidence": 2}),
        (r"in \[0, 1\], not nan", {"min_confidence": float("nan")}),
        ("choose keep or equalize", {"short": "drop"}),
        ("no image remains of the 3", {"min_confidence": 0.9}),
        ("no image remains .* equalize", {"short": "equalize"}),  # class c has none
        ("class 'd' is not one of the teacher's 3 classes", {"like": ["a", "b", "c", "d"]}),
    ):
        with pytest.raises(InputError, match=message) as error:
            found.select(**arguments)
        one_line(error)


# --- the file and the data set


@pytest.fixture(scope="module")
def labelled_file(split: tuple[ImageDataset, ImageDataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool labelled by the classifier of all tests."""
    path = tmp_path_factory.mktemp("file") / "p.h5"
    write_pseudo_labels(Teacher(trained()), split[1], path, progress=False)
    return path


def test_a_choice_is_written_and_opened(
    labelled_file: Path, split: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    chosen = PseudoLabels.open(labelled_file, teacher=trained()).select(5)
    chosen.write(tmp_path / "chosen.h5")
    again = PseudoLabels.open(tmp_path / "chosen.h5", teacher=trained())
    assert again.selection == json.loads(json.dumps(chosen.selection))
    assert again.job == chosen.job
    assert again.ids == chosen.ids
    assert again.rows.tolist() == chosen.rows.tolist()
    dataset = again.dataset(split[1])
    assert dataset.ids == chosen.ids
    assert dataset.fingerprint == chosen.dataset(split[1]).fingerprint
    assert torch.equal(dataset.batch([3])[0], split[1].batch([int(chosen.rows[3])])[0])
    np.testing.assert_array_equal(dataset.confidence, chosen.confidence)


def test_the_data_set_has_the_labelled_sets_classes(
    labelled_file: Path, split: tuple[ImageDataset, ImageDataset]
) -> None:
    found = PseudoLabels.open(labelled_file)
    backwards = found.dataset(split[1], like=DIGITS[::-1])
    assert backwards.classes == DIGITS[::-1]
    assert backwards.labels.tolist() == (9 - found.labels).tolist()
    few = found.dataset(split[1], like=DIGITS[:3])
    assert few.classes == DIGITS[:3]
    assert len(few) == int((found.labels < 3).sum())
    joined = concatenate([split[0], found.dataset(split[1], like=split[0])])
    assert joined.classes == DIGITS
    assert joined.labels.tolist() == [*split[0].labels.tolist(), *found.labels.tolist()]
    with pytest.raises(InputError, match="class 'cat' is not one of the teacher's 10 classes"):
        found.dataset(split[1], like=["cat", "dog"])


def test_another_pool_is_refused(labelled_file: Path, split: tuple[ImageDataset, ImageDataset]) -> None:
    found = PseudoLabels.open(labelled_file)
    for pool in (split[0], split[1].subset(range(299)), split[1].subset(range(299, -1, -1))):
        with pytest.raises(DataError, match=r"is not the pool that was labelled .*ids") as error:
            found.dataset(pool)
        one_line(error)


def test_another_teachers_file_is_refused(labelled_file: Path) -> None:
    with pytest.raises(DataError, match=r"labelled by another teacher .*label the pool with this one") as error:
        PseudoLabels.open(labelled_file, teacher=untrained())
    assert trained().fingerprint[:12] in one_line(error)
    assert untrained().fingerprint[:12] in one_line(error)


def test_damaged_files(labelled_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    with pytest.raises(DataError, match="there are no pseudo-labels at"):
        PseudoLabels.open(path)
    path.write_bytes(labelled_file.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be read as pseudo-labels"):
        PseudoLabels.open(path)
    write_hdf5(path, torch.zeros(2, 1, 4, 4))
    with pytest.raises(DataError, match="no file of pseudo-labels"):
        PseudoLabels.open(path)

    def damage(change: Any) -> None:
        path.write_bytes(labelled_file.read_bytes())
        with h5py.File(path, "a") as file:
            change(file)
        with pytest.raises(DataError, match=r"cannot be read as pseudo-labels|version 1") as error:
            PseudoLabels.open(path)
        one_line(error)

    damage(lambda file: file.attrs.update(version=2))
    damage(lambda file: file.attrs.update(job="{"))
    damage(lambda file: file.attrs.update(job="{}"))
    damage(lambda file: file.attrs.update(job='{"labeller": {"teacher": 3}, "pool": {}}'))
    damage(lambda file: file.__delitem__("confidence"))
    damage(lambda file: file["label"].__setitem__(0, 10))
    damage(lambda file: file.__delitem__("ids"))


def test_against_the_truth(labelled_file: Path, split: tuple[ImageDataset, ImageDataset]) -> None:
    train = digits("train")
    pool = train.subset([train.index_of(item) for item in split[1].ids])
    found = PseudoLabels.open(labelled_file)
    measured = label_accuracy(found, pool)
    assert measured["all"] == {"right": int((found.labels == pool.labels).sum()), "n": 300}
    assert measured["surer half"]["n"] == 150
    assert measured["surer half"]["right"] / 150 >= measured["all"]["right"] / 300
    with pytest.raises(InputError, match="no true labels"):
        label_accuracy(found, split[1])
    with pytest.raises(DataError, match="not the pool"):
        label_accuracy(found, digits("test"))


def test_training_takes_them_and_sees_no_true_label(tmp_path: Path) -> None:
    """Self-training as a whole: the net depends on the pool's images and pseudo-labels, and on nothing else of it."""
    train = digits("train")
    labelled, pool = complement(train, 60, seed=2)
    pool = pool.subset(range(120))
    rows = [train.index_of(item) for item in pool.ids]
    write_pseudo_labels(Teacher(trained()), pool, tmp_path / "p.h5", progress=False)
    nets = []
    for labels in (train.labels[rows], (train.labels[rows] + 1) % 10):
        opened = ArrayDataset(train.batch(rows)[0].numpy(), labels, name="pool", classes=DIGITS, ids=list(pool.ids))
        unlabelled = PseudoLabels.open(tmp_path / "p.h5").select(8).dataset(opened, like=labelled)
        net = train_classifier(
            untrained(), labelled, objective="self-training", unlabelled=unlabelled, epochs=1, batch_size=30,
            device="cpu", progress=False,
        )  # fmt: skip
        nets.append(net.fingerprint)
    assert nets[0] == nets[1]
    bare = train_classifier(untrained(), labelled, epochs=1, batch_size=30, device="cpu", progress=False)
    assert bare.fingerprint != nets[0]


# --- the command


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier of all tests in a folder."""
    folder = tmp_path_factory.mktemp("net")
    save_classifier(trained(), folder)
    return folder


def test_the_command(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.h5"
    write = ("pseudo-label", "write", "--dataset", "digits", "--classifier", net, "--device", "cpu", "--quiet")
    labels = ("--labels", 100, "--seed", 4)
    nndefense("index", "build", "--dataset", "digits", "--classifier", net, "--layer", "block2", "--out",
              tmp_path / "db", "--quiet")  # fmt: skip
    options = ("--by", "product", "--database", tmp_path / "db", "--k", 5, "--exclude", "digits:test")
    made = nndefense(*write, "--out", out, *labels, *options, "--exclude-l2", "1/2", "--json").json
    assert made["images"] == 1197
    assert made["labeller"]["by"] == "product"
    assert made["labeller"]["parts"][1]["voters"] == 100
    assert made["exclude"]["l2"] == 0.5
    assert made["near_test_set"] == len(made["near_test_set_ids"])
    train = digits("train")
    _, pool = complement(train, 100, seed=4)
    assert PseudoLabels.open(out).job["pool"] == json.loads(json.dumps(pool_identity(pool)))

    chosen = tmp_path / "chosen.h5"
    done = nndefense("pseudo-label", "select", out, "--per-class", 200, "--out", chosen)
    assert done.code == 0, done.err
    assert "too few    fewer than 200: 0 (" in done.out
    found = nndefense("pseudo-label", "info", chosen, "--json").json
    assert found["images"] == sum(row["images"] for row in found["classes"]) == found["usable"]
    assert found["selection"]["per_class"] == 200

    measured = nndefense("pseudo-label", "check", out, "--dataset", "digits", *labels, "--json").json["accuracy"]
    assert set(measured) == {"all", "teacher", "retrieval", "surer half"}
    assert measured["all"]["right"] > 0.9 * measured["all"]["n"]
    assert measured["all"]["ci_low"] < measured["all"]["right"] / measured["all"]["n"] < measured["all"]["ci_high"]
    assert nndefense("pseudo-label", "check", out, "--dataset", "digits", *labels).out.count(" right: ") == 4

    fails(3, "other ids and pixels", "pseudo-label", "check", out, "--dataset", "digits", "--labels", 100)
    fails(3, "with its true label", *write, "--out", tmp_path / "q.h5", "--by", "retrieval", "--database",
          tmp_path / "db")  # fmt: skip
    fails(2, "chosen.h5 exists", "pseudo-label", "select", out, "--out", chosen)
    fails(2, "is the file that is chosen from", "pseudo-label", "select", out, "--out", out, "--overwrite")
    fails(2, "belongs to a job with another", *write, "--out", out)


def test_any_kind_of_pool(net: Path, tmp_path: Path) -> None:
    """The same pictures as a folder, an HDF5 file and tar shards get the same labels."""
    pictures = (digits("train").batch(range(24))[0] * 255).round()
    write_hdf5(tmp_path / "pool.h5", pictures / 255)
    for row, picture in enumerate(pictures):
        path = tmp_path / "photos" / "all" / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[0].byte().numpy()).save(path)
    with tarfile.open(tmp_path / "pool-0.tar", "w") as first, tarfile.open(tmp_path / "pool-1.tar", "w") as second:
        for row in range(24):
            (first if row < 10 else second).add(tmp_path / "photos" / "all" / f"{row:02d}.png", f"{row:02d}.png")
    found = []
    for number, spec in enumerate(("imagefolder:photos", "hdf5:pool.h5", "webdataset:pool-{0..1}.tar")):
        kind, _, rest = spec.partition(":")
        out = tmp_path / f"{number}.h5"
        done = nndefense("pseudo-label", "write", "--dataset", f"{kind}:{tmp_path / rest}", "--classifier", net,
                         "--out", out, "--device", "cpu")  # fmt: skip
        assert done.code == 0, done.err
        found.append(PseudoLabels.open(out))
        assert len(found[-1]) == 24
        np.testing.assert_array_equal(found[-1].labels, found[0].labels)
        np.testing.assert_allclose(found[-1].confidence, found[0].confidence, atol=1e-6)
    assert found[2].ids == [f"{row:02d}" for row in range(24)]


def test_mistakes_of_the_command(net: Path, tmp_path: Path) -> None:
    write = ("pseudo-label", "write", "--dataset", "digits", "--classifier", net, "--out", tmp_path / "p.h5")
    fails(2, "give --database", *write, "--by", "retrieval")
    fails(2, "asks no database", *write, "--database", tmp_path)
    fails(2, "give one of the two", *write, "--by", "product", "--database", tmp_path, "--labels", 5, "--labelled", "x")
    fails(2, "name it with --exclude", *write, "--exclude-l2", "1")
    fails(2, "cannot take 1297 labelled", *write, "--labels", 1297)
    fails(3, "there are no pseudo-labels", "pseudo-label", "info", tmp_path / "no.h5")
    fails(5, "there is no database", *write, "--by", "retrieval", "--database", tmp_path / "db")
