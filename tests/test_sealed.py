"""No file of a database, its calibration, its guard or its classifier can change an answer unnoticed."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import fails, nndefense
from helpers import BLOCK2, digits, images, rewrite, untrained
from served import serving
from test_database import PowerCut, interrupted_at

from index_build import build_database, build_databases, stages
from nndefense.database import ImageDatabase, Manifest, Rule
from nndefense.database.manifest import CALIBRATION, keep_beside
from nndefense.defenses.stored import open_stored
from nndefense.errors import DatabaseError, InputError, NNDefenseError
from nndefense.evaluation import AttackSettings
from nndefense.features import FeatureSpec
from nndefense.files import sha256_of
from nndefense.guard import Guard
from nndefense.models import load_classifier, save_classifier
from nndefense.pipeline import Chosen, build_calibrated, calibrating, seal_records

ROWS, K = 60, 7
CHOSEN = {"layer": "block2", "pooling": "avg", "dimension": 4, "k": K, "weighting": "uniform"}


def build(folder: Path, seed: int = 0, **options: Any) -> None:
    net = untrained(seed)
    rows = digits("train").subset(np.arange(ROWS))
    build_database(rows, net, FeatureSpec("block2", pca=4), folder, specs=["digits"], progress=False, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two databases that are alike, each with its classifier, its calibration and its guard: ``a`` and ``b``."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("ab"):
        save_classifier(untrained(seed), root / name / "classifier")
        database = root / name / "database"
        build(database, seed)
        keep_beside(database, CALIBRATION, {"chosen": CHOSEN | {"k": K + seed}})
        guard = Guard.open(database, device="cpu")
        held = digits("train").subset(np.arange(200, 230))
        guard.calibrate(held, reject_rate=0.1 + 0.1 * seed).write(database / "guard.json")
    return root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of ``a`` that may be damaged."""
    shutil.copytree(made / "a", tmp_path / "a")
    return tmp_path / "a"


