"""What is finished counts only for the defence, settings and images that it was made of; mistakes are told first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import trained
from torch import Tensor, nn

import nndefense as nnd
from index_build import build_database
from nndefense.database.manifest import CALIBRATION, keep_beside
from nndefense.datasets import ImageDataset, open_dataset
from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, Recipe, ThreatModel, rungs_for
from nndefense.evaluation.evaluate import _Cell, _Run
from nndefense.features import FeatureSpec
from nndefense.models.racnn import DESCRIPTION_FILE
from nndefense.pipeline import Materials, MaterialSettings, defenses, make_defense, makers, subject_of
from nndefense.pipeline.defenses import Defense
from nndefense.pipeline.evaluating import open_recipe
from nndefense.pipeline.making import Made

SMALL = {"layers": 1, "holdout": 20, "candidate_rows": 40, "steps": 1}


def materials(out: Path, train: str | None = "digits:train[:80]", seed: int = 0, **settings: Any) -> Materials:
    images: ImageDataset | None = None if train is None else open_dataset(train)
    scope = MaterialSettings(**{**SMALL, **settings})
    return Materials(scope, images, out, torch.device("cpu"), seed, given=trained(), progress=False)


def identity(defense: Defense, out: Path, options: dict[str, Any] | None = None, **changes: Any) -> str:
    mine = materials(out, **changes)
    return subject_of(make_defense(defense, mine, options), "x", "defense", mine, informed=False).identity


class Head(nn.Module):
    def __init__(self, classifier: nn.Module, weight: float, database: str = "") -> None:
        super().__init__()
        self.classifier, self.weight = classifier, nn.Parameter(torch.tensor(weight))
        self.database = SimpleNamespace(fingerprint=database)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.classifier(images) * self.weight
        return found


def test_other_weights_databases_and_images_are_another_defence(tmp_path: Path) -> None:
    def head(weight: float = 1.0, database: str = "") -> str:
        made = Defense("x", lambda classifier: Head(classifier, weight, database), sha256="0" * 64)
        return identity(made, tmp_path)

    assert head() == head()
    assert len({head(), head(2.0), head(1.0, "f00"), head(1.0, "ba4")}) == 4
    asks = Defense("x", lambda classifier, data: classifier, sha256="0" * 64)
    sets = ("digits:train[:80]", "digits:train[80:160]", None)
    assert len({identity(asks, tmp_path, train=train) for train in sets}) == 3
    # Who asks for no images does not depend on them.
    plain = Defense("x", lambda classifier: classifier, sha256="0" * 64)
    assert len({identity(plain, tmp_path, train=train) for train in sets}) == 1


def test_every_setting_tells_a_defence_apart(tmp_path: Path) -> None:
    crops = defenses.get("crop-ensemble")
    found = [identity(crops, tmp_path, options) for options in ({"size": 0.876}, {"size": 0.884}, {"seed": 1}, {})]
    found += [identity(crops, tmp_path, **changes) for changes in ({"draws": 3}, {"crop": 0.5})]
    assert len(set(found)) == len(found)
    # The words for people are as short as before.
    assert make_defense(crops, materials(tmp_path), {"size": 0.876}).facts == {"form": "30 crops of 0.88 of the side"}


def test_where_attacks_start_is_part_of_a_cell() -> None:
    run = _Run(open_dataset("digits:test[:5]"), "net", {}, 0, 5, "cpu", lambda images: None, None)

    def key(images: Any) -> dict[str, Any]:
        target = SimpleNamespace(rows=SimpleNamespace(images=images))
        cell = _Cell(ThreatModel("adaptive", target), AttackSettings("adaptive", "linf", (0.1,), 2), 0.1)
        return run.key(cell, [], False)

    assert key(None) != key(open_dataset("digits:train[:5]"))


def recipe(folder: Path, **changes: Any) -> Recipe:
    attack = AttackSettings(norm="linf", eps=(0.1,), steps=1)
    given = {"materials": SMALL, "limit": 10, **changes}
    return Recipe("digits:test", str(folder / "net"), rungs_for(("gray",), attack), "linf", 0.1, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    nnd.save_classifier(trained(), folder / "net")
    return folder


def test_k_and_weighting_reach_the_defence_that_is_made(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, defenses=("nearest-neighbor",), train_set=("digits:train[:80]",), k=3, weighting="uniform")
    opened = open_recipe(made, tmp_path, progress=False)
    assert opened.defense is not None
    assert (opened.defense.k, opened.defense.weighting) == (3, "uniform")
    # No calibration chose these.
    assert opened.calibration is None


@pytest.mark.parametrize("given", [{"k": 5}, {"weighting": "uniform"}, {"k": 5, "defenses": ("jpeg",)}])
def test_k_and_weighting_of_no_defence_are_refused(given: dict[str, Any], folder: Path) -> None:
    with pytest.raises(InputError, match="are settings of nearest-neighbor"):
        recipe(folder, **given)


def test_calibration_images_are_refused_whatever_k_is(folder: Path, tmp_path: Path) -> None:
    place, test = tmp_path / "database", open_dataset("digits:test")
    build_database(open_dataset("digits:train[:60]"), trained(), FeatureSpec("block2", pca=0), place, progress=False)
    keep_beside(place, CALIBRATION, {"chosen": {"k": 5, "weighting": "uniform"}, "ids": list(test.ids)})
    for given in ({}, {"k": 3}, {"k": 3, "weighting": "cbw-d"}):
        with pytest.raises(DataError, match="was calibrated on"):
            open_recipe(recipe(folder, database=str(place), **given), tmp_path, progress=False)


def test_patches_of_other_settings_are_cut_again(tmp_path: Path) -> None:
    def patches(**changes: Any) -> tuple[Made, bool]:
        said: list[str] = []
        mine = materials(tmp_path, **changes)
        mine.say = said.append
        return make_defense(defenses.get("quilting"), mine), bool(said)

    assert patches(patches=50)[1]
    assert not patches(patches=50)[1]
    more, cut = patches(patches=80)
    assert (more.database_rows, cut) == (80, True)
    other, cut = patches(patches=80, seed=1)
    assert cut
    assert other.database != more.database
    # More than there are is all of them, found again.
    everything, _ = patches(patches=10**6, seed=1)
    assert everything.database_rows == 60 * 4 * 4
    assert not patches(patches=10**6, seed=1)[1]


def test_an_ra_cnn_of_other_settings_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []

    def train(*parts: Any, out: Path, **settings: Any) -> str:
        assert not (out / DESCRIPTION_FILE).exists()
        out.mkdir(parents=True)
        (out / DESCRIPTION_FILE).write_text("{}")
        trainings.append(settings)
        return "trained"

    monkeypatch.setattr(makers, "train_racnn", train)
    monkeypatch.setattr(makers, "load_racnn", lambda *parts, **options: "found")
    database = SimpleNamespace(fingerprint="0")

    def made(k: int = 5, **changes: Any) -> Any:
        return makers._racnn(materials(tmp_path, **changes), database, k)

    assert [made(), made(), made(3), made(3)] == ["trained", "found", "trained", "found"]
    assert made(3, training={"epochs": 2}) == "trained"
    assert made(3, training={"epochs": 2}, classifier={"arch": "strided-cnn"}) == "trained"
    assert made(3, seed=1) == "trained"
    assert [settings["k"] for settings in trainings] == [5, 3, 3, 3, 3]


def test_what_a_training_lacks_is_told_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def net(*parts: Any, **options: Any) -> None:
        pytest.fail("A net was trained before the settings were looked at")

    monkeypatch.setattr(Materials, "net", net)
    mine = materials(tmp_path, training={"epochs": 1})
    with pytest.raises(InputError, match="name them in a recipe"):
        make_defense(defenses.get("ensemble-adversarial"), mine)


def test_wrong_materials_are_told_first(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no entry materials\.no_such_entry"):
        open_recipe(recipe(folder / "nowhere", materials={"no_such_entry": 1}), tmp_path)
    with pytest.raises(InputError, match="holdout is 0, but must be at least 20"):
        open_recipe(recipe(folder / "nowhere", materials={"holdout": 0}), tmp_path)
    with pytest.raises(InputError, match="batch_size is 0"):
        MaterialSettings(batch_size=0)
    with pytest.raises(InputError, match="a training set is what other defences are made of"):
        recipe(folder, train_set=("digits:train",))
