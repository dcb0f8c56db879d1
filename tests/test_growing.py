"""Rows that come to a finished database and go again, without building it anew."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails, nndefense
from helpers import BLOCK2, assert_holds, digits, nearest_by_loop, rewrite, table, trained, untrained, write
from test_database import PowerCut, content, interrupted_at

from index_build import build_database, compact_database, grow, grow_database, remove_images
from nndefense.database import ImageDatabase, Manifest, mapped_shards, writer
from nndefense.database.growing import outgrown
from nndefense.database.manifest import CALIBRATION, GUARD, keep_beside, standing_beside
from nndefense.datasets.arrays import ArrayDataset
from nndefense.errors import DatabaseError, DataError, InputError
from nndefense.features import FeatureSpec
from nndefense.models import save_classifier

KINDS = ("Flat", "IVF4,Flat", "SQ8", "PCA8,Flat", "IVF4,PQ4x4", "HNSW8", "IVF4,PQ4x4fs")
HERE = Path(__file__).resolve().parent


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 7 rows (16 features and 10 classes)."""
    monkeypatch.setattr(writer, "_SHARD_BYTES", 7 * 4 * (16 + 10 + 8))


def build(images, out, classifier=None, **options):
    settings = {"batch_size": 16, "shard_rows": 32, "workers": 1, **options}
    return build_database(images, classifier or untrained(), BLOCK2, out, progress=False, **settings)


def more(images, folder, classifier=None, **options):
    return grow_database(images, classifier or untrained(), folder, workers=1, progress=False, **options)


def part(first: int, last: int):
    return digits("train").subset(np.arange(first, last))


def columns_of(database: ImageDatabase) -> list[object]:
    rows = np.arange(len(database))
    read = [database.features(rows), database.posteriors(rows), database.weights(rows, "cbw-d"), database.labels(rows)]
    return [*(tensor.numpy().tobytes() for tensor in read), database.ids(rows)]


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"row_noise": 0.1, "storage": "float16", "posteriors": "top-3"}], ids=str)
def test_added_images_make_the_rows_and_the_exact_index_of_one_build(tmp_path, settings):
    whole = build(part(0, 96), tmp_path / "whole", **settings)
    build(part(0, 64), tmp_path / "grown", **settings)
    made = more(part(64, 80), tmp_path / "grown")
    assert (made.rows, made.added, made.rejected) == (80, 16, {})
    assert more(part(80, 96), tmp_path / "grown", specs=["digits:train[80:96]"]).rows == 96
    grown = ImageDatabase.open(tmp_path / "grown", classifier=untrained())
    assert columns_of(grown) == columns_of(whole)
    index = grown.manifest.index["file"]
    assert (grown.path / index).read_bytes() == (whole.path / "index.faiss").read_bytes()
    assert grown.verify()["rows"] == grown.manifest.build["images"] == 96
    assert grown.manifest.data["specs"] == ["digits:train[80:96]"]
    assert grown.manifest.data["fingerprint"] != whole.manifest.data["fingerprint"]
    # Nothing is left but what the manifest names.
    assert {path.name for path in grown.path.iterdir()} == {"manifest.json", *grown.manifest.files}


def test_the_pca_of_the_database_makes_the_new_vectors(tmp_path):
    feature = FeatureSpec("block2", "grid2", pca=8, whiten=True)
    build_database(part(0, 60), untrained(), feature, tmp_path, index="IVF4,Flat", progress=False, workers=1)
    held = (tmp_path / "pca.safetensors").read_bytes()
    more(part(60, 90), tmp_path)
    grown = ImageDatabase.open(tmp_path)
    assert (tmp_path / "pca.safetensors").read_bytes() == held
    with torch.no_grad():
        expected = grown.extractor(untrained())(part(60, 90).batch(np.arange(30))[0])
    assert torch.allclose(grown.features(np.arange(60, 90)), expected, atol=1e-4)
    grown.verify()


