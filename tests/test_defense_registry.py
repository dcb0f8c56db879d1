"""The registry of defences: one entry is enough for the command, recipes, the comparison and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails, nndefense
from helpers import trained
from torch import Tensor, nn

import nndefense as nnd
from nndefense import recipes
from nndefense.comparison import comparison_from, run_comparison, table_of
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, Recipe, rungs_for
from nndefense.evaluation.recipe import recipe_from
from nndefense.evaluation.report.figures import defense_lines
from nndefense.pipeline import Materials, MaterialSettings, defenses, make_defense, subject_of
from nndefense.pipeline.defenses import Defense


class Dimmed(nn.Module):
    """A toy: the image at a share of its brightness."""

    def __init__(self, classifier: nn.Module, share: float) -> None:
        super().__init__()
        self.classifier, self.share = classifier, share

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.share * images)
        return found


def dimmed(classifier: nn.Module, share: float = 0.9) -> nn.Module:
    return Dimmed(classifier, share)


@pytest.fixture
def toy() -> Iterator[str]:
    name = defenses.register(Defense("dimmed", dimmed, "at nine tenths of its brightness"))
    yield name
    defenses.unregister(name)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry") / "net"
    nnd.save_classifier(trained(), folder)
    return folder


def materials(out: Path, train: str | None = None, **settings: Any) -> Materials:
    images = None if train is None else nnd.open_dataset(train)
    scope = MaterialSettings(**settings)
    return Materials(scope, images, out, torch.device("cpu"), given=trained(), progress=False)


def test_a_toy_is_a_choice_a_recipe_entry_a_row_and_a_curve(toy: str, net: Path, tmp_path: Path) -> None:
    assert toy in nndefense("evaluate", "--help").out
    attack = ["--norm", "linf", "--eps", "0.1,0.2", "--steps", 2, "--no-audit", "--quiet"]
    given = ["--dataset", "digits:test", "--limit", 20, "--classifier", net, "--defense", toy]
    results = nndefense("evaluate", *given, *attack, "--out", tmp_path / "command", "--json").json
    (tmp_path / "recipe.toml").write_text(f"""
[data]
dataset = "digits:test"
limit = 20
[models]
classifier = "{net}"
[defense]
names = ["{toy}"]
[report]
headline_norm = "linf"
headline_eps = 0.2
audit = false
[[attack]]
threat_model = ["gray", "white"]
norm = "linf"
eps = [0.1, 0.2]
steps = 2
""")
    again = nndefense("evaluate", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "recipe", "--json").json
    outcomes = [
        {(r["defense"], r["threat_model"], r["eps"]): r["correct"] for r in found["records"]}
        for found in (results, again)
    ]
    assert outcomes[0] == outcomes[1]
    assert {threat for defense, threat, _ in outcomes[0] if defense == toy} == {"clean", "gray", "white", "worst"}
    page = (tmp_path / "command" / "report.html").read_text()
    assert page.count("dimmed") > 3
    assert "Every defence as the attack grows" in page
    assert [line.label for line in defense_lines(results)] == ["bare, worst", "dimmed, worst"]
    # And in a comparison, with options of its own.
    rows = [{"name": "bare", "kind": "none"}, {"name": "darker", "kind": toy, "options": {"share": 0.5}}]
    scope = {"default": {"eps": [0.2], "headline": 0.2, "steps": 2, "white_steps": 2, "holdout": 20}}
    compared = comparison_from({"title": "toy", "row": rows, "scope": scope}, "toy", "digits")
    made = Materials(
        compared.scope, nnd.open_dataset("digits:train[:60]"), tmp_path, torch.device("cpu"), given=trained(),
        progress=False,
    )  # fmt: skip
    table = {row.name: row for row in table_of(run_comparison(compared, made, nnd.open_dataset("digits:test[:20]")))}
    assert table["darker"].cells["informed"].accuracy is not None


def test_a_name_is_taken_once_and_given_back() -> None:
    name = defenses.register(dimmed)
    assert defenses.register(dimmed) == name == "dimmed"
    with pytest.raises(InputError, match="there is a defence 'dimmed' already"):
        defenses.register(Defense("dimmed", lambda classifier: classifier))
    with pytest.raises(InputError, match="already"):
        defenses.register(Defense("jpeg", dimmed))
    defenses.unregister(name)
    assert name not in defenses.names()
    for wrong in (name, "jpeg"):
        with pytest.raises(InputError, match="is no defence that was registered"):
            defenses.unregister(wrong)
    with pytest.raises(InputError, match="must be one of none, crop-ensemble"):
        defenses.get(name)


def test_what_attackers_are_given_follows_from_what_it_shows(tmp_path: Path) -> None:
    mine = materials(tmp_path)

    class Step(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = trained()((images * 3).round() / 3)
            return found

    class Shown(Step):
        def attack_model(self, draws: int) -> nn.Module:
            self.draws = draws
            return trained()

    def subject(model: nn.Module, informed: bool = True) -> Any:
        made = make_defense(Defense("x", lambda classifier: model), mine)
        return subject_of(made, "x", "defense", mine, informed=informed)

    # Rounding has a gradient of 0, which nobody can follow.
    assert subject(Step()).white is None
    shown = Shown()
    assert subject(shown).white is trained()
    assert shown.draws == mine.scope.draws
    plain = Dimmed(trained(), 0.9)
    assert subject(plain).white is plain
    assert subject(plain, informed=False).white is None
    jpeg = subject_of(make_defense(defenses.get("jpeg"), mine), "jpeg", "defense", mine)
    assert jpeg.white is not None
    assert jpeg.surface is None


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda classifier: 3, "made as int"),
        (lambda classifier: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "must give finite logits"),
        (lambda classifier: nn.Identity(), "must give finite logits"),
        (lambda classifier: Breaking("forward"), "the defence x raised RuntimeError: forward broke"),
        (lambda classifier: Breaking("nan"), "gives NaN or infinite scores"),
        (lambda classifier: Breaking("attack_model"), "raised RuntimeError: attack_model broke"),
        (lambda classifier: Breaking("three"), r"attack_model\(\) of Breaking gives int"),
        (lambda classifier: Breaking("surface"), r"surface\(\) of Breaking gives int"),
    ],
)
def test_what_is_no_defence_is_told(factory: Any, words: str, tmp_path: Path) -> None:
    mine = materials(tmp_path)
    with pytest.raises(InputError, match=words):
        subject_of(make_defense(Defense("x", factory, sha256="0"), mine), "x", "x", mine)


class Breaking(nn.Module):
    """A defence that breaks in one place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        if place in ("attack_model", "three"):
            self.attack_model = self.follow
        if place == "surface":
            self.surface = lambda: 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.place == "forward":
            raise RuntimeError("forward broke")
        return torch.full((len(images), 10), torch.nan if self.place == "nan" else 0.0)

    def follow(self) -> int:
        if self.place == "three":
            return 3
        raise RuntimeError("attack_model broke")


