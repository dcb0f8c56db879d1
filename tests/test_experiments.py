"""Recipes: read, shrunk until they run in seconds on digits, killed, resumed, and written as tables and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import fails, nndefense

from nndefense.certificates.record import Certified
from nndefense.cli import reproduce as reproduce_command
from nndefense.database import ImageDatabase
from nndefense.errors import DataError, InputError, ModelError
from nndefense.evaluation.ladder import from_hex
from nndefense.evaluation.threats import AttackSettings
from nndefense.experiments import (
    SCALES,
    ExperimentRecipe,
    Method,
    Threat,
    differences,
    figure_of,
    open_images,
    read_results,
    recipe_from,
    recipe_names,
    run,
    runs_of,
    shipped_recipe,
    tables_of,
    write_outputs,
)
from nndefense.experiments.answer import answer
from nndefense.experiments.spread import student_interval
from nndefense.experiments.threat import SPATIAL
from nndefense.experiments.train import Workshop
from nndefense.models import build_classifier, load_classifier

Results = dict[str, Any]


def tiny(recipe: ExperimentRecipe, **changes: Any) -> ExperimentRecipe:
    """The same experiment on a few digits, in a second or two: every part of it runs."""
    threats = {threat.norm: threat for threat in recipe.threats}
    # Several numbers of labels only where the figure is about them.
    labels = (0,) if not max(recipe.labels) else (40, 80) if recipe.figure == "gap" else (60,)
    # Step settings of the shipped ones that mean nothing in two short epochs.
    kept = ("optimizer", "lr", "schedule", "keep_best", "augment", "flip", "momentum", "nesterov", "weight_decay")
    settings = {name: value for name, value in recipe.settings.items() if name in kept}
    if settings.get("schedule") == "step":
        settings["milestones"] = [1]
    chosen: dict[str, Any] = {
        "train": "digits:train[:200]",
        "test": "digits:test[:40]",
        "validation": min(recipe.validation, 40),
        "architecture": "nn-strided-cnn" if recipe.forms else "strided-cnn",
        "adaptive_steps": 3,
        "threats": tuple(threats.values()),
        "labels": labels,
        "seeds": 1,
        "settings": {**settings, "epochs": 2, "batch_size": 40, "check_images": 20},
        "attack": {**recipe.attack, "steps": 2},
        "start": {**recipe.start, "settings": {"epochs": 1}} if recipe.start else {},
        "check_steps": 2,
        "evaluation": tuple(
            attack if attack.name == "fgsm" else replace(attack, steps=3, restarts=min(attack.restarts, 2))
            for attack in recipe.evaluation
            if attack.name in ("fgsm", "pgd")
        ),
        "grid": (3, 2),
        "images": 30,
        "batch_size": 16,
        **changes,
    }  # fmt: skip
    named = {"", *(threat.name for threat in chosen["threats"])}
    return replace(recipe, **{**chosen, "published": tuple(one for one in recipe.published if one.threat in named)})


def done(recipe: ExperimentRecipe, out: Path, **options: Any) -> Results:
    return run(recipe, open_images(recipe), out, device="cpu", progress=False, **options)


VALUES: dict[str, Any] = {
    "title": "T",
    "train": "digits:train",
    "test": "digits:test",
    "architecture": "strided-cnn",
    "threat": [{"norm": "linf", "eps": [0.1, "8/255"]}],
    "method": [{"name": "standard", "objective": "standard"}, {"name": "at", "objective": "adversarial"}],
    "evaluation": [{"name": "pgd", "steps": 3}],
    "small": {},
}


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_can_be_read(name: str, scale: str) -> None:
    recipe = shipped_recipe(name, scale)
    assert recipe.title
    assert recipe.about
    assert recipe.sources
    assert recipe.scale == scale
    for method in recipe.methods:
        settings = recipe.settings_of(method, 50_000)
        assert settings.epochs >= 1
        if settings.keep_best:
            assert recipe.validation > 0
    # The full scale is the stronger one.
    if scale == "full" and recipe.evaluation:
        assert recipe.evaluation[0].steps >= shipped_recipe(name, "small").evaluation[0].steps


def test_the_recipes_are_those_that_are_promised() -> None:
    assert set(recipe_names()) >= {
        "tsipras-mnist", "tsipras-cifar10", "madry-mnist", "madry-cifar10", "trades-cifar10", "rst-cifar10",
        "gap-vs-labels", "rotations", "rst-mnist",
    }  # fmt: skip


def test_papers_settings_at_full_scale() -> None:
    madry = shipped_recipe("madry-mnist")
    robust = madry.methods[2]
    attack: Any = madry.attack_of(robust, madry.threats[0])
    assert (attack.eps, attack.steps, attack.step_size, attack.start) == (0.3, 40, 0.01, "uniform")
    trades = shipped_recipe("trades-cifar10")
    attack = trades.attack_of(trades.methods[2], trades.threats[0])
    assert (attack.eps, attack.steps, attack.step_size, attack.start) == (0.031, 10, 0.007, "gaussian")
    assert trades.methods[2].weights == {"beta": 6.0}
    rotations = shipped_recipe("rotations")
    assert rotations.grid[0] * rotations.grid[1] ** 2 == 775
    draws = [getattr(rotations.attack_of(method, rotations.threats[0]), "draws", None) for method in rotations.methods]
    assert draws == [None, 10, 1, 10, 1]
    tsipras = shipped_recipe("tsipras-mnist")
    assert [(threat.norm, threat.eps) for threat in tsipras.threats] == [
        ("linf", 0.1), ("linf", 0.2), ("linf", 0.3), ("l2", 0.5), ("l2", 1.5), ("l2", 2.5),
    ]  # fmt: skip
    # Standard training once, the other two for every threat.
    assert len(runs_of(tsipras)) == 13


def test_a_scale_replaces_what_stands_at_the_top() -> None:
    values = {
        **VALUES,
        "seeds": 3,
        "settings": {"epochs": 5, "lr": 1.0},
        "small": {"settings": {"epochs": 2}, "seeds": 1},
    }
    recipe = recipe_from(values, "r", "small")
    assert recipe.settings == {"epochs": 2, "lr": 1.0}
    assert recipe.seeds == 1
    assert [threat.name for threat in recipe.threats] == ["linf-0.1", "linf-8of255"]
    assert recipe.threats[1].eps == pytest.approx(8 / 255)


def test_a_scale_can_have_methods_of_its_own() -> None:
    own = [{"name": "standard", "objective": "standard", "settings": {"epochs": 3}}]
    values = {**VALUES, "full": {}, "small": {"method": own}, "compare": []}
    assert [dict(method.settings) for method in recipe_from(values, "r", "small").methods] == [{"epochs": 3}]
    assert len(recipe_from(values, "r", "full").methods) == len(VALUES["method"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sede": 1}, "no entry sede"),
        ({"seeds": "many"}, "seeds is 'many', but must be a whole number"),
        ({"seeds": True}, "seeds is True"),
        ({"seeds": 0}, "seeds is 0"),
        ({"threat": [{"norm": "l3", "eps": 1}]}, "l3"),
        ({"threat": [{"norm": "linf"}]}, "needs eps"),
        ({"threat": [{"norm": "linf", "eps": -0.1}]}, "above 0"),
        ({"threat": [{"norm": "linf", "eps": 8}]}, "8/255"),
        ({"threat": [{"norm": "linf", "eps": "8/0"}]}, "quotient"),
        ({"threat": []}, "needs threats"),
        ({"threat": [{"norm": "linf", "eps": [0.1, 0.1]}]}, "one name"),
        ({"method": [{"name": "x", "objective": "magic"}]}, "magic"),
        ({"method": [{"name": "x", "objective": "trades", "weights": {"gamma": 1}}]}, "gamma"),
        ({"method": [{"name": "x"}]}, "needs method.objective"),
        ({"method": [{"name": "r", "objective": "rst-at"}]}, "standard"),
        ({"method": [{"name": "r", "objective": "trades", "pool": True}]}, "trades has none"),
        ({"method": [{"name": "r", "objective": "retrieval", "pool": True}]}, "pseudo-labels come from the method"),
        ({"settings": {"learning_rate": 1}}, "learning_rate"),
        ({"settings": {"lr": -1.0}}, "learning rate"),
        ({"settings": {"keep_best": True}}, "validation"),
        ({"attack": {"eps": 3}}, "attack"),
        ({"attack": {"steps": 0}}, "steps"),
        ({"start": {"radius": 1}}, "start has no entry radius"),
        ({"evaluation": []}, "[[evaluation]]"),
        ({"evaluation": [{"name": "deepfool"}]}, "deepfool"),
        ({"architecture": "perceptron"}, "perceptron"),
        ({"labels": [-1]}, "labels"),
        ({"compare": [["at", "robust"]]}, "robust"),
        ({"published": [{"method": "at", "threat": "l2-1"}]}, "l2-1"),
        ({"layout": "round"}, "round"),
        ({"grid": [3]}, "grid is [3], but must be a list of 2"),
        ({"compare": [["at", 1]]}, "compare is 1, but must be text"),
        ({"threat": {"norm": "linf"}}, "[[threat]] tables"),
        ({"evaluation": [{"name": "pgd", "eps": 1}]}, "no entry evaluation.eps"),
        ({"small": None}, "no table [small]"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    values = {key: value for key, value in {**VALUES, **changes}.items() if value is not None}
    with pytest.raises(InputError, match="recipe r at scale small") as caught:
        recipe_from(values, "r", "small")
    assert text in str(caught.value)


def test_an_unknown_recipe_or_scale_is_refused() -> None:
    with pytest.raises(InputError, match="there is no recipe"):
        shipped_recipe("madry")
    with pytest.raises(InputError, match="there is no scale"):
        shipped_recipe("madry-mnist", "huge")


def test_the_hash_follows_every_setting() -> None:
    recipe = recipe_from(VALUES, "r", "small")
    again = recipe_from(json.loads(json.dumps(VALUES)), "r", "small")
    assert recipe.sha256 == again.sha256
    for change in ({"seeds": 2}, {"settings": {"lr": 0.1}}, {"images": 5}, {"attack": {"steps": 3}}):
        assert replace(recipe, **change).sha256 != recipe.sha256


# -- images --------------------------------------------------------------------------------------------------------


def test_images_are_kept_apart() -> None:
    recipe = replace(tiny(shipped_recipe("rst-cifar10", "small")), validation=20)
    images = open_images(recipe)
    labelled, pool = images.labelled(60, 3)
    assert images.validation is not None
    assert pool is not None
    parts = [set(part.ids) for part in (labelled, pool, images.validation, images.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200 + 40
    assert set(images.attacked.ids) <= parts[3]
    assert len(images.attacked) == 30
    assert (pool.labels == -1).all()
    assert np.bincount(labelled.labels).tolist() == [6] * 10
    truth = images.true_labels(pool)
    assert truth is not None
    assert list(truth.ids) == list(pool.ids)
    assert (truth.labels >= 0).all()


def test_overlapping_or_too_few_images_are_refused() -> None:
    recipe = tiny(shipped_recipe("madry-mnist", "small"))
    with pytest.raises(DataError, match="stand in"):
        open_images(replace(recipe, test="digits:train[180:240]"))
    with pytest.raises(InputError, match="label fewer"):
        open_images(replace(recipe, labels=(190,)))
    with pytest.raises(InputError, match="unlabelled"):
        open_images(replace(tiny(shipped_recipe("rst-mnist", "small")), labels=(0,)))


# -- running -------------------------------------------------------------------------------------------------------


# At full scale that one has methods which it leaves out at the small one. Recipes with forms have many to measure.
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *(
            pytest.param(name, "small", marks=[pytest.mark.slow] if shipped_recipe(name).forms else [])
            for name in recipe_names()
        ),
        ("rst-cifar10", "full"),
    ],
)
def test_every_shipped_recipe_runs(name: str, scale: str, tmp_path: Path) -> None:
    recipe = tiny(shipped_recipe(name, scale), **({"seeds": 2} if name == "gap-vs-labels" else {}))
    results = done(recipe, tmp_path, command="nndefense reproduce")
    assert read_results(tmp_path / "results.json") == json.loads(json.dumps(results))
    names = [one.name for one in runs_of(recipe)]
    assert [record["name"] for record in results["runs"]] == names
    measured = [(found["run"], found["method"], found["kind"], found["threat"]) for found in results["measurements"]]
    assert len(set(measured)) == len(measured)
    for found in results["measurements"]:
        n = 40 if found["kind"] == "clean" else 30
        assert found["n"] == n
        assert found["right"] == int(from_hex(found["outcomes"], n).sum())
        assert found["ci_low"] <= found["accuracy"] <= found["ci_high"]
        if found["kind"] == "robust" and found["norm"] != SPATIAL:
            assert found["largest_change"] <= found["eps"] + 1e-6
            assert found["forwards"] > 0
    for record in results["runs"]:
        net = load_classifier(tmp_path / record["folder"], device="cpu")
        assert net.fingerprint == record["fingerprint"]
        assert record["settings"]["seed"] == record["seed"]
        if record["unlabelled"] is not None:
            assert record["pseudo_labels"]["n"] == record["unlabelled"]["n"]
            assert 0 < record["pseudo_labels"]["right"] <= record["pseudo_labels"]["n"]
            assert "pseudo-labels" in record["unlabelled"]["name"]
        # A database holds all images that its net was trained on.
        for database in (tmp_path / "databases" / record["name"]).glob("*/manifest.json"):
            pooled = record["unlabelled"]["n"] if record["unlabelled"] else 0
            assert len(ImageDatabase.open(database.parent)) == record["data"]["n"] + pooled
    assert len(results["differences"]) == len(recipe.compare) * len(recipe.threats) * len(recipe.labels)

    paths = write_outputs(results, tmp_path)
    assert [path.name for path in paths] == ["table.md", "figure.png", "figure.svg", "report.html"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    page = paths[3].read_text(encoding="utf-8")
    for foreign in ("<script", "http://", "https://", 'src="figure', "@import"):
        assert foreign not in page
    assert '<svg class="chart"' in page
    assert recipe.sha256 in page
    text = paths[0].read_text(encoding="utf-8")
    for method in recipe.methods:
        assert method.name in text
    for table in tables_of(results):
        assert {len(row) for row in table.rows} == {len(table.columns)}


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_run_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(shipped_recipe("rst-mnist", "small"))
    whole = done(recipe, tmp_path / "whole")
    steps = {"n": 0}

    def kill_after(count: int) -> Callable[[], None]:
        def step() -> None:
            steps["n"] += 1
            if steps["n"] >= count:
                raise Killed

        return step

    from nndefense.experiments.measure import Judge
    from nndefense.training.step import Stepper

    trained, judged = Stepper.__call__, Judge._block
    kills, blocks = 0, []
    for count in (3, 4, 3, 5, 4, 6, 10**9):
        steps["n"] = 0
        step = kill_after(count)

        def stepping(self: Stepper, *args: Any, step: Callable[[], None] = step, **options: Any) -> Any:
            found = trained(self, *args, **options)
            step()
            return found

        def blocking(self: Judge, *args: Any, step: Callable[[], None] = step) -> Any:
            step()
            blocks.append(args)
            return judged(self, *args)

        monkeypatch.setattr(Stepper, "__call__", stepping)
        monkeypatch.setattr(Judge, "_block", blocking)
        try:
            resumed = done(recipe, tmp_path / "killed")
        except Killed:
            kills += 1
    assert kills >= 4

    def essence(results: Results) -> Any:
        nets = [(record["name"], record["fingerprint"], record["best"]) for record in results["runs"]]
        return nets, [(found["run"], found["threat"], found["outcomes"]) for found in results["measurements"]]

    assert essence(resumed) == essence(whole)
    # No block was attacked twice, and the whole of it once more costs nothing.
    assert len(blocks) == len(runs_of(recipe))
    again = done(recipe, tmp_path / "killed")
    assert len(blocks) == len(runs_of(recipe))
    assert essence(again) == essence(whole)


def test_more_seeds_add_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(shipped_recipe("gap-vs-labels", "small"), labels=(40,))
    one = done(recipe, tmp_path)
    begun = []
    train = Workshop._net
    monkeypatch.setattr(
        Workshop,
        "_net",
        lambda self, run, name, *args, **options: (
            begun.append(name) if not (self.folder(name) / "classifier.json").exists() else None,
            train(self, run, name, *args, **options),
        )[1],
    )
    two = done(replace(recipe, seeds=2), tmp_path)
    assert len([name for name in begun if not name.endswith("-start")]) == len(two["runs"]) // 2
    assert all("seed1" in name for name in begun)
    fingerprints = {record["name"]: record["fingerprint"] for record in two["runs"]}
    assert all(fingerprints[record["name"]] == record["fingerprint"] for record in one["runs"])


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    recipe = tiny(shipped_recipe("madry-cifar10", "small"))
    done(recipe, tmp_path)
    with pytest.raises(InputError, match="other lr"):
        done(replace(recipe, settings={**recipe.settings, "lr": 0.5}), tmp_path)
    with pytest.raises(InputError, match="another --out"):
        done(replace(recipe, name="other"), tmp_path)


def test_the_first_stage_gives_the_initial_weights(tmp_path: Path) -> None:
    recipe = tiny(shipped_recipe("madry-mnist", "small"))
    assert recipe.start
    results = done(
        replace(recipe, methods=recipe.methods[2:], compare=(), settings={**recipe.settings, "lr": 1e-12}), tmp_path
    )
    # With next to no learning rate the net that is trained stays where the first stage left it.
    folder = tmp_path / results["runs"][0]["folder"]
    first, last = load_classifier(folder.with_name(f"{folder.name}-start")), load_classifier(folder)
    for before, after in zip(first.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(before, after, atol=1e-7, rtol=1e-6)
    assert results["runs"][0]["start"]["attack"]["eps"] == pytest.approx(recipe.start.get("eps", 1) * 0.3)


def test_the_small_net_is_the_papers() -> None:
    net = build_classifier("strided-cnn", input_shape=(1, 28, 28), classes=tuple("0123456789"))
    # Weights and biases of 4x4 convolutions of 16 and 32 filters, 7 x 7 x 32 -> 100 -> 10.
    assert sum(p.numel() for p in net.parameters()) == 272 + 8224 + 156_900 + 1010
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    odd = build_classifier("strided-cnn", input_shape=(3, 33, 35), classes=("a", "b"))
    assert odd(torch.zeros(1, 3, 33, 35)).shape == (1, 2)
    with pytest.raises(InputError, match="takes only 28 x 28"):
        net(torch.zeros(1, 1, 32, 32))


# -- numbers -------------------------------------------------------------------------------------------------------


FORMED: dict[str, Any] = {
    **VALUES,
    "train": "digits:train[:200]", "test": "digits:test[:60]", "validation": 40, "images": 20, "figure": "retrieval",
    "threat": [{"norm": "linf", "eps": 0.1}],
    "settings": {"epochs": 2, "batch_size": 40},
    "adaptive_steps": 2,
    "certified": 3,
    "form": [
        {"name": "neighbours", "layer": "fc1", "k": 3, "votes": "posteriors"},
        {"name": "kernel", "of": ["standard"], "layer": "fc1", "temperature": "held-out", "rows": [30, 0]},
        {"name": "net", "of": ["standard"], "layer": "fc1", "alpha": 1.0},
    ],
    "compare": [["standard + kernel", "standard"]],
}  # fmt: skip


@pytest.mark.slow
def test_a_nets_forms_are_measured_beside_it(tmp_path: Path) -> None:
    recipe = recipe_from(FORMED, "formed", "small")
    forms = ["standard + neighbours", "standard + kernel (30 rows)", "standard + kernel", "standard + net"]
    assert recipe.subjects == ("standard", *forms, "at", "at + neighbours")
    results = done(recipe, tmp_path)
    found = {(one["method"], one["kind"]): one for one in results["measurements"]}
    for name in forms:
        clean, gray, worst = (found[name, kind] for kind in ("clean", "gray", "robust"))
        assert (clean["n"], gray["n"], worst["n"]) == (60, 20, 20)
        # Who knows everything begins with the gray box's images.
        assert not (from_hex(worst["outcomes"], 20) & ~from_hex(gray["outcomes"], 20)).any()
        assert worst["largest_change"] <= 0.1 + 1e-6
    # What is proven stands: of nets, and of votes that depend on the nearest rows alone.
    proven = {name for name, kind in found if kind == "certified"}
    assert proven == {"standard", "standard + neighbours", "at", "at + neighbours"}
    for name in proven:
        floor, ceiling = (from_hex(found[name, kind]["outcomes"], n) for kind, n in (("certified", 3), ("robust", 20)))
        assert not (floor & ~ceiling[:3]).any()
    # Alpha 1 is the net: right on the same images, and its own attacked images break it as they break the net.
    assert found["standard + net", "clean"]["outcomes"] == found["standard", "clean"]["outcomes"]
    assert found["standard + net", "gray"]["outcomes"] == found["standard", "robust"]["outcomes"]
    (row,) = results["differences"]
    assert row["robust"]["mean"] == pytest.approx(
        found["standard + kernel", "robust"]["accuracy"] - found["standard", "robust"]["accuracy"]
    )
    page = write_outputs(results, tmp_path)[3].read_text(encoding="utf-8")
    assert "Does retrieval defend?" in page
    # A second run measures nothing again.
    shown: list[str] = []
    again = done(recipe, tmp_path, say=shown.append)
    assert again["measurements"] == results["measurements"]


@pytest.mark.slow
def test_a_proof_that_an_attack_refutes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(target: Any, images: torch.Tensor, *, eps: list[float], norm: str) -> Certified:
        return Certified(target(images).argmax(1), torch.full((len(images),), eps[-1], dtype=torch.float64), norm)

    monkeypatch.setattr("nndefense.certificates.bounds.certify_bounds", everything)
    recipe = recipe_from({**FORMED, "certified": 20, "threat": [{"norm": "linf", "eps": 0.9}]}, "formed", "small")
    with pytest.raises(ModelError, match="proven to stand and have fallen"):
        done(recipe, tmp_path)


@pytest.mark.parametrize(
    ("gained", "paid", "said"),
    [
        ((0.01, 0.09), (-0.01, 0.02), "In 1 of 2 comparisons: a + kernel against a at ℓ∞ 0.1, +5.00 [+1.00, +9.00] p"),
        ((-0.01, 0.11), (-0.01, 0.02), "Not here: in none of 2 comparisons"),
        ((0.01, 0.09), (-0.05, -0.01), "At a loss of clean accuracy it adds robust accuracy in 1"),
        ((-0.09, -0.01), (-0.01, 0.02), "It is less robust than what it is compared with in 1"),
    ],
)  # fmt: skip
def test_the_answer_follows_from_the_intervals(
    gained: tuple[float, float], paid: tuple[float, float], said: str
) -> None:
    def spread(ends: tuple[float, float]) -> dict[str, float]:
        return {"mean": sum(ends) / 2, "low": ends[0], "high": ends[1]}

    none = {"first": "b + kernel", "second": "b", "threat": "t", "standard": spread((-1, 1)), "robust": spread((-1, 1))}
    one = {"first": "a + kernel", "second": "a", "threat": "t", "standard": spread(paid), "robust": spread(gained)}
    found = answer({"differences": [one, none], "threats": [{"name": "t", "title": "ℓ∞ 0.1"}]})
    assert said in found
    assert ("In 1 of 2" in found) == (gained[0] > 0 and paid[1] >= 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"form": [{"name": "f", "of": ["pgd"]}]}, "form.of names the method 'pgd'"),
        ({"form": [{"name": "f"}, {"name": "f"}]}, "two of the forms have one name"),
        ({"validation": 0}, "split some off with validation"),
        ({"compare": [["standard + mixture", "standard"]]}, "compare names the method 'standard + mixture'"),
        ({"form": [{"name": "f", "temperature": "warm"}]}, "must be one of none, learned, held-out"),
    ],
)
def test_a_form_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        recipe_from({**FORMED, **changes}, "formed", "small")


def test_a_net_that_learned_no_temperature_is_told(tmp_path: Path) -> None:
    form = [{"name": "f", "layer": "fc1", "temperature": "learned"}]
    with pytest.raises(InputError, match="strided-cnn learns no temperature: give the recipe an architecture nn-"):
        done(recipe_from({**FORMED, "form": form, "compare": []}, "formed", "small"), tmp_path)


def test_students_interval() -> None:
    # Half-width of three values with standard deviation 1: 4.302653 / sqrt(3).
    low, high = student_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.4841377, 2 + 2.4841377), abs=1e-6)


def hand_made() -> Results:
    """Two methods, one threat, three seeds of four images, with outcomes that are easy to count."""

    def entry(method: str, seed: int, kind: str, bits: list[int]) -> dict[str, Any]:
        from nndefense.experiments.measure import rate

        return {
            "run": f"{method}-{seed}", "method": method, "trained_for": None if method == "standard" else "linf-0.1",
            "labels": 100, "seed": seed, "kind": kind, "threat": None if kind == "clean" else "linf-0.1",
            **rate(np.array(bits, dtype=bool)),
        }  # fmt: skip

    measured = []
    for seed, (standard, robust) in enumerate([(4, 3), (4, 2), (3, 1)]):
        for method, clean, attacked in (("standard", standard, 0), ("robust", robust, robust)):
            measured.append(entry(method, seed, "clean", [1] * clean + [0] * (4 - clean)))
            measured.append(entry(method, seed, "robust", [1] * attacked + [0] * (4 - attacked)))
    recipe = ExperimentRecipe(
        name="h", title="H", scale="small", train="a", test="b", architecture="strided-cnn",
        threats=(Threat("linf", 0.1, "0.1"),),
        methods=(Method("standard", "standard"), Method("robust", "adversarial")),
        evaluation=(AttackSettings(name="pgd", norm="linf", eps=(1.0,)),),
        compare=(("standard", "robust"),), labels=(100,), seeds=3,
    )  # fmt: skip
    run_of = {"labels": 100, "seed": 0, "name": "x", "method": "robust", "objective": "o", "epochs_done": 1,
              "training_seconds": 1.0, "catastrophic_overfitting": False, "fingerprint": "f" * 64}  # fmt: skip
    results: Results = {
        "recipe": recipe.to_json(),
        "threats": [{"name": "linf-0.1", "title": "ℓ∞ 0.1"}],
        "runs": [run_of],
        "measurements": measured,
        "images": {"test": {"n": 4}, "attacked": {"n": 4}},
        "machine": {"device": "cpu", "threads": 1},
    }
    results["differences"] = differences(results)
    return results


def test_differences_are_paired_by_seed() -> None:
    (row,) = hand_made()["differences"]
    assert row["standard"]["values"] == (0.25, 0.5, 0.5)
    assert row["standard"]["mean"] == pytest.approx(1.25 / 3)
    assert row["standard"]["over"] == "seeds"
    assert row["robust"]["values"] == (-0.75, -0.5, -0.25)
    # One image against none: p = 1; two against none: 1/2.
    assert row["standard_mcnemar"] == [1.0, 0.5, 0.5]


def test_tables_show_means_and_intervals() -> None:
    results = hand_made()
    methods, gap, _ = tables_of(results)
    assert methods.columns == ("method", "threat", "standard accuracy", "robust accuracy")
    low, high = student_interval([1.0, 1.0, 0.75])
    assert methods.rows[0][2] == f"91.67 [{100 * low:.2f}, 100.00]"
    assert high > 1
    assert gap.rows[0][3].startswith("+41.67 [")
    markdown = methods.markdown()
    assert "| standard | ℓ∞ 0.1 | 91.67" in markdown
    figure = figure_of({**results, "recipe": {**results["recipe"], "figure": "gap"}})
    heights = figure.axes[1].containers[0].lines[0].get_ydata()
    assert heights == pytest.approx([100 * 1.25 / 3])


def test_the_tradeoff_table_has_the_shape_of_the_slides(tmp_path: Path) -> None:
    shipped = shipped_recipe("tsipras-mnist", "small")
    recipe = tiny(shipped, threats=shipped.threats[1:4:2], images=10)
    results = done(recipe, tmp_path)
    table, published, *_ = tables_of(results)
    head = ["norm", "ε"]
    for group in ("standard acc.", "robust acc."):
        head += [f"{group}: {method}" for method in ("standard", "half-half", "robust")]
    assert list(table.columns) == list(published.columns) == head
    assert [row[:2] for row in table.rows] == [("linf", "0"), ("", "0.2"), ("l2", "0"), ("", "0.5")]
    # The line of eps 0 has the standard net alone.
    assert table.rows[0][3:] == published.rows[0][3:] == ("–",) * 5
    # What is published is of other nets, and stands beside nothing that was measured.
    assert published.rows[0][2] == "99.31"
    assert published.rows[1][2:] == ("99.31", "99.22", "98.99", "0.05", "90.79", "92.86")
    assert published.rows[3][2:] == ("99.31", "99.35", "99.41", "94.67", "97.60", "97.70")
    assert "Tsipras et al. 2019" in published.note
    measured = {(m["method"], m["threat"]): m["accuracy"] for m in results["measurements"] if m["kind"] == "robust"}
    names = [threat["name"] for threat in results["threats"]]
    for row, name in ((table.rows[1], names[0]), (table.rows[3], names[1])):
        assert row[5:8] == tuple(f"{100 * measured[m, name]:.2f}" for m in ("standard", "half-half", "robust"))


def test_an_image_counts_only_if_it_withstands_every_attack(tmp_path: Path) -> None:
    recipe = tiny(shipped_recipe("madry-mnist", "small"))
    recipe = replace(recipe, methods=recipe.methods[:1], compare=(), published=())
    weak = done(recipe, tmp_path)["measurements"][1]
    stronger = replace(
        recipe, evaluation=(*recipe.evaluation, AttackSettings(name="apgd", norm="linf", eps=(1.0,), steps=10))
    )
    both = done(stronger, tmp_path)["measurements"][1]
    bits = [from_hex(found["outcomes"], found["n"]) for found in (weak, both)]
    assert not (bits[1] & ~bits[0]).any()
    assert sum(both["broken_by"].values()) == int(done(recipe, tmp_path)["measurements"][1]["n"]) - both["right"] - int(
        (~clean_bits(tmp_path)).sum()
    )


def clean_bits(out: Path) -> Any:
    """Which attacked images the net classifies rightly when they are clean."""
    results = read_results(out / "results.json")
    recipe = tiny(shipped_recipe("madry-mnist", "small"))
    net = load_classifier(out / results["runs"][0]["folder"], device="cpu")
    images, labels = open_images(recipe).attacked.batch(np.arange(30))
    with torch.no_grad():
        return (net(images).argmax(1) == labels).numpy()


def test_tables_and_page_say_what_was_trained(tmp_path: Path) -> None:
    recipe = tiny(shipped_recipe("rst-cifar10", "small"))
    results = done(recipe, tmp_path)
    first, trainings = tables_of(results)[0], tables_of(results)[-1]
    # 60 labels in batches of 40 are two steps an epoch; the pool is what is left of 200, less the labels.
    assert "strided-cnn (" in first.note
    assert "60 images, 2 epochs, 4 steps of 40" in first.note
    assert "60 images and 140 of the pool" in first.note
    page = (write_outputs(results, tmp_path)[3]).read_text(encoding="utf-8")
    for text in (first.note.split("Trained: ")[1], "steps", "strided-cnn"):
        assert text in page
    columns = {name: place for place, name in enumerate(trainings.columns)}
    for row, record in zip(trainings.rows, results["runs"], strict=True):
        assert row[columns["net"]] == record["architecture"] == "strided-cnn"
        assert row[columns["steps"]] == f"{record['steps_done']:,}"
        assert record["steps_done"] == record["epochs_done"] * 2
        assert record["parameters"] == sum(p.numel() for p in load_classifier(tmp_path / record["folder"]).parameters())


def test_the_fgsm_table_has_error_and_confidence_of_every_image(tmp_path: Path) -> None:
    from nndefense.attacks import fgsm

    recipe = tiny(shipped_recipe("fgsm-table", "small"))
    results = done(recipe, tmp_path)
    table, published, *_ = tables_of(results)
    assert [row[0] for row in table.rows] == ["softmax", "maxout"]
    assert [record["architecture"] for record in results["runs"]] == ["softmax", "maxout"]
    assert [row[1:3] for row in published.rows] == [("99.90", "79.30"), ("89.40", "97.60")]
    images, labels = open_images(recipe).attacked.batch(np.arange(30))
    for row, record in zip(table.rows, results["runs"], strict=True):
        net = load_classifier(tmp_path / record["folder"], device="cpu")
        with torch.no_grad():
            clean = net(images).argmax(1) == labels
        made = fgsm(net, images, labels, eps=0.25, norm="linf")
        with torch.no_grad():
            shares = net(made).softmax(1)
        wrong = ~(clean & (shares.argmax(1) == labels))
        sure = shares.scatter(1, labels[:, None], -1).amax(1)[wrong].mean()
        assert float(row[3]) == pytest.approx(100 * float(wrong.float().mean()), abs=0.006)
        assert float(row[4]) == pytest.approx(100 * float(sure), abs=0.06)


def test_a_published_figure_needs_source_setting_and_somebody(tmp_path: Path) -> None:
    whole = {"method": "at", "standard": 1.0, "source": "S", "setting": "N"}
    for lack, text in (("source", "needs a source"), ("setting", "needs a source"), ("method", "method")):
        left = {key: value for key, value in whole.items() if key != lack}
        with pytest.raises(InputError, match=text):
            recipe_from({**VALUES, "published": [left]}, "r", "small")
    with pytest.raises(InputError, match="or a name"):
        recipe_from({**VALUES, "published": [{**whole, "method": ""}]}, "r", "small")
    named = recipe_from({**VALUES, "published": [{**whole, "method": "", "name": "another"}]}, "r", "small")
    assert named.published[0].name == "another"


# -- command -------------------------------------------------------------------------------------------------------


def test_the_command_lists_the_recipes() -> None:
    listed: Any = nndefense("reproduce", "--list", "--json").json
    assert [row["name"] for row in listed] == list(recipe_names())
    assert next(row for row in listed if row["name"] == "tsipras-mnist")["small"]["trainings"] == 13
    text = nndefense("reproduce", "--list").out
    assert all(name in text for name in recipe_names())
    # Data, machine and time of each, as far as they were measured.
    assert "small: 13 nets on mnist:train, 63 minutes of one core; full: " in text
    assert text.count("small: ") == text.count("full: ") == len(recipe_names())
    assert "needs a GPU" in text
    for row in listed:
        stored = Path(__file__).parent.parent / "docs/results" / f"{row['name']}.json"
        took = json.loads(stored.read_text())["seconds"] if stored.exists() else None
        assert row["small"]["minutes"] == (took and round((took["training"] + took["attacks"]) / 60))


def test_the_command_runs_resumes_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nndefense.experiments.shipped_recipe", lambda name, scale: tiny(shipped_recipe(name, scale)))
    monkeypatch.setitem(reproduce_command._ADDED, "square", {"queries": 5})
    words = ["reproduce", "madry-cifar10", "--scale", "small", "--out", tmp_path, "--device", "cpu", "--quiet"]
    first = nndefense(*words, "--json").json
    assert first["command"].startswith("nndefense reproduce madry-cifar10 --scale small")
    assert {path.name for path in tmp_path.iterdir()} >= {
        "results.json", "table.md", "figure.png", "figure.svg", "report.html", "trainings", "cells",
    }  # fmt: skip
    (tmp_path / "table.md").unlink()
    again = nndefense(*words, "--report-only")
    assert again.code == 0
    assert "Accuracies with intervals" in again.out
    assert (tmp_path / "table.md").exists()
    added = nndefense(*words, "--seeds", 2, "--attack", "square", "--json").json
    assert len(added["runs"]) == 2 * len(first["runs"])
    assert [one["name"] for one in added["recipe"]["evaluation"]][-1] == "square"
    fingerprints = {record["name"]: record["fingerprint"] for record in added["runs"]}
    assert all(fingerprints[record["name"]] == record["fingerprint"] for record in first["runs"])


@pytest.mark.slow
def test_one_row_after_another_is_the_whole_table(tmp_path: Path) -> None:
    shipped = shipped_recipe("tsipras-mnist", "small")
    recipe = tiny(shipped, threats=shipped.threats[1:4:2])
    parts = ["standard/linf-0.2", "robust/linf-0.2", "robust/l2-0.5", "half-half"]
    trained = []
    for part in parts:
        results = done(replace(recipe, only=(part,)), tmp_path)
        trained += [record["name"] for record in results["runs"]]
        assert {found["method"] for found in results["measurements"]} == {part.partition("/")[0]}
        for threat in {found["threat"] for found in results["measurements"]} - {None}:
            assert part in (f"{part.partition('/')[0]}/{threat}", "half-half")
        # Cells that were not run are blank, and the page can be written.
        assert any("–" in row[2:] for row in tables_of(results)[0].rows)
        write_outputs(results, tmp_path)
    assert sorted(trained) == sorted(one.name for one in runs_of(recipe))
    whole = done(recipe, tmp_path)
    fresh = done(recipe, tmp_path / "fresh")
    assert [m["outcomes"] for m in whole["measurements"]] == [m["outcomes"] for m in fresh["measurements"]]


def test_a_part_brings_the_teacher_that_it_needs() -> None:
    recipe = replace(shipped_recipe("rst-mnist", "small"), only=("rst",), seeds=1)
    assert [one.method.name for one in runs_of(recipe)] == ["standard", "rst"]
    recipe = replace(recipe, only=("adversarial/linf-0.3",))
    assert [one.name for one in runs_of(recipe)] == ["adversarial-linf-0.3-n1000-seed0"]


def test_a_recipe_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = """
        title = "T"
        train = "digits:train[:100]"
        test = "digits:test[:20]"
        architecture = "softmax"
        threat = [{ norm = "linf", eps = ["8/255", 0.1] }]
        method = [{ name = "standard", objective = "standard" }, { name = "at", objective = "adversarial" }]
        evaluation = [{ name = "fgsm" }]
        settings = { epochs = 1 }
        [small]
    """
    Path("mine.toml").write_text(own)
    words = ["reproduce", "--recipe", "mine.toml", "--scale", "small", "--device", "cpu", "--quiet"]
    found = nndefense(*words, "--only", "at/linf-8/255", "--json").json
    assert [record["name"] for record in found["runs"]] == ["at-linf-8of255-seed0"]
    assert Path("runs/reproduce/mine-small/report.html").exists()
    fails(2, "leave its name out", *words, "madry-mnist")
    fails(2, "only is 'at/linf-1'", *words, "--only", "at/linf-1")
    fails(2, "only is 'robust'", *words, "--only", "at,robust")
    fails(2, "--allow-code is for", "reproduce", "madry-mnist", "--allow-code")
    fails(3, "there is no recipe at", "reproduce", "--recipe", "none.toml")
    Path("mine.toml").write_text(own + "\nsteps = 3")
    fails(2, "no entry steps", *words)
    Path("mine.toml").write_text(own.replace('"fgsm"', '"python:evil.py:attack"'))
    Path("evil.py").write_text("open('ran', 'w')")
    fails(2, "give --allow-code", *words)
    assert not Path("ran").exists()


def test_mistakes_at_the_command(tmp_path: Path) -> None:
    fails(2, "name a recipe", "reproduce")
    fails(2, "there is no recipe 'mnist'", "reproduce", "mnist")
    fails(2, "uses no unlabelled images", "reproduce", "madry-mnist", "--unlabelled", "digits", "--out", tmp_path)
    fails(2, "--attack is deepfool", "reproduce", "madry-mnist", "--attack", "deepfool", "--out", tmp_path)
    fails(2, "leave --arch out", "reproduce", "fgsm-table", "--arch", "small-cnn", "--out", tmp_path)
    fails(2, "perceptron", "reproduce", "madry-mnist", "--arch", "perceptron", "--out", tmp_path)
    fails(3, "results.json is missing", "reproduce", "madry-mnist", "--report-only", "--out", tmp_path)