def test_what_is_in_already_is_left_out_and_told(tmp_path):
    build(part(0, 32), tmp_path, dedupe=True)
    made = more(part(20, 40), tmp_path)
    assert (made.rows, made.added, made.rejected) == (40, 8, {"duplicate": 12})
    manifest = Manifest.read(tmp_path)
    assert manifest.rejected == {"duplicate": 12}
    assert manifest.rows + sum(manifest.rejected.values()) == manifest.build["images"]
    (told,) = [name for name in manifest.files if name.startswith("rejected")]
    assert "is in the database already" in json.loads((tmp_path / told).read_text().splitlines()[0])["reason"]
    # The same pixels under another name are one of --dedupe, and the same again adds nothing.
    pictures, labels = part(0, 2).batch(np.arange(2))
    copies = ArrayDataset(pictures.numpy(), labels.tolist(), name="copies", classes=digits("train").classes)
    held = content(tmp_path)
    for images in (copies, part(20, 40)):
        assert more(images, tmp_path).added == 0
    assert content(tmp_path) == held
    assert not (tmp_path / "growing").exists()


def test_another_picture_under_the_id_of_a_row_is_refused_until_that_is_removed(tmp_path):
    pictures, labels = part(0, 20).batch(np.arange(20))
    first, second = (
        ArrayDataset(some.numpy(), labels.tolist(), name="pictures", classes=digits("train").classes)
        for some in (pictures, pictures.flip(0))
    )
    database = build(first, tmp_path)
    held = content(tmp_path)
    with pytest.raises(DataError, match=r"20 images have the id of a row of .* with other pixels.*index remove"):
        more(second, tmp_path)
    assert content(tmp_path) == held
    remove_images(tmp_path, database.ids([3]))
    assert len(ImageDatabase.open(tmp_path)) == 19
    # What was being extracted is of a database that is another one now, but its shards are the same.
    with pytest.raises(DataError, match="19 images have the id"):
        more(second, tmp_path)


def test_only_what_the_manifest_says_is_added(tmp_path):
    build(part(0, 32), tmp_path)
    held = content(tmp_path)
    with pytest.raises(DatabaseError, match="was made with another classifier"):
        more(part(32, 40), tmp_path, untrained(1))
    with pytest.raises(DatabaseError, match="there is no database"):
        more(part(32, 40), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="a distance to excluded images was given"):
        more(part(32, 40), tmp_path, exclude_eps=0.5)
    assert more(part(32, 40), tmp_path, exclude=part(32, 36), exclude_eps=0).rejected == {"excluded": 4}
    assert content(tmp_path) != held
    # A copy of a damaged index would be vouched for by a checksum of its own.
    index = tmp_path / Manifest.read(tmp_path).index["file"]
    damaged = bytearray(index.read_bytes())
    damaged[-1] ^= 1
    index.write_bytes(damaged)
    with pytest.raises(DatabaseError, match="has changed since it was built"):
        more(part(40, 48), tmp_path)


def test_one_that_was_killed_goes_on_without_a_forward_pass_and_another_needs_overwrite(tmp_path, monkeypatch):
    classifier = untrained()
    build(part(0, 32), tmp_path, classifier)
    held, join = content(tmp_path), grow._join
    monkeypatch.setattr(grow, "_join", lambda *args: (_ for _ in ()).throw(PowerCut()))
    with pytest.raises(PowerCut):
        more(part(32, 64), tmp_path, classifier)
    assert content(tmp_path) == held
    monkeypatch.setattr(grow, "_join", join)
    with pytest.raises(DatabaseError, match=r"unfinished build with other settings.*--overwrite"):
        more(part(32, 48), tmp_path, classifier)
    passes = []
    handle = classifier.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    # Killed once more, when all was done but to remove the folder.
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    assert more(part(32, 64), tmp_path, classifier).added == 32
    monkeypatch.undo()
    assert (tmp_path / "growing").exists()
    assert more(part(32, 64), tmp_path, classifier).added == 32
    assert more(part(64, 80), tmp_path, classifier, overwrite=True).rows == 80
    handle.remove()
    # Those of the last one: three images show how the layer is laid out.
    assert passes == [3, 16]
    assert columns_of(ImageDatabase.open(tmp_path)) == columns_of(build(part(0, 80), tmp_path / "whole"))


# -- rows --------------------------------------------------------------------------------------------------------------