def answers(root: Path) -> str:
    """What a folder of a database and its classifier says to some images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guard = Guard.open(root / "database", device="cpu")
    return json.dumps([one.to_json() for one in guard.predict(images("test", 3)[0])])


def damages(root: Path, other: Path, each: int, seed: int = 0) -> Iterator[tuple[str, Path, bytes | None]]:
    """For every file, seeded: flipped bits, cuts, bytes too many, deletion (None), and what ``other`` has there."""
    chance = random.Random(seed)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        whole, twin = path.read_bytes(), other / path.relative_to(root)
        for _ in range(each):
            place = chance.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            yield f"{path.name}: bit {place}", path, bytes(flipped)
        for _ in range(max(each // 8, 1)):
            size = chance.randrange(len(whole))
            yield f"{path.name}: cut to {size}", path, whole[:size]
        yield f"{path.name}: longer", path, whole + b"\0"
        yield f"{path.name}: deleted", path, None
        if twin.is_file():
            yield f"{path.name}: swapped", path, twin.read_bytes()


@contextmanager
def damaged(path: Path, content: bytes | None) -> Iterator[None]:
    whole = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def silently_wrong(
    cases: Iterator[tuple[str, Path, bytes | None]], asked: Callable[[], str], expected: str
) -> tuple[int, list[str]]:
    """How many cases were refused, and those that were not but gave another answer (or were not refused in a line)."""
    refused, wrong = 0, []
    for name, path, content in cases:
        with damaged(path, content):
            try:
                if asked() != expected:
                    wrong.append(name)
            except NNDefenseError as error:
                refused += 1
                if "\n" in str(error):
                    wrong.append(f"{name}: {error}")
    return refused, wrong


@pytest.mark.parametrize("each", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_every_changed_file_of_a_database_is_refused_or_harmless(made: Path, copied: Path, each: int) -> None:
    expected = answers(copied)
    refused, wrong = silently_wrong(damages(copied, made / "b", each), lambda: answers(copied), expected)
    assert wrong == []
    assert refused > 6 * each
    assert answers(copied) == expected


@pytest.mark.slow
def test_every_changed_file_is_refused_or_harmless_at_a_reload(made: Path, copied: Path) -> None:
    """The guard that serves stays, and answers as it did."""
    expected = answers(copied)
    with serving(lambda: Guard.open(copied / "database", device="cpu")) as served, served.client() as client:

        def asked() -> str:
            client.post("/v1/admin/reload")
            found = served.state.guard.predict(images("test", 3)[0])
            return json.dumps([one.to_json() for one in found])

        assert silently_wrong(damages(copied, made / "b", 20), asked, expected) == (0, [])


@pytest.mark.parametrize("each", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_a_changed_file_of_an_unfinished_build_is_made_again_or_refused(made: Path, tmp_path: Path, each: int) -> None:
    net, rows = untrained(), digits("train").subset(np.arange(ROWS))
    begun, other = tmp_path / "begun", tmp_path / "other"
    for seed, folder in enumerate((begun, other)):
        feature = FeatureSpec("block2", pca=4)
        stages.extract(rows, untrained(seed), feature, folder, specs=["digits"], progress=False, shard_rows=32)
        stages.fit(folder)
        stages.add(folder, progress=False)
    whole = tmp_path / "whole"
    shutil.copytree(begun, whole)
    stages.merge(whole)
    stages.verify(whole)
    expected = answered(ImageDatabase.open(whole, classifier=net), net)
    wrong, refused = [], 0
    # All of them, or every third.
    for name, path, content in itertools.islice(damages(begun, other, each), 0, None, 3 if each == 1 else 1):
        folder = tmp_path / "again"
        shutil.copytree(begun, folder)
        with damaged(folder / path.name, content):
            try:
                stages.merge(folder)
                stages.verify(folder)
                if answered(ImageDatabase.open(folder, classifier=net), net) != expected:
                    wrong.append(name)
            except NNDefenseError:
                refused += 1
        shutil.rmtree(folder)
    assert wrong == []
    assert refused > 4


def answered(database: ImageDatabase, net: Any) -> list[Any]:
    with torch.no_grad():
        distances, rows = database.search(database.extractor(net)(images("test", 5)[0]), K)
    return [distances.tolist(), rows.tolist(), database.posteriors(rows).tolist(), database.ids(rows)]


# -- what belongs together -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        lambda classes: classes.__setitem__(3, classes[1]),
        lambda classes: classes.reverse(),
        lambda classes: classes.pop(),
        lambda classes: classes.append("ten"),
    ],
    ids=["two are equal", "another order", "nine of ten", "one more"],
)
def test_other_classes_than_the_classifiers_are_refused(copied: Path, edit: Callable[[list[str]], object]) -> None:
    """Even where the digest was made for them."""
    manifest = copied / "database" / "manifest.json"
    before = manifest.read_bytes()
    rewrite(manifest, lambda value: edit(value["classes"]))
    with pytest.raises(DatabaseError, match="has other classes than the classifier"):
        ImageDatabase.open(copied / "database", classifier=load_classifier(copied / "classifier"))
    manifest.write_bytes(before)
    rewrite(copied / "classifier" / "classifier.json", lambda value: edit(value["classes"]))
    with pytest.raises(NNDefenseError, match=r"has other classes than the classifier|do not fit"):
        Guard.open(copied / "database", device="cpu")


@pytest.mark.parametrize("name", ["calibration.json", "guard.json"])
@pytest.mark.parametrize("change", ["deleted", "edited", "another's"])
def test_calibration_and_guard_are_never_left_out_in_silence(made: Path, copied: Path, name: str, change: str) -> None:
    path = copied / "database" / name
    if change == "deleted":
        path.unlink()
    elif change == "edited":
        value = json.loads(path.read_text())
        path.write_text(json.dumps(value, indent=4))
    else:
        shutil.copy(made / "b" / "database" / name, path)
    for opened in (lambda: ImageDatabase.open(copied / "database"), lambda: Guard.open(copied / "database")):
        with pytest.raises(DatabaseError, match=rf"{name}.*index verify --seal"):
            opened()


def test_a_calibration_that_was_put_in_is_refused_and_so_is_one_of_another_feature(made: Path, tmp_path: Path) -> None:
    build(tmp_path / "database")
    shutil.copy(made / "b" / "database" / "calibration.json", tmp_path / "database")
    with pytest.raises(DatabaseError, match="was not made for this database"):
        ImageDatabase.open(tmp_path / "database")
    (tmp_path / "database" / "calibration.json").unlink()
    for wrong in ({"layer": "block1"}, {"pooling": "max"}, {"k": 0}, {"k": ROWS + 1}, {"k": "7"}, {"weighting": "w"}):
        keep_beside(tmp_path / "database", CALIBRATION, {"chosen": CHOSEN | wrong})
        with pytest.raises(DatabaseError, match=r"calibration\.json"):
            Guard.open(tmp_path / "database", untrained(), device="cpu")


@pytest.mark.parametrize("after", [False, True])
def test_a_calibration_replaced_and_interrupted_is_the_old_one_or_the_new_one(copied: Path, after: bool) -> None:
    for number in itertools.count():
        shutil.copytree(copied / "database", copied / str(number))
        with pytest.MonkeyPatch.context() as patch:
            interrupted_at(number, after, patch)
            try:
                keep_beside(copied / str(number), CALIBRATION, {"chosen": CHOSEN | {"k": 3}})
            except PowerCut:
                ended = False
            else:
                ended = True
        guard = Guard.open(copied / str(number), copied / "classifier", device="cpu")
        assert guard.k == (3 if ended or number > 1 or (number == 1 and after) else K)
        assert guard.threshold is not None
        if ended:
            break
    assert number == 3


def killed_at(step: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the end come just before the ``step``-th file is put in place or removed."""
    done: list[str] = []
    place, remove = os.replace, Path.unlink

    def before(what: str, act: Callable[[], object]) -> None:
        if len(done) >= step:
            raise PowerCut
        done.append(what)
        act()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        # A lock is the system's, and a part is nobody's: neither is there for whoever opens the folder.
        if path.suffix in (".part", ".lock") or not path.exists():
            remove(path, missing_ok=missing_ok)
        else:
            before(f"the end of {path.name}", lambda: remove(path))

    patch.setattr(os, "replace", lambda source, target: before(Path(target).name, lambda: place(source, target)))
    patch.setattr(Path, "unlink", unlink)
    return done


