"""The registry of attacks: what it says is so, and an attack that is added to it is found wherever one is named."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails, nndefense
from helpers import digits, images, trained
from torch import Tensor

from index_build import build_database
from nndefense import attacks
from nndefense.attacks import registry
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, run_attack, rungs_for
from nndefense.evaluation.recipe import recipe_from
from nndefense.features import FeatureSpec
from nndefense.models import save_classifier
from nndefense.own_code import sha256_of_source

REPOSITORY = Path(__file__).resolve().parent.parent
EVALUATE = ["evaluate", "--dataset", "digits:test", "--limit", 8, "--eps", "0.5", "--adaptive-steps", 2, "--no-sizes"]
EVALUATE += ["--gallery", 1, "--quiet", "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier and a database of digits."""
    folder = tmp_path_factory.mktemp("registry")
    save_classifier(trained(), folder / "net")
    rows = digits("train").subset(range(200))
    build_database(rows, trained(), FeatureSpec("block2", "grid4", pca=16), folder / "database", progress=False)
    return folder


@pytest.fixture
def toy() -> Iterator[str]:
    """An attack that is registered in one place."""
    name = attacks.register(attacks.Attack("toy-noise", noise, "Toy noise", effort="steps", standard=3))
    yield name
    registry.unregister(name)