# Products take long to learn.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if "PQ" in kind else kind for kind in KINDS]
)
def test_rows_come_and_go_in_an_index_of_any_kind(tmp_path, small_shards, kind):
    data = table(120)
    database = write(tmp_path, data.cut(0, 90), index=kind)
    database.add(*data.cut(90, 120).columns())
    assert database.manifest.index["trained_rows"] == 90
    assert_columns(database, data, np.arange(120))
    gone = np.array([0, 5, 6, *range(28, 42), 88, 91, 119])
    left = np.setdiff1d(np.arange(120), gone)
    assert database.remove([data.ids[row] for row in gone]) == len(gone)
    for opened in (database, ImageDatabase.open(tmp_path)):
        assert_columns(opened, data, left)
        opened.verify()
        if "nprobe" in opened._index.parameters:
            opened._index.set_search({"nprobe": 4})
        distances, found = opened.search(data.features, min(30, len(left)))
        names = set(opened.ids(found))
        assert not names & {data.ids[row] for row in gone}
        expected, rows = nearest_by_loop(data.features.numpy(), data.features.numpy()[left], 30)
        if kind.endswith("Flat") and "PCA" not in kind:
            assert np.allclose(distances.numpy(), expected, atol=1e-3)
            assert (found.numpy() == rows).mean() > 0.99
        else:
            shares = [len(set(some) & set(others)) for some, others in zip(found.tolist(), rows.tolist(), strict=True)]
            assert np.mean(shares) > 12


def assert_columns(database: ImageDatabase, data, rows) -> None:
    everything = np.arange(len(rows))
    assert len(database) == len(rows)
    assert database.ids(everything) == [data.ids[row] for row in rows]
    assert torch.equal(database.features(everything), data.features[rows])
    assert torch.equal(database.posteriors(everything), data.posteriors[rows])
    assert torch.equal(database.labels(everything), data.labels[rows])


def test_an_exact_index_has_the_bytes_of_one_that_was_built_of_the_rows_that_are_left(tmp_path, small_shards):
    data = table(60)
    database = write(tmp_path / "a", data.cut(0, 20))
    for first in (20, 33, 50):
        database.add(*data.cut(first, {20: 33, 33: 50, 50: 60}[first]).columns())
    database.remove(list(data.ids[10:25]))
    database.remove([data.ids[59], data.ids[0]])
    left = [*range(1, 10), *range(25, 59)]
    rest = type(data)(data.features[left], data.posteriors[left], [data.ids[i] for i in left], data.labels[left])
    other = write(tmp_path / "b", rest)
    assert_holds(database, rest)
    bytes_of = [(some.path / some.manifest.index["file"]).read_bytes() for some in (database, other)]
    assert bytes_of[0] == bytes_of[1]
    # Joined shards hold the same rows in the same order, and what was replaced is gone.
    before = columns_of(database)
    made = compact_database(tmp_path / "a")
    assert len(made.shards) == 1
    found = ImageDatabase.open(tmp_path / "a")
    found.verify()
    assert columns_of(found) == before
    assert {path.name for path in found.path.iterdir()} == {"manifest.json", *made.files}
    assert compact_database(tmp_path / "a") == made
    found.add(*table(5, seed=9).columns())
    assert found.ids(np.arange(43, 48)) == list(table(5, seed=9).ids)


def test_readers_keep_what_they_opened(tmp_path, small_shards, monkeypatch):
    # Few maps: most shards are mapped when they are asked for.
    monkeypatch.setattr(mapped_shards, "room_for_shards", lambda: 2)
    data = table(70)
    write(tmp_path, data)
    reader, changer = ImageDatabase.open(tmp_path), ImageDatabase.open(tmp_path)
    changer.remove(list(data.ids[3:60:9]))
    changer = ImageDatabase.open(tmp_path)
    assert_columns(reader, data, np.arange(70))
    assert torch.equal(reader.search(data.features, 1)[1][:, 0], torch.arange(70))
    with pytest.raises(DatabaseError, match="was changed since it was opened: open it again"):
        reader.add(*table(3, seed=4).columns())
    with pytest.raises(DatabaseError, match="was changed since it was opened: open it again"):
        reader.remove([data.ids[0]])