@pytest.mark.parametrize(
    "case", ["calibrate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("again", "demo"))]
)
def test_a_calibrated_build_killed_anywhere_never_opens_without_its_calibration(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, rows, feature = untrained(), digits("train").subset(np.arange(ROWS)), FeatureSpec("block2", pca=4)
    found = Chosen(feature, Rule(K, "uniform"), {"chosen": CHOSEN, "ids": ["digits:1"]}, [feature])
    monkeypatch.setattr(calibrating, "choose", lambda *_, **__: found)
    attack = AttackSettings("pgd", "l2", (0.2,))

    def work(folder: Path) -> None:
        if case == "demo":
            places = {folder: feature, folder.with_name("deep"): FeatureSpec("block3", pca=4)}
            kept = {folder: found.calibration}
            build_databases(rows, net, places, overwrite=True, calibrations=kept, progress=False)
        else:
            again = case == "again"
            build_calibrated(net, (rows, rows, rows), folder, attack, overwrite=again, progress=False)

    def state(folder: Path) -> tuple[object, ...]:
        manifest = Manifest.read(folder)
        text = (folder / CALIBRATION).read_bytes()
        return manifest.files, manifest.beside, manifest.build, text, sorted(path.name for path in folder.iterdir())

    work(tmp_path / "whole")
    old = tmp_path / "old"
    build(old)
    keep_beside(old, CALIBRATION, {"chosen": CHOSEN | {"k": 3}})
    opened = []
    for step in itertools.count():
        folder = tmp_path / str(step) / "database"
        if case == "again":
            shutil.copytree(old, folder)
        with pytest.MonkeyPatch.context() as patch:
            done = killed_at(step, patch)
            with suppress(PowerCut):
                work(folder)
        try:
            opened.append(open_stored(folder, net).k)
        except DatabaseError:
            opened.append(None)
        finished = (folder / "manifest.json").exists() and not (folder / "job.json").exists()
        if finished and case == "calibrate":
            with pytest.raises(DatabaseError, match="already holds a database"):
                work(folder)
        else:
            work(folder)
        assert state(folder) == state(tmp_path / "whole"), done
        if len(done) < step:
            break
    # What was there before, then nothing, then the new one, which comes with its last files.
    stages_seen = [k for k, _ in itertools.groupby(opened)]
    assert stages_seen == ([3, None, K] if case == "again" else [None, K])
    assert opened.count(None) > 10
    assert opened.count(K) > 5


def test_an_unfinished_build_keeps_its_calibration_at_every_stage_and_takes_no_other(tmp_path: Path) -> None:
    net, rows, feature = untrained(), digits("train").subset(np.arange(ROWS)), FeatureSpec("block2", pca=4)
    out = tmp_path / "database"
    stages.extract(rows, net, feature, out, calibrations={out: {"chosen": CHOSEN}}, progress=False)
    for other in ({}, {"calibrations": {out: {"chosen": CHOSEN | {"k": 3}}}}):
        with pytest.raises(DatabaseError, match=r"other settings \(calibration [0-9a-f]{12}\.\.\., now"):
            build_database(rows, net, feature, out, progress=False, **other)
    with pytest.raises(InputError, match="calibrations names folders that are not built"):
        build_database(rows, net, feature, tmp_path / "x", calibrations={out: {"chosen": CHOSEN}}, progress=False)
    stages.fit(out, index="IVF2,Flat")
    stages.add(out, progress=False)
    stages.merge(out)
    assert open_stored(out, net).k == K
    stages.verify(out)
    assert (open_stored(out, net).k, open_stored(out, net).weighting) == (K, "uniform")


# -- from before there were digests --------------------------------------------------------------------------------


def aged(root: Path) -> None:
    """Make a folder what older versions wrote: records without digests, a guard bound to the manifest's bytes."""

    def old(path: Path, *entries: str, **values: Any) -> None:
        value = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value[name] for name in value if name not in ("digest", *entries)}))

    old(root / "database" / "manifest.json", "beside")
    old(root / "database" / "guard.json", manifest=sha256_of(root / "database" / "manifest.json"))
    old(root / "classifier" / "classifier.json")


