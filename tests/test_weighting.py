"""Weights of neighbours and how they are combined, against the formulas and worked values of the method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import images, table, trained, write
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nndefense.database import WEIGHTINGS, combine, neighbor_weights, weight_shares
from nndefense.errors import InputError

FEW = settings(max_examples=60, deadline=None)


def uniform(classes: int) -> torch.Tensor:
    return torch.full((classes,), 1 / classes, dtype=torch.float64)


def one_hot(classes: int) -> torch.Tensor:
    return torch.eye(classes, dtype=torch.float64)[2]


def two_halves(classes: int) -> torch.Tensor:
    posterior = torch.zeros(classes, dtype=torch.float64)
    posterior[[1, 3]] = 0.5
    return posterior


def mostly_one(classes: int) -> torch.Tensor:
    posterior = torch.full((classes,), 0.3 / (classes - 1), dtype=torch.float64)
    posterior[4] = 0.7
    return posterior


@pytest.mark.parametrize(
    ("posterior", "classes", "terms", "cbw_e", "cbw_d"),
    [
        (uniform, 1000, 20, 0, 0),
        (one_hot, 1000, 20, 6.907755, 20),
        (two_halves, 1000, 20, 6.214608, 2.375),
        (mostly_one, 1000, 20, 4.2249, 6.8512),
        (uniform, 10, 9, 0, 0),
        (one_hot, 10, 9, 2.302585, 9),
        (two_halves, 10, 9, 1.609438, 1.0),
        (mostly_one, 10, 9, 1.0326, 2.6667),
    ],
)
def test_worked_values(posterior, classes, terms, cbw_e, cbw_d):
    s = posterior(classes)
    assert float(neighbor_weights(s, "uniform")) == 1
    # The table has 4 or 6 decimals.
    assert float(neighbor_weights(s, "cbw-e")) == pytest.approx(cbw_e, abs=6e-5 if cbw_e < 4.3 else 6e-7)
    assert float(neighbor_weights(s, "cbw-d", power=3, terms=terms)) == pytest.approx(cbw_d, abs=6e-5)
    # In float32, as posteriors are stored.
    assert float(neighbor_weights(s.float(), "cbw-d", terms=terms)) == pytest.approx(cbw_d, abs=1e-4)
    assert float(neighbor_weights(s.float(), "cbw-e")) == pytest.approx(cbw_e, abs=1e-4)


def test_default_power_and_terms_are_3_and_20():
    s = mostly_one(1000)
    assert neighbor_weights(s, "cbw-d") == neighbor_weights(s, "cbw-d", power=3, terms=20)
    assert neighbor_weights(s, "cbw-d") != neighbor_weights(s, "cbw-d", power=2, terms=20)
    assert neighbor_weights(s, "cbw-d") != neighbor_weights(s, "cbw-d", power=3, terms=19)


@pytest.mark.parametrize("terms", [9, 10, 20, 1000])
def test_more_terms_than_classes_are_cut_to_one_less(terms):
    s = mostly_one(10)
    assert neighbor_weights(s, "cbw-d", terms=terms) == neighbor_weights(s, "cbw-d", terms=9)
    assert float(neighbor_weights(torch.tensor([0.75, 0.25]), "cbw-d", terms=terms)) == pytest.approx(0.125)


def test_weights_against_the_formulas_on_real_posteriors():
    with torch.no_grad():
        posteriors = trained()(images("test", 40)[0]).softmax(1).double()
    for s, e, d in zip(
        posteriors.numpy(),
        neighbor_weights(posteriors, "cbw-e").numpy(),
        neighbor_weights(posteriors, "cbw-d", power=2.5, terms=4).numpy(),
        strict=True,
    ):
        assert e == pytest.approx(abs(np.log(10) + sum(p * np.log(p) for p in s if p > 0)), abs=1e-9)
        top, *others = sorted(s, reverse=True)[:5]
        assert d == pytest.approx(sum((top - p) ** 2.5 for p in others), abs=1e-9)


def test_neighbours_that_all_weigh_nothing_are_averaged_plainly():
    posteriors = torch.full((2, 3, 4), 0.25)
    assert torch.equal(combine(posteriors, torch.zeros(2, 3)), torch.full((2, 4), 0.25))
    # Also where the posteriors differ, and only in the row whose weights are all 0.
    posteriors = torch.eye(3)[None].repeat(2, 1, 1)
    weights = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    assert torch.allclose(combine(posteriors, weights), torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0, 0.25, 0.75]]))


def test_weights_of_the_smallest_size_still_count_in_full():
    tiny = torch.tensor([[1e-42, 1e-42, 0.0]])
    assert torch.allclose(weight_shares(tiny), torch.tensor([[0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("changed", [{"power": 0}, {"power": -1.0}, {"power": float("nan")}, {"terms": 0}])
def test_unusable_power_and_terms(changed):
    with pytest.raises(InputError, match="power above 0 and at least 1 term"):
        neighbor_weights(uniform(10), "cbw-d", **changed)


def test_unknown_weighting():
    with pytest.raises(InputError, match=r"'cbw'.*uniform, cbw-e, cbw-d"):
        neighbor_weights(uniform(10), "cbw")


@st.composite
def posteriors_of_neighbours(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 30)))
    raw = draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1)))
    # At least one class must have some mass, and one-hot rows must stay possible.
    raw[..., draw(st.integers(0, shape[2] - 1))] += 1e-3
    return torch.from_numpy(raw / raw.sum(-1, keepdims=True))


@FEW
@given(posteriors_of_neighbours(), st.sampled_from(WEIGHTINGS), st.floats(0.1, 8), st.integers(1, 40), st.randoms())
def test_weights_and_combination_for_any_posteriors(s, weighting, power, terms, random):
    weights = neighbor_weights(s, weighting, power=power, terms=terms)
    assert weights.shape == s.shape[:-1]
    assert bool((weights >= 0).all())
    combined = combine(s.float(), weights.float())
    assert torch.allclose(combined.sum(-1), torch.ones(len(s)), atol=1e-5)
    assert bool((combined >= 0).all())
    # No class is special: other names change nothing.
    order = list(range(s.shape[-1]))
    random.shuffle(order)
    again = neighbor_weights(s[..., order], weighting, power=power, terms=terms)
    assert torch.allclose(weights, again, rtol=1e-9, atol=1e-12)


@FEW
@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(0, 1e6, width=32)))
def test_shares_sum_to_1(weights):
    assert torch.allclose(weight_shares(torch.from_numpy(weights)).sum(1), torch.ones(3), atol=1e-4)


def test_stored_weights_are_the_computed_ones(tmp_path: Path):
    rows = table(30)
    database = write(tmp_path, rows)
    picked = np.array([[3, 29], [0, 3]])
    for weighting in WEIGHTINGS:
        assert torch.equal(database.weights(picked, weighting), neighbor_weights(rows.posteriors[picked], weighting))
    # More terms than classes are the stored weights too; other settings are worked out.
    for options in ({"terms": 9}, {"terms": 500}, {"terms": 2}, {"power": 1.5}):
        computed = neighbor_weights(rows.posteriors[picked], "cbw-d", **options)
        assert torch.allclose(database.weights(picked, "cbw-d", **options), computed)
    with pytest.raises(InputError, match="at least 1 term"):
        database.weights(picked, "cbw-d", terms=0)