def test_one_that_is_opened_while_it_changes_is_the_new_one(tmp_path, monkeypatch):
    data = table(20)
    write(tmp_path, data.cut(0, 10))
    check, done = Manifest.check_files, []

    def changed_first(self, folder, **options):
        if not done:
            done.append(True)
            ImageDatabase.open(tmp_path).add(*data.cut(10, 20).columns())
        check(self, folder, **options)

    monkeypatch.setattr(Manifest, "check_files", changed_first)
    assert_holds(ImageDatabase.open(tmp_path), data)


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_removal_that_is_interrupted_between_any_two_files(tmp_path, small_shards, after):
    data = table(24)
    names = [data.ids[row] for row in (2, 3, 9, 23)]
    write(tmp_path / "done", data)
    ImageDatabase.open(tmp_path / "done").remove(names)
    finished = content(tmp_path / "done")
    for number in itertools.count():
        folder = tmp_path / str(number)
        begun = write(folder, data).fingerprint
        with pytest.MonkeyPatch.context() as patch:
            placed = interrupted_at(number, after, patch)
            try:
                ImageDatabase.open(folder).remove(names)
            except PowerCut:
                pass
            else:
                break
        expected = finished if after and placed[-1] == "manifest.json" else begun
        assert content(folder) == expected, placed
        if expected == begun:
            ImageDatabase.open(folder).remove(names)
            assert content(folder) == finished
    # Three of four shards, index and manifest.
    assert number == 5


def test_what_cannot_be_removed_or_added_changes_nothing(tmp_path):
    data = table(10)
    database = write(tmp_path, data)
    held = content(tmp_path)
    for ids, message in (
        (["x/0-0", "not there"], "1 of the ids are of no row of .*, such as 'not there': nothing was removed"),
        ([], "no id was given"),
        (list(data.ids), "would be left with 0 rows, but a database has at least one"),
    ):
        with pytest.raises(InputError, match=message):
            database.remove(ids)
    with pytest.raises(InputError, match="has a row with the id 'x/0-0' already"):
        database.add(*data.cut(0, 1).columns())
    new = table(2, seed=1)
    with pytest.raises(InputError, match="two rows would have the id 'x/1-0'"):
        database.add(new.features, new.posteriors, ["x/1-0", "x/1-0"], new.labels)
    with pytest.raises(InputError, match="a subset of a database cannot be cut down"):
        database.subset(np.arange(3)).remove([data.ids[0]])
    assert content(tmp_path) == held


def test_what_was_calibrated_for_other_rows_is_told_and_the_guards_distances_go(tmp_path):
    data = table(40)
    database = write(tmp_path, data.cut(0, 30))
    (tmp_path / CALIBRATION).write_text(json.dumps({"chosen": {"k": 25, "weighting": "uniform"}}))
    rewrite(tmp_path / "manifest.json", lambda value: value.update(beside=standing_beside(tmp_path)))
    keep_beside(tmp_path, GUARD, {"manifest": Manifest.read(tmp_path).identity})
    database = ImageDatabase.open(tmp_path)
    with pytest.raises(InputError, match="left with 24 rows, but its rule asks for the 25 nearest"):
        database.remove(list(data.ids[:6]))
    assert (tmp_path / GUARD).exists()
    database.add(*data.cut(30, 40).columns())
    assert not (tmp_path / GUARD).exists()
    found = ImageDatabase.open(tmp_path)
    assert found.manifest.read_beside(tmp_path, GUARD) is None
    assert found.manifest.read_beside(tmp_path, CALIBRATION)["chosen"]["k"] == 25
    text = nndefense("index", "info", tmp_path).out
    assert "(calibrated for the 30 rows before it was changed)" in text
    assert "changed    10 added (30 rows before)" in text
    # So they do where files are joined; distances that were measured since then stay.
    keep_beside(tmp_path, GUARD, {"manifest": Manifest.read(tmp_path).identity})
    compact_database(tmp_path)
    assert not (tmp_path / GUARD).exists()
    keep_beside(tmp_path, GUARD, {"manifest": Manifest.read(tmp_path).identity})
    held = (tmp_path / GUARD).read_bytes()
    compact_database(tmp_path)
    assert (tmp_path / GUARD).read_bytes() == held


