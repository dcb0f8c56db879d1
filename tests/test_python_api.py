"""The face of the package, as a reader of the README meets it: ``import nndefense as nnd``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rewrite

import nndefense as nnd
from index_build import build_database
from nndefense.database.manifest import CALIBRATION, keep_beside
from nndefense.training import train_classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier that was trained on a part of the digits, and a database of them."""
    folder = tmp_path_factory.mktemp("api")
    images = nnd.open_dataset("digits:train[:320]")
    net = nnd.build_classifier("small-cnn", input_shape=images.shape, classes=images.classes)
    trained = train_classifier(net, images, epochs=2, progress=False)
    nnd.save_classifier(trained, folder / "classifier")
    build_database(images, trained, nnd.FeatureSpec("block2"), folder / "database", progress=False)
    return folder


def test_the_readme_in_python(made: Path) -> None:
    defense = nnd.NearestNeighborDefense.open(made / "database")
    classifier = defense.classifier
    assert (defense.k, defense.weighting) == (50, "cbw-d")
    test = nnd.open_dataset("digits:test")
    images, labels = test.batch(range(64))
    assert images.shape == (64, 1, 8, 8)
    assert labels.shape == (64,)

    attacked = nnd.attacks.pgd(classifier, images, labels, eps=0.1, norm="normalized-l2", steps=5)
    assert attacked.shape == images.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    moved = (attacked - images).flatten(1).norm(dim=1)
    assert (moved <= 0.1 * images.flatten(1).norm(dim=1) * (1 + 1e-5)).all()
    assert (moved > 0).all()

    scores = defense(attacked)
    assert scores.shape == (64, 10)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(64), atol=1e-4, rtol=0)
    why = defense.explain(attacked)
    assert why.rows.shape == why.distances.shape == why.weights.shape == why.labels.shape == (64, 50)
    assert why.posteriors.shape == (64, 50, 10)
    assert len(why.ids) == 64
    assert all(len(names) == 50 for names in why.ids)
    torch.testing.assert_close(why.log_probabilities, scores)

    # The defence stands on real digits, so it must be far better than chance, and the attack must do something.
    clean = float((defense(images).argmax(1) == labels).float().mean())
    bare = [float((classifier(x).argmax(1) == labels).float().mean()) for x in (images, attacked)]
    assert clean > 0.5
    assert bare[0] > 0.5
    assert bare[1] < bare[0]


def test_a_defence_opens_with_its_setting(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all" / "database"
    shutil.copytree(made, tmp_path / "all")
    keep_beside(folder, CALIBRATION, {"chosen": {"k": 7, "weighting": "uniform"}, "ids": []})
    open_it = nnd.NearestNeighborDefense.open
    found = [open_it(folder), open_it(folder, k=3), open_it(folder, made / "classifier", weighting="cbw-e")]
    assert [(one.k, one.weighting) for one in found] == [(7, "uniform"), (3, "uniform"), (7, "cbw-e")]
    with pytest.raises(nnd.NNDefenseError, match="k is 321"):
        open_it(folder, k=321)
    few = nnd.NearestNeighborDefense(found[0].classifier, found[0].database.subset(np.arange(20)))
    assert (few.k, few.weighting) == (20, "cbw-d")


def test_python_code_runs_only_if_it_is_named(made: Path, tmp_path: Path) -> None:
    """One rule, for the defence as for the pipeline: a manifest is data, and does not make code run."""
    folder = tmp_path / "all" / "database"
    shutil.copytree(made, tmp_path / "all")
    rewrite(folder / "manifest.json", lambda manifest: manifest["classifier"].update(source="python:evil.py:make"))
    with pytest.raises(nnd.NNDefenseError, match="runs only if you name it"):
        nnd.NearestNeighborDefense.open(folder)
    with pytest.raises(nnd.NNDefenseError, match="runs only if you name it"):
        nnd.pipeline.open_classifier(None, database=folder)
    assert nnd.NearestNeighborDefense.open(folder, made / "classifier").k == 50


def test_the_checks_are_on_in_python(made: Path, tmp_path: Path) -> None:
    """What stands in the database is refused, without any option."""
    recipe = nnd.evaluation.Recipe(
        dataset="digits:train[300:340]",
        classifier=str(made / "classifier"),
        database=str(made / "database"),
        rungs=nnd.evaluation.rungs_for(["gray"], nnd.evaluation.AttackSettings(eps=(0.1,), steps=1)),
        headline_norm="normalized-l2",
        headline_eps=0.1,
    )
    with pytest.raises(nnd.NNDefenseError, match="stand in the database"):
        nnd.pipeline.evaluate(recipe, tmp_path / "out", progress=False)
    images = nnd.open_dataset("digits:train[:320]")
    attack = nnd.evaluation.AttackSettings(eps=(0.1,), steps=1)
    classifier = nnd.load_classifier(made / "classifier")
    with pytest.raises(nnd.NNDefenseError, match="stand in"):
        nnd.pipeline.choose(classifier, images, images.subset([1, 2]), attack, 0.1, progress=False)


def test_a_database_of_another_classifier_is_refused(made: Path) -> None:
    other = nnd.build_classifier("small-cnn", input_shape=(1, 8, 8), classes=[str(i) for i in range(10)], seed=1)
    with pytest.raises(nnd.NNDefenseError, match="another classifier"):
        nnd.ImageDatabase.open(made / "database", classifier=other)


def test_public_names() -> None:
    for name in nnd.__all__:
        assert getattr(nnd, name) is not None
        assert name in dir(nnd)
    assert nnd.evaluation.wilson_interval(5, 10)[0] == pytest.approx(0.2366, abs=1e-4)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = nnd.nonsense
    assert issubclass(nnd.NNDefenseError, Exception)
