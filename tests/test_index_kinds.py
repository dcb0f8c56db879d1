"""Kinds of indexes: recall against exact search, parts against the whole, files, the choice of `auto`, tuning, GPUs."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import nearest_by_loop, table, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nndefense.database import ImageDatabase
from nndefense.database.faiss_tools import check_device, list_finder
from nndefense.database.index import FaissIndex, TorchIndex
from nndefense.database.index_training import (
    EXACT_ROWS,
    check_factory,
    choose_index,
    index_bytes,
    sample_rows,
    train_index,
    training_rows,
)
from nndefense.database.merging import merge_parts
from nndefense.database.reranking import MOST_RERANKED, RerankedIndex
from nndefense.database.tuning import exact_neighbours, measure, recall_at, tune
from nndefense.errors import DatabaseError, InputError

faiss = pytest.importorskip("faiss")
D = 16
# Kind, and the least recall@10 that it must reach once it looks at half of the index.
KINDS = {
    "Flat": 1.0,
    "IVF16,Flat": 0.99,
    "IVF16_HNSW8,Flat": 0.97,
    "IVF16,SQ8": 0.95,
    "IVF16,SQfp16": 0.99,
    "IVF16,PQ8x4": 0.5,
    "OPQ8_16,IVF16,PQ8x4": 0.5,
    "PQ8x4": 0.5,
    "OPQ8,PQ8x4": 0.5,
    "SQ8": 0.95,
    "HNSW16": 0.95,
    "PCA12,IVF16,Flat": 0.6,
}
# Codes take long to learn; each form of them has one quick case.
LONG = ("OPQ8_16,IVF16,PQ8x4", "OPQ8,PQ8x4", "IVF16,PQ8x4")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) if kind in LONG else kind for kind in KINDS]
WHOLE = ("HNSW16", "IVF16,PQ8x4fs", "IVF16,PQ8x4,RFlat", "NSG8")


@functools.cache
def vectors(count: int = 3000, seed: int = 0) -> np.ndarray:
    """Clustered rows, 16-dimensional."""
    centres = np.random.default_rng(9).standard_normal((40, D), dtype=np.float32) * 2
    chance = np.random.default_rng(seed)
    noise = chance.standard_normal((count, D), dtype=np.float32)
    return (centres[chance.integers(0, 40, count)] + noise).astype(np.float32)


@functools.cache
def trained_bytes(factory: str) -> bytes:
    """A trained index without rows, once for all tests."""
    rows = vectors()
    # OPQ learns slowly, and codes of 4 bits need few rows.
    size = 400 if "PQ" in factory else training_rows(factory, D, len(rows))
    return faiss.serialize_index(train_index(factory, D, rows[sample_rows(len(rows), size)]).index).tobytes()


def trained_index(factory: str) -> FaissIndex:
    return FaissIndex(faiss.deserialize_index(np.frombuffer(trained_bytes(factory), dtype=np.uint8)))


def half(index: FaissIndex) -> FaissIndex:
    """Set to look at half of the index."""
    index.set_search({name: {"nprobe": 8, "efSearch": 80}[name] for name in index.parameters})
    return index


def in_parts(factory: str, rows: np.ndarray, cuts: list[int], folder: Path) -> tuple[list[Path], FaissIndex]:
    """Files of parts, cut at these rows, and an index to which the same pieces were added."""
    whole, paths = trained_index(factory), []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        part = trained_index(factory)
        part.add(rows[first:last], first=first)
        paths.append(folder / f"part-{number}")
        part.write(paths[-1])
        whole.add(rows[first:last])
    return paths, whole


@pytest.mark.parametrize("factory", SLOW)
def test_each_kind_has_its_recall_and_numbers_rows_from_0(factory):
    rows, asked = vectors(), vectors(100, seed=1)
    index = half(trained_index(factory))
    index.add(rows[:1000])
    index.add(rows[1000:])
    assert index.rows == 3000
    assert index.dimension == D
    distances, found = index.search(asked, 10)
    assert recall_at(found, nearest_by_loop(asked, rows, 10)[1]) >= KINDS[factory]
    assert distances.dtype == np.float32
    assert found.dtype == np.int64
    assert (np.diff(distances, axis=1) >= 0).all()
    assert np.array_equal(index.held_rows(), np.arange(3000))


@pytest.mark.parametrize("factory", [kind for kind in KINDS if kind not in WHOLE])
def test_merged_parts_are_the_whole_to_the_byte_and_open_mapped(factory, tmp_path):
    rows, asked = vectors(), vectors(50, seed=1)
    paths, whole = in_parts(factory, rows, [700, 700, 2100], tmp_path)
    assert merge_parts(paths, tmp_path / "index", memory=1 << 30) == [tmp_path / "index"]
    whole.write(tmp_path / "whole")
    assert (tmp_path / "index").read_bytes() == (tmp_path / "whole").read_bytes()
    expected = half(whole).search(asked, 10)
    for mapped in (False, True):
        index = half(FaissIndex.read(tmp_path / "index", mapped=mapped, dimension=D, rows=3000))
        for one, other in zip(index.search(asked, 10), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.array_equal(index.held_rows(), np.arange(3000))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    factory=st.sampled_from(["Flat", "IVF16,Flat", "IVF16,SQ8", "PQ8x4", "OPQ8_16,IVF16,PQ8x4"]),
    count=st.integers(1, 400), cuts=st.lists(st.integers(0, 400), max_size=4), k=st.integers(1, 20),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_parts_of_any_size_are_the_whole(factory, count, cuts, k, seed, tmp_path):
    rows = np.random.default_rng(seed).permutation(vectors())[:count]
    paths, whole = in_parts(factory, rows, sorted(min(cut, count) for cut in cuts), tmp_path)
    merge_parts(paths, tmp_path / "index")
    index = FaissIndex.read(tmp_path / "index", mapped=True, dimension=D, rows=count)
    for one, other in zip(half(index).search(rows[:7], k), half(whole).search(rows[:7], k), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.array_equal(index.held_rows(), np.arange(count))


@pytest.mark.parametrize("factory", WHOLE)
def test_kinds_that_cannot_be_merged_say_so_before_rows_are_added(factory, tmp_path):
    assert not check_factory(factory, D)
    index = train_index(factory, D, vectors())
    with pytest.raises(InputError, match="cannot be made in parts"):
        index.add(vectors()[:10], first=100)
    index.add(vectors()[:500])
    index.write(tmp_path / "part")
    with pytest.raises(InputError, match="cannot be merged"):
        merge_parts([tmp_path / "part"], tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_merging_refuses_strangers_and_what_does_not_fit(tmp_path):
    paths, _ = in_parts("IVF16,Flat", vectors()[:300], [100], tmp_path)
    other = train_index("IVF16,Flat", D, vectors(seed=3), seed=1)
    other.add(vectors()[:10], first=300)
    other.write(tmp_path / "other")
    with pytest.raises(DatabaseError, match="another trained index"):
        merge_parts([*paths, tmp_path / "other"], tmp_path / "index")
    with pytest.raises(InputError, match="no index parts"):
        merge_parts([], tmp_path / "index")
    (tmp_path / "torn").write_bytes(paths[0].read_bytes()[:-100])
    with pytest.raises(DatabaseError, match="not an index"):
        merge_parts([tmp_path / "torn"], tmp_path / "index")
    # Inverted lists and plain vectors need no memory; codes do.
    merge_parts(paths, tmp_path / "lists", memory=1)
    codes, _ = in_parts("PQ8x4", vectors()[:300], [100], tmp_path)
    with pytest.raises(InputError, match="bytes of memory"):
        merge_parts(codes, tmp_path / "index", memory=1000)
    assert not (tmp_path / "index").exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_mapped_index_is_not_read_into_memory(tmp_path):
    rows = np.random.default_rng(0).standard_normal((50_000, 128), dtype=np.float32)
    index = train_index("IVF64,Flat", 128, rows[:640])
    index.write(tmp_path / "empty")
    index.add(rows)
    index.write(tmp_path / "index")
    code = (
        "import sys; from pathlib import Path; from nndefense.database.index import FaissIndex\n"
        "def held():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        # What FAISS loads when it is first used counts for neither.
        "[FaissIndex.read(Path(sys.argv[2]), mapped=mapped) for mapped in (True, False)]\n"
        "before = held(); mapped = FaissIndex.read(Path(sys.argv[1]), mapped=True)\n"
        "between = held(); read = FaissIndex.read(Path(sys.argv[1]))\n"
        "print(between - before, held() - between, mapped.rows, read.rows)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "index"), str(tmp_path / "empty")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mapped, read, *held = (int(word) for word in done.stdout.split())
    assert held == [50_000, 50_000]
    assert mapped < 5_000 < 15_000 < read


def test_a_file_in_another_ones_place_is_found(tmp_path):
    _, whole = in_parts("IVF16,Flat", vectors()[:300], [], tmp_path)
    whole.write(tmp_path / "index")
    with pytest.raises(DatabaseError, match="300 rows, but 301"):
        FaissIndex.read(tmp_path / "index", rows=301)
    with pytest.raises(DatabaseError, match="16 dimensions, but 17"):
        FaissIndex.read(tmp_path / "index", dimension=17)
    faiss.write_index(faiss.IndexFlatIP(D), str(tmp_path / "inner"))
    with pytest.raises(DatabaseError, match="metric"):
        FaissIndex.read(tmp_path / "inner")
    for mapped in (False, True):
        (tmp_path / "text").write_text("no index at all, but long enough for a header of one")
        with pytest.raises(DatabaseError, match="not an index"):
            FaissIndex.read(tmp_path / "text", mapped=mapped)


@pytest.mark.parametrize("factory", ["IVF16Flat", "Flatt", "", "IVF16,PQ5", "IVF0,Flat", "HNSW32,Flt", "flat"])
def test_misspelt_factories_are_one_line(factory):
    for call in (lambda: check_factory(factory, D), lambda: train_index(factory, D, vectors())):
        with pytest.raises(InputError, match="FAISS cannot build") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert ".cpp" not in str(caught.value)


def test_training_needs_rows_of_the_right_length_and_enough_of_them():
    with pytest.raises(InputError, match="FAISS cannot build"):
        train_index("IVF16,Flat", D, vectors()[:5])
    with pytest.raises(InputError, match="n x 16"):
        train_index("IVF16,Flat", D, vectors()[:, :5])
    with pytest.raises(InputError, match="M x 16"):
        trained_index("Flat").add(vectors()[:, :5])
    assert training_rows("Flat", D, 1000) == training_rows("HNSW16", D, 1000) == 0
    assert training_rows("IVF16,Flat", D, 10_000) == 800
    assert training_rows("IVF16,Flat", D, 100) == 100
    chosen = sample_rows(1000, 50, 3)
    assert np.array_equal(chosen, sample_rows(1000, 50, 3))
    assert not np.array_equal(chosen, sample_rows(1000, 50, 4))
    assert len(np.unique(chosen)) == 50 == (np.diff(chosen) > 0).sum() + 1


@pytest.mark.parametrize(
    "factory", ["IVF16,Flat", "HNSW16", "IVF16_HNSW8,SQ8", pytest.param("PQ8x4", marks=pytest.mark.slow)]
)
def test_the_same_rows_give_the_same_bytes_whatever_the_threads(factory):
    made = []
    for threads in (1, 3):
        faiss.omp_set_num_threads(threads)
        index = train_index(factory, D, vectors()[:1000], seed=5)
        index.add(vectors())
        made.append(faiss.serialize_index(index.index).tobytes())
        assert faiss.omp_get_max_threads() == threads
    faiss.omp_set_num_threads(1)
    assert made[0] == made[1]
    other = train_index(factory, D, vectors()[:1000], seed=6)
    if "nprobe" in other.parameters:
        other.add(vectors())
        assert faiss.serialize_index(other.index).tobytes() != made[0]


def test_set_search_takes_what_the_kind_has():
    index = trained_index("IVF16_HNSW8,Flat")
    index.set_search({"nprobe": 12})
    assert index.parameters == {"nprobe": 12}
    assert faiss.downcast_index(index.inner.quantizer).hnsw.efSearch == 24
    index.set_search({})
    assert index.parameters == {"nprobe": 12}
    graph = trained_index("HNSW16")
    graph.set_search({"efSearch": 33})
    assert graph.parameters == {"efSearch": 33}
    for wrong, text in (({"efSearch": 3}, "no 'efSearch'"), ({"nprobe": 17}, "1 to 16"), ({"nprobe": 0}, "1 to 16")):
        with pytest.raises(InputError, match=text):
            index.set_search(wrong)
    with pytest.raises(InputError, match="none to set"):
        trained_index("Flat").set_search({"nprobe": 1})


@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW8", "Flat"])
def test_tuning_finds_the_smallest_value_that_reaches_the_recall(factory):
    rows, asked = vectors(), vectors(100, seed=1)
    truth = exact_neighbours(asked, [rows[:1111], rows[1111:]], 10)
    assert np.array_equal(truth, nearest_by_loop(asked, rows, 10)[1])
    index = train_index(factory, D, rows)
    index.add(rows)
    tuned = tune(index, asked, truth, recall=0.97, seconds=0.01)
    assert tuned.reached
    assert tuned.recall >= 0.97
    assert tuned.recall == recall_at(index.search(asked, 10)[1], truth)
    assert tuned.queries_per_second > 0
    assert index.parameters == tuned.search
    assert tuned.k == 10
    if factory == "IVF64,Flat":
        index.set_search({"nprobe": tuned.value - 1})
        assert recall_at(index.search(asked, 10)[1], truth) < 0.97


def test_tuning_says_when_a_recall_cannot_be_reached_and_never_leaves_rows_missing():
    rows, asked = vectors(), vectors(30, seed=1)
    truth = exact_neighbours(asked, [rows], 10)
    coarse = trained_index("PQ8x4")
    coarse.add(rows)
    assert not tune(coarse, asked, truth, recall=0.999, seconds=0).reached
    lists = trained_index("IVF16,Flat")
    lists.add(rows[:40])
    few = exact_neighbours(asked, [rows[:40]], 20)
    # A recall that a list or two would reach, but with fewer than 20 rows.
    tuned = tune(lists, asked, few, recall=0.05, seconds=0)
    assert (lists.search(asked, 20)[1] >= 0).all()
    assert tuned.reached
    for recall in (0, 1.1):
        with pytest.raises(InputError, match="recall is"):
            tune(lists, asked, few, recall=recall)
    with pytest.raises(InputError, match="tuning needs"):
        tune(lists, asked[:3], few)
    with pytest.raises(InputError, match="k is 41"):
        exact_neighbours(asked, [rows[:40]], 41)


def test_recall_counts_rows_in_any_order_and_none_as_missed():
    truth = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall_at(truth[:, ::-1], truth) == 1
    assert recall_at(np.array([[1, 2, -1, -1], [9, 9, 9, 9]]), truth) == 0.25
    with pytest.raises(InputError):
        recall_at(truth[:, :2], truth)


def repeated(count: int, times: int, offset: float = 0, seed: int = 0) -> np.ndarray:
    """Vectors, each so many times, in mixed order."""
    chance = np.random.default_rng(seed)
    return chance.permutation(np.repeat(chance.normal(offset, 1, (count, D)), times, axis=0)).astype(np.float32)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("offset", [0, 300])
def test_an_exact_search_over_repeated_rows_has_recall_1(backend: str, offset: float):
    rows = repeated(40, 30, offset)
    asked = np.concatenate([rows[:25], repeated(25, 1, offset, seed=1)])
    search = trained_index("Flat") if backend == "faiss" else TorchIndex(lambda a, b: rows[a:b], len(rows))
    if isinstance(search, FaissIndex):
        search.add(rows)
    # Of 30 equals the exact search lists others than the truth, whose rows came in pieces.
    truth = (exact_neighbours(asked, [rows[500:], rows[:500]], 20) + 500) % len(rows)
    found = search.search(asked, 20)[1]
    assert recall_at(found, truth) < 0.9
    assert recall_at(found, truth, asked, lambda numbers: rows[numbers]) == 1


def test_rows_farther_than_the_kth_are_no_hits_however_often_they_stand_there():
    rows = np.repeat(np.float32([[0, 0], [1, 0], [2, 0]]), 4, axis=0)
    asked = np.float32([[0, 0]])

    def recall(found: list[int], truth: list[int]) -> float:
        return recall_at(np.array([found]), np.array([truth]), asked, lambda numbers: rows[numbers])

    assert recall([3, 2], [0, 1]) == 1
    assert recall([4, 3], [0, 1]) == 0.5
    assert recall([4, 8], [0, 1]) == 0
    assert recall([-1, 3], [0, 1]) == 0.5
    # The last of the truth is one of the second group: all of that group are as good, but none of the third.
    assert recall([0, 1, 2, 3, 7], [0, 1, 2, 3, 4]) == 1
    assert recall([0, 1, 2, 3, 8], [0, 1, 2, 3, 4]) == 0.8


def test_inverted_lists_over_repeated_rows_are_not_all_searched_for_that():
    rows = repeated(64, 40)
    index = train_index("IVF16,Flat", D, rows)
    index.add(rows)
    own = np.arange(0, len(rows), 9)
    # Any 10 of the 39 equals are the nearest, whichever the exact search happens to list.
    truth = np.stack([np.flatnonzero((rows == rows[row]).all(1))[-10:] for row in own])
    tuned = tune(index, rows[own], truth, rows=lambda numbers: rows[numbers], own=own, recall=1.0, seconds=0)
    assert tuned.reached
    assert (tuned.value, tuned.recall) == (1, 1.0)
    assert not tune(index, rows[own], truth, own=own, recall=1.0, seconds=0).reached


def test_where_no_effort_reaches_a_recall_the_smallest_that_is_as_good_as_the_best_is_taken():
    rows, asked = vectors(), vectors(50, seed=1)
    truth = exact_neighbours(asked, [rows], 10)
    index = train_index("IVF64,SQ4", D, rows)
    index.add(rows)
    tuned = tune(index, asked, truth, recall=0.999, seconds=0)
    assert not tuned.reached
    assert tuned.value is not None
    found = {}
    for lists in range(1, 65):
        index.set_search({"nprobe": lists})
        found[lists] = recall_at(index.search(asked, 10)[1], truth)
    best = max(found.values())
    assert found[tuned.value] == tuned.recall
    assert tuned.recall >= best - 0.003
    assert tuned.value < 40
    assert found[tuned.value - 1] < best - 0.001 + 1e-9


# Products, products of 4 bits that are scanned at once, 4 bits a number, a bit a number, and fewer numbers.
CODED = ("PQ8x4", "IVF16,PQ8x4fs", "IVF16,SQ4", "IVF16,RaBitQ", "PCA8,IVF16,Flat")


@pytest.mark.parametrize("factory", CODED)
def test_codes_whose_candidates_are_read_find_the_nearest_at_their_true_distances(factory: str):
    rows, asked = vectors(), vectors(60, seed=1)
    true, truth = nearest_by_loop(asked, rows, 10)
    index = trained_index(factory)
    index.add(rows)
    assert index.coded
    alone = tune(index, asked, truth, recall=0.98, seconds=0)
    assert not alone.reached
    reranked = RerankedIndex(index.index, lambda numbers: rows[numbers])
    tuned = tune(reranked, asked, truth, recall=0.98, seconds=0)
    assert tuned.reached
    assert 1 < tuned.rerank <= MOST_RERANKED
    assert tuned.search["rerank"] == tuned.rerank == reranked.parameters["rerank"]
    distances, found = reranked.search(asked, 10)
    assert recall_at(found, truth) == tuned.recall >= 0.98
    assert (np.diff(distances, axis=1) >= 0).all()
    same = found == truth
    assert np.allclose(distances[same], true[same], rtol=1e-6)
    # Half of the candidates would not do.
    reranked.set_search({"rerank": tuned.rerank // 2})
    assert recall_at(reranked.search(asked, 10)[1], truth) < 0.98


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW16", "IVF16_HNSW8,Flat"])
def test_whole_vectors_are_no_codes(factory: str):
    assert not trained_index(factory).coded


def test_candidates_that_are_missing_stay_so_and_no_more_are_asked_for_than_there_are():
    rows = vectors()[:40]
    index = trained_index("IVF16,SQ4")
    index.add(rows)
    index.set_search({"nprobe": 1})
    reranked = RerankedIndex(index.index, lambda numbers: rows[numbers])
    reranked.set_search({"rerank": 8})
    distances, found = reranked.search(vectors(30, seed=1), 20)
    assert (found < 0).any()
    assert np.isinf(distances[found < 0]).all()
    for query in found:
        assert len(set(query[query >= 0])) == (query >= 0).sum()
    for wrong in (0, MOST_RERANKED + 1, 1.5):
        with pytest.raises(InputError, match="rerank is"):
            reranked.set_search({"rerank": wrong})


def test_what_was_measured_is_how_a_database_is_searched(tmp_path: Path):
    data = table(600)
    write(tmp_path, data, index="IVF4,SQ4")
    search = measure(tmp_path, k=10, recall=0.99)
    assert search["reached"]
    assert search["setting"]["rerank"] > 1
    database = ImageDatabase.open(tmp_path)
    queries, rows = data.features[:50].numpy() + 0.01, data.features.numpy()
    distances, found = database.search(queries, 10)
    true, truth = nearest_by_loop(queries, rows, 10)
    assert recall_at(found.numpy(), truth) > 0.95
    same = found.numpy() == truth
    assert np.allclose(distances.numpy()[same], true[same], rtol=1e-5)
    assert not database.exact


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_a_database_of_repeated_pictures_is_measured_by_distances(factory: str, tmp_path: Path):
    data = table(300)
    data.features[::2] = data.features[0]
    write(tmp_path, data, index=factory)
    search = measure(tmp_path, k=20, recall=0.9)
    assert search["reached"]
    assert search["recall"] >= (0.9 if factory != "Flat" else 1)
    assert search["setting"].get("nprobe", 1) < 4


@pytest.mark.parametrize(
    ("rows", "dimension", "memory", "gpu", "factory"),
    [
        (1, 8, None, False, "Flat"),
        (EXACT_ROWS, 256, None, False, "Flat"),
        (EXACT_ROWS + 1, 256, None, False, "IVF1024,Flat"),
        (10**6, 256, None, False, "IVF4096,Flat"),
        (10**6, 256, None, True, "IVF16384,Flat"),
        (10**6, 256, 600 * 10**6, False, "IVF4096,SQfp16"),
        (10**6, 256, 300 * 10**6, False, "IVF4096,SQ8"),
        (10**6, 256, 80 * 10**6, False, "OPQ64_256,IVF4096,PQ64"),
        (10**8, 256, 64 * 10**9, False, "IVF32768_HNSW32,SQfp16"),
        (10**9, 256, 10**6, False, "OPQ8_256,IVF131072_HNSW32,PQ8"),
        (10**6, 7, 1000, False, "IVF4096,SQ8"),
        (1000, 256, 10**6, False, "IVF16,SQfp16"),
    ],
)
def test_auto_chooses_and_says_why(rows, dimension, memory, gpu, factory):
    choice = choose_index(rows, dimension, memory=memory, gpu=gpu)
    assert choice.factory == factory
    assert f"{rows:,} rows" in choice.why
    assert "\n" not in choice.why
    check_factory(choice.factory, dimension)
    assert ("no kind fits" in choice.why) == (memory is not None and choice.bytes > memory)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 10**10), dimension=st.integers(1, 512), memory=st.none() | st.integers(1, 10**12))
def test_whatever_auto_chooses_can_be_made(rows, dimension, memory):
    choice = choose_index(rows, dimension, memory=memory)
    assert 0 <= training_rows(choice.factory, dimension, rows) <= rows


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,SQ8", "PQ8x4", "HNSW16", "IVF16_HNSW8,Flat"])
def test_the_size_foretold_is_about_the_size(factory, tmp_path):
    index = trained_index(factory)
    index.add(vectors())
    index.write(tmp_path / "index")
    assert 0.7 < index_bytes(factory, 3000, D) / (tmp_path / "index").stat().st_size < 1.3


@pytest.mark.parametrize(("rows", "dimension", "memory"), [(0, 8, None), (8, 0, None), (8, 8, 0)])
def test_auto_refuses_nothing_to_choose_for(rows, dimension, memory):
    with pytest.raises(InputError, match="at least 1"):
        choose_index(rows, dimension, memory=memory)


# -- GPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "all-gpus"])
def test_without_a_gpu_every_way_to_one_is_one_line(device, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    index = trained_index("IVF16,Flat")
    for call in (
        lambda: check_device(device),
        lambda: train_index("IVF16,Flat", D, vectors(), device=device),
        lambda: index.add(vectors(), device=device),
        lambda: index.to_device(device),
    ):
        with pytest.raises(InputError, match="no GPU here") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_devices_have_names():
    assert check_device("cpu") == []
    for wrong in ("gpu", "cuda:x", "cuda:-1", "CUDA"):
        with pytest.raises(InputError, match="no device"):
            check_device(wrong)
    index = trained_index("Flat")
    assert not index.on_gpu
    assert index.to_cpu() is index
    assert index.to_device("cpu").index is index.index


@pytest.mark.parametrize("factory", ["IVF16,Flat", "OPQ8_16,IVF16,PQ8x4", "IVF16_HNSW8,SQ8"])
def test_rows_with_lists_chosen_elsewhere_are_added_as_faiss_would(factory):
    # What a GPU does is to choose lists; here an exact search on the CPU takes its place.
    rows = vectors()[:800]
    one, other = trained_index(factory), trained_index(factory)
    if "HNSW" in factory:
        # The graph looks at all centres, and so chooses as an exact search does.
        faiss.downcast_index(one.inner.quantizer).hnsw.efSearch = 64
        faiss.downcast_index(other.inner.quantizer).hnsw.efSearch = 64
    one.add(rows, first=100)
    find = list_finder(other.inner, "cpu")
    other._add_assigned(rows, np.arange(100, 900), find)
    assert faiss.serialize_index(one.index).tobytes() == faiss.serialize_index(other.index).tobytes()
    assert other.rows == 800


@pytest.fixture
def gpu() -> None:
    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        pytest.skip("there is no GPU that FAISS can use")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "all-gpus"])
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,SQ8", "OPQ8_16,IVF16,PQ8"])
@pytest.mark.usefixtures("gpu")
def test_gpu_trains_adds_and_searches_and_opens_on_the_cpu(factory, device, tmp_path):
    rows, asked = vectors(), vectors(100, seed=1)
    index = train_index(factory, D, rows, device=device)
    index.add(rows, device=device)
    index.write(tmp_path / "index")
    opened = half(FaissIndex.read(tmp_path / "index", mapped=True, rows=3000))
    assert np.array_equal(opened.held_rows(), np.arange(3000))
    here = opened.search(asked, 10)[1]
    for float16 in (False, True):
        there = half(FaissIndex.read(tmp_path / "index")).to_device(device, float16=float16)
        assert recall_at(there.search(asked, 10)[1], here) > 0.97
    with pytest.raises(InputError, match="2,048"):
        there.search(asked, 2049)
    there.write(tmp_path / "back")
    assert FaissIndex.read(tmp_path / "back").rows == 3000


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_graph_stays_on_the_cpu():
    with pytest.raises(InputError, match="cannot be put on a GPU"):
        trained_index("HNSW16").to_device("cuda")
