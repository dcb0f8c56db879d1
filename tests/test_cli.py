"""The command: a whole path on real digits, its output, and one line with the right exit code for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from command import fails, nndefense
from helpers import digits, rewrite, trained
from PIL import Image
from typer.testing import CliRunner

from nndefense.cli import main
from nndefense.cli.app import build
from nndefense.database import ImageDatabase
from nndefense.datasets import open_dataset
from nndefense.errors import DataError, NNDefenseError
from nndefense.evaluation import AttackSettings
from nndefense.guard import Guard
from nndefense.models import build_classifier, load_classifier, save_classifier
from nndefense.pipeline import write_attacked

REPOSITORY = Path(__file__).resolve().parent.parent
DIGITS = [str(digit) for digit in range(10)]
REQUIRED = {
    "dataset", "defense", "attack", "threat_model", "norm", "eps", "eps_raw", "n", "accuracy", "ci_low", "ci_high",
    "seed", "seconds", "classifier", "database",
}  # fmt: skip
SHORT = ["--steps", "2", "--quiet"]


@dataclass(frozen=True)
class Work:
    """What the commands of the sequence made."""

    folder: Path
    said: dict[str, dict[str, Any]]

    @property
    def classifier(self) -> Path:
        return self.folder / "classifier"

    @property
    def database(self) -> Path:
        return self.folder / "database"

    @property
    def both(self) -> list[object]:
        return ["--classifier", self.classifier, "--database", self.database]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A trained classifier and a database of 300 digits; every other case starts from these."""
    folder = tmp_path_factory.mktemp("cli")
    said = {}
    said["train"] = nndefense(
        "train", "--dataset", "digits:train[:300]", "--validation", "digits:test[:50]", "--epochs", 1, "--lr", 3e-3,
        "--out", folder / "classifier", "--quiet", "--json",
    ).json  # fmt: skip
    said["build"] = nndefense(
        "index", "build", "--dataset", "digits:train[:300]", "--classifier", folder / "classifier", "--layer", "block2",
        "--out", folder / "database", "--quiet", "--json",
    ).json  # fmt: skip
    return Work(folder, said)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, three a class: grey in one folder, the same in colour in another."""
    folder = tmp_path_factory.mktemp("photos")
    data = open_dataset("digits:test")
    for digit in range(10):
        for number, row in enumerate(np.flatnonzero(data.labels == digit)[:3]):
            pixels = (data[int(row)][0][0].numpy() * 255).round().astype(np.uint8)
            for kind, mode in (("grey", "L"), ("colour", "RGB")):
                place = folder / kind / str(digit)
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).convert(mode).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def colour(work: Work) -> Path:
    """A classifier of colour images (untrained)."""
    folder = work.folder / "colour"
    save_classifier(build_classifier("small-cnn", input_shape=(3, 8, 8), classes=DIGITS), folder)
    return folder


# -- the sequence -------------------------------------------------------------------------------------------------


def test_train(work: Work) -> None:
    said = work.said["train"]
    classifier = load_classifier(work.classifier)
    assert said["classifier"] == str(work.classifier)
    assert said["fingerprint"] == classifier.fingerprint
    test = open_dataset("digits:test[:50]")
    images, labels = test.batch(range(50))
    with torch.no_grad():
        right = float((classifier(images).argmax(1) == labels).float().mean())
    assert said["validation_accuracy"] == pytest.approx(right)
    assert said["training_accuracy"] > 0.3


def test_index_build_info_and_verify(work: Work) -> None:
    info = nndefense("index", "info", work.database, "--json").json
    assert info == work.said["build"]
    assert (info["rows"], info["classes"], info["calibrated"]) == (300, 10, None)
    assert info["classifier"]["fingerprint"] == work.said["train"]["fingerprint"]
    assert info["data"]["specs"] == ["digits:train[:300]"]
    found = nndefense("index", "verify", work.database, "--json").json
    assert (found["ok"], found["rows"], found["index_rows"]) == (True, 300, 300)
    # Without --json the same is said for people.
    text = nndefense("index", "info", work.database).out
    assert "300 rows" in text
    assert "block2" in text
    assert "is whole" in nndefense("index", "verify", work.database).out


def test_calibrate_then_classify_and_evaluate(work: Work, photos: Path, tmp_path: Path) -> None:
    database, out = tmp_path / "calibrated", tmp_path / "evaluated"
    said = nndefense(
        "calibrate", "--dataset", "digits:train[:300]", "--classifier", work.classifier, "--out", database,
        "--holdout", 40, "--layers", "block2,block3", "--poolings", "avg", "--ks", "1,5", "--eps", "0.1",
        "--objective", "gray", "--build-anyway", *SHORT, "--json",
    ).json  # fmt: skip
    calibration = said["calibration"]
    assert (said["rows"], calibration["n"], calibration["candidate_rows"]) == (300, 40, 260)
    assert len(calibration["table"]) == 2 * 2 * 3
    assert calibration["chosen"] in calibration["table"]
    assert calibration["attack"] == {
        "name": "pgd", "norm": "normalized-l2", "eps": [0.1], "steps": 2, "restarts": 1,
    }  # fmt: skip
    chosen = {name: calibration["chosen"][name] for name in ("k", "weighting")}
    assert nndefense("index", "info", database, "--json").json["calibrated"] == chosen

    files = sorted(photos.glob("grey/*/0.png"))
    answer = nndefense(
        "classify", *files, "--classifier", work.classifier, "--database", database, "--top", 3, "--json"
    ).json
    assert {name: answer[name] for name in chosen} == chosen
    assert [image["file"] for image in answer["images"]] == [str(file) for file in files]
    for image in answer["images"]:
        assert len(image["top"]) == len(image["bare"]["top"]) == 3
        assert image["agree"] == (image["class"] == image["bare"]["class"])
        assert len(image["neighbors"]) == min(3, chosen["k"])
        assert all(neighbor["id"].startswith("digits/") for neighbor in image["neighbors"])
    # Options beat the calibration.
    other = nndefense(
        "classify", files[0], "--classifier", work.classifier, "--database", database, "--k", 7, "--weighting", "cbw-e",
        "--json",
    ).json  # fmt: skip
    assert (other["k"], other["weighting"]) == (7, "cbw-e")

    results = nndefense(
        "evaluate", "--dataset", "digits:test", "--classifier", work.classifier, "--database", database, "--out", out,
        "--surrogate", work.classifier, "--eps", "0.1,0.3", "--limit", 30, "--gallery", 2, *SHORT,
        "--adaptive-steps", 2, "--no-audit", "--json",
    ).json  # fmt: skip
    assert results == json.loads((out / "results.json").read_text())
    assert "<html" in (out / "report.html").read_text()
    # The budget that it was calibrated for is the headline, though it is not the largest.
    assert results["headline"]["eps"] == 0.1
    assert results["calibration"] == {name: value for name, value in calibration.items() if name != "ids"}
    assert len(calibration["ids"]) == 40
    assert results["command"].startswith("nndefense evaluate --dataset digits:test")
    cells = {(r["defense"], r["threat_model"], r["eps"]) for r in results["records"]}
    assert {("nearest-neighbor", threat, eps) for threat in ("gray", "black") for eps in (0.1, 0.3)} <= cells
    assert all(r["n"] == 30 for r in results["records"])


def test_attack_keeps_the_images(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "attacked.h5"
    words = [
        "attack", "--dataset", "digits:test[:40]", "--classifier", work.classifier, "--out", out, "--eps", "8/255",
        *SHORT, "--json",
    ]  # fmt: skip
    said = nndefense(*words).json
    clean, attacked = open_dataset("digits:test[:40]"), open_dataset(f"hdf5:{out}")
    assert list(attacked.ids) == list(clean.ids)
    assert attacked.classes == clean.classes
    a, labels = attacked.batch(range(40))
    moved = (a - clean.batch(range(40))[0]).abs()
    assert 0 < float(moved.max()) <= 8 / 255 + 1e-6
    with torch.no_grad():
        right = float((load_classifier(work.classifier)(a).argmax(1) == labels).float().mean())
    assert said["attacked"]["accuracy"] == pytest.approx(right)
    assert said["attacked"]["ci_low"] < right < said["attacked"]["ci_high"]
    assert (said["n"], said["attack"]["eps"], said["attack"]["norm"]) == (40, [8 / 255], "linf")
    fails(2, "--overwrite", *words)
    assert nndefense(*words, "--overwrite").json == said


@pytest.mark.parametrize("target", ["3", "least-likely", "random"])
def test_an_attack_towards_a_class_says_how_often_and_how_surely_it_is_reached(target: str, tmp_path: Path) -> None:
    data, net, settings = digits("test").subset(range(60)), trained(), AttackSettings("pgd", "linf", (0.4,), 20)
    said = write_attacked(settings, net, data, tmp_path / "a.h5", target=target, batch_size=25, progress=False)
    clean, labels = data.batch(range(60))
    moved = open_dataset(f"hdf5:{tmp_path / 'a.h5'}").batch(range(60))[0]
    with torch.no_grad():
        before, after = net(clean), net(moved).softmax(1)
    goals, aim = after.argmax(1), said["target"]
    if target == "3":
        goals = torch.full_like(labels, 3)
        assert torch.equal(moved[labels == 3], clean[labels == 3])
    if target == "least-likely":
        goals = before.scatter(1, labels[:, None], torch.inf).argmin(1)
    others = goals != labels
    reached = (after.argmax(1) == goals) & others
    if target != "random":
        assert aim["n"] == int(others.sum())
        assert aim["success"]["share"] == pytest.approx(float(reached.sum() / others.sum()))
        assert aim["before"]["share"] == pytest.approx(float((before.argmax(1) == goals)[others].double().mean()))
        assert aim["confidence"] == pytest.approx(float(after.amax(1)[reached].mean()), abs=1e-6)
    assert aim["success"]["ci_low"] < aim["success"]["share"] < aim["success"]["ci_high"] or target == "3"
    assert aim["success"]["share"] > 0.6
    wrong = after.argmax(1) != labels
    assert said["attacked"]["accuracy"] == pytest.approx(1 - float(wrong.double().mean()))
    assert said["attacked"]["confidence_wrong"] == pytest.approx(float(after.amax(1)[wrong].mean()), abs=1e-6)
    share = aim["success"]["share"] + aim["merely_wrong"]["share"]
    assert share * aim["n"] == pytest.approx(int((wrong & others).sum()))
    # Neither the targets nor who is attacked depend on the batch size.
    once = write_attacked(settings, net, data, tmp_path / "b.h5", target=target, batch_size=60, progress=False)
    assert once["target"]["n"] == aim["n"]
    assert once["target"]["before"] == aim["before"]


def test_the_command_attacks_towards_a_class_and_refuses_what_is_none(work: Work, tmp_path: Path) -> None:
    words = ["attack", "--dataset", "digits:test[:20]", "--classifier", work.classifier, "--eps", "0.5", *SHORT]
    done = nndefense(*words, "--out", tmp_path / "a.h5", "--target", "7")
    assert re.search(
        r"target 7: reached by [01]\.\d{3} \[.*\] of \d+ images of other classes \([01]\.\d{3} before\)", done.out
    )
    assert re.search(r"clean accuracy [01]\.\d{3} \[.*\], mean confidence [01]\.\d{3}", done.out)
    words += ["--out", tmp_path / "b.h5"]
    fails(2, "'ten' is not one of the classifier's 10 classes", *words, "--target", "ten")
    fails(2, "leave the target (--target) out, or take fgsm, pgd", *words, "--target", "7", "--attack", "fab")
    assert not (tmp_path / "b.h5").exists()


def test_a_target_that_all_images_have_is_refused(tmp_path: Path) -> None:
    data = digits("test")
    threes = data.subset(np.flatnonzero(data.labels == 3)[:5])
    with pytest.raises(DataError, match=r"all images of .* are of the class '3': choose another target"):
        write_attacked(AttackSettings(steps=1), trained(), threes, tmp_path / "a.h5", target="3", progress=False)


@pytest.mark.slow
def test_demo_and_again_in_the_same_folder(tmp_path: Path) -> None:
    words = [
        "demo", "--dataset", "digits:train[:300]", "--holdout", 40, "--epochs", 1, "--out", tmp_path / "demo",
        "--surrogate-arch", "small-cnn", "--layers", "block1,block3", "--poolings", "avg", "--ks", "1,5",
        "--eps", "0.1,8/40", "--headline", "8/40", "--limit", 20, "--gallery", 2, *SHORT, "--adaptive-steps", 2,
        "--no-audit", "--json",
    ]  # fmt: skip
    # What is said is what is looked at.
    words.remove("--quiet")
    done = nndefense(*words)
    results = done.json
    assert "calibrating: 2 layers" in done.err
    assert "nothing is proven: the exact accuracy needs a feature that is affine" in done.err
    out = tmp_path / "demo"
    assert {path.name for path in out.iterdir()} == {
        "results.json", "report.html", "classifier", "surrogate", "database", "cells",
    }  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == results
    assert results["classifier"]["fingerprint"] == load_classifier(out / "classifier").fingerprint
    assert results["surrogate"]["fingerprint"] == load_classifier(out / "surrogate").fingerprint
    # Of the 40 that were held out, 20 stand in no database: the guard is calibrated on them.
    assert results["database"]["rows"] == 280
    guard = Guard.open(out / "database", device="cpu")
    assert guard.calibration is not None
    assert len(guard.calibration) == 20
    assert not {sample.id for sample in guard.samples(20)} & set(guard.database.ids(guard.database.row_numbers))
    assert guard.describe()["pictures"]
    names = set()
    for record in results["records"]:
        assert set(record) >= REQUIRED
        names.add(record["defense"])
        assert 0 <= record["ci_low"] <= record["accuracy"] <= record["ci_high"] <= 1
        assert record["database"] is None if record["defense"] == "none" else record["database"]
    assert {"none", "nearest-neighbor"} < names
    assert all(name.startswith("nearest-neighbor") for name in names - {"none"})
    assert {r["threat_model"] for r in results["records"]} == {"clean", "gray", "black", "white", "adaptive", "worst"}
    assert {r["eps"] for r in results["records"]} == {0.0, 0.1, 0.2}

    again = nndefense(*words).json

    def accuracies(value: dict[str, Any]) -> list[tuple[object, ...]]:
        return [(r["defense"], r["threat_model"], r["eps"], r["accuracy"]) for r in value["records"]]

    assert accuracies(again) == accuracies(results)
    assert again["database"]["fingerprint"] == results["database"]["fingerprint"]


def test_grey_files_and_a_colour_classifier(colour: Path, photos: Path, tmp_path: Path) -> None:
    database = tmp_path / "database"
    build = nndefense(
        "index", "build", "--dataset", f"imagefolder:{photos / 'colour'}", "--classifier", colour, "--layer", "block1",
        "--out", database, "--quiet", "--json",
    )  # fmt: skip
    assert build.json["rows"] == 30
    words = ["--classifier", colour, "--database", database, "--k", 3]
    grey, colourful = photos / "grey" / "4" / "1.png", photos / "colour" / "4" / "1.png"
    fails(2, "is grey, but the classifier takes colour images: give --convert", "classify", grey, *words)
    converted, plain = (
        nndefense("classify", *given, *words, "--json").json["images"][0]
        for given in ([grey, "--convert"], [colourful])
    )
    assert converted["top"] == plain["top"]
    # The colour picture is in the database, so it must find itself.
    assert plain["neighbors"][0]["id"].endswith("4/1.png")
    assert plain["neighbors"][0]["distance"] == pytest.approx(0, abs=1e-3)


def test_the_app_can_be_called_by_typer_too() -> None:
    app = build()
    done = CliRunner().invoke(app, ["train", "--dataset", "nonsense", "--out", "nowhere"])
    assert isinstance(done.exception, DataError)
    assert CliRunner().invoke(app, ["evaluate", "--help"]).exit_code == 0


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--bogus"], "No such option: --bogus"),
        (["nonsense"], "No such command"),
        (["train", "--dataset", "digits"], "--out"),
        (["train", "--dataset", "digits", "--out", "x", "--device", "tpu"], "--device"),
        (["train", "--dataset", "digits", "--out", "x", "--epochs", "0"], "--epochs"),
        (["train", "--dataset", "digits", "--out", "x", "--seed", "-1"], "--seed"),
        (["train", "--dataset", "digits", "--out", "x", "--lr", "nan"], "learning rate"),
        (["train", "--dataset", "digits", "--out", "x", "--arch", "small_cnn"], "did you mean small-cnn"),
        (["train", "--dataset", "digits", "--out", "x", "--resume"], "no training to resume"),
        (["demo", "--eps", "nan"], "not a list of numbers"),
        (["demo", "--eps", "nan"], "--eps is 'nan'"),
        (["demo", "--ks", "0"], "--ks is '0'"),
        (["theory", "directions", "--theta", "x"], "--theta is 'x'"),
        (["demo", "--no-adaptive", "--attack", "rank-margin"], "leave --no-adaptive out"),
        (["train", "--dataset", "digits", "--out", "x", "--source-cache", "y"], "leave --source-cache out"),
        (["demo", "--eps", "0.1,inf"], "not a list of numbers"),
        (["demo", "--eps", "0"], "above 0"),
        (["demo", "--eps=-0.1"], "above 0"),
        (["demo", "--eps", "8/0"], "not a list of numbers"),
        (["demo", "--eps", ""], "not a list of numbers"),
        (["demo", "--eps", "1,5"], "headline"),
        (["demo", "--norm", "linf", "--eps", "16"], "eps (--eps) is 16 in linf"),
        (["demo", "--norm", "linf", "--eps", "16"], "give 16/255 = 0.0627"),
        (["train", "--dataset", "digits", "--out", "x", "--objective", "adversarial", "--eps", "8"], "8/255 = 0.0314"),
        (["evaluate", "table2", "--dataset", "digits", "--norm", "linf", "--eps", "2,4"], "4/255 = 0.0157"),
        (["demo", "--headline", "0.2,0.3"], "one number"),
        (["demo", "--ks", "nan"], "not a list of numbers"),
        (["demo", "--ks", "0"], "whole numbers"),
        (["demo", "--ks", "2.5"], "whole numbers"),
        (["demo", "--norm", "l0"], "--norm"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--input-shape", "3,224"], "--input-shape"),
        (["demo", "--dataset", "imagefolder:photos"], "--test"),
        (["demo", "--holdout", "5000"], "hold out"),
        (["demo", "--layers", "block9", "--holdout", "100000"], "hold out"),
    ],
)  # fmt: skip
def test_wrong_options(words: Sequence[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fails(2, message, *words)
    # Nothing was begun.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path) -> None:
    fails(2, "no CUDA GPU", "train", "--dataset", "digits", "--out", tmp_path / "x", "--device", "cuda")


def test_missing_and_damaged_data(work: Work, photos: Path, tmp_path: Path) -> None:
    build = ["index", "build", "--classifier", work.classifier, "--layer", "block2", "--quiet", "--out", tmp_path / "d"]
    fails(3, "unknown data set", *build, "--dataset", "digit")
    fails(3, "nothing at", *build, "--dataset", f"imagefolder:{tmp_path / 'nowhere'}")
    fails(3, "nothing at", *build, "--dataset", f"hdf5:{tmp_path / 'nowhere.h5'}")
    (tmp_path / "empty").mkdir()
    fails(3, "is empty", *build, "--dataset", f"imagefolder:{tmp_path / 'empty'}")
    damaged = shutil.copytree(photos / "grey", tmp_path / "damaged")
    file = damaged / "7" / "2.png"
    file.write_bytes(file.read_bytes()[:-40])
    fails(3, "7/2.png", *build, "--dataset", f"imagefolder:{damaged}", "--max-rejected", 0)
    # A build that failed leaves no database behind.
    fails(5, "no", "index", "info", tmp_path / "d")
    fails(3, str(file), "classify", file, *work.both)
    fails(3, "no-such.png", "classify", tmp_path / "no-such.png", *work.both)


def test_missing_and_unsafe_classifiers(work: Work, tmp_path: Path) -> None:
    evaluate = ["evaluate", "--dataset", "digits:test", "--database", work.database, "--out", tmp_path / "out"]
    fails(4, "no classifier at", *evaluate, "--classifier", tmp_path / "nowhere")
    (tmp_path / "net.pth").write_bytes(b"\x80\x04.")
    fails(4, "pickle", *evaluate, "--classifier", tmp_path / "net.pth")
    weights = shutil.copytree(work.classifier, tmp_path / "broken") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    fails(4, "damaged", *evaluate, "--classifier", tmp_path / "broken")
    fails(4, "no classifier at", *evaluate, "--classifier", work.classifier, "--surrogate", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_missing_and_damaged_databases(work: Work, colour: Path, photos: Path, tmp_path: Path) -> None:
    fails(5, "no database at", "index", "info", tmp_path / "nowhere")
    (tmp_path / "unfinished").mkdir()
    fails(5, "no finished database", "index", "verify", tmp_path / "unfinished")

    truncated = shutil.copytree(work.database, tmp_path / "truncated")
    rows = truncated / "rows-00000.h5"
    rows.write_bytes(rows.read_bytes()[:-100])
    fails(5, "truncated", "index", "info", truncated)
    picture = photos / "grey" / "0" / "0.png"
    fails(5, "truncated", "classify", picture, "--classifier", work.classifier, "--database", truncated)

    changed = shutil.copytree(work.database, tmp_path / "changed")
    rows = changed / "rows-00000.h5"
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(bytes(content))
    assert nndefense("index", "info", changed).code == 0
    fails(5, "wrong sha256", "index", "verify", changed)
    fails(5, "wrong sha256", "classify", picture, "--classifier", work.classifier, "--database", changed)

    other = tmp_path / "other"
    save_classifier(build_classifier("small-cnn", input_shape=(1, 8, 8), classes=DIGITS, seed=1), other)
    # One of the same shape, and one for colour images: neither is the one that the database was made with.
    for source in (other, colour):
        fails(
            5, "made with another classifier", "classify", picture, "--classifier", source, "--database", work.database
        )
    fails(
        5, "already holds a database",
        "index", "build", "--dataset", "digits:train[:300]", "--classifier", work.classifier, "--layer", "block2",
        "--out", work.database, "--quiet",
    )  # fmt: skip


def test_more_neighbours_than_rows(work: Work, photos: Path, tmp_path: Path) -> None:
    message = "k is 301, but must be from 1 to the database's 300 rows"
    fails(2, message, "classify", photos / "grey" / "0" / "0.png", *work.both, "--k", 301)
    fails(2, message, "evaluate", "--dataset", "digits:test", *work.both, "--out", tmp_path / "out", "--k", 301)


def test_images_that_would_find_themselves(work: Work, tmp_path: Path) -> None:
    evaluate = ["evaluate", "--out", tmp_path / "out", "--eps", "0.1", "--limit", 10, *SHORT, "--no-adaptive"]
    evaluate += ["--no-audit"]
    fails(3, "stand in", *evaluate, "--dataset", "digits:train[290:400]", *work.both)
    part = tmp_path / "part"
    built = nndefense(
        "index", "build", "--dataset", "digits:train", "--limit", 60, "--classifier", work.classifier,
        "--layer", "block2", "--out", part, "--quiet", "--json",
    )  # fmt: skip
    assert built.json["rows"] == 60
    two = ["--classifier", work.classifier, "--database", part]
    fails(3, "stand in digits:train (60 of 1297)", *evaluate, "--dataset", "digits:train", *two)
    # Where the images cannot be opened again by name, they are recognised by their features.
    rewrite(part / "manifest.json", lambda manifest: manifest["data"].update(specs=[]))
    fails(3, "stand in the database", *evaluate, "--dataset", "digits:train", *two)
    assert nndefense(*evaluate, "--dataset", "digits:test", *two, "--gallery", 0, "--no-sizes", "--k", 5).code == 0

    calibrate = [
        "calibrate", "--dataset", "digits:train[:300]", "--classifier", work.classifier, "--out", tmp_path / "c",
        "--layers", "block2", "--poolings", "avg", "--ks", "1", "--eps", "0.1", *SHORT,
    ]  # fmt: skip
    fails(3, "stand in", *calibrate, "--calibration", "digits:train[250:350]")
    assert not (tmp_path / "c").exists()
    demo = ["demo", "--dataset", "digits:test", "--out", tmp_path / "demo", *SHORT]
    fails(2, "which images of digits:test are the test images cannot be guessed: give --test", *demo)
    fails(3, "stand in", *demo, "--test", "digits:test")
    assert not (tmp_path / "demo").exists()


def test_calibrate_on_few_images_lowers_holdout_and_pca(work: Work, tmp_path: Path) -> None:
    words = ["calibrate", "--classifier", work.classifier, "--layers", "block1", "--poolings", "flatten", "--ks", "1"]
    words += ["--eps", "0.1", "--steps", "1", "--objective", "gray", "--build-anyway"]
    done = nndefense(*words, "--dataset", "digits:train[:61]", "--out", tmp_path / "few")
    assert done.code == 0, done.err
    assert "digits:train[:61] has 61 images: 20 of them are held out to calibrate on" in done.err
    assert "41 images are too few for a PCA to 256 dimensions: 20 are kept" in done.err
    assert ImageDatabase.open(tmp_path / "few").dimension == 20
    # What was said is not changed, and nothing is said where nothing was lowered.
    done = nndefense(*words, "--dataset", "digits:train[:61]", "--out", tmp_path / "said", "--holdout", 5, "--pca", 9)
    assert done.code == 0, done.err
    assert "images" not in done.err
    assert ImageDatabase.open(tmp_path / "said").dimension == 9
    fails(2, "cannot hold out 61", *words, "--dataset", "digits:train[:61]", "--out", tmp_path / "no", "--holdout", 61)


def test_settings_that_fit_no_run(work: Work, colour: Path, tmp_path: Path) -> None:
    evaluate = ["evaluate", "--dataset", "digits:test", *work.both, "--out", tmp_path / "out", "--eps", "0.1", *SHORT]
    fails(2, "headline", *evaluate, "--headline", "0.7")
    fails(4, "takes images 3 x 8 x 8", *evaluate, "--surrogate", colour)
    save_classifier(build_classifier("strided-cnn", input_shape=(1, 12, 10), classes=DIGITS), tmp_path / "larger")
    fails(4, "(nndefense train --size 8,8 makes one)", *evaluate, "--surrogate", tmp_path / "larger")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_out(work: Work, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    fails(2, "file is in its place", "train", "--dataset", "digits", "--out", file)
    fails(2, "file is in its place", "demo", "--out", file / "demo")
    fails(2, "file is in its place", "evaluate", "--dataset", "digits:test", *work.both, "--out", file)
    two = ["--classifier", work.classifier, "--dataset", "digits:train[:300]", "--quiet"]
    fails(2, "file is in its place", "attack", *two, "--out", file / "a.h5")
    fails(2, "file is in its place", "calibrate", *two, "--holdout", 20, "--out", file)
    fails(5, "cannot be written", "index", "build", *two, "--layer", "block2", "--out", file)
    assert file.read_text() == "mine"


# -- in a process of its own --------------------------------------------------------------------------------------


def process(*words: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_an_error_in_a_process_and_its_traceback(tmp_path: Path) -> None:
    words = ["-m", "nndefense", "index", "info", tmp_path / "nowhere"]
    plain, debugged = process(*words), process(*words, "--debug")
    out, err = plain.communicate(timeout=120)
    assert (plain.returncode, out) == (5, "")
    assert err == (
        f"nndefense: error: there is no database at {tmp_path / 'nowhere'}: build one with 'nndefense index build'\n"
    )
    _, err = debugged.communicate(timeout=120)
    assert debugged.returncode == 1
    assert "Traceback (most recent call last)" in err
    assert "DatabaseError: there is no database" in err


def test_debug_anywhere_raises(tmp_path: Path) -> None:
    for words in (["--debug", "index", "info", str(tmp_path / "x")], ["index", "info", str(tmp_path / "x"), "--debug"]):
        with mock.patch.object(sys, "argv", ["nndefense", *words]), pytest.raises(NNDefenseError, match="no database"):
            main()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.slow
def test_interrupted_training(tmp_path: Path) -> None:
    out = tmp_path / "classifier"
    # A process that a script starts in the background ignores Ctrl-C; this one must not.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from nndefense.cli import main; main()"
    )
    training = process(
        "-c", code, "train", "--dataset", "digits", "--epochs", 2000, "--out", out, "--quiet", "--device", "cpu"
    )
    try:
        ended = time.monotonic() + 120
        while not (out / "training.json").exists():
            assert training.poll() is None, training.communicate()
            assert time.monotonic() < ended
            time.sleep(0.05)
        training.send_signal(signal.SIGINT)
        said, err = training.communicate(timeout=60)
    finally:
        training.kill()
    assert training.returncode == 130
    assert (said, err) == ("", "nndefense: interrupted\n")
    fails(4, "--resume", "attack", "--dataset", "digits:test", "--classifier", out, "--out", tmp_path / "a.h5")


def test_a_reader_that_has_gone(work: Work) -> None:
    # head closes its end of the pipe before the command has said anything.
    command = process("-m", "nndefense", "index", "info", work.database, "--json")
    assert command.stdout is not None
    command.stdout.close()
    assert command.wait(timeout=120) == 1
    assert command.stderr is not None
    with command.stderr:
        assert command.stderr.read() == ""
