"""The nearest-neighbour defence against its plain algorithm, and the choice of its settings."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DIGITS, digits, images, trained, untrained
from torch import Tensor

from index_build import build_database, build_databases
from nndefense.attacks import pgd
from nndefense.database import WEIGHTINGS, ImageDatabase
from nndefense.defenses import NearestNeighborDefense, calibrate
from nndefense.errors import DatabaseError, InputError
from nndefense.features import FeatureSpec
from nndefense.models import build_classifier

ROWS = 400
SPEC = FeatureSpec("block2", "grid2", pca=24)


@pytest.fixture(scope="module")
def databases(tmp_path_factory) -> list[ImageDatabase]:
    """The first digits of the training set in three features."""
    root = tmp_path_factory.mktemp("databases")
    specs = [SPEC, FeatureSpec("block2", "grid2", pca=2), FeatureSpec("block3", "avg", pca=0)]
    paths = {root / str(i): spec for i, spec in enumerate(specs)}
    return build_databases(digits("train").subset(np.arange(ROWS)), trained(), paths, progress=False)


@pytest.fixture(scope="module")
def database(databases) -> ImageDatabase:
    return databases[0]


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor, Tensor]:
    """Clean and attacked test digits with their labels."""
    clean, labels = images("test", 60)
    with torch.enable_grad():
        attacked = pgd(trained(), clean, labels, norm="normalized-l2", eps=0.25, steps=5)
    return clean, attacked, labels


@torch.no_grad()
def plain_features(batch: Tensor) -> np.ndarray:
    """The means over a 2 x 2 grid of the second block's 4 x 4 maps."""
    net = trained().net
    maps = net.block2(net.pool1(net.block1(batch))).double().numpy()
    return maps.reshape(len(maps), 64, 2, 2, 2, 2).mean((3, 5)).reshape(len(maps), -1)


