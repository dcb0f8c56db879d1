"""The guard: answers that do not depend on the company an image is in, percentiles that hold, and honest refusals."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BLOCK2, DIGITS, digits, images, rewrite, table, trained, untrained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from index_build import build_database
from nndefense.cli.app import build
from nndefense.database import ImageDatabase, Manifest
from nndefense.datasets import ImageDataset, concatenate, load_image, write_hdf5
from nndefense.datasets import open_dataset as reopened
from nndefense.errors import DatabaseError, DataError, InputError, ModelError, NNDefenseError
from nndefense.features import FeatureSpec
from nndefense.files import sealed
from nndefense.guard import Defended, Guard, Percentile
from nndefense.guard import pictures as pictures_module
from nndefense.guard.batch_invariant import SteadyForward, _plan
from nndefense.guard.nearest_rows import NearestRows
from nndefense.models import Classifier, save_classifier

HELD = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``classifier`` and ``database``, which holds all training digits but the last 150 of a random order."""
    place = tmp_path_factory.mktemp("guard")
    save_classifier(trained(), place / "classifier")
    kept = np.sort(np.random.default_rng(0).permutation(len(digits("train")))[HELD:])
    build_database(
        digits("train").subset(kept), trained(), BLOCK2, place / "database", specs=["digits"], progress=False
    )
    return place


@pytest.fixture(scope="module")
def held() -> ImageDataset:
    """The digits that stand in no database (though the classifier saw them)."""
    return digits("train").subset(np.sort(np.random.default_rng(0).permutation(len(digits("train")))[:HELD]))


@pytest.fixture(scope="module")
def guard(folder: Path) -> Guard:
    return Guard.open(folder / "database", folder / "classifier", k=5, weighting="cbw-d", device="cpu")


@pytest.fixture(scope="module")
def alone(guard: Guard) -> list[Any]:
    """Each of 60 test digits, classified on its own."""
    return [guard.predict(image)[0] for image in images("test", 60)[0]]


# -- what it says ---------------------------------------------------------------------------------------------------


def test_it_says_what_the_defence_says(guard: Guard) -> None:
    pictures, _ = images("test", 100)
    why = guard.defense.explain(pictures)
    with torch.no_grad():
        bare = guard.classifier(pictures).softmax(1)
    for i, said in enumerate(guard.predict(pictures)):
        assert [n.row for n in said.neighbors] == why.rows[i].tolist()
        assert [n.id for n in said.neighbors] == why.ids[i]
        assert [n.distance for n in said.neighbors] == pytest.approx(why.distances[i].tolist(), rel=1e-4, abs=1e-4)
        assert [n.weight for n in said.neighbors] == pytest.approx(why.weights[i].tolist(), abs=1e-6)
        assert sum(n.weight for n in said.neighbors) == pytest.approx(1)
        assert said.probabilities == pytest.approx(why.log_probabilities[i].exp().tolist(), abs=1e-6)
        assert said.bare.probabilities == pytest.approx(bare[i].tolist(), abs=1e-6)
        assert said.class_index == int(why.log_probabilities[i].argmax())
        assert said.agree == (said.class_index == said.bare.class_index)
        assert said.distance == said.neighbors[0].distance
        assert [n.label for n in said.neighbors] == [DIGITS[label] for label in why.labels[i]]
        assert (said.percentile, said.abstained) == (None, False)


def test_lists_are_as_long_as_asked_for(guard: Guard) -> None:
    pictures, _ = images("test", 20)
    whole = guard.predict(pictures, top=10)
    for top, neighbors in ((1, 0), (3, 2), (10, 5), (99, 99)):
        some = guard.predict(pictures, top=top, neighbors=neighbors)
        assert [one.limited(top, neighbors) for one in whole] == some
        assert len(some[0].top) == min(top, 10)
        assert len(some[0].neighbors) == min(neighbors, 5)
    for one in whole:
        assert [value for _, value in one.top] == sorted(one.probabilities, reverse=True)
    with pytest.raises(InputError, match="top must be at least 1"):
        guard.stream(pictures, top=0)


