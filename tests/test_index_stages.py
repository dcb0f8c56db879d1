"""Builds in stages: what each leaves behind, what is rejected, and how an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from dirty import catalogue
from helpers import DIGITS, digits, table, trained, write
from PIL import Image

from index_build import add as adding
from index_build import build_database, build_databases, stages
from index_build.job import BuildJob
from nndefense import files
from nndefense.database import ImageDatabase, Manifest, neighbor_weights, repeats, rows
from nndefense.database.repeats import id_keys, repeated_ids
from nndefense.datasets import ImageDataset, open_dataset, pixel_digests
from nndefense.datasets.arrays import ArrayDataset
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.features import FeatureSpec
from nndefense.files import sha256_of
from nndefense.locks import LOCK, locked
from nndefense.models import build_classifier

FEATURE = FeatureSpec("block2", pca=8)
SMALL: dict[str, Any] = {"shard_rows": 24, "batch_size": 10, "pca_sample": 40, "progress": False}
LISTS = "IVF4,Flat"


def pictures(count: int = 100, copies: int = 0) -> ArrayDataset:
    """Digits; the last ``copies`` have the pixels of the first."""
    source = digits("train")
    chosen = np.r_[np.arange(count - copies), np.arange(copies)]
    images, labels = source.batch(chosen)
    names = [f"{'ü' if i % 2 else 'x'}/{i}" for i in range(count)]
    return ArrayDataset(images.numpy(), labels.numpy(), name="pictures", classes=DIGITS, ids=names)


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and waiting for the disk would take most of the time."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the index that take two shards."""
    monkeypatch.setattr(adding, "PART_ROWS", 30)


def build(out: Path, dataset: ImageDataset | None = None, **options: Any) -> ImageDatabase:
    return build_database(dataset or pictures(), trained(), FEATURE, out, **(SMALL | options))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def checksums(folder: Path) -> dict[str, str]:
    """What the manifest says of its files, each compared with the file."""
    manifest = Manifest.read(folder)
    manifest.check_files(folder, checksums=True)
    return {name: entry.sha256 for name, entry in manifest.files.items()}


# -- stages ------------------------------------------------------------------------------------------------------------