@functools.lru_cache(maxsize=1)
def fitted() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reduced features and posteriors of the rows, and the mean and axes of the PCA."""
    data = images("train", ROWS)[0]
    with torch.no_grad():
        s = trained()(data).double().softmax(1).numpy()
    z = plain_features(data)
    axes = np.linalg.svd(z - z.mean(0), full_matrices=False)[2][:24].T
    return (z - z.mean(0)) @ axes, s, z.mean(0), axes


def reference(query: Tensor, k: int, weighting: str) -> np.ndarray:
    """The algorithm in NumPy: every feature and posterior afresh, SVD for the PCA, a full sort for the search."""
    z, s, mean, axes = fitted()
    out = []
    for vector in (plain_features(query) - mean) @ axes:
        nearest = np.argsort(np.linalg.norm(z - vector, axis=1))[:k]
        w = []
        for posterior in s[nearest]:
            if weighting == "uniform":
                w.append(1.0)
            elif weighting == "cbw-e":
                w.append(np.log(10) - sum(-p * np.log(p) for p in posterior if p > 0))
            else:
                top, *others = sorted(posterior, reverse=True)
                w.append(sum((top - p) ** 3 for p in others))
        out.append((np.array(w)[:, None] * s[nearest]).sum(0) / np.sum(w))
    return np.stack(out)


# -- predictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("k", [1, 10, 50])
def test_defense_is_the_plain_algorithm(database, held_out, weighting, k):
    defense = NearestNeighborDefense(trained(), database, k, weighting)
    for batch in held_out[:2]:
        output = defense(batch)
        assert output.shape == (60, 10)
        assert torch.allclose(output.exp().sum(1), torch.ones(60), atol=1e-5)
        assert bool(torch.isfinite(output).all())
        np.testing.assert_allclose(output.exp().numpy(), reference(batch, k, weighting), atol=2e-4)


def test_defense_classifies_digits_and_resists_where_the_classifier_does_not(database, held_out):
    labels = held_out[2]
    defense = NearestNeighborDefense(trained(), database, 5)
    right = [
        float((model(x).argmax(1) == labels).double().mean()) for model in (trained(), defense) for x in held_out[:2]
    ]
    assert right[0] > 0.9
    assert right[2] > 0.8
    assert right[3] > right[1]


def test_a_prediction_costs_one_forward_pass_up_to_the_layer(database):
    classifier = trained()
    defense = NearestNeighborDefense(classifier, database, 50)
    runs: dict[str, int] = {}

    def count(name):
        def hook(module, args):
            runs[name] = runs.get(name, 0) + 1

        return hook

    handles = [m.register_forward_pre_hook(count(name)) for name, m in classifier.net.named_modules() if name]
    defense(images("test", 7)[0])
    explained = dict(runs)
    runs.clear()
    defense.explain(images("test", 7)[0])
    for handle in handles:
        handle.remove()
    assert set(runs.values()) == {1}
    assert runs == explained
    assert {name for name in runs if "." in name} == {f"block{block}.{i}" for block in (1, 2) for i in range(3)}
    assert "fc" not in runs


def test_explanation_agrees_with_the_prediction(database):
    batch = images("test", 9)[0]
    for weighting in WEIGHTINGS:
        defense = NearestNeighborDefense(trained(), database, 6, weighting)
        told = defense.explain(batch)
        assert torch.equal(told.log_probabilities, defense(batch))
        assert torch.allclose(
            (told.weights[..., None] * told.posteriors).sum(1).log(), told.log_probabilities, atol=1e-4
        )
        assert torch.allclose(told.weights.sum(1), torch.ones(9), atol=1e-6)
        assert bool((told.distances.diff(dim=1) >= 0).all())
        assert [[int(name[-5:]) for name in row] for row in told.ids] == [
            [int(digits("train").ids[int(r)][-5:]) for r in row] for row in told.rows
        ]
        assert torch.equal(told.labels, torch.from_numpy(digits("train").labels[told.rows.numpy()]))
    other = NearestNeighborDefense(trained(), database, 6, "cbw-d", power=1, terms=2).explain(batch)
    assert not torch.allclose(other.weights, told.weights)


def test_an_image_of_the_database_finds_itself(database):
    batch = images("train", 50)[0]
    told = NearestNeighborDefense(trained(), database, 1).explain(batch)
    assert told.rows[:, 0].tolist() == list(range(50))
    typical = NearestNeighborDefense(trained(), database, 2).explain(batch).distances[:, 1].median()
    assert float(told.distances.max()) < 0.01 * float(typical)
    with torch.no_grad():
        assert torch.allclose(told.log_probabilities.exp(), trained()(batch).softmax(1), atol=1e-5)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_batch_size_does_not_change_predictions(database, backend):
    batch = images("test", 33)[0]
    defense = NearestNeighborDefense(trained(), ImageDatabase.open(database.path, backend=backend), 10)
    whole = defense(batch)
    for size in (1, 5, 32):
        assert torch.allclose(torch.cat([defense(part) for part in batch.split(size)]), whole, atol=1e-3)
    assert defense(batch[:0]).shape == (0, 10)


def test_one_row_is_enough_for_k_1_and_subsets_serve_too(database):
    part = database.subset(np.array([17]))
    output = NearestNeighborDefense(trained(), part, 1)(images("test", 3)[0])
    assert torch.allclose(output.exp(), database.posteriors(np.array([17, 17, 17])), atol=1e-6)


def test_output_carries_no_gradient(database):
    pixels = images("test", 2)[0].requires_grad_()
    assert not NearestNeighborDefense(trained(), database, 3)(pixels).requires_grad


def test_a_classifier_in_training_is_used_as_trained_and_not_changed(database):
    classifier = copy.deepcopy(trained()).train()
    before = classifier.fingerprint
    batch = images("test", 5)[0]
    defense = NearestNeighborDefense(classifier, database, 5)
    assert torch.allclose(defense(batch), NearestNeighborDefense(trained(), database, 5)(batch), atol=1e-5)
    assert classifier.fingerprint == before


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.full((1, 1, 8, 8), float("nan")), "hold NaN pixels"),
        (torch.full((1, 1, 8, 8), float("inf")), "must lie in"),
        (torch.full((2, 1, 8, 8), 255.0), "divide 8-bit values by 255"),
        (torch.full((2, 1, 8, 8), -0.5), r"must lie in \[0, 1\]"),
        (torch.zeros((2, 1, 8, 8), dtype=torch.uint8), "uint8, but must be floats"),
        (torch.zeros(1, 8, 8), "add a batch dimension"),
        (torch.zeros(2, 3, 8, 8), r"colour \(3 channels\), but the classifier takes grey"),
        (torch.zeros(2, 1, 2, 2), "2 x 2|vectors of length"),
        (np.zeros((2, 1, 8, 8)), "must be a torch tensor"),
    ],
)
def test_images_that_cannot_be_classified(database, batch, message):
    defense = NearestNeighborDefense(trained(), database, 5)
    for use in (defense, defense.explain):
        with pytest.raises(InputError, match=message) as error:
            use(batch)
        assert "\n" not in str(error.value)


def test_grey_images_for_a_colour_classifier_and_another_size(tmp_path):
    classifier = build_classifier("madry-mnist", input_shape=(3, 8, 8), classes=DIGITS)
    colour = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    layer = classifier.layers()[0]
    begun = ImageDatabase.create(tmp_path, classifier=classifier, feature=FeatureSpec(layer, pca=0))
    with torch.no_grad():
        vectors = classifier.net.get_submodule(layer)(colour).mean((2, 3))
        begun.add(vectors, classifier(colour).softmax(1), [str(i) for i in range(12)], [-1] * 12)
    begun.finish()
    defense = NearestNeighborDefense(classifier, ImageDatabase.open(tmp_path), 3)
    assert defense.explain(colour).rows[:, 0].tolist() == list(range(12))
    with pytest.raises(InputError, match=r"grey \(1 channel\), but the classifier takes colour.*repeat the channel"):
        defense(colour[:, :1])
    with pytest.raises(InputError, match="takes only 8 x 8"):
        defense(torch.zeros(1, 3, 16, 16))


def test_settings_that_cannot_be_used(database):
    for k in (0, ROWS + 1):
        with pytest.raises(InputError, match=f"k is {k}, but must be from 1 to the database's {ROWS} rows"):
            NearestNeighborDefense(trained(), database, k)
    with pytest.raises(InputError, match="uniform, cbw-e, cbw-d"):
        NearestNeighborDefense(trained(), database, 5, "softmax")
    for options in ({"power": 0}, {"terms": 0}):
        with pytest.raises(InputError, match="power above 0"):
            NearestNeighborDefense(trained(), database, 5, **options)
    with pytest.raises(DatabaseError, match="another classifier"):
        NearestNeighborDefense(untrained(), database, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_classifier_on_a_gpu_is_defended_there(database):
    batch = images("test", 20)[0]
    expected = NearestNeighborDefense(trained(), database, 10)(batch)
    output = NearestNeighborDefense(copy.deepcopy(trained()).to("cuda"), database, 10)(batch.cuda())
    assert output.device.type == "cuda"
    assert torch.allclose(output.cpu(), expected, atol=1e-2)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_what_a_defense_with_that_setting_scores(databases, held_out):
    clean, attacked, labels = held_out
    found = calibrate(trained(), databases[1:], *held_out, ks=(7, 400, 401, 0), batch_size=17)
    assert len(found.table) == 2 * 2 * len(WEIGHTINGS)
    assert {row.k for row in found.table} == {7, 400}
    by_feature = {(d.feature.layer, d.feature.pooling, d.dimension): d for d in databases}
    for row in found.table:
        defense = NearestNeighborDefense(
            trained(), by_feature[row.layer, row.pooling, row.dimension], row.k, row.weighting
        )
        for images_, accuracy in ((clean, row.clean), (attacked, row.attacked)):
            assert accuracy == float((defense(images_).argmax(1) == labels).double().mean())
    with torch.no_grad():
        assert found.bare_clean == float((trained()(clean).argmax(1) == labels).double().mean())
        assert found.bare_attacked == float((trained()(attacked).argmax(1) == labels).double().mean())
    assert found.n == 60


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.1, 1.0])
def test_the_best_setting_within_the_bound_is_chosen(databases, held_out, loss):
    found = calibrate(trained(), databases, *held_out, ks=(1, 10, 200), max_clean_loss=loss)
    within = [row for row in found.table if row.clean >= found.bare_clean - loss - 1e-9]
    assert found.within_bound == bool(within)
    if within:
        assert found.chosen == found.table[0]
        # More attacked accuracy first, then more clean accuracy, then fewer neighbours.
        assert found.chosen in within
        best = max((row.attacked, row.clean, -row.k) for row in within)
        assert (found.chosen.attacked, found.chosen.clean, -found.chosen.k) == best
        assert list(found.table[: len(within)]) == sorted(
            within, key=lambda row: (row.attacked, row.clean, -row.k), reverse=True
        )
    assert f"{100 * loss:g} points" in found.objective


def test_where_no_setting_keeps_the_bound_the_one_that_loses_least_is_taken(databases, held_out):
    found = calibrate(trained(), databases, *held_out, ks=(200, 400), max_clean_loss=-0.5)
    assert not found.within_bound
    assert found.chosen.clean == max(row.clean for row in found.table)
    assert found.to_json()["within_bound"] is False
    assert found.to_json()["chosen"] in found.to_json()["table"]


def test_ties_go_to_fewer_neighbours_and_to_the_first_given(database):
    clean, labels = images("train", 20)
    found = calibrate(trained(), [database], clean, clean, labels, ks=(3, 1, 2), max_clean_loss=1)
    best = [row for row in found.table if (row.attacked, row.clean) == (found.chosen.attacked, found.chosen.clean)]
    assert len(best) > 3
    assert (found.chosen.k, found.chosen.weighting) == (1, "uniform")
    assert [row.k for row in best] == sorted(row.k for row in best)


def test_calibrated_defense_uses_the_chosen_database(databases, held_out):
    # Two candidates differ in nothing but the PCA, and one of them only in its rows.
    candidates = [databases[0].subset(np.arange(30)), databases[1], databases[0]]
    for ks in ((1, 5, 20), (400,)):
        for order in (candidates, candidates[::-1]):
            defense, found = NearestNeighborDefense.calibrate(trained(), order, *held_out, max_clean_loss=1, ks=ks)
            assert defense.database is order[found.candidate]
            assert (defense.k, defense.weighting) == (found.chosen.k, found.chosen.weighting)
            for batch, accuracy in zip(held_out[:2], (found.chosen.clean, found.chosen.attacked), strict=True):
                assert float((defense(batch).argmax(1) == held_out[2]).double().mean()) == accuracy


def test_calibration_errors(database, held_out):
    clean, attacked, labels = held_out
    with pytest.raises(InputError, match="nothing to calibrate"):
        calibrate(trained(), [], clean, attacked, labels)
    with pytest.raises(InputError, match="nothing to calibrate"):
        calibrate(trained(), [database], clean, attacked, labels, ks=(ROWS + 1,))
    with pytest.raises(InputError, match="60 clean images and 59 labels"):
        calibrate(trained(), [database], clean, attacked, labels[1:])
    with pytest.raises(InputError, match="59 attacked images and 60 labels"):
        calibrate(trained(), [database], clean, attacked[1:], labels)
    with pytest.raises(InputError, match="0 clean images and 0 labels"):
        calibrate(trained(), [database], clean[:0], attacked[:0], labels[:0])
    with pytest.raises(InputError, match="attacked images range from"):
        calibrate(trained(), [database], clean, attacked + 2, labels)
    with pytest.raises(InputError, match="weighting is 'x'"):
        calibrate(trained(), [database], clean, attacked, labels, weightings=("x",))
    with pytest.raises(DatabaseError, match="another classifier"):
        calibrate(untrained(), [database], clean, attacked, labels)


def test_progress_sees_every_candidate(tmp_path: Path, held_out):
    built = build_database(
        digits("train").subset(np.arange(20)), trained(), FeatureSpec("block1", pca=0), tmp_path, progress=False
    )
    seen = []

    def watch(candidates):
        for candidate in candidates:
            seen.append(candidate)
            yield candidate

    calibrate(trained(), iter([built, built]), *held_out, ks=(1,), progress=watch)
    assert seen == [built, built]