def test_a_defence_gets_the_images_that_it_asks_for(tmp_path: Path) -> None:
    seen: list[int] = []

    def factory(classifier: nn.Module, data: Materials) -> nn.Module:
        seen.extend((len(data.rows), len(data.held)))
        return classifier

    make_defense(Defense("x", factory), materials(tmp_path, "digits:train[:100]", holdout=30))
    assert seen == [70, 30]
    with pytest.raises(InputError, match="--train-set"):
        make_defense(Defense("x", factory), materials(tmp_path))
    with pytest.raises(InputError, match="takes no colour"):
        make_defense(Defense("x", factory), materials(tmp_path), {"colour": 1})


def test_wrong_commands_are_told(net: Path, tmp_path: Path) -> None:
    run = ["evaluate", "--dataset", "digits:test", "--classifier", net, "--out", tmp_path / "out", "--eps", "0.1"]
    fails(2, "'magic' is not one of", *run, "--defense", "magic")
    fails(2, "made of training images: name them by --train-set", *run, "--defense", "quilting")
    fails(2, "name them by --defense", *run, "--train-set", "digits:train")
    fails(3, "stand in", *run, "--defense", "quilting", "--train-set", "digits:test")
    fails(2, "there is no file", *run, "--defense", "python:nowhere.py:make")
    (tmp_path / "mine.py").write_text("def make(classifier):\n    raise ValueError('no')\n")
    fails(2, "raised ValueError: no", *run, "--defense", f"python:{tmp_path}/mine.py:make")


def test_a_database_is_the_nearest_neighbour_defence_already(tmp_path: Path) -> None:
    attack = AttackSettings(eps=(0.1,), steps=1)
    recipe = Recipe(
        "digits:test", "net", rungs_for(("gray",), attack), "normalized-l2", 0.1, database="db",
        defenses=("nearest-neighbor",), train_set=("digits:train",),
    )  # fmt: skip
    with pytest.raises(InputError, match="leave out one of the two"):
        nnd.pipeline.evaluate(recipe, tmp_path)


def test_recipes_say_how_defences_are_made() -> None:
    values = {
        "data": {"dataset": "digits:test", "train_set": "digits:train"},
        "models": {"classifier": "net"},
        "defense": {"names": ["alp", "python:mine.py:make"]},
        "report": {"headline_norm": "linf", "headline_eps": 0.1},
        "materials": {"holdout": 40, "training": {"eps": 0.15}},
        "attack": [{"threat_model": "white", "norm": "linf", "eps": 0.1}],
    }
    recipe = recipe_from(values)
    assert recipe.defenses == ("alp", "python:mine.py:make")
    assert recipe.train_set == ("digits:train",)
    assert recipes.build(MaterialSettings, recipe.materials, "materials").holdout == 40
    assert json.loads(json.dumps(recipe.to_json()))["materials"]["training"] == {"eps": 0.15}


def test_the_registry_is_there_at_once() -> None:
    code = "import sys; from nndefense.pipeline import defenses; defenses.names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
