"""The rule by which neighbours decide, against the formula by hand and in its limits."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digits, images, table, trained, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from index_build import build_database
from nndefense.database import WEIGHTINGS, ImageDatabase, Manifest, Rule, combine, weight_shares
from nndefense.database.manifest import keep_beside
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.stored import open_stored
from nndefense.errors import DatabaseError, InputError
from nndefense.evaluation.evaluate import Subject, identity_of
from nndefense.evaluation.recipe import recipe_from
from nndefense.features import FeatureSpec
from nndefense.guard import Guard

ROWS = 300
RULES = (
    {"k": 10},
    {"k": 7, "weighting": "uniform", "votes": "labels"},
    {"k": 20, "weighting": "cbw-e", "temperature": 2.5},
    {"k": 300, "votes": "labels", "temperature": 0.4, "alpha": 0.3},
    {"k": 10, "alpha": 0.5},
    {"k": 10, "alpha": 1.0},
)


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> ImageDatabase:
    """The first digits of the training set."""
    data = digits("train").subset(np.arange(ROWS))
    feature = FeatureSpec("block2", "grid2", pca=24)
    return build_database(data, trained(), feature, tmp_path_factory.mktemp("rule") / "db", progress=False)


def by_hand(database: ImageDatabase, batch: Tensor, rule: Rule) -> np.ndarray:
    """The formula image by image and row by row, with Python's numbers."""
    with torch.no_grad():
        vectors, own = database.extractor(trained())(batch).double().numpy(), trained()(batch).double().softmax(1)
    every = database.row_numbers
    rows, labels = database.features(every).double().numpy(), database.labels(every).tolist()
    posteriors = database.posteriors(every).double().tolist()
    weights = database.weights(every, rule.weighting).tolist()
    out = []
    for vector, bare in zip(vectors, own.tolist(), strict=True):
        squared = ((rows - vector) ** 2).sum(1)
        near = np.argsort(squared)[: rule.k]
        total, vote = 0.0, [0.0] * 10
        for j in near:
            kappa = 1.0 if rule.temperature is None else math.exp(-squared[j] / rule.temperature)
            said = posteriors[j] if rule.votes == "posteriors" else [float(c == labels[j]) for c in range(10)]
            total += weights[j] * kappa
            vote = [v + weights[j] * kappa * s for v, s in zip(vote, said, strict=True)]
        out.append([(1 - rule.alpha) * v / total + rule.alpha * b for v, b in zip(vote, bare, strict=True)])
    return np.array(out)


@pytest.mark.parametrize("values", RULES)
def test_a_defence_is_the_formula(database, values):
    batch, rule = images("test", 12)[0], Rule.of(values)
    wanted = by_hand(database, batch, rule)
    defense = NearestNeighborDefense(trained(), database, **rule.to_json())
    assert defense.rule == rule
    np.testing.assert_allclose(defense(batch).exp().numpy(), wanted, atol=1e-6)
    said = defense.explain(batch)
    torch.testing.assert_close(said.log_probabilities, defense(batch))
    votes = said.posteriors if rule.votes == "posteriors" else torch.nn.functional.one_hot(said.labels, 10).float()
    neighbours = (said.weights.unsqueeze(2) * votes).sum(1)
    with torch.no_grad():
        own = trained()(batch).softmax(1)
    np.testing.assert_allclose((1 - rule.alpha) * neighbours + rule.alpha * own, wanted, atol=1e-6)
    answers = Guard(trained(), database, **rule.to_json()).predict(batch)
    np.testing.assert_allclose([one.probabilities for one in answers], wanted, atol=1e-6)
    np.testing.assert_allclose([[n.weight for n in one.neighbors] for one in answers], said.weights, atol=1e-6)


@pytest.mark.parametrize("values", RULES)
def test_the_guards_answer_does_not_depend_on_the_company(database, values):
    batch = images("test", 23)[0]
    guard = Guard(trained(), database, **Rule.of(values).to_json())
    together = guard.predict(batch)
    order = [17, 3, 22, 0, 9, 17]
    assert guard.predict(batch[order]) == [together[i] for i in order]
    assert [guard.predict(batch[i])[0] for i in (0, 9, 22)] == [together[i] for i in (0, 9, 22)]


