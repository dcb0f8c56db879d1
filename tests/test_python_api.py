"""The face of the package, as a reader of the README meets it: ``import nndefense as nnd``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nndefense as nnd
from index_build import build_database
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
    classifier = nnd.load_classifier(made / "classifier")
    database = nnd.ImageDatabase.open(made / "database", classifier=classifier)
    defense = nnd.NearestNeighborDefense(classifier, database, k=50, weighting="cbw-d")
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