def test_older_databases_open_with_a_warning_and_are_sealed_without_building(copied: Path) -> None:
    expected = answers(copied)
    aged(copied)
    assert answers(copied) == expected
    with pytest.warns(UserWarning, match="index verify --seal") as told:
        Guard.open(copied / "database", device="cpu")
    asked = [str(one.message) for one in told if "index verify --seal" in str(one.message)]
    assert [text.split(" was made before")[0] for text in asked] == [
        str(copied / "classifier"),
        str(copied / "database"),
    ]
    rows = {path.name: path.read_bytes() for path in (copied / "database").iterdir() if path.suffix != ".json"}
    found = nndefense("index", "verify", "--seal", copied / "database")
    assert found.code == 0, found.err
    assert "is whole" in found.out
    assert {name: (copied / "database" / name).read_bytes() for name in rows} == rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Guard.open(copied / "database", device="cpu")
    assert answers(copied) == expected
    (copied / "database" / "calibration.json").unlink()
    with pytest.raises(DatabaseError, match="missing, though the database was made with it"):
        answers(copied)
    # To go on without it is a decision that somebody has to take.
    assert nndefense("index", "verify", "--seal", copied / "database").code == 0
    assert Guard.open(copied / "database", device="cpu").k == 50


@pytest.mark.parametrize("after", [False, True])
def test_sealing_interrupted_anywhere_changes_no_answer(copied: Path, after: bool) -> None:
    expected = answers(copied)
    aged(copied)
    for number in itertools.count():
        root = copied / str(number)
        for name in ("classifier", "database"):
            shutil.copytree(copied / name, root / name)
        with pytest.MonkeyPatch.context() as patch:
            interrupted_at(number, after, patch)
            try:
                seal_records(root / "database", root / "classifier")
            except PowerCut:
                ended = False
            else:
                ended = True
        assert answers(root) == expected
        if ended:
            break
    assert number == 3


def test_what_does_not_belong_together_is_not_sealed(made: Path, copied: Path) -> None:
    aged(copied)
    database = copied / "database"
    for name, message in (("guard.json", "another state"), ("rows-00000.h5", "wrong sha256")):
        with damaged(database / name, (made / "b" / "database" / name).read_bytes()):
            fails(5, message, "index", "verify", "--seal", database)
    fails(5, "another classifier", "index", "verify", "--seal", database, "--classifier", made / "b" / "classifier")
    (database / "guard.json").unlink()
    rewrite(database / "manifest.json", lambda value: (value["classes"].reverse(), value.update(beside={})))
    (database / "calibration.json").unlink()
    fails(5, "other classes than the classifier", "index", "verify", "--seal", database)


def test_verify_covers_calibration_guard_and_the_classifier_that_is_given(made: Path, copied: Path) -> None:
    database = copied / "database"
    found = nndefense("index", "verify", database, "--classifier", copied / "classifier", "--json").json
    assert found["calibrated"] == {"k": K, "weighting": "uniform"}
    assert (found["guard"], found["classifier"]) == (30, untrained().fingerprint)
    assert nndefense("index", "verify", database, "--json").json["classifier"] is None
    fails(5, "another classifier", "index", "verify", database, "--classifier", made / "b" / "classifier")
    manifest = Manifest.read(database)
    replace(manifest, created="later").write(database)
    fails(5, "another state of the database", "index", "verify", database)


def test_classifiers_and_guards_alone_can_be_sealed(made: Path, copied: Path, tmp_path: Path) -> None:
    aged(copied)
    shutil.copy(copied / "database" / "guard.json", tmp_path / "far.json")
    for path in (copied / "classifier", tmp_path / "far.json"):
        assert nndefense("index", "verify", "--seal", path).code == 0
    assert "digest" in json.loads((tmp_path / "far.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_classifier(copied / "classifier").classes == untrained().classes
    fails(2, "is no database", "index", "verify", "--seal", tmp_path)


def test_a_net_of_ones_own_that_names_no_classes_has_those_of_the_database(tmp_path: Path) -> None:
    from nndefense.defenses.stored import open_stored

    code = "import sys; from helpers import untrained\ndef net():\n    made = untrained().net\n    return made\n"
    (tmp_path / "own.py").write_text(code)
    names = [f"class {number}" for number in range(10)]
    source = f"python:{tmp_path / 'own.py'}:net"
    net = load_classifier(source, classes=names, input_shape=(1, 8, 8), device="cpu")
    build_database(digits("train").subset(np.arange(9)), net, BLOCK2, tmp_path / "db", progress=False)
    assert open_stored(tmp_path / "db", source, device="cpu").classifier.classes == tuple(names)