def test_a_rule_without_kernel_and_classifier_is_the_plain_weighted_mean_to_the_bit(database):
    batch = images("test", 30)[0]
    for weighting in WEIGHTINGS:
        said = NearestNeighborDefense(trained(), database, 9, weighting).explain(batch)
        weights = database.weights(said.rows, weighting)
        assert torch.equal(said.log_probabilities.exp(), combine(said.posteriors, weights).log().exp())
        assert torch.equal(said.weights, weight_shares(weights))


def test_the_classifier_alone_and_the_neighbours_alone_are_the_ends_of_a_mixture(database):
    batch = images("test", 30)[0]
    with torch.no_grad():
        own = trained()(batch).softmax(1)
    ends = [NearestNeighborDefense(trained(), database, 9, alpha=alpha)(batch).exp() for alpha in (0.0, 1.0)]
    assert torch.equal(ends[0], NearestNeighborDefense(trained(), database, 9)(batch).exp())
    torch.testing.assert_close(ends[1], own, atol=1e-6, rtol=0)


def test_a_mixture_costs_one_whole_forward_pass(database):
    defense = NearestNeighborDefense(trained(), database, 5, alpha=0.5)
    passes = []
    hooks = [part.register_forward_hook(lambda *_: passes.append(1)) for part in (trained().net, trained().net.block2)]
    try:
        defense(images("test", 4)[0])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(passes) == 2


some = settings(max_examples=60, deadline=None)
numbers = st.integers(0, 2**31 - 1)


def drawn(seed: int, k: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Votes, weights, distances and the classifier's posteriors of 4 images."""
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randn(4, k, 5, generator=generator, dtype=torch.float64).softmax(2)
    weights = torch.rand(4, k, generator=generator, dtype=torch.float64)
    distances = scale * torch.rand(4, k, generator=generator, dtype=torch.float64).sort(1).values
    return votes, weights, distances, torch.randn(4, 5, generator=generator, dtype=torch.float64).softmax(1)


@given(numbers, st.integers(1, 9), st.floats(1e-320, 1e300), st.floats(0, 1e6), st.floats(0, 1))
@some
def test_answers_are_distributions_whatever_the_temperature(seed, k, temperature, scale, alpha):
    votes, weights, distances, own = drawn(seed, k, scale)
    weights[0] = 0
    rule = Rule(k, temperature=temperature, alpha=alpha)
    for found in (rule.shares(weights, distances), rule.probabilities(votes, weights, distances, own)):
        assert bool((found >= 0).all())
        torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0)


@given(numbers, st.integers(1, 9))
@some
def test_an_endless_temperature_is_no_kernel_and_a_vanishing_one_the_nearest_row(seed, k):
    votes, weights, distances, _ = drawn(seed, k)
    weights = weights + 0.01
    hot, cold, none = (Rule(k, temperature=t).probabilities(votes, weights, distances) for t in (1e200, 1e-200, None))
    torch.testing.assert_close(hot, none, atol=1e-12, rtol=0)
    torch.testing.assert_close(cold, votes[:, 0], atol=1e-12, rtol=0)