def test_an_index_that_its_rows_have_outgrown_is_told_and_trained_anew(tmp_path):
    data = table(200)
    database = write(tmp_path, data.cut(0, 40), index="IVF2,Flat")
    database.add(*data.cut(40, 100).columns())
    assert outgrown(database.manifest) == ""
    database.add(*data.cut(100, 200).columns())
    assert "was trained on 40 rows and holds 200" in outgrown(database.manifest)
    made = compact_database(tmp_path, index="IVF8,Flat")
    assert (made.index["factory"], made.index["trained_rows"], outgrown(made)) == ("IVF8,Flat", 200, "")
    assert made.index["search"]["recall"] >= 0.95
    assert_columns(ImageDatabase.open(tmp_path), data, np.arange(200))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_adds_removes_and_compacts(tmp_path):
    net, out = tmp_path / "net", tmp_path / "db"
    save_classifier(trained(), net)
    build(part(0, 40), out, trained())
    said = nndefense("index", "add", out, "--dataset", "digits:train[30:60]", "--classifier", net, "--quiet", "--json")
    assert (said.json["rows"], said.json["added"], said.json["rejected"]) == (60, 20, {"duplicate": 10})
    names = ImageDatabase.open(out).ids(np.arange(60))
    (tmp_path / "ids.txt").write_text(f"{names[1]}\n{names[2]}\n")
    said = nndefense("index", "remove", out, "--ids", tmp_path / "ids.txt", "--id", names[50], "--json").json
    assert (said["rows"], said["removed"]) == (57, 3)
    fails(2, "such as 'nobody'", "index", "remove", out, "--id", "nobody")
    fails(2, "name them by --dataset", "index", "add", out, "--classifier", net)
    fails(2, "leave --engine", "index", "add", out, "--dataset", "digits:train[:3]", "--engine", "ray")
    assert "57 rows in 1 files" in nndefense("index", "compact", out, "--index", "auto").out
    assert ImageDatabase.open(out).ids(np.arange(57)) == [name for i, name in enumerate(names) if i not in (1, 2, 50)]
    assert nndefense("index", "verify", out, "--json").json["rows"] == 57


# -- killed for good ---------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_growing import build, more, part
from index_build import compact_database, remove_images
from nndefense.database import ImageDatabase
root, kills = Path(sys.argv[1]), int(sys.argv[2])

def work(job, folder):
    if job == "add":
        more(part(64, 128), folder)
    elif job == "remove":
        remove_images(folder, part(0, 64).ids[5:50:3])
    else:
        compact_database(folder, index="IVF4,Flat")

def child(job, folder, last=None):
    process = os.fork()
    if process == 0:
        calls = 0
        def count(*_):
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        work(job, folder)
        sys.setprofile(None)
        (root / "calls").write_text(str(calls))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

import shutil
build(part(0, 64), root / "old", index="IVF2,Flat", dedupe=True)
more(part(60, 64), root / "old")
moments = random.Random(0)
for job in ("add", "remove", "compact"):
    shutil.copytree(root / "old", root / f"{job}-whole")
    assert child(job, root / f"{job}-whole") == 0
    total = int((root / "calls").read_text())
    for number in range(kills):
        folder = root / f"{job}-{number}"
        shutil.copytree(root / "old", folder)
        killed = child(job, folder, moments.randrange(1, total))
        rows = len(ImageDatabase.open(folder))
        ImageDatabase.open(folder).verify()
        try:
            again = child(job, folder)
        finally:
            print(job, number, killed, rows, again)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_the_old_or_the_new_one_opens_and_the_same_goes_on(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "12"],
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = {"add": {64, 128}, "remove": {64, 49}, "compact": {64}}
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 36
    for job, number, killed, found, again in lines:
        assert int(killed) == -signal.SIGKILL
        assert int(found) in rows[job]
        # Rows that were removed before the kill are not there to be removed again.
        assert again == "0" or (job == "remove" and found == "49"), (job, number)
        database, whole = (
            ImageDatabase.open(tmp_path / f"{job}-{number}"),
            ImageDatabase.open(tmp_path / f"{job}-whole"),
        )
        database.verify()
        assert columns_of(database) == columns_of(whole)
        assert not (database.path / "growing").exists()