def test_every_stage_leaves_what_it_says(tmp_path: Path, small_parts: None) -> None:
    whole = build(tmp_path / "whole", index=LISTS)
    out = tmp_path / "staged"
    source, options = pictures(), {name: SMALL[name] for name in ("shard_rows", "batch_size", "pca_sample")}
    again = {"index": LISTS, "progress": False, **options}

    found = stages.extract(source, trained(), FEATURE, out, **again)
    assert (found.rows, found.rejected) == (100, {})
    assert {f"rows-0000{i}.h5" for i in range(5)} | {"rows.h5"} == set(found.files)
    assert {name: sha256_of(out / name) for name in found.files} == {n: e.sha256 for n, e in found.files.items()}
    assert [found.files[f"rows-0000{i}.h5"].rows for i in range(5)] == [24, 24, 24, 24, 4]
    with pytest.raises(DatabaseError, match=r"no finished database.*continue"):
        ImageDatabase.open(out)
    # The same again changes nothing and computes nothing.
    held = {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*.h5")}
    passes: list[int] = []
    handle = trained().register_forward_pre_hook(lambda *_: passes.append(1))
    assert stages.extract(source, trained(), FEATURE, out, **again) == found
    handle.remove()
    assert not passes
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*.h5")} == held

    with pytest.raises(DatabaseError, match=r"not fitted.*index fit"):
        stages.add(out)
    fitted = stages.fit(out)
    assert (fitted.factory, fitted.mergeable) == (LISTS, True)
    assert stages.fit(out) == fitted
    with pytest.raises(DatabaseError, match=r"part-00000.faiss is missing.*index add"):
        stages.merge(out)
    assert stages.add(out, workers=2, progress=False) == 3
    assert {path.name for path in out.glob("index-part-*.faiss")} == {f"index-part-0000{i}.faiss" for i in range(3)}
    manifest = stages.merge(out)
    assert stages.merge(out) == manifest
    # From the manifest on it is a database, and every count in it is that of the contents.
    database = ImageDatabase.open(out)
    assert database.verify() == {"rows": 100, "files": len(manifest.files), "index_rows": 100}
    assert manifest.rows == sum(entry.rows for entry in manifest.files.values()) == len(database)
    assert "search" not in manifest.index
    assert manifest.build["images"] == 100

    verified = stages.verify(out)
    assert verified["rows"] == 100
    assert verified["search"]["recall"] >= 0.95
    assert Manifest.read(out).index["search"] == verified["search"]
    assert names_in(out) == names_in(tmp_path / "whole")
    assert names_in(out) == {"manifest.json", *manifest.files}
    assert checksums(out) == checksums(tmp_path / "whole")
    assert Manifest.read(out).fingerprint == whole.fingerprint


def test_stages_out_of_order_and_in_strange_places(tmp_path: Path) -> None:
    for stage in (stages.fit, stages.add, stages.merge):
        with pytest.raises(DatabaseError, match=r"no unfinished build \(job.json is missing\): begin one with"):
            stage(tmp_path / "nowhere")
    with pytest.raises(DatabaseError, match="no database at"):
        stages.verify(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    out = tmp_path / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("index_build.runner.extract", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(out)
    for stage in (stages.fit, stages.add, stages.merge):
        with pytest.raises(DatabaseError, match=r"rows of .* are not complete: run 'nndefense index extract'"):
            stage(out)
    with pytest.raises(DatabaseError, match="no finished database"):
        stages.verify(out)
    assert len(build(out)) == 100
    with pytest.raises(DatabaseError, match="no unfinished build"):
        stages.fit(out)
    with pytest.raises(InputError, match="at least 1 worker"):
        adding.add(out, workers=0)


def test_another_index_after_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "x"
    stages.extract(pictures(), trained(), FEATURE, out, **SMALL)
    assert stages.fit(out).factory == "Flat"
    assert stages.fit(out, index=LISTS).factory == LISTS
    assert stages.add(out, progress=False) == 1
    stages.merge(out)
    with pytest.raises(DatabaseError, match="is merged"):
        stages.fit(out, index="Flat")
    stages.verify(out)
    assert checksums(out) == checksums(build(tmp_path / "y", index=LISTS).path)


def test_an_index_whose_parts_cannot_be_merged(tmp_path: Path, small_parts: None) -> None:
    database = build(tmp_path / "x", index="HNSW8")
    assert not list(database.path.glob("index-*"))
    assert database.verify()["index_rows"] == 100
    assert database.manifest.index["search"]["recall"] > 0.9


def test_auto_says_why(tmp_path: Path) -> None:
    manifest = build(tmp_path / "x", index="auto").manifest
    assert manifest.index["factory"] != "auto"
    assert manifest.index["why"]
    assert "\n" not in manifest.index["why"]
    assert manifest.build["index"] == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size of at least 1"),
        ({"storage": "float8"}, "storage is 'float8', but must be one of float32, float16"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"posteriors": "top"}, "must be auto, dense or top-M"),
        ({"posteriors": "top-0"}, "must be auto, dense or top-M"),
        ({"shard_rows": 0}, "at least 1 image"),
        ({"memory": 5}, "at least 1 MiB"),
        ({"recall": 0.0}, "recall must be above 0"),
        ({"k": 0}, "K at least 1"),
        ({"max_rejected": "many"}, "must be a number or a share like 5%"),
        ({"max_rejected": -1}, "must be a number or a share like 5%"),
        ({"max_rejected": "101%"}, "must be a number or a share like 5%"),
        ({"exclude_eps": 1.0}, "no images to exclude"),
        ({"index_device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_settings_that_make_no_build(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_a_misspelt_setting_and_a_folder_twice(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no argument 'bach_size'"):
        build_database(pictures(), trained(), FEATURE, tmp_path / "x", bach_size=3)
    here = Path(os.path.relpath(tmp_path / "x"))
    with pytest.raises(InputError, match="same folder"):
        build_databases(pictures(), trained(), {tmp_path / "x": FEATURE, here: FEATURE}, **SMALL)


# -- what rows hold ----------------------------------------------------------------------------------------------------


def test_half_precision_and_the_largest_posteriors(tmp_path: Path) -> None:
    full = build(tmp_path / "full")
    small = build(tmp_path / "small", storage="float16", posteriors="top-3")
    everything = np.arange(100)
    assert small.manifest.storage == {"features": "float16", "posteriors": "top-3"}
    assert full.manifest.storage == {"features": "float32", "posteriors": "dense"}
    with h5py.File(small.path / "rows-00000.h5") as file:
        assert file["features"].dtype == np.float16
        assert file["top_classes"].shape == file["top_values"].shape == (24, 3)
        assert "posteriors" not in file
    assert small.features(everything).dtype == torch.float32
    assert torch.equal(small.features(everything), full.features(everything).half().float())
    # The three largest are kept as they are, and the rest is spread evenly.
    dense, read = full.posteriors(everything), small.posteriors(everything)
    top = dense.topk(3, dim=1)
    assert torch.equal(read.gather(1, top.indices), top.values)
    assert torch.allclose(read.sum(1), torch.ones(100))
    rest = read.scatter(1, top.indices, torch.nan)
    assert torch.allclose(rest.nan_to_num().sum(1) / 7, rest.nan_to_num().amax(1), atol=1e-7)
    # Weights come from the whole posteriors.
    for weighting in ("cbw-e", "cbw-d"):
        assert torch.equal(small.weights(everything, weighting), neighbor_weights(dense, weighting))
        assert torch.equal(small.weights(everything, weighting), full.weights(everything, weighting))
    # One of few row numbers, of any shape, across shards.
    picked = np.array([[99, 0], [30, 30]])
    assert torch.equal(small.posteriors(picked), read[picked])
    assert small.verify()["rows"] == 100


def test_a_row_of_1000_classes_is_small(tmp_path: Path) -> None:
    posteriors = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1).numpy()
    stored = rows.top_posteriors(posteriors, 20)
    assert sum(column[0].nbytes for column in stored.values()) == 20 * (2 + 4)
    assert stored["top_classes"].dtype == np.int16
    assert bool((np.diff(stored["top_values"], axis=1) <= 0).all())
    order = np.argsort(-posteriors, axis=1, kind="stable")[:, :20]
    assert np.array_equal(stored["top_classes"], order)
    whole = rows.spread_posteriors(stored["top_classes"], stored["top_values"], 1000)
    assert np.allclose(whole.sum(1), 1, atol=1e-5)
    assert np.array_equal(np.take_along_axis(whole, order, 1), np.take_along_axis(posteriors, order, 1))
    assert rows.top_posteriors(np.ones((1, 40_000), np.float32) / 40_000, 2)["top_classes"].dtype == np.int32


def test_all_shards_in_one_file(tmp_path: Path) -> None:
    database = build(tmp_path / "x")
    moved = tmp_path / "moved"
    database.path.rename(moved)
    with h5py.File(moved / "rows.h5") as file:
        assert np.array_equal(file["features"][()], database.features(np.arange(100)).numpy())
        assert [name.decode() for name in file["ids"][()]] == list(pictures().ids)
        assert file["digest"].shape == (100, 16)
        assert all(file[name].is_virtual for name in file)


def test_rows_are_added_in_the_form_that_is_there(tmp_path: Path) -> None:
    database = build(tmp_path / "x", storage="float16", posteriors="top-3")
    more = table(10, database.dimension)
    database.add(*more.columns())
    assert len(database) == 110
    assert torch.allclose(database.features(np.arange(100, 110)), more.features, atol=1e-2)
    assert torch.allclose(database.posteriors([105]).amax(), more.posteriors[5].amax())
    reopened = ImageDatabase.open(database.path)
    assert reopened.verify()["rows"] == 110
    assert (reopened.manifest.top, reopened.manifest.half) == (3, True)
    assert "rows.h5" not in names_in(database.path)


def test_databases_from_before_still_open(tmp_path: Path) -> None:
    data = table(9)
    write(tmp_path, data)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("storage", "rejected", "build", "beside", "digest"):
        del manifest[name]
    path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="index verify --seal"):
        database = ImageDatabase.open(tmp_path)
    assert torch.equal(database.posteriors(np.arange(9)), data.posteriors)
    assert (database.manifest.top, database.manifest.half, database.manifest.rejected) == (0, False, {})
    database.add(*table(3, seed=1).columns())
    assert len(ImageDatabase.open(tmp_path)) == 12
    manifest["storage"] = {"posteriors": "top-many"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DatabaseError, match="lacks entries or has unknown ones"):
        ImageDatabase.open(tmp_path)


def test_shards_are_in_the_order_of_their_numbers() -> None:
    names = ["rows-100000.h5", "rows-99999.h5", "rows-00002.h5"]
    entries = {name: {"sha256": "", "bytes": 1, "rows": 1} for name in names}
    from nndefense.database.manifest import in_row_order

    assert in_row_order(entries) == ["rows-00002.h5", "rows-99999.h5", "rows-100000.h5"]


# -- what is left out --------------------------------------------------------------------------------------------------


def image_folder(root: Path, count: int, damaged: tuple[int, ...] = ()) -> ImageDataset:
    source = digits("train")
    for i in range(count):
        image, label = source[i]
        path = root / str(label) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(path)
        if i in damaged:
            path.write_bytes(path.read_bytes()[:50])
    return open_dataset(f"imagefolder:{root}", channels=1, size=8)


def rejected_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text("utf-8").splitlines()]