@given(numbers, st.integers(2, 9), st.one_of(st.none(), st.floats(1e-3, 1e3)))
@some
def test_the_order_of_the_neighbours_does_not_matter(seed, k, temperature):
    votes, weights, distances, own = drawn(seed, k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    rule = Rule(k, temperature=temperature, alpha=0.25)
    torch.testing.assert_close(
        rule.probabilities(votes[:, order], weights[:, order], distances[:, order], own),
        rule.probabilities(votes, weights, distances, own),
        atol=1e-12,
        rtol=0,
    )


def test_rows_far_from_everything_still_vote():
    votes = torch.eye(3)[None]
    distances = torch.tensor([[1e3, 1e3 + 1e-3, 2e3]])
    found = Rule(3, "uniform", temperature=1.0).probabilities(votes, torch.ones(1, 3), distances)
    ratio = math.exp(float(distances[0, 0].double() ** 2 - distances[0, 1].double() ** 2))
    assert found[0].tolist() == pytest.approx([1 / (1 + ratio), ratio / (1 + ratio), 0.0], abs=1e-6)


def test_rows_without_a_label_do_not_vote(tmp_path: Path):
    rows = table(40, 8)
    rows.labels[torch.arange(40) % 4 > 0] = -1
    database = write(tmp_path / "some", rows)
    for temperature in (None, 1e-3, 10.0):
        rule = Rule(40, "uniform", votes="labels", temperature=temperature)
        votes, weights = rule.voters(database, database.row_numbers[None])
        distances = torch.linspace(1, 2, 40)[None]
        known = torch.arange(0, 40, 4)
        shares = rule.shares(weights, distances)
        assert not bool(shares[0][rows.labels < 0].any())
        wanted = Rule(10, "uniform", temperature=temperature).probabilities(
            votes[:, known], torch.ones(1, 10), distances[:, known]
        )
        torch.testing.assert_close(rule.probabilities(votes, weights, distances), wanted)
        # Neighbours of which none has a label leave all classes as likely.
        silent = (rows.labels < 0).nonzero()[:5].T
        votes, weights = rule.voters(database, silent)
        found = rule.probabilities(votes, weights, distances[:, :5])
        torch.testing.assert_close(found, torch.full_like(found, 1 / found.shape[1]))


def test_labels_cannot_vote_where_there_are_none(tmp_path: Path):
    rows = table(20, 8)
    rows.labels[:] = -1
    database = write(tmp_path / "none", rows)
    with pytest.raises(InputError, match=r"no image in .* has a label to vote with.*posteriors"):
        Rule.fitting(database, 5, votes="labels")
    assert Rule.fitting(database, 5) == Rule(5)


def test_a_rule_is_the_same_after_json():
    for values in RULES:
        rule = Rule.of(values)
        assert Rule.of(json.loads(json.dumps(rule.to_json()))) == rule
        assert Rule.of(json.loads(json.dumps(rule.settings))) == rule
    assert Rule(np.int64(3), temperature=torch.tensor(2.0)).to_json() == Rule(3, temperature=2.0).to_json()
    assert Rule(5).settings == {"k": 5, "weighting": "cbw-d"}
    assert str(Rule(5, votes="labels", temperature=2.0, alpha=0.5)) == (
        "k = 5, CBW-D, votes of true labels, kernel exp(-d²/2), 50 % of the classifier's own posterior"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k is 0, but must be a whole number of at least 1"),
        ({"k": 2.5}, "k is 2.5"),
        ({"k": True}, "k is True"),
        ({"k": 3, "weighting": "cbw"}, "weighting is 'cbw', but must be one of uniform"),
        ({"k": 3, "power": -1.0}, "power above 0"),
        ({"k": 3, "terms": "many"}, "whole number of terms"),
        ({"k": 3, "votes": "hearts"}, "votes is 'hearts', but must be one of posteriors, labels"),
        ({"k": 3, "temperature": 0.0}, "temperature is 0.0, but must be above 0"),
        ({"k": 3, "temperature": -1}, "temperature is -1"),
        ({"k": 3, "temperature": math.nan}, "temperature is nan"),
        ({"k": 3, "temperature": math.inf}, "temperature is inf.*left out for no kernel"),
        ({"k": 3, "temperature": "warm"}, "temperature is warm"),
        ({"k": 3, "alpha": 1.1}, "alpha is 1.1, but must be from 0"),
        ({"k": 3, "alpha": -0.1}, "alpha is -0.1"),
        ({"k": 3, "alpha": math.nan}, "alpha is nan"),
        ({"k": 3, "alpha": None}, "alpha is None"),
        ({"weighting": "uniform"}, "a rule has a k"),
        ({"k": 3, "colour": "red"}, "colour"),
        ([3], "a rule has a k"),
    ],
)
def test_rules_that_cannot_be_used(values, message):
    with pytest.raises(InputError, match=message):
        Rule.of(values)


def test_more_neighbours_than_rows_are_refused(database):
    with pytest.raises(InputError, match="k is 301, but must be from 1 to the database's 300 rows"):
        NearestNeighborDefense(trained(), database, 301, votes="labels")


# -- stored ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, database) -> Path:
    """A copy of the database, beside the classifier that made it."""
    copy = tmp_path / "db"
    shutil.copytree(database.path, copy)
    return copy


def opened(folder: Path, **asked) -> Rule:
    return open_stored(folder, trained(), **asked).rule