def test_json_is_plain_and_rounded(guard: Guard) -> None:
    said = guard.predict(images("test", 1)[0])[0]
    value = said.to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert set(value) == {
        "class", "class_index", "probability", "top", "bare", "agree", "distance", "percentile", "abstained",
        "neighbors",
    }  # fmt: skip
    numbers = [value["probability"], *(row["probability"] for row in value["top"])]
    assert all(number == round(number, 6) for number in numbers)
    assert value["distance"] == float(f"{said.distance:.7g}") == value["neighbors"][0]["distance"]
    again = Defended.from_json(json.loads(json.dumps(value)))
    assert again.to_json() == value
    assert (again.class_name, again.top[0][0], again.probabilities) == (said.class_name, said.class_name, ())
    described = guard.describe()
    json.dumps(described, allow_nan=False)
    assert str(guard.database.path) not in json.dumps(described)


# -- the same in any company ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.integers(0, 59), min_size=1, max_size=150),
    batch_size=st.integers(1, 100),
)
def test_company_changes_no_bit(guard: Guard, alone: list[Any], chosen: list[int], batch_size: int) -> None:
    pictures, _ = images("test", 60)
    # Equal as dataclasses: every float, not only the digits that JSON keeps.
    assert guard.predict(pictures[chosen], batch_size=batch_size) == [alone[i] for i in chosen]


@pytest.mark.parametrize("arch", ["small-cnn", pytest.param("madry-mnist", marks=pytest.mark.slow)])
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_company_changes_no_bit_for_other_nets_and_threads(arch: str, threads: int, tmp_path: Path) -> None:
    classifier = untrained(1, arch)
    layer = "block1" if arch == "small-cnn" else "fc1"
    spec = FeatureSpec(layer, "grid4", pca=32)
    build_database(digits("train").subset(range(400)), classifier, spec, tmp_path, progress=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        guard = Guard.open(tmp_path, classifier, k=20, device="cpu")
        pictures, _ = images("test", 70)
        alone = [guard.predict(picture)[0] for picture in pictures]
        generator = np.random.default_rng(0)
        for size in (2, 3, 7, 33, 70):
            chosen = generator.permutation(70)[:size]
            assert guard.predict(pictures[chosen]) == [alone[i] for i in chosen]
        # Another number of threads than it was opened with, too; and in threads with numbers of their own, at once.
        torch.set_num_threads(1 if threads > 1 else 2)
        assert guard.predict(pictures) == alone
        assert torch.get_num_threads() != threads

        def said(own: int) -> bool:
            # In a new thread the first look takes over the number that any thread has set last.
            torch.get_num_threads()
            torch.set_num_threads(own)
            same = all(guard.predict(pictures[:size]) == alone[:size] for size in (3, 70))
            return same and torch.get_num_threads() == own

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(said, (1, 2, 3, 1, 2, 3)))
    finally:
        torch.set_num_threads(before)


def test_a_failed_pass_leaves_the_number_of_threads(guard: Guard) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(guard._forward.threads + 1)
    try:
        with pytest.raises(InputError):
            guard._forward._run(torch.zeros(1, 5, 8, 8))
        assert torch.get_num_threads() == guard._forward.threads + 1
    finally:
        torch.set_num_threads(before)