def noise(model: Any, x: Tensor, y: Tensor, *, eps: float, norm: str, generator: torch.Generator, steps: int) -> Tensor:
    """The best of several random draws, given back where it stands at the edge of the ball."""
    best, value = x, torch.full((len(x),), -torch.inf)
    for _ in range(steps):
        drawn = torch.randn(x.shape, generator=generator)
        delta = drawn * (attacks.radius(x, eps, norm) / drawn.flatten(1).norm(dim=1))[:, None, None, None]
        tried = (x + 0.99 * delta).clamp(0, 1)
        reached = attacks.margin(model(tried).detach(), y)
        best = torch.where((reached > value)[:, None, None, None], tried, best)
        value = torch.maximum(value, reached)
    return best


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_names_are_there_without_torch() -> None:
    code = (
        "import sys; from nndefense.attacks import registry; print(registry.names()); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert "'autoattack'" in done.stdout


def test_threat_models_follow_from_what_an_attack_needs() -> None:
    assert registry.names("white") == ("fgsm", "pgd", "apgd", "apgd-t", "eot")
    assert registry.names("gray") == registry.names("black")
    assert registry.names("gray")[-4:] == ("square", "fab", "cw", "deepfool")
    assert registry.names("adaptive")[:2] == ("square", "adaptive")
    assert registry.names("exact") == ("exact",)
    assert set(registry.names()) == {name for model in ("gray", "adaptive", "exact") for name in registry.names(model)}


@pytest.mark.parametrize("name", sorted(registry.SHIPPED))
def test_an_entry_says_what_its_function_takes(name: str) -> None:
    attack = registry.get(name)
    function = attack.load()
    if attack.effort and attack.on_retrieval:  # all take what the one ascent takes
        from nndefense.attacks.retrieval import ascent, run_adaptive

        function = run_adaptive if name == "adaptive" else ascent.attack
    taken = inspect.signature(function).parameters
    assert attack.restarts == ("restarts" in taken)
    assert not attack.loss or "loss" in taken
    assert not attack.effort or attack.effort in taken
    assert set(attack.settings) <= set(taken)
    # The standard effort is the function's own, but for PGD, which has none, and where a command always had fewer.
    if name not in ("fgsm", "pgd", "adaptive", "drift", "pgd-pr", "pgd-fs", "exact"):
        assert attack.standard == taken[attack.effort or "steps"].default


def test_every_attack_that_can_be_sent_towards_a_class_is_and_the_others_say_so() -> None:
    x, y = images("test", 8)
    goals, generator = (y + 1) % 10, torch.Generator().manual_seed(0)
    for name in registry.names("gray"):
        norm = "l2" if "linf" not in registry.get(name).norms else "linf"
        settings = AttackSettings(name, norm, (0.5 if norm == "linf" else 4.0,))
        if name == "cw":
            continue
        if registry.get(name).effort:
            settings = replace(settings, **{registry.get(name).effort: 400 if name == "square" else 20})
        if registry.get(name).targeted:
            found = run_attack(settings, trained(), x, goals, settings.eps[0], generator, targeted=True).images
            with torch.no_grad():
                before, after = (trained()(shown).softmax(1).gather(1, goals[:, None]) for shown in (x, found))
            assert after.mean() > before.mean() + 0.1, name
        else:
            with pytest.raises(
                InputError, match=rf"{name} cannot be sent towards a class: leave the target \(--target\)"
            ):
                run_attack(settings, trained(), x, goals, settings.eps[0], generator, targeted=True)
    assert [name for name in registry.names() if registry.get(name).targeted] == ["fgsm", "pgd", "apgd", "square", "cw"]


def test_an_own_attack_is_sent_towards_a_class_where_it_takes_that(toy: str) -> None:
    def towards(model: Any, x: Tensor, y: Tensor, *, eps: float, norm: str, targeted: bool) -> Tensor:
        assert targeted
        return attacks.pgd(model, x, y, eps=eps, norm=norm, steps=5, targeted=targeted)

    x, y = images("test", 4)
    name = attacks.register(attacks.Attack("toy-towards", towards))
    try:
        generator = torch.Generator().manual_seed(0)
        found = run_attack(AttackSettings(name, "linf", (0.3,)), trained(), x, y, 0.3, generator, targeted=True)
        assert not torch.equal(found.images, x)
        with pytest.raises(InputError, match="a function of your own has to take targeted="):
            run_attack(AttackSettings(toy, "l2", (0.3,)), trained(), x, y, 0.3, generator, targeted=True)
    finally:
        registry.unregister(name)


def test_the_documentation_has_the_table() -> None:
    assert registry.table() in (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert registry.table().count("\n") == len(registry.SHIPPED) + 1


def test_threat_models_that_cannot_use_an_attack_run_another() -> None:
    def rungs(name: str, *models: str, **more: Any) -> list[tuple[str, str]]:
        found = rungs_for(models, AttackSettings(name, **more), AttackSettings("adaptive", steps=7))
        return [(rung.threat_model, rung.attack.name) for rung in found]

    ladder = ("gray", "white", "adaptive")
    assert rungs("apgd-t", *ladder) == [("gray", "apgd-t"), ("white", "apgd-t"), ("adaptive", "adaptive")]
    assert rungs("autoattack", *ladder) == [
        ("gray", "autoattack"), ("gray", "pgd"), ("white", "pgd"), ("adaptive", "adaptive"),
    ]  # fmt: skip
    # Nobody but the net is attacked: its images are shown to nothing else.
    assert rungs("autoattack", "gray") == [("gray", "autoattack")]
    assert rungs("square", *ladder)[1:] == [("white", "pgd"), ("adaptive", "adaptive"), ("adaptive", "square")]
    assert rungs("ask", *ladder) == [("gray", "pgd"), ("white", "pgd"), ("adaptive", "adaptive"), ("adaptive", "ask")]
    stand_in = rungs_for(ladder, AttackSettings("fab", "linf", (0.1, 0.2), restarts=3))[1].attack
    assert stand_in == AttackSettings("pgd", "linf", (0.1, 0.2), steps=20, restarts=3)
    with pytest.raises(InputError, match=r"none of them is here.*give --database"):
        rungs_for(("gray",), AttackSettings("ask"))
    with pytest.raises(InputError, match="the threat model is 'grey', but must be one of"):
        rungs_for(("grey",), AttackSettings())
    with pytest.raises(InputError, match="none of them is here"):
        rungs("ask", "gray")


# -- every choice of the command ---------------------------------------------------------------------------------------


def effort(name: str) -> list[object]:
    """Little of what may be chosen; what is fixed stays."""
    unit = registry.get(name).effort
    return [f"--{unit}", {"steps": 20 if registry.get(name).least else 3, "queries": 20}[unit]] if unit else []


# One of each kind at every change: within a budget, by scores, of fixed effort, on the surface; the least change below.
QUICK = ("pgd", "square", "fgsm", "push-pull")
# What proves is asked for by an option of its own.
NAMES = [name for name in registry.names() if name not in registry.names("exact")]
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", EVERY)
def test_evaluate_runs_every_attack_with_a_database(folder: Path, tmp_path: Path, name: str) -> None:
    words = [*EVALUATE, "--classifier", folder / "net", "--database", folder / "database", "--k", 5]
    found = nndefense(*words, "--attack", name, *effort(name), "--out", tmp_path).json
    tried = {(r["threat_model"], r["attack"]) for r in found["records"]}
    assert {model for model, _ in tried} == {"clean", "gray", "white", "adaptive", "worst"}
    for model in registry.get(name).threat_models:
        assert (model, name) in tried or model == "black"
    assert ("adaptive", "adaptive") in tried


@pytest.mark.parametrize(
    "name", ["deepfool" if name == "deepfool" else value for name, value in zip(NAMES, EVERY, strict=True)]
)
def test_evaluate_runs_every_attack_on_a_classifier_alone(folder: Path, tmp_path: Path, name: str) -> None:
    words = [*EVALUATE, "--classifier", folder / "net", "--attack", name, *effort(name), "--out", tmp_path]
    if registry.get(name).on_retrieval:
        fails(2, "give --database", *words)
        return
    found = nndefense(*words).json
    (record,) = [r for r in found["records"] if r["threat_model"] == "gray"]
    assert record["attack"] == name
    unit, number = (*effort(name), "steps", registry.get(name).standard)[:2]
    assert (record["steps"], record.get("query_limit")) == ((number, None) if unit.endswith("steps") else (0, number))


# -- an attack that is added -------------------------------------------------------------------------------------------


def test_a_registered_attack_is_found_wherever_attacks_are_named(folder: Path, tmp_path: Path, toy: str) -> None:
    assert toy in registry.names("white")
    for command in ("evaluate", "attack", "calibrate", "demo"):
        assert toy in nndefense(command, "--help").out
    text = {"threat_model": ["gray", "white"], "name": toy, "eps": 0.2, "steps": 2}
    recipe = recipe_from(
        {"data": {"dataset": "d"}, "models": {"classifier": "c"}, "defense": {"database": "b"}, "attack": [text],
         "report": {"headline_norm": "normalized-l2", "headline_eps": 0.2}}
    )  # fmt: skip
    assert [(rung.attack.name, rung.attack.steps) for rung in recipe.rungs] == [(toy, 2), (toy, 2)]
    words = [*EVALUATE, "--classifier", folder / "net", "--database", folder / "database", "--k", 5, "--attack", toy]
    found = nndefense(*words, "--eps", "0.2,0.5", "--out", tmp_path).json
    rows = [r for r in found["records"] if r["attack"] == toy]
    assert {(r["threat_model"], r["eps"], r["steps"]) for r in rows} == {
        (model, eps, 3) for model in ("gray", "white") for eps in (0.2, 0.5)
    }
    assert all(len(r["attack_sha256"]) == 64 for r in rows)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Toy noise, normalised ℓ₂ 0.5" in page  # the table's heading
    assert "Accuracy against attack budget (Toy noise" in page  # the curves
    with pytest.raises(InputError, match="already: register it under another name"):
        attacks.register(attacks.Attack(toy, lambda *given, **named: given[1]))


def test_a_callable_alone_gets_a_name_of_its_own() -> None:
    def twice(model: Any, x: Tensor, y: Tensor, *, eps: float, norm: str, generator: torch.Generator) -> Tensor:
        return x

    first = attacks.register(twice)
    second = attacks.register(lambda model, x, y, **more: x)
    try:
        assert first == attacks.register(twice) == "twice"
        assert registry.get(second).function is not registry.get(first).function
        x, y = images("test", 4)
        assert torch.equal(run_attack(AttackSettings(first), trained(), x, y, 0.1, torch.Generator()).images, x)
    finally:
        registry.unregister(first)
        registry.unregister(second)


OWN = """
import torch

def push(model, x, y, *, eps, norm, generator):
    return (x + {share} * eps * torch.ones_like(x)).clamp(0, 1)

def wrong_shape(model, x, y, **more):
    return x[:, :, :4]

def no_number(model, x, y, **more):
    return x * float("nan")

def outside(model, x, y, **more):
    return x - 0.25

def fails(model, x, y, **more):
    raise ValueError("not today")
"""


def test_an_attack_of_the_users_is_run_and_known_by_its_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN.format(share=1))
    words = [*EVALUATE, "--classifier", folder / "net", "--norm", "linf", "--out", tmp_path / "out", "--no-audit"]
    words += ["--attack", f"python:{tmp_path / 'mine.py'}:push"]
    (first,) = [r for r in nndefense(*words).json["records"] if r["threat_model"] == "gray"]
    assert first["attack"] == words[-1]
    assert "push (mine.py)" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    cells = len(list((tmp_path / "out" / "cells").iterdir()))
    assert nndefense(*words).json["records"][1]["attack_seconds"] == first["attack_seconds"]
    # Another text of the file is another attack.
    (tmp_path / "mine.py").write_text(OWN.format(share=0.5))
    (again,) = [r for r in nndefense(*words).json["records"] if r["threat_model"] == "gray"]
    assert again["attack_sha256"] != first["attack_sha256"]
    assert len(list((tmp_path / "out" / "cells").iterdir())) == cells + 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("push", "passes its budget, linf 0.1, by 0.05"),
        ("wrong_shape", r"returned torch.float32 \(4, 1, 4, 8\), but must return images like"),
        ("no_number", "NaN or infinite pixels in 4 of 4 images"),
        ("outside", r"left \[0, 1\] by 0.25"),
        ("fails", "raised ValueError: not today; it must run as f"),
        ("absent", "has no function absent"),
    ],
)
def test_the_budget_is_checked_and_not_believed(tmp_path: Path, function: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(OWN.format(share=1.5))
    x, y = images("test", 4)

    def run() -> None:
        settings = AttackSettings(f"python:{tmp_path / 'mine.py'}:{function}", "linf", (0.1,))
        run_attack(settings, trained(), x, y, 0.1, torch.Generator())

    with pytest.raises(InputError, match=message):
        run()


def test_settings_of_an_attack_of_the_users_that_it_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN.format(share=1))
    name = f"python:{tmp_path / 'mine.py'}:push"
    for more, message in (({"steps": 5}, r"leave steps \(--steps\) out"), ({"restarts": 2}, "takes no restarts")):
        with pytest.raises(InputError, match=message):
            AttackSettings(name, **more)
    assert json.loads(json.dumps(AttackSettings(name).to_json()))["sha256"] == registry.get(name).sha256
    with pytest.raises(InputError, match="there is no file"):
        AttackSettings("python:absent.py:f")
    with pytest.raises(InputError, match="or python:FILE:FUNCTION"):
        AttackSettings("magic")