def test_the_rule_of_a_build_is_stored_and_used_and_options_beat_it(tmp_path):
    rule = {"k": 7, "votes": "labels", "temperature": 2.5, "alpha": 0.25}
    data, feature = digits("train").subset(np.arange(60)), FeatureSpec("block2", "grid2", pca=8)
    built = build_database(data, trained(), feature, tmp_path / "db", rule=rule, progress=False)
    assert Rule.of(built.manifest.rule) == Rule.of(rule) == opened(built.path)
    assert opened(built.path, k=3, temperature=math.inf) == Rule(3, votes="labels", alpha=0.25)
    batch = images("test", 8)[0]
    wanted = NearestNeighborDefense(trained(), built, **Rule.of(rule).to_json())(batch)
    assert torch.equal(NearestNeighborDefense.open(built.path, trained())(batch), wanted)
    guard = Guard.open(built.path, trained())
    assert guard.rule == Rule.of(rule)
    assert guard.describe()["rule"] == Rule.of(rule).to_json() | {"text": str(guard.rule)}
    assert Guard.open(built.path, trained(), votes="posteriors").rule.votes == "posteriors"
    with pytest.raises(InputError, match="the rule has k = 61, but there are 60 images"):
        build_database(data, trained(), feature, tmp_path / "other", rule={"k": 61}, progress=False)
    with pytest.raises(InputError, match="alpha is 2"):
        build_database(data, trained(), feature, tmp_path / "other", rule={"k": 6, "alpha": 2}, progress=False)


def test_manifests_without_a_rule_read_as_before(stored):
    text = (stored / "manifest.json").read_text()
    assert '"rule"' not in text
    manifest = Manifest.read(stored)
    assert opened(stored) == Rule(50)
    manifest.write(stored)
    assert (stored / "manifest.json").read_text() == text
    # The guard's distances do not depend on the rule.
    assert dataclasses.replace(manifest, rule=Rule(3).to_json()).identity == manifest.identity


def test_a_calibrations_choice_goes_before_the_manifests_rule(stored):
    manifest = Manifest.read(stored)
    dataclasses.replace(manifest, rule=Rule(9, alpha=0.5, temperature=3.0).to_json()).write(stored)
    assert opened(stored) == Rule(9, alpha=0.5, temperature=3.0)
    chosen = {"layer": "block2", "pooling": "grid2", "k": 5, "weighting": "uniform"}
    keep_beside(stored, "calibration.json", {"chosen": chosen})
    assert opened(stored) == Rule(5, "uniform", alpha=0.5, temperature=3.0)
    keep_beside(stored, "calibration.json", {"chosen": chosen | {"votes": "labels", "temperature": None, "alpha": 0.0}})
    assert opened(stored) == Rule(5, "uniform", votes="labels")
    for wrong in ({"votes": "hearts"}, {"temperature": -1.0}, {"alpha": "half"}):
        keep_beside(stored, "calibration.json", {"chosen": chosen | wrong})
        with pytest.raises(DatabaseError, match="is not a calibration of this database"):
            opened(stored)


@pytest.mark.parametrize("rule", [{"k": 0}, {"k": 301}, {"k": 5, "colour": 1}, {"alpha": 3}, {"k": "many"}])
def test_a_manifests_rule_that_cannot_be_used_is_told(stored, rule):
    dataclasses.replace(Manifest.read(stored), rule=rule).write(stored)
    with pytest.raises(DatabaseError, match="has a rule that cannot be used"):
        opened(stored)


def test_cells_and_results_are_of_the_whole_rule(database):
    def identity(**rule) -> str:
        subject = Subject("defence", NearestNeighborDefense(trained(), database, 5, **rule), "calibrated")
        return json.dumps(identity_of(subject))

    rules = ({}, {"votes": "labels"}, {"temperature": 0.5}, {"alpha": 0.5}, {"temperature": 0.5, "alpha": 0.5})
    assert len({identity(**rule) for rule in rules}) == len(rules)
    assert json.loads(identity())[-1] == [5, "cbw-d", 3.0, 20]
    recipe = {
        "data": {"dataset": "digits"},
        "models": {"classifier": "x"},
        "defense": {"database": "db", "votes": "labels", "temperature": math.inf, "alpha": 0.5},
        "attack": [{"threat_model": "gray", "name": "pgd", "norm": "linf", "eps": 0.1}],
        "report": {"headline_norm": "linf", "headline_eps": 0.1},
    }
    assert recipe_from(recipe).rule == {"votes": "labels", "temperature": math.inf, "alpha": 0.5}
    del recipe["defense"]["database"]
    with pytest.raises(
        InputError, match=r"are settings of nearest-neighbor.*leave out votes and temperature and alpha"
    ):
        recipe_from(recipe)