def test_damaged_images_are_left_out_and_listed(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pictures", 60, damaged=(3, 17, 44))
    database = build(tmp_path / "x", source)
    bad = [entry["id"] for entry in rejected_of(database.path)]
    assert sorted(bad) == sorted(i for i in source.ids if i.rsplit("/", 1)[1] in ("003.png", "017.png", "044.png"))
    assert database.ids(np.arange(57)) == [name for name in source.ids if name not in bad]
    assert sum(database.manifest.rejected.values()) == 3
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in rejected_of(database.path))
    assert "rejected.jsonl" in database.manifest.files
    assert database.labels(np.arange(57)).tolist() == [int(name.split("/")[0]) for name in database.ids(np.arange(57))]
    assert "rejected.jsonl" not in build(tmp_path / "y", pictures(30)).manifest.files


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:.*EXIF.*:UserWarning")
def test_every_dirty_image_is_converted_or_listed_with_its_reason(tmp_path: Path) -> None:
    dirt = {name if "/" in name else f"clean/{name}": what for name, what in catalogue().items()}
    for name, what in dirt.items():
        path = tmp_path / "dirty" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(what.data)
    source = open_dataset(f"imagefolder:{tmp_path / 'dirty'}", size=(8, 8))
    classifier = build_classifier("small-cnn", input_shape=(3, 8, 8), classes=source.classes, seed=0)
    database = build_database(source, classifier, FEATURE, tmp_path / "x", **SMALL)
    expected = {name: (what.kind, what.reason) for name, what in dirt.items() if what.picture is None}
    told = {entry["id"]: (entry["kind"], entry["reason"]) for entry in rejected_of(tmp_path / "x")}
    assert set(told) == set(expected)
    assert all(told[name][0] == kind and reason in told[name][1] for name, (kind, reason) in expected.items())
    kept = database.ids(np.arange(len(database)))
    assert set(kept) == set(dirt) - set(expected)
    assert sum(database.manifest.rejected.values()) == len(expected)
    assert set(database.manifest.rejected) == {kind for kind, _ in expected.values()}
    # A row's digest is that of the image as it was converted.
    digests = database._table.take("digest", np.arange(len(kept)))
    images = source.batch([source.index_of(name) for name in kept])[0]
    assert np.array_equal(digests, pixel_digests(images))


