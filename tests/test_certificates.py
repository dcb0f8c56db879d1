"""The record of a certificate: what stands at a budget, in another norm, as plain values, and what is refused."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_exact import vote_surface

from nndefense.attacks import norms
from nndefense.attacks.retrieval import run_exact
from nndefense.certificates import Certified, registry
from nndefense.errors import InputError
from nndefense.statistics import wilson_interval


def certified(*radii: float, norm: str = "l2", predictions: list[int] | None = None) -> Certified:
    radius = torch.tensor(radii, dtype=torch.float64)
    return Certified(torch.zeros(len(radius)) if predictions is None else torch.tensor(predictions), radius, norm)


def test_an_image_stands_where_it_is_right_and_its_radius_reaches_the_budget() -> None:
    found = certified(0.0, 0.5, 1.0, 2.0, 0.0, predictions=[1, 1, 1, 0, -1])
    labels = torch.ones(5)
    assert found.abstained.tolist() == [False, False, False, False, True]
    assert found.correct(labels).tolist() == [True, True, True, False, False]
    assert found.stands(labels, 0.5).tolist() == [False, True, True, False, False]
    at = found.accuracy(labels, 0.5)
    assert (at.accuracy, at.n) == (0.4, 5)
    assert (at.ci_low, at.ci_high) == wilson_interval(2, 5)
    assert found.accuracy(labels, 0).accuracy == 0.6


@pytest.mark.parametrize("eps", [0.05, 0.1, 8 / 255, 1 / 3])
def test_a_budget_that_is_proven_stands_to_the_last_bit_and_a_larger_one_does_not(eps: float) -> None:
    for found in (certified(eps), Certified.from_json(certified(eps).to_json())):
        assert found.radius.tolist() == [eps]
        assert found.stands(torch.zeros(1), eps).tolist() == [True]
        assert found.stands(torch.zeros(1), math.nextafter(eps, 1)).tolist() == [False]


@given(st.integers(0, 2**31), st.sampled_from(norms.NORMS), st.sampled_from(norms.NORMS))
def test_a_ball_of_another_norm_lies_within_the_certified_one(seed: int, norm: str, other: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((4, 1, 3, 3), generator=generator).double()
    images[0] = 0
    found = certified(*(0.9 * torch.rand(4, generator=generator)).tolist(), 0.0, norm=norm).radius[:4]
    record = Certified(torch.zeros(4), found, norm).in_norm(other, images)
    inside = record.radius.clamp_max(0.999)
    delta = torch.randn((4, 1, 3, 3), generator=generator).double()
    reach = norms.radius(images, inside, other)
    size = norms.length(delta) if other != "linf" else delta.flatten(1).abs().amax(1)
    delta = delta * norms.per_image(reach / size, delta)
    if other == "linf":
        # The corner is what is farthest in l2.
        delta = delta.sign() * norms.per_image(reach, delta)
    raw = norms.length(delta) if norm != "linf" else delta.flatten(1).abs().amax(1)
    assert (raw[1:] <= norms.radius(images, found, norm)[1:] * (1 + 1e-9)).all()
    assert (record.radius >= 0).all()


def test_nothing_proven_stays_nothing_in_every_norm_also_of_a_black_image() -> None:
    for norm in norms.NORMS:
        for other in norms.NORMS:
            assert certified(0.0, norm=norm).in_norm(other, torch.zeros(1, 1, 2, 2)).radius.tolist() == [0.0]


def test_plain_values_and_parts_give_the_same_record() -> None:
    whole = certified(0.25, math.inf, 0.0, predictions=[3, 2, -1])
    again = Certified.from_json(whole.to_json())
    parts = Certified.joined([certified(0.25, predictions=[3]), certified(math.inf, 0.0, predictions=[2, -1])])
    for other in (again, parts):
        assert torch.equal(other.prediction, whole.prediction)
        assert torch.equal(other.radius, whole.radius)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: certified(-0.1), "at least 0"),
        (lambda: certified(math.nan), "at least 0"),
        (lambda: certified(0.1, predictions=[-1]), "abstains"),
        (lambda: certified(0.1, norm="l1"), "norm is 'l1'"),
        (lambda: Certified(torch.zeros(2), torch.zeros(3), "l2"), "one radius for each image"),
        (lambda: Certified(torch.zeros(2), torch.zeros(2), "l2", alpha=1.0), "alpha is 1.0"),
        (lambda: Certified.joined([]), "at least one"),
        (lambda: Certified.joined([certified(0.1), certified(0.1, norm="linf")]), "all in one norm"),
        (lambda: registry.get("magic"), "must be one of smoothing, smoothed-features, exact"),
    ],
)
def test_records_that_say_nothing_sensible_are_refused(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize("name", registry.names())
def test_every_method_of_the_registry_is_a_function_that_takes_settings_by_their_names(name: str) -> None:
    method = registry.get(name)
    known = {"norm", "eps", "sigma", "draws_select", "draws", "alpha", "seed", "batch_size", "limit"}
    parameters = inspect.signature(method.load()).parameters
    settings = {one.name for one in parameters.values() if one.kind is one.KEYWORD_ONLY}
    assert len(parameters) - len(settings) == 2
    assert settings <= known | {one.name for one in parameters.values() if one.default is not one.empty}
    assert set(method.norms) <= set(norms.NORMS)
    assert not method.at_eps or "eps" in settings
    assert f"| `{name}` | {method.about}" in registry.table()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_exact_certificate_is_the_largest_budget_that_the_exact_search_proves(norm: str) -> None:
    generator = np.random.default_rng(0)
    rows = torch.from_numpy(generator.random((12, 3))).float()
    posteriors = torch.eye(2)[torch.from_numpy(generator.integers(0, 2, 12))] * 0.9 + 0.05
    surface = vote_surface(rows, posteriors, torch.eye(3), torch.zeros(3), 3)
    images = torch.rand((6, 1, 1, 3), generator=torch.Generator().manual_seed(1))
    grid = (0.2, 0.02, 0.1, 0.05)
    found = registry.get("exact").run(surface, images, eps=grid, norm=norm, sigma=0.5)
    answers = surface.predict(images).argmax(1)
    assert torch.equal(found.prediction, answers)
    assert set(found.radius.tolist()) <= {0.0, *grid}
    assert (found.radius > 0).any()
    for eps in grid:
        proven = run_exact(surface, images, answers, eps=eps, norm=norm).certified
        assert torch.equal(found.radius >= eps, proven)
    with pytest.raises(InputError, match="--eps"):
        registry.get("exact").run(surface, images, eps=(), norm=norm)