def test_threads_and_other_passes_do_not_disturb(guard: Guard, alone: list[Any]) -> None:
    pictures, _ = images("test", 60)
    done, wrong = threading.Event(), []

    def predict(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(8):
            chosen = generator.integers(0, 60, generator.integers(1, 40))
            if guard.predict(pictures[chosen]) != [alone[i] for i in chosen]:
                wrong.append(seed)

    def disturb() -> None:
        while not done.is_set():
            moved = pictures[:5].clone().requires_grad_()
            guard.classifier(moved).sum().backward()
            guard.defense(pictures[:3])

    other = threading.Thread(target=disturb)
    workers = [threading.Thread(target=predict, args=(seed,)) for seed in range(3)]
    for thread in (other, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    other.join()
    assert wrong == []


class Moody(nn.Module):
    """A net whose rows depend on the size of the batch, on their place in it, or on chance."""

    def __init__(self, mood: str) -> None:
        super().__init__()
        self.mood = mood
        self.layer = nn.Flatten()
        self.last = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        flat = self.layer(pictures)
        if self.mood == "size":
            flat = flat * (1 + 1e-3 * (len(flat) in (4, 32)))
        elif self.mood == "place":
            flat = flat * (1 + 1e-3 * torch.arange(len(flat))[:, None])
        elif self.mood == "chance":
            flat = flat + 1e-3 * torch.rand(len(flat), 1)
        logits: Tensor = self.last(flat)
        return logits


@pytest.mark.parametrize(
    ("mood", "sizes", "exact"), [("size", (64, 16, 8), True), ("place", (1,), True), ("chance", (1,), False)]
)
def test_only_batch_sizes_that_agree_are_used(mood: str, sizes: tuple[int, ...], exact: bool) -> None:
    torch.manual_seed(0)
    classifier = Classifier(Moody(mood), arch="moody", input_shape=(1, 8, 8), classes=DIGITS).eval()
    forward = SteadyForward(classifier, FeatureSpec("layer", pca=0), None, (1, 8, 8))
    found = forward.sizes
    assert forward.exact == exact
    if mood == "size":
        # What is smaller may agree or not, as the library pleases; these must not be among them.
        assert found[0] == 64
        assert not {4, 32} & set(found)
    else:
        assert found == sizes
    if exact:
        pictures = torch.rand(70, 1, 8, 8)
        whole, parts = forward(pictures), [forward(part) for part in pictures.split(9)]
        for side in (0, 1):
            assert np.array_equal(whole[side], np.concatenate([part[side] for part in parts]))


@given(count=st.integers(0, 500), sizes=st.sets(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1))
def test_batches_cover_the_images_once(count: int, sizes: set[int]) -> None:
    plan = list(_plan(count, tuple(sorted(sizes, reverse=True))))
    assert sum(filled for _, filled in plan) == count
    assert all(size in sizes and 1 <= filled <= size for size, filled in plan)
    # Not more is computed than half as much again, and one smallest batch.
    assert sum(size for size, _ in plan) <= 1.5 * count + min(sizes)


# -- neighbours -----------------------------------------------------------------------------------------------------


def _database(folder: Path, features: Tensor, index: str = "Flat") -> ImageDatabase:
    rows = table(len(features))
    spec = FeatureSpec("block2", pca=0)
    with_classifier = ImageDatabase.create(folder, classifier=untrained(), feature=spec, index=index)
    with_classifier.add(features, rows.posteriors, rows.ids, rows.labels)
    with_classifier.finish()
    return ImageDatabase.open(folder)


def _oracle(database: ImageDatabase, vectors: np.ndarray[Any, Any], k: int) -> tuple[Any, Any]:
    rows = database.features(database.row_numbers).numpy().astype(np.float64)
    found = []
    for vector in vectors.astype(np.float64):
        distances = np.sqrt(((rows - vector) ** 2).sum(1))
        order = np.lexsort((np.arange(len(rows)), distances))[:k]
        found.append((order, distances[order]))
    return np.array([f[0] for f in found]), np.array([f[1] for f in found])


@pytest.mark.parametrize("kind", ["plain", "far from the origin", "copies", "all equal"])
@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_neighbours_are_exact_where_float32_is_not(backend: str, kind: str, k: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(700, 24, generator=generator)
    if kind == "far from the origin":
        # Lengths of 20,000: products of float32 cannot tell neighbours at distances of about 5 apart.
        features = features + 5000
    elif kind == "copies":
        features = features[torch.randint(0, 20, (700,), generator=generator)]
    elif kind == "all equal":
        features = features[:1].repeat(700, 1)
    _database(tmp_path / "db", features)
    database = ImageDatabase.open(tmp_path / "db", backend=backend)
    vectors = (features[:40] + 0.1 * torch.randn(40, 24, generator=generator)).numpy()
    nearest = NearestRows(database, k)
    rows, distances = nearest(vectors)
    right_rows, right_distances = _oracle(database, vectors, k)
    assert np.array_equal(rows, right_rows)
    assert np.allclose(distances, right_distances, rtol=1e-12)
    for size in (1, 3, 19, 20, 40):
        part = nearest(vectors[:size])
        assert np.array_equal(part[0], rows[:size])
        assert np.array_equal(part[1], distances[:size])
    if kind == "far from the origin" and backend == "torch":
        plain = database.search(vectors, k)[1].numpy()
        assert not np.array_equal(plain, right_rows), "the index alone would have done: this case tests nothing"


@pytest.mark.parametrize("index", ["IVF16,Flat", "HNSW16", "SQ8"])
def test_other_indexes_give_their_own_rows_in_any_company(index: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(900, 16, generator=generator)
    database = _database(tmp_path / "db", features, index)
    vectors = torch.randn(50, 16, generator=generator).numpy()
    nearest = NearestRows(database, 8)
    rows, distances = nearest(vectors)
    assert np.array_equal(distances, np.sort(distances, axis=1))
    # The rows are those that the evaluated defence finds.
    offline = [database.search(vector[None], 8)[1].numpy()[0] for vector in vectors]
    assert [set(row) for row in rows.tolist()] == [set(row.tolist()) for row in offline]
    for i in range(0, 50, 7):
        part = nearest(vectors[i : i + 3])
        assert np.array_equal(part[0], rows[i : i + 3])
        assert np.array_equal(part[1], distances[i : i + 3])


# -- percentiles and abstention -------------------------------------------------------------------------------------

DISTANCES = st.lists(st.floats(0, 100) | st.integers(0, 5).map(float), min_size=2, max_size=60)


def _percentile(distances: Any) -> Percentile:
    return Percentile(tuple(sorted(map(float, distances))), "m", "c")


@given(distances=DISTANCES, rate=st.floats(0.01, 0.99))
def test_no_more_than_the_rate_is_rejected_whichever_image_is_the_new_one(distances: list[float], rate: float) -> None:
    # The theorem behind it, without chance: of n + 1 images in any order each is as likely to be the new one, and at
    # most the rate of them may lie beyond the threshold of the n others.
    rejected = 0
    for place, distance in enumerate(distances):
        try:
            threshold = _percentile(distances[:place] + distances[place + 1 :]).threshold(rate)
        except InputError:
            assert rate < 1 / len(distances) + 1e-9
            return
        rejected += distance > threshold
    assert rejected <= rate * len(distances) + 1e-6
    if len(set(distances)) == len(distances):
        assert rejected > rate * len(distances) - 1 - 1e-6


@given(distances=DISTANCES, distance=st.floats(0, 120))
def test_a_percentile_counts_what_is_nearer(distances: list[float], distance: float) -> None:
    assert _percentile(distances).of(distance) == pytest.approx(100 * np.mean(np.array(distances) < distance))


@pytest.mark.parametrize(
    ("n", "rate", "place"), [(99, 0.05, 95), (100, 0.05, 96), (19, 0.05, 19), (99, 0.01, 99), (9, 0.5, 5)]
)
def test_the_threshold_is_the_conformal_quantile(n: int, rate: float, place: int) -> None:
    assert _percentile(range(1, n + 1)).threshold(rate) == place


def test_a_rate_needs_enough_images() -> None:
    with pytest.raises(InputError, match="needs at least 19 calibration images, but there are 18"):
        _percentile(range(18)).threshold(0.05)
    for rate in (0, 1, -0.1, math.nan):
        with pytest.raises(InputError, match="above 0 and below 1"):
            _percentile(range(50)).threshold(rate)
    for wrong in ((), (2.0, 1.0), (math.nan,), (-1.0,)):
        with pytest.raises(InputError, match="ascending"):
            Percentile(wrong, "m", "c")


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_coverage_over_many_draws(rate: float) -> None:
    generator = np.random.default_rng(5)
    n, draws, each = 149, 400, 50
    rejected = 0
    for _ in range(draws):
        found = _percentile(generator.exponential(size=n))
        rejected += int((generator.exponential(size=each) > found.threshold(rate)).sum())
    # Images of one draw share a threshold: the share rejected of each follows a beta distribution.
    spread = math.sqrt(rate * (1 - rate) * (1 / n + 1 / each) / draws)
    # Exactly: floor((n + 1) rate) / (n + 1).
    exact = math.floor(round((n + 1) * rate, 9)) / (n + 1)
    assert abs(rejected / (draws * each) - exact) < 4 * spread


@pytest.fixture(scope="module")
def calibrated(folder: Path, held: ImageDataset) -> Path:
    """The folder of a calibrated database."""
    database = folder.parent / f"{folder.name}-calibrated" / "database"
    shutil.copytree(folder / "database", database)
    shutil.copytree(folder / "classifier", database.parent / "classifier")
    guard = Guard.open(database, k=5, weighting="cbw-d", device="cpu")
    guard.calibrate(held, specs=["digits"]).write(database / "guard.json")
    return database


def test_held_out_digits_are_rejected_at_the_rate(calibrated: Path) -> None:
    rate = 0.1
    guard = Guard.open(calibrated, k=5, weighting="cbw-d", device="cpu", reject_rate=rate)
    assert guard.calibration is not None
    assert len(guard.calibration) == HELD
    said = guard.predict(digits("test"), neighbors=0)
    spread = math.sqrt(rate * (1 - rate) * (1 / HELD + 1 / len(said)))
    assert abs(np.mean([one.abstained for one in said]) - rate) < 3.5 * spread
    percentiles = np.array([one.percentile for one in said])
    # The Kolmogorov-Smirnov distance from uniform; 1.95 is the point of 0.001.
    grid = np.arange(1, 100)
    gap = np.abs(np.array([(percentiles < g).mean() for g in grid]) - grid / 100).max()
    assert gap < 1.95 * math.sqrt(1 / HELD + 1 / len(said))
    for one in said:
        assert one.abstained == (one.distance > guard.threshold)
        assert one.to_json()["percentile"] == round(one.percentile, 2)


def test_noise_is_far_away(calibrated: Path) -> None:
    guard = Guard.open(calibrated, k=5, weighting="cbw-d", device="cpu", reject_rate=0.05)
    noise = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    said = guard.predict(noise)
    assert all(one.abstained and one.percentile == 100 for one in said)
    assert guard.predict(digits("train").batch([5])[0])[0].abstained is False


def test_a_stored_rate_is_used_and_options_beat_it(calibrated: Path, held: ImageDataset, tmp_path: Path) -> None:
    guard = Guard.open(calibrated, device="cpu", calibration=False)
    assert (guard.calibration, guard.reject_rate, guard.threshold) == (None, None, None)
    file = tmp_path / "other.json"
    guard.calibrate(held, reject_rate=0.2).write(file)
    assert guard.reject_rate == 0.2
    again = Guard.open(calibrated, device="cpu", calibration=file)
    assert (again.reject_rate, again.threshold) == (0.2, guard.threshold)
    assert Guard.open(calibrated, device="cpu", calibration=file, reject_rate=0.1).threshold > guard.threshold
    assert Percentile.read(file) == guard.calibration
    described = again.describe()
    assert described["calibrated"]
    assert described["calibration"]["n"] == HELD
    assert described["reject_rate"] == 0.2


def test_images_of_the_database_are_no_calibration(guard: Guard, held: ImageDataset, tmp_path: Path) -> None:
    rows = digits("train").subset([digits("train").index_of(guard.database.ids(np.array([7]))[0])])
    with pytest.raises(DataError, match="stand in the database"):
        guard.calibrate(concatenate([held, rows]))
    # Copies under other names.
    pictures, labels = digits("train").batch(range(300))
    write_hdf5(tmp_path / "copies.h5", pictures, labels.numpy(), [f"c/{i}" for i in range(300)], DIGITS)
    with pytest.raises(DataError, match="are copies of images in the database"):
        guard.calibrate(reopened(f"hdf5:{tmp_path / 'copies.h5'}"))
    with pytest.raises(DataError, match="no images"):
        guard.calibrate(held.subset([]))
    assert guard.calibration is None


def test_a_calibration_that_does_not_fit_is_refused(calibrated: Path, tmp_path: Path) -> None:
    database = tmp_path / "database"
    shutil.copytree(calibrated, database)
    shutil.copytree(calibrated.parent / "classifier", tmp_path / "classifier")
    rewrite(database / "manifest.json", lambda manifest: manifest.update(created="later"))
    with pytest.raises(DatabaseError, match="another state of the database"):
        Guard.open(database, device="cpu")
    assert Guard.open(database, device="cpu", calibration=False).calibration is None
    file = tmp_path / "guard.json"
    for text in ("{", "[]", "{}", '{"format": "nndefense-guard", "version": 2}', '{"format": "nndefense-guard"}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"guard\.json"):
            Guard.open(database, device="cpu", calibration=file)
    value = json.loads((calibrated / "guard.json").read_text())
    for name, wrong in (("distances", [3, 1]), ("distances", []), ("reject_rate", 7), ("samples", None), ("more", 1)):
        file.write_text(json.dumps({**value, name: wrong}))
        with pytest.raises(DataError, match="values have changed"):
            Guard.open(database, device="cpu", calibration=file)
        file.write_text(json.dumps(sealed({**value, name: wrong})))
        with pytest.raises(DataError, match="damaged"):
            Guard.open(database, device="cpu", calibration=file)
    (database / "guard.json").unlink()
    with pytest.raises(DatabaseError, match="missing, though the database was made with it"):
        Guard.open(database, device="cpu", calibration=False)
    rewrite(database / "manifest.json", lambda manifest: manifest.update(beside={}))
    with pytest.raises(InputError, match="no calibration to abstain by"):
        Guard.open(database, device="cpu", reject_rate=0.1)


# -- what it takes --------------------------------------------------------------------------------------------------


def _pixels(count: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return [(picture[0] * 255).round().to(torch.uint8).numpy() for picture in images("test", count)[0]]


def test_every_kind_of_image_gives_the_same(guard: Guard, tmp_path: Path) -> None:
    pixels = _pixels(6)
    paths = []
    for number, picture in enumerate(pixels):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    tensors = torch.stack([load_image(path, channels=1, size=8) for path in paths])
    expected = guard.predict(tensors)
    mixed = [str(paths[0]), paths[1], Image.open(paths[2]), pixels[3], pixels[4][:, :, None], tensors[5]]
    for given_images in (
        tensors.double(), list(tensors), paths, pixels, np.stack(pixels)[..., None], mixed, iter(mixed), tuple(paths),
        (np.dstack([picture] * 3) for picture in pixels), [Image.fromarray(picture) for picture in pixels],
    ):  # fmt: skip
        assert guard.predict(given_images) == expected
    assert guard.predict(paths[0]) == guard.predict(pixels[0]) == guard.predict(tensors[0]) == expected[:1]
    assert guard.predict([]) == []
    assert guard.predict(torch.zeros(0, 1, 8, 8)) == []


def test_pictures_are_turned_and_resized_as_data_sets_turn_theirs(guard: Guard, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (20, 31, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    opened = Image.open(tmp_path / "turned.jpg")
    assert guard.predict(opened) == guard.predict(tmp_path / "turned.jpg")
    assert guard.predict(opened) != guard.predict(picture)
    # The caller's image is as it was.
    assert opened.size == (31, 20)
    assert opened.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 9, 9), "1 x 9 x 9 was given, but the classifier takes 1 x 8 x 8"),
        (torch.zeros(2, 3, 8, 8), "3 x 8 x 8 was given"),
        (torch.zeros(8, 8), "image"),
        (torch.full((1, 8, 8), 2.0), "must lie in"),
        (torch.full((1, 8, 8), math.nan), "NaN"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "divide by 255"),
        (np.zeros((8, 8)), "float64, whose range is not known"),
        (np.zeros((3, 8, 3), np.uint8), "may be H x W x C or C x H x W"),
        (np.zeros((3, 8, 8), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 2), np.uint8), "is not H x W x C"),
        (np.zeros((0, 8), np.uint8), "0 x 8"),
        (np.zeros(8, np.uint8), "H x W"),
        (7, "int is no image"),
        (b"PNG", "bytes is no image"),
        ({"a": 1}, "dict is no image"),
        ([torch.zeros(1, 8, 8), 7], "image 1 is int"),
        ([[torch.zeros(1, 8, 8)]], "image 0 is list"),
        (None, "NoneType is no image"),
    ],
)
def test_what_is_not_clearly_an_image_is_refused(guard: Guard, wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        guard.predict(wrong)


def test_files_that_cannot_be_read_are_named(guard: Guard, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such\.png"):
        guard.predict([tmp_path / "no-such.png"])
    Image.fromarray(_pixels(1)[0]).resize((400, 400)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png"):
        guard.predict(tmp_path / "cut.png")
    with pytest.raises(DataError, match="image 1 cannot be read"):
        guard.predict([_pixels(1)[0], Image.open(tmp_path / "cut.png")])
    with pytest.raises(InputError, match="batch size"):
        guard.predict(_pixels(1), batch_size=0)


def test_a_stream_holds_one_batch_at_a_time(guard: Guard) -> None:
    picture, taken = images("test", 1)[0][0], 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield picture

    stream = guard.stream(endless(), batch_size=10)
    for number, said in enumerate(itertools.islice(stream, 95)):
        assert taken == 10 * (number // 10 + 1)
        assert said.class_name in DIGITS
    seen: list[str] = []
    guard.observe = lambda part, seconds: seen.append(part) if seconds >= 0 else None
    try:
        guard.predict(digits("test").subset(range(130)), batch_size=64)
    finally:
        guard.observe = None
    assert seen == ["forward", "search", "explain"] * 3


# -- opening --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A database that may be damaged, with its classifier beside it; recorded under a place that does not exist."""
    shutil.copytree(folder / "database", tmp_path / "copy" / "database")
    shutil.copytree(folder / "classifier", tmp_path / "copy" / "classifier")
    return tmp_path / "copy" / "database"


def test_the_classifier_is_found(copied: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Guard.open(copied, device="cpu").fingerprint == trained().fingerprint
    # As the manifest names it, relative to where the command runs.
    rewrite(copied / "manifest.json", lambda manifest: manifest["classifier"].update(source="classifier"))
    (copied.parent / "classifier").rename(copied.parent / "elsewhere")
    with pytest.raises(ModelError, match="not to be found: give --classifier"):
        Guard.open(copied, device="cpu")
    monkeypatch.chdir(folder)
    assert Guard.open(copied, device="cpu").fingerprint == trained().fingerprint
    assert Guard.open(copied, copied.parent / "elsewhere", device="cpu").k == 50
    with pytest.raises(InputError, match="k is 9999"):
        Guard.open(copied, trained(), k=9999, device="cpu")


def test_another_classifier_of_that_name_is_not_taken(copied: Path) -> None:
    shutil.rmtree(copied.parent / "classifier")
    save_classifier(untrained(5), copied.parent / "classifier")
    with pytest.raises(ModelError, match="not to be found"):
        Guard.open(copied, device="cpu")
    with pytest.raises(DatabaseError, match="made with another classifier"):
        Guard.open(copied, copied.parent / "classifier", device="cpu")


def test_code_that_a_manifest_names_is_not_run(copied: Path) -> None:
    ran = copied / "ran"
    (copied / "net.py").write_text(f"open({str(ran)!r}, 'w')\ndef net(): ...\n")
    source = f"python:{copied / 'net.py'}:net"
    rewrite(copied / "manifest.json", lambda manifest: manifest["classifier"].update(source=source))
    with pytest.raises(ModelError, match="runs only if you name it: give --classifier"):
        Guard.open(copied, device="cpu")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["index.faiss", "rows-00000.h5", "../classifier/model.safetensors"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_files_are_not_loaded(copied: Path, name: str, damage: str) -> None:
    path = copied / name
    if damage == "changed":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    else:
        path.unlink()
    with pytest.raises((DatabaseError, ModelError), match="sha256" if damage == "changed" else "missing") as error:
        Guard.open(copied, device="cpu")
    assert isinstance(error.value, NNDefenseError)
    assert path.name in str(error.value)


# -- pictures -------------------------------------------------------------------------------------------------------


def test_neighbours_have_pictures(guard: Guard) -> None:
    said = guard.predict(images("test", 1)[0])[0]
    for neighbor in said.neighbors:
        picture = guard.neighbor_image(neighbor.row)
        assert picture is not None
        assert (picture.shape, picture.dtype) == ((8, 8, 1), np.uint8)
        right, _ = digits("train").batch([digits("train").index_of(neighbor.id)])
        assert np.array_equal(picture[:, :, 0], (right[0, 0] * 255).round().to(torch.uint8).numpy())
        same = guard.neighbor_image(neighbor.id)
        assert same is not None
        assert np.array_equal(same, picture)
    for wrong in (-1, len(guard.database), "digits/99999", "../../etc/passwd"):
        with pytest.raises(InputError):
            guard.neighbor_image(wrong)


def test_pictures_are_never_those_of_other_images(copied: Path) -> None:
    kept = Manifest.read(copied)
    for data in ({"specs": ["digits:test"]}, {"specs": []}, {"fingerprint": "0" * 64}, {"specs": ["imagefolder:/no"]}):
        replace(kept, data={**kept.data, **data}).write(copied)
        guard = Guard.open(copied, device="cpu")
        assert guard.neighbor_image(0) is None
        assert guard.samples() == []
        assert guard.describe()["pictures"] is False


def test_samples_of_a_large_database_are_of_some_of_its_rows(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = pictures_module.varied
    monkeypatch.setattr(pictures_module, "_LOOKED_AT", 20)
    monkeypatch.setattr(
        pictures_module, "varied", lambda labels, count: looked.append(len(labels)) or real(labels, count)
    )
    assert len(guard.samples(5)) == 5
    assert 20 <= looked[0] < 40 < len(guard.database)


def test_samples_are_held_out_images_where_there_are_some(guard: Guard, calibrated: Path, held: ImageDataset) -> None:
    rows = guard.samples(4)
    assert [sample.held_out for sample in rows] == [False] * 4
    # One of each class before a second of any.
    for shown in (guard, Guard.open(calibrated, device="cpu")):
        for count in (3, 10, 15):
            found = [sample.class_name for sample in shown.samples(count)]
            assert len(found) == count
            assert len(set(found)) == min(count, 10)
    samples = Guard.open(calibrated, device="cpu").samples(6)
    assert len({sample.id for sample in samples}) == 6
    for sample in samples:
        assert sample.held_out
        place = held.index_of(sample.id)
        assert sample.class_name == held.classes[held.labels[place]]
        assert np.array_equal(sample.image[:, :, 0], (held.batch([place])[0][0, 0] * 255).round().numpy())


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_calibrates(copied: Path, tmp_path: Path) -> None:
    root = build()

    def run(*words: object) -> Any:
        return CliRunner().invoke(root, ["guard", "calibrate", *map(str, words), "--device", "cpu"])

    both = ["--database", copied, "--dataset", "digits:test"]
    done = run(*both, "--limit", 120, "--reject-rate", 0.1, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.output)
    assert (value["n"], value["reject_rate"]) == (120, 0.1)
    assert [row["reject_rate"] for row in value["thresholds"]] == [0.01, 0.05, 0.1]
    guard = Guard.open(copied, device="cpu")
    assert guard.threshold == value["thresholds"][-1]["distance"]
    assert guard.samples(3)[0].held_out
    again = run(*both)
    assert isinstance(again.exception, InputError)
    assert "--overwrite" in str(again.exception)
    assert "120 images" in run(*both, "--limit", 120, "--out", tmp_path / "g.json").output
    assert isinstance(run("--database", copied, "--dataset", "digits:train", "--overwrite").exception, DataError)
    # A refused calibration leaves the old one.
    assert Guard.open(copied, device="cpu").reject_rate == 0.1
    wrong = run(*both, "--overwrite", "--reject-rate", 1.5)
    assert isinstance(wrong.exception, InputError)