@pytest.mark.parametrize(("limit", "fits"), [(3, True), (2, False), ("5%", True), ("4.9%", False), ("0%", False)])
def test_too_many_rejected_images_end_the_build(tmp_path: Path, limit: int | str, fits: bool) -> None:
    source = image_folder(tmp_path / "pictures", 60, damaged=(3, 17, 44))
    out = tmp_path / "x"
    if fits:
        assert len(build(out, source, max_rejected=limit)) == 57
        return
    with pytest.raises(DataError, match=r"of the 60 images .* cannot be used, more than .*--max-rejected allows"):
        build(out, source, max_rejected=limit)
    with pytest.raises(DatabaseError):
        ImageDatabase.open(out)
    # With a higher limit the same build goes on.
    assert len(build(out, source, max_rejected=3)) == 57


def test_nothing_but_rejected_images(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pictures", 5, damaged=(0, 1, 2, 3, 4))
    with pytest.raises(DataError, match=r"no image of .* can be used"):
        build(tmp_path / "x", source)
    assert not (tmp_path / "x").exists()


def test_a_shard_without_an_image(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pictures", 30)
    for name in source.ids[8:16]:
        (tmp_path / "pictures" / name).write_bytes(b"")
    database = build(tmp_path / "x", source, shard_rows=4)
    assert len(database) == 22
    assert "rows-00002.h5" not in database.manifest.files
    assert database.ids(np.arange(22)) == [*source.ids[:8], *source.ids[16:]]
    database.add(*table(3, database.dimension).columns())
    assert len(ImageDatabase.open(tmp_path / "x")) == 25


def test_duplicates_are_dropped_but_for_the_first(tmp_path: Path) -> None:
    source = pictures(100, copies=30)
    database = build(tmp_path / "x", source, dedupe=True)
    assert database.ids(np.arange(70)) == list(source.ids[:70])
    assert database.manifest.rejected == {"duplicate": 30}
    told = {entry["id"]: entry["reason"] for entry in rejected_of(tmp_path / "x")}
    assert told == {source.ids[70 + i]: f"duplicate of {source.ids[i]}" for i in range(30)}
    assert len(build(tmp_path / "y", source)) == 100
    # A shard of duplicates alone goes.
    assert len(build(tmp_path / "z", source, dedupe=True, shard_rows=10)) == 70


def test_images_of_an_evaluation_set_are_kept_out(tmp_path: Path) -> None:
    source = pictures(60)
    moved = source.batch(np.arange(20, 25))[0].numpy()
    moved[:, :, 0, 0] = np.clip(moved[:, :, 0, 0] + 0.05, 0, 1)
    apart = ArrayDataset(
        np.concatenate([source.batch(np.arange(5))[0].numpy(), moved]), [-1] * 10, name="test", classes=(),
        ids=[f"test/{i}" for i in range(10)],
    )  # fmt: skip
    equal = build(tmp_path / "a", source, exclude=apart, exclude_eps=0.0)
    assert len(equal) == 55
    assert equal.manifest.rejected == {"excluded": 5}
    assert {entry["reason"] for entry in rejected_of(tmp_path / "a")} == {f"equal to test/{i}" for i in range(5)}
    near = build(tmp_path / "b", source, exclude=apart, exclude_eps=0.06)
    assert set(source.ids) - set(near.ids(np.arange(len(near)))) == {*source.ids[:5], *source.ids[20:25]}
    assert near.manifest.build["excluded"]["fingerprint"] == apart.fingerprint


def test_two_images_of_one_id(tmp_path: Path) -> None:
    source = pictures(40)
    names = [*source.ids[:39], source.ids[3]]
    twice = ArrayDataset(source.batch(np.arange(40))[0].numpy(), [-1] * 40, name="twice", classes=(), ids=names)
    with pytest.raises(DataError, match="1 images have an id that another one has, such as 'ü/3'"):
        build(tmp_path / "x", twice)


# -- interruptions -----------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Not an Exception: nothing may catch it."""


def cut_at(number: int, after: bool, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the ``number``-th file that is put in place (before or after that) be the last thing that happens."""
    placed: list[str] = []
    replace = os.replace

    def cut(source: Any, target: Any) -> None:
        placed.append(Path(target).name)
        if len(placed) > number and not after:
            raise PowerCut
        replace(source, target)
        if len(placed) > number:
            raise PowerCut

    patch.setattr(files.os, "replace", cut)
    return placed


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_interrupted_between_any_two_files(tmp_path: Path, small_parts: None, after: bool) -> None:
    source, options = pictures(60, copies=9), {"dedupe": True, "index": LISTS}
    whole = checksums(build(tmp_path / "whole", source, **options).path)
    passes: list[int] = []
    handle = trained().register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    for number in itertools.count():
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            placed = cut_at(number, after, patch)
            try:
                build(out, source, **options)
            except PowerCut:
                pass
            else:
                break
        passes.clear()
        if (out / "manifest.json").exists() and not (out / "job.json").exists():
            # Cut after the very last step: there is nothing left to continue.
            continue
        assert len(build(out, source, **options)) == 51, placed
        assert checksums(out) == whole, placed
        assert names_in(out) == {"manifest.json", *whole}, placed
        if placed[-1].startswith(("index", "manifest")) or "extracted.json" in placed:
            assert not passes, placed
        elif "job.json" in placed[:-1]:
            # At most the unfinished shard again, or one that was being written again without its duplicates; and three
            # images that show the layout of a layer.
            made = sum(name.endswith(".h5.json") for name in placed[:-1])
            assert sum(passes) <= 3 + max(60 - 24 * min(made, 3), 24) + (24 if made > 3 else 0), placed
    handle.remove()
    assert number > 20


@pytest.mark.slow
def test_several_databases_interrupted(tmp_path: Path) -> None:
    kinds = (FEATURE, FeatureSpec("block1", "rmac", pca=0))
    source = pictures(60)

    def work(root: Path) -> list[ImageDatabase]:
        return build_databases(source, trained(), {root / str(i): kind for i, kind in enumerate(kinds)}, **SMALL)

    whole = [checksums(database.path) for database in work(tmp_path / "whole")]
    for number in itertools.count(0, 6):
        root = tmp_path / f"cut-{number}"
        with pytest.MonkeyPatch.context() as patch:
            placed = cut_at(number, True, patch)
            try:
                work(root)
            except PowerCut:
                pass
            else:
                break
        found = work(root)
        assert [checksums(database.path) for database in found] == whole, placed
        assert all(
            names_in(database.path) == {"manifest.json", *sums} for database, sums in zip(found, whole, strict=True)
        )
    assert number > 15
    # A finished database in the place of the second half stays.
    with pytest.MonkeyPatch.context() as patch:
        cut_at(placed.index("job.json"), True, patch)
        with pytest.raises(PowerCut):
            work(tmp_path / "begun")
    assert (tmp_path / "begun" / "0" / "job.json").exists()
    assert not (tmp_path / "begun" / "1" / "job.json").exists()
    other = build(tmp_path / "begun" / "1").fingerprint
    with pytest.raises(DatabaseError, match="already holds a database"):
        work(tmp_path / "begun")
    assert ImageDatabase.open(tmp_path / "begun" / "1").fingerprint == other
    # A folder of another build is not taken for the second half of one.
    with pytest.MonkeyPatch.context() as patch:
        cut_at(12, True, patch)
        with pytest.raises(PowerCut):
            work(tmp_path / "half")
    (tmp_path / "half" / "1").rename(tmp_path / "lost")
    with pytest.raises(DatabaseError, match="does not hold its other part"):
        work(tmp_path / "half")
    places = {tmp_path / "half" / str(i): kind for i, kind in enumerate(kinds)}
    found = build_databases(source, trained(), places, overwrite=True, **SMALL)
    assert [checksums(database.path) for database in found] == whole


@pytest.mark.parametrize("name", ["rows-00001.h5", "rows-00001.h5.json", "pca.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_continued_build_trusts_only_what_is_whole(tmp_path: Path, name: str, damage: str) -> None:
    whole = checksums(build(tmp_path / "whole").path)
    out = tmp_path / "x"
    stages.extract(pictures(), trained(), FEATURE, out, **SMALL)
    path = out / name
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    content = {"cut": bytes(held[: len(held) // 2]), "changed": bytes(held), "gone": None}[damage]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if name == "pca.safetensors":
        with pytest.raises(DatabaseError, match=r"pca.safetensors is missing or damaged"):
            build(out)
        build(out, overwrite=True)
        return
    build(out)
    assert checksums(out) == whole


def test_other_settings_for_an_unfinished_build(tmp_path: Path) -> None:
    out = tmp_path / "x"
    stages.extract(pictures(), trained(), FEATURE, out, **SMALL)
    for options, told in (
        ({"batch_size": 5}, "batch size 10, now 5"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"storage": "float16", "dedupe": True}, "storage float32, now float16, dedupe False, now True"),
    ):
        with pytest.raises(DatabaseError, match="holds an unfinished build with other settings") as error:
            build(out, **options)
        assert told in str(error.value)
        assert "--overwrite" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DatabaseError, match="images"):
        build(out, pictures(80))
    with pytest.raises(DatabaseError, match="feature block2:avg:pca8, now block1"):
        build_database(pictures(), trained(), FeatureSpec("block1"), out, **SMALL)
    assert build(out, batch_size=5, overwrite=True).manifest.build["batch_size"] == 5
    # Threads, bars and limits decide nothing about the result.
    other = tmp_path / "y"
    stages.extract(pictures(), trained(), FEATURE, other, **SMALL)
    assert len(build(other, workers=2, max_rejected=5)) == 100


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "nndefense-index-job", "version": 2}'])
def test_a_damaged_job(tmp_path: Path, content: str) -> None:
    out = tmp_path / "x"
    stages.extract(pictures(), trained(), FEATURE, out, **SMALL)
    (out / "job.json").write_text(content)
    for use in (lambda: build(out), lambda: stages.fit(out), lambda: BuildJob.read(out)):
        with pytest.raises(DatabaseError, match=r"job.json is damaged or of another version: .* --overwrite"):
            use()
    assert len(build(out, overwrite=True)) == 100


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "x"
    with locked(out):
        with pytest.raises(
            DatabaseError, match=f"is being written by process {os.getpid()} on .*: wait for it"
        ) as error:
            build(out)
        assert "\n" not in str(error.value)
    assert not out.exists()
    stages.extract(pictures(), trained(), FEATURE, out, **SMALL)
    with locked(out):
        for stage in (stages.fit, stages.add, stages.merge):
            with pytest.raises(DatabaseError, match="is being written by"):
                stage(out)
    assert len(build(out)) == 100
    assert LOCK not in names_in(out)
    # A lock that a killed builder has left holds nobody up.
    (out / LOCK).write_text("process 1 on nowhere\n")
    assert len(build(out, overwrite=True)) == 100


@pytest.mark.slow
def test_a_full_disk_is_one_clean_error_and_loses_nothing(tmp_path: Path, small_parts: None) -> None:
    whole = checksums(build(tmp_path / "whole", index=LISTS).path)
    for number in itertools.count():
        out, calls = tmp_path / str(number), itertools.count()

        def full(descriptor: int, calls: Any = calls, number: int = number) -> None:
            if next(calls) >= 6 * number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            told = ""
            try:
                build(out, index=LISTS)
            except DatabaseError as error:
                told = str(error)
        if not told:
            break
        assert "cannot be written (No space left on device): free some space" in told
        assert "\n" not in told
        if out.exists():
            assert not list(out.glob("*.part"))
        assert len(build(out, index=LISTS)) == 100
        assert checksums(out) == whole
    assert number > 5


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
@pytest.mark.parametrize("refused", ["rows-00001.h5", "index.faiss"])
def test_the_systems_own_refusal_to_write(tmp_path: Path, refused: str) -> None:
    import resource

    feature, options = FeatureSpec("block2", "grid4", pca=0), SMALL | {"shard_rows": 10, "index": LISTS}
    whole = build_database(pictures(), trained(), feature, tmp_path / "whole", **options)
    out, old = tmp_path / "x", resource.getrlimit(resource.RLIMIT_FSIZE)
    # The index is larger than every shard.
    limit = whole.manifest.files[refused].bytes - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(DatabaseError, match="cannot be written") as error:
            build_database(pictures(), trained(), feature, out, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(error.value)
    assert len(build_database(pictures(), trained(), feature, out, **options)) == 100
    assert checksums(out) == checksums(whole.path)


def test_a_source_that_vanishes_loses_nothing(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    source = image_folder(root, 60)
    whole = checksums(build(tmp_path / "whole", source).path)
    out, passes = tmp_path / "x", itertools.count()

    def vanish(*_: Any) -> None:
        # Past the look at the layer and the images of the PCA, when a shard has been written.
        if next(passes) == 10:
            root.rename(tmp_path / "elsewhere")

    handle = trained().register_forward_pre_hook(vanish)
    with pytest.raises(DataError) as error:
        build(out, source, workers=1)
    handle.remove()
    assert "\n" not in str(error.value)
    assert list(out.glob("rows-*.h5"))
    with pytest.raises(DatabaseError):
        ImageDatabase.open(out)
    (tmp_path / "elsewhere").rename(root)
    assert len(build(out, source)) == 60
    assert checksums(out) == whole


# -- the index's quality -----------------------------------------------------------------------------------------------


def test_recall_is_that_of_an_exact_search_without_the_row_itself(tmp_path: Path) -> None:
    database = build(tmp_path / "x", index=LISTS, k=5)
    search = database.manifest.index["search"]
    assert (search["k"], search["queries"], search["wanted"]) == (5, 100, 0.95)
    vectors = database.features(np.arange(100))
    exact = torch.cdist(vectors, vectors)
    exact.fill_diagonal_(torch.inf)
    truth = exact.topk(5, largest=False).indices
    _, found = database.search(vectors, 6)
    hits = [
        len((set(f) - {i}) & set(t)) / 5 for i, (f, t) in enumerate(zip(found.tolist(), truth.tolist(), strict=True))
    ]
    assert search["recall"] == pytest.approx(float(np.mean(hits)), abs=0.01)
    assert search["recall"] >= 0.95
    assert search["setting"]["nprobe"] <= 4


def test_another_recall_and_real_queries(tmp_path: Path) -> None:
    database = build(tmp_path / "x", index="IVF8,Flat")
    before = checksums(tmp_path / "x")
    found = stages.verify(tmp_path / "x", recall=1.0, k=10)["search"]
    assert found["recall"] == 1.0
    vectors = stages.vectors_of(database, trained(), digits("test").subset(np.arange(30)))
    found = stages.verify(tmp_path / "x", recall=0.5, k=3, queries=vectors, queries_from="digits:test")["search"]
    assert (found["queries"], found["queries_from"], found["k"]) == (30, "digits:test", 3)
    assert Manifest.read(tmp_path / "x").index["search"] == found
    # The files are what they were; only what is said of them is new.
    assert checksums(tmp_path / "x") == before
    for arguments in ({"recall": 1.5}, {"k": 0}, {"queries": vectors[:, :3]}, {"queries": vectors[:0]}):
        with pytest.raises(InputError):
            stages.verify(tmp_path / "x", **arguments)


def test_verify_writes_nothing_unasked(tmp_path: Path) -> None:
    build(tmp_path / "x")
    held = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x").iterdir()}
    stages.verify(tmp_path / "x")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x").iterdir()} == held


# -- repeats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 100, 10_000])
def test_repeats_are_those_of_a_plain_search(tmp_path: Path, held: int) -> None:
    generator = np.random.default_rng(held)
    keys = generator.integers(0, 256, (200, 16), dtype=np.uint8)[generator.integers(0, 200, 1000)]
    keys[500] = 0
    found, firsts = repeats.repeats((keys[i : i + 77] for i in range(0, 1000, 77)), tmp_path, held=held)
    seen: dict[bytes, int] = {}
    expected = [(i, seen[k]) for i, k in enumerate(map(bytes, keys)) if seen.setdefault(k, i) != i]
    assert list(zip(found.tolist(), firsts.tolist(), strict=True)) == expected
    assert not list(tmp_path.iterdir())
    assert [len(part) for part in repeats.repeats([])] == [0, 0]


def test_ids_are_compared_as_text(tmp_path: Path) -> None:
    names = [f"image-{i}" for i in range(500)] + ["image-7", "image-77x"]
    short, long = (np.array([name.encode() for name in names], dtype=f"S{width}") for width in (12, 40))
    assert np.array_equal(id_keys(short), id_keys(long))
    assert len(np.unique(id_keys(short), axis=0)) == 501
    column = {"ids": short, "labels": np.zeros(502, np.int64), "features": np.zeros((502, 2), np.float32)}
    column |= {name: np.zeros(502, np.float32) for name in ("cbw_e", "cbw_d")} | {"posteriors": np.ones((502, 1))}
    rows.write_shard(tmp_path / "rows-00000.h5", column)
    held = [tmp_path / "rows-00000.h5"]
    assert repeated_ids(held).tolist() == [500]
    with pytest.MonkeyPatch.context() as patch:
        # Keys that say nothing: the text decides.
        patch.setattr(repeats, "id_keys", lambda ids: np.zeros((len(ids), 16), np.uint8))
        assert set(repeated_ids(held).tolist()) <= {500}


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    stages.extract(pictures(), trained(), FEATURE, tmp_path / "x", **SMALL, reopen={"classifier": "somewhere"})
    job = BuildJob.read(tmp_path / "x")
    assert job.reopen == {"classifier": "somewhere"}
    job.write()
    assert BuildJob.read(tmp_path / "x") == job
    assert dataclasses.replace(job, images=25).shards == 2