def test_an_attack_that_works_in_place_is_measured_against_the_clean_images() -> None:
    name = attacks.register(in_place)
    x, y = images("test", 4)
    before = x.clone()
    try:
        with pytest.raises(InputError, match="passes its budget"):
            run_attack(AttackSettings(name, "linf", (0.01,)), trained(), x, y, 0.01, torch.Generator())
    finally:
        registry.unregister(name)
    assert torch.equal(x, before)


def in_place(model: Any, x: Tensor, y: Tensor, **more: Any) -> Tensor:
    """Far outside a small ball."""
    return x.add_(0.5).clamp_(0, 1)


def closing_over(share: float) -> Any:
    """A function whose file says nothing of what it does."""

    def push(model: Any, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        return x * share

    return push


def test_whatever_decides_the_images_decides_the_identity(tmp_path: Path) -> None:
    def identity(function: Any, **more: Any) -> str:
        name = attacks.register(attacks.Attack("toy", function, **more))
        try:
            return registry.get(name).sha256
        finally:
            registry.unregister(name)

    assert identity(noise) == identity(noise)
    assert identity(noise, settings={"steps": 1}) != identity(noise, settings={"steps": 9})
    assert identity(noise, least=True) != identity(noise)
    assert identity(closing_over(0.5)) == identity(closing_over(0.5)) != identity(closing_over(0.6))
    # Without a file, as in a notebook, constants count.
    typed = [eval(f"lambda model, x, y, **more: x + {share}") for share in (0.1, 0.9)]
    assert identity(typed[0]) != identity(typed[1])
    # A module beside the user's file, imported at any depth, too.
    for name, text in (("mine", "import beside\ndef f(): ...\n"), ("beside", "from deeper import x\n")):
        (tmp_path / f"{name}.py").write_text(text)
    found = []
    for value in (1, 2):
        (tmp_path / "deeper.py").write_text(f"x = {value}\n")
        found.append(sha256_of_source(f"python:{tmp_path / 'mine.py'}:f"))
    assert found[0] != found[1]
    (tmp_path / "stranger.py").write_text("y = 1\n")
    assert found[1] == sha256_of_source(f"python:{tmp_path / 'mine.py'}:f")


def test_what_cannot_be_registered_is_told() -> None:
    with pytest.raises(InputError, match="there is an attack 'pgd' already"):
        attacks.register(replace(registry.get("pgd"), settings={"step_size": 0.0}))
    with pytest.raises(InputError, match="can need gradient, scores"):
        attacks.Attack("toy", noise, needs=("gradients",))
    with pytest.raises(InputError, match="needs a name"):
        attacks.register(partial(noise, steps=3))
