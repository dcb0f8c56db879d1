"""``nndefense evaluate`` with a recipe: the whole ladder on digits, killed at random and continued."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import fails, nndefense

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = """
title = "digits, the whole ladder"
batch_size = 10

[data]
dataset = "digits:test"
limit = 20

[models]
classifier = "{folder}/classifier"
surrogate = "{folder}/surrogate"

[defense]
database = "{folder}/database"
k = 5
weighting = "uniform"
sizes = false

[report]
headline_norm = "linf"
headline_eps = 0.15
gallery = 2
audit_images = 8

[[attack]]
threat_model = ["black", "gray", "white"]
norm = "linf"
eps = [0.1, 0.15]
steps = 5

[[attack]]
threat_model = "gray"
name = "apgd"
norm = "linf"
eps = [0.15]
steps = 8
loss = "margin"

[[attack]]
threat_model = "adaptive"
norm = "linf"
name = "adaptive"
eps = [0.1, 0.15]
steps = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, a surrogate and a database of digits, with the recipe for them."""
    folder = tmp_path_factory.mktemp("ladder")
    common = ["--dataset", "digits:train[:400]", "--quiet"]
    for name, seed in (("classifier", 0), ("surrogate", 1)):
        done = nndefense("train", *common, "--epochs", 3, "--seed", seed, "--out", folder / name)
        assert done.code == 0, done.err
    index = [
        "index",
        "build",
        *common,
        "--classifier",
        folder / "classifier",
        "--layer",
        "block1",
        "--pooling",
        "grid4",
    ]
    assert nndefense(*index, "--out", folder / "database").code == 0
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return folder


def evaluate(folder: Path, out: Path, *more: object) -> dict[str, Any]:
    return nndefense("evaluate", "--recipe", folder / "recipe.toml", "--out", out, "--quiet", "--json", *more).json


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return evaluate(folder, folder / "whole")


def test_the_whole_ladder(folder: Path, whole: dict[str, Any]) -> None:
    assert whole == json.loads((folder / "whole" / "results.json").read_text())
    page = (folder / "whole" / "report.html").read_text()
    for words in (
        "What it holds against whom",
        "worst case",
        "To them, of the",
        "Was the attack strong enough?",
    ):
        assert words in page
    cells = {
        (r["threat_model"], r["attack"], r["eps"]): r for r in whole["records"] if r["defense"] == "nearest-neighbor"
    }
    for threat in ("black", "gray", "white"):
        assert {(threat, "pgd", 0.1), (threat, "pgd", 0.15)} <= set(cells)
    gray, adaptive, worst = (cells[key, name, 0.15] for key, name in
                             (("gray", "apgd"), ("adaptive", "adaptive"), ("worst", "all")))  # fmt: skip
    assert worst["accuracy"] <= adaptive["accuracy"] < gray["accuracy"]
    assert (gray["knowledge"], adaptive["knowledge"], worst["knowledge"]) == ("L0", "L3", "L3")
    assert cells["black", "pgd", 0.15]["knowledge"] == ""
    assert adaptive["queries"] > 0
    assert adaptive["backwards"] > 0
    assert adaptive["attack_seconds"] > 0
    assert all(r["budget_excess"] <= 1e-6 for r in whole["records"])
    # White and adaptive images are made for the defence alone.
    assert not any(r["threat_model"] in ("white", "adaptive") and r["defense"] == "none" for r in whole["records"])
    audit = {line["name"]: line["passed"] for line in whole["audit"]}
    assert len(audit) == 15
    for name in ("budget", "evaluation mode", "determinism", "batch size", "near-duplicates", "zero gradients"):
        assert audit[name] is True, name
    assert whole["recipe"]["title"] == "digits, the whole ladder"
    assert {row["threat_model"] for row in whole["comparisons"]} == {"clean", "gray", "black", "worst"}


def timeless(value: Any) -> Any:
    """Results without what no two runs share: times, memory, place and moment of the run, and the digest over those."""
    if isinstance(value, dict):
        skipped = ("seconds", "attack_seconds", "peak_memory_mb", "created", "command", "digest")
        return {name: timeless(part) for name, part in value.items() if name not in skipped}
    return [timeless(part) for part in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_and_continued(folder: Path, whole: dict[str, Any], seed: int) -> None:
    out, chance = folder / f"killed-{seed}", random.Random(seed)
    words = ["-m", "nndefense", "evaluate", "--recipe", str(folder / "recipe.toml"), "--out", str(out), "--quiet"]
    for _ in range(3):
        running = subprocess.Popen(
            [sys.executable, *words], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # The first cells take a few seconds, most of them the start of Python.
        until, cells = time.monotonic() + 60, len(list((out / "cells").glob("*.json"))) if out.exists() else 0
        while time.monotonic() < until and running.poll() is None:
            if len(list((out / "cells").glob("*.json"))) > cells + chance.randint(0, 1):
                break
            time.sleep(0.02)
        time.sleep(chance.random() * 0.3)
        running.send_signal(signal.SIGKILL)
        running.wait()
    before = {path.name: path.read_bytes() for path in (out / "cells").glob("*.json")}
    assert before
    found = evaluate(folder, out)
    assert timeless(found) == timeless(whole)
    # What was finished was not measured again.
    assert all((out / "cells" / name).read_bytes() == data for name, data in before.items())


def test_recipes_and_options_do_not_mix(folder: Path, tmp_path: Path) -> None:
    recipe = ["evaluate", "--recipe", folder / "recipe.toml", "--out", tmp_path]
    fails(2, "leave --dataset out", *recipe, "--dataset", "digits:test")
    fails(2, "leave --eps, --limit out", *recipe, "--limit", 3, "--eps", "0.1")
    fails(2, "give --recipe, or --dataset and", "evaluate", "--out", tmp_path)
    fails(3, "there is no recipe", "evaluate", "--recipe", tmp_path / "none.toml", "--out", tmp_path)
    (tmp_path / "bad.toml").write_text(
        (folder / "recipe.toml").read_text().replace("steps = 8\nloss", "stepz = 8\nloss")
    )
    fails(2, "no entry attack.stepz", "evaluate", "--recipe", tmp_path / "bad.toml", "--out", tmp_path)


def test_a_classifier_alone(folder: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--dataset", "digits:test", "--classifier", folder / "classifier", "--limit", 12, "--quiet"]
    words += ["--norm", "linf", "--eps", "0.1,0.2", "--steps", 5, "--surrogate", folder / "surrogate"]
    found = nndefense(*words, "--out", tmp_path / "alone", "--json").json
    assert {r["defense"] for r in found["records"]} == {"none"}
    assert {r["threat_model"] for r in found["records"]} == {"clean", "gray", "black", "worst"}
    assert found["database"] is found["defense"] is None
    audit = {line["name"]: line["passed"] for line in found["audit"]}
    assert audit["near-duplicates"] is None
    assert audit["unbounded budget"] is True
    assert "What it holds against whom" in (tmp_path / "alone" / "report.html").read_text()


def test_a_database_names_its_classifier(folder: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--dataset", "digits:test", "--database", folder / "database", "--limit", 8, "--quiet"]
    words += ["--norm", "linf", "--eps", "0.1", "--steps", 1, "--no-adaptive", "--no-audit", "--no-sizes"]
    runs = [nndefense(*words, "--gallery", 0, "--out", tmp_path / "without", "--json").json]
    words += ["--classifier", folder / "classifier"]
    runs.append(nndefense(*words, "--gallery", 0, "--out", tmp_path / "with", "--json").json)
    assert timeless(runs[0])["records"] == timeless(runs[1])["records"]
    assert runs[0]["classifier"] == runs[1]["classifier"]


@pytest.mark.parametrize("attack", ["apgd", "apgd-t", "square", "fab", "deepfool"])
def test_attack_by_name(folder: Path, tmp_path: Path, attack: str) -> None:
    norm, eps = ("l2", "0.6") if attack == "deepfool" else ("linf", "0.15")
    words = ["attack", "--dataset", "digits:test", "--classifier", folder / "classifier", "--limit", 20, "--quiet"]
    words += ["--attack", attack, "--norm", norm, "--eps", eps, "--out", tmp_path / "a.h5"]
    words += ["--queries" if attack == "square" else "--steps", 20]
    said = nndefense(*words, "--json").json
    assert said["attacked"]["accuracy"] < said["clean"]["accuracy"]
    assert said["attack"]["name"] == attack


def test_one_command_sets_autoattack_on_the_net_beside_the_adaptive_attack_on_the_defence(
    folder: Path, tmp_path: Path
) -> None:
    words = ["--dataset", "digits:test", "--database", folder / "database", "--k", 5, "--limit", 8, "--norm", "linf"]
    more = [
        "--eps",
        "0.15",
        "--attack",
        "autoattack",
        "--adaptive-steps",
        4,
        "--no-audit",
        "--no-sizes",
        "--gallery",
        0,
    ]
    done = nndefense("evaluate", *words, *more, "--quiet", "--out", tmp_path)
    assert done.code == 0, done.err
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    cells = {(r["defense"], r["threat_model"], r["attack"]): r for r in records}
    # Each is attacked by what is made for it, on the same images.
    assert cells["none", "gray", "autoattack"]["correct"]
    assert cells["nearest-neighbor", "adaptive", "adaptive"]["correct"]
    # What AutoAttack's images, which stop at the net's boundary, would hide of the defence, PGD's show.
    assert ("nearest-neighbor", "gray", "pgd") in cells
    assert "no defence under AutoAttack: " in done.out
    assert "nearest neighbours under " in done.out
    assert "Side by side" in (tmp_path / "report.html").read_text(encoding="utf-8")
