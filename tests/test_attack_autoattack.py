"""APGD, Square and AutoAttack: exact cases, budgets, checkpoints, who is attacked, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import images, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nndefense.attacks import NORMS, WorstCase, apgd, autoattack, distance, pgd, radius, square
from nndefense.attacks.auto_pgd import checkpoints
from nndefense.attacks.standard_sequence import apgd_square
from nndefense.errors import InputError


def net() -> nn.Module:
    return trained().eval()


def accuracy(model: nn.Module, attacked: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(attacked).argmax(1) == y).double().mean())


def pair(weights: Tensor, bias: float) -> nn.Module:
    """A two-class linear model whose margin for class 1 is w.x + b."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(weights.numel(), 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weights / 2, weights / 2]))
        model[1].bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    return model


class Sizes:
    """A model that notes the size of every batch and whether a gradient was wanted."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.sizes, self.gradients = model, [], 0

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.gradients += x.requires_grad
        return self.model(x)


def test_checkpoints_are_the_papers() -> None:
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(1)) == [1]
    assert all(0 < at <= 20 for at in checkpoints(20))


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_reaches_the_worst_case_of_a_linear_model(norm: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3 * 4 * 5, generator=generator)
    x = 0.3 + 0.4 * torch.rand(6, 3, 4, 5, generator=generator)
    eps = {"linf": 0.05, "l2": 0.25, "normalized-l2": 0.05}[norm]
    model = pair(weights, 100.0)  # so sure that nothing fools it, and the whole ball is used
    attacked = apgd(model, x, torch.ones(6, dtype=torch.int64), eps=eps, norm=norm, loss="margin", generator=generator)
    fall = (x - attacked).flatten(1) @ weights
    dual = weights.abs().sum() if norm == "linf" else weights.norm()
    torch.testing.assert_close(fall, radius(x, eps, norm) * dual, rtol=1e-4, atol=1e-4)


def test_square_reaches_the_worst_case_of_a_linear_model() -> None:
    """In linf only corners count, and single pixels turn by turn find the best one."""
    generator = torch.Generator().manual_seed(1)
    weights, x = torch.randn(16, generator=generator), torch.full((2, 1, 4, 4), 0.5)
    y = torch.ones(2, dtype=torch.int64)
    attacked = square(pair(weights, 100.0), x, y, eps=0.1, queries=600, generator=generator)
    torch.testing.assert_close((x - attacked).flatten(1) @ weights, 0.1 * weights.abs().sum().expand(2))


@pytest.mark.filterwarnings("ignore:.*holds every image")
@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(0, 2, width=32),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
)
def test_budget_is_never_exceeded(norm: str, seed: int, eps: float, shape: tuple[int, int, int, int]) -> None:
    generator, eps = torch.Generator().manual_seed(seed), min(eps, 1.0) if norm == "linf" else eps
    x = torch.rand(shape, generator=generator)
    x[0].round_()
    weights = torch.randn(5, x[0].numel(), generator=generator)
    y = torch.randint(5, (shape[0],), generator=generator)

    def model(batch: Tensor) -> Tensor:
        return torch.tanh(batch.flatten(1) @ weights.T)

    for attacked in (
        apgd(model, x, y, eps=eps, norm=norm, steps=5, loss="dlr", generator=generator),
        apgd(model, x, y, eps=eps, norm=norm, steps=5, targets=2, generator=generator),
        square(model, x, y, eps=eps, norm=norm, queries=8, generator=generator),
        autoattack(model, x, y, eps=eps, norm=norm, steps=3, targets=2, queries=3, generator=generator).images,
    ):
        assert attacked.shape == x.shape
        assert attacked.isfinite().all()
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert (distance(x, attacked, norm) <= radius(x, eps, norm) * (1 + 1e-6) + 1e-6).all()


class TestStrength:
    @pytest.mark.parametrize("norm", NORMS)
    def test_apgd_is_at_least_as_strong_as_pgd(self, norm: str) -> None:
        x, y = images("test", 60)
        eps = {"linf": 0.11, "l2": 0.8, "normalized-l2": 0.2}[norm]
        plain = pgd(net(), x, y, eps=eps, norm=norm, steps=25, generator=torch.Generator().manual_seed(0))
        auto = apgd(net(), x, y, eps=eps, norm=norm, steps=25, generator=torch.Generator().manual_seed(0))
        aimed = apgd(net(), x, y, eps=eps, norm=norm, steps=25, targets=2, generator=torch.Generator().manual_seed(0))
        assert accuracy(net(), auto, y) <= accuracy(net(), plain, y) + 0.02
        assert accuracy(net(), aimed, y) <= accuracy(net(), auto, y) + 0.02

    @pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 1.2)])
    def test_square_needs_no_gradient(self, norm: str, eps: float) -> None:
        x, y = images("test", 60)
        model = Sizes(net())
        attacked = square(model, x, y, eps=eps, norm=norm, queries=300, generator=torch.Generator().manual_seed(0))
        assert model.gradients == 0
        assert len(model.sizes) <= 300
        assert accuracy(net(), attacked, y) < accuracy(net(), x, y) - 0.3
        # Who is fooled is not asked again.
        assert model.sizes == sorted(model.sizes, reverse=True)

    def test_dlr_does_not_mind_large_logits(self) -> None:
        x, y = images("test", 100)
        model = net()

        def loud(batch: Tensor) -> Tensor:
            return 1e4 * model(batch)

        dlr = [apgd(m, x, y, eps=0.08, steps=20, loss="dlr", generator=torch.Generator().manual_seed(0))
               for m in (model, loud)]  # fmt: skip
        assert accuracy(model, dlr[1], y) <= accuracy(model, dlr[0], y) + 0.02


class TestAutoAttack:
    def test_the_worst_case_and_who_broke_what(self) -> None:
        x, y = images("test", 80)
        y = y.clone()
        y[:3] = (y[:3] + 1) % 10  # wrong before any attack
        generator = torch.Generator().manual_seed(0)
        found = autoattack(net(), x, y, eps=0.1, steps=20, targets=3, queries=50, generator=generator)
        assert isinstance(found, WorstCase)
        with torch.no_grad():
            fooled = net()(found.images).argmax(1) != y
        assert [by != "" for by in found.broken_by] == fooled.tolist()
        assert found.broken_by[:3] == ("clean",) * 3
        assert set(found.broken_by) <= {"", "clean", "apgd-ce", "apgd-t", "fab-t", "square"}
        assert found.broken_by.count("apgd-ce") > 10
        assert found.robust_accuracy == pytest.approx(float((~fooled).double().mean()))
        assert torch.equal(found.images[:3], x[:3])

    def test_it_is_at_least_as_strong_as_each_part(self) -> None:
        x, y = images("test", 40)
        settings: dict[str, Any] = {"eps": 0.06, "steps": 10, "targets": 2, "queries": 50}
        whole = autoattack(net(), x, y, **settings, generator=torch.Generator().manual_seed(0))
        for name in ("apgd-ce", "fab-t"):
            part = autoattack(net(), x, y, **settings, attacks=(name,), generator=torch.Generator().manual_seed(0))
            assert whole.robust_accuracy <= part.robust_accuracy + 0.02

    def test_each_attack_sees_only_what_stands(self) -> None:
        x, y = images("test", 60)
        model = Sizes(net())
        autoattack(model, x, y, eps=0.05, steps=5, targets=2, queries=5)
        assert model.sizes[0] == 60
        first = autoattack(net(), x, y, eps=0.05, steps=5, attacks=("apgd-ce",)).broken_by.count("")
        assert model.sizes[-1] <= first < 60

    def test_without_fab_at_any_effort(self) -> None:
        x, y = images("test", 16)
        begun = [torch.Generator().manual_seed(0) for _ in range(2)]
        found = apgd_square(net(), x, y, eps=0.05, steps=4, generator=begun[0])
        parts = ("apgd-ce", "apgd-t", "square")
        same = autoattack(net(), x, y, eps=0.05, attacks=parts, steps=4, queries=40, generator=begun[1])
        assert torch.equal(found.images, same.images)
        assert found.broken_by == same.broken_by
        assert set(found.broken_by) <= {"", "clean", *parts}
        with pytest.raises(InputError, match="steps is 0"):
            apgd_square(net(), x, y, eps=0.05, steps=0)

    def test_the_seed_decides(self) -> None:
        x, y = images("test", 30)
        runs = [autoattack(net(), x, y, eps=0.05, steps=5, targets=2, queries=20,
                           generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]  # fmt: skip
        assert torch.equal(runs[0].images, runs[1].images)
        assert runs[0].broken_by == runs[1].broken_by
        assert not torch.equal(runs[0].images, runs[2].images)

    def test_two_classes_have_no_targeted_dlr(self) -> None:
        weights = torch.randn(16, generator=torch.Generator().manual_seed(0))
        x, y = torch.full((4, 1, 4, 4), 0.5), torch.ones(4, dtype=torch.int64)
        model = pair(weights, float(0.05 * weights.abs().sum() - 0.5 * weights.sum()))
        found = autoattack(model, x, y, eps=0.051, attacks=("apgd-t",), steps=20)
        assert found.broken_by == ("apgd-margin",) * 4
        assert autoattack(model, x, y, eps=0.049, steps=20, queries=50).broken_by == ("",) * 4

    def test_one_eps_per_image(self) -> None:
        x, y = images("test", 20)
        eps = torch.tensor([0.0, 0.5] * 10)
        found = autoattack(net(), x, y, eps=eps, steps=10, targets=2, queries=10)
        assert all(by in ("", "clean") for by in found.broken_by[::2])
        assert all(found.broken_by[1::2])
        assert torch.equal(found.images[::2], x[::2])

    def test_no_images(self) -> None:
        x, y = images("test", 4)
        found = autoattack(net(), x[:0], y[:0], eps=0.1)
        assert found.images.shape == (0, 1, 8, 8)
        assert found.broken_by == ()


@pytest.mark.parametrize("attack", [apgd, square, autoattack])
def test_bad_input(attack: Any) -> None:
    x, y = images("test", 4)
    model = net()
    for case, message in (
        (lambda: attack(model, (255 * x).byte(), y, eps=0.1), "divide by 255"),
        (lambda: attack(model, (x - 0.13) / 0.31, y, eps=0.1), "leave normalisation to the model"),
        (lambda: attack(model, x, y + 100, eps=0.1), "classes 0 to 9"),
        (lambda: attack(lambda z: model(z).softmax(1), x, y, eps=0.1), "remove its softmax"),
        (lambda: attack(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), x, y, eps=0.1), "training mode"),
        (lambda: attack(model, x, y, eps=-1), "at least 0"),
        (lambda: attack(model, x, y, eps=0.1, norm="l1"), "must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            case()


def test_bad_settings() -> None:
    x, y = images("test", 4)
    for settings_, message in (
        ({"steps": 0}, "steps"), ({"restarts": 0}, "restarts"), ({"rho": 0.0}, "rho"), ({"targets": 0}, "targets"),
        ({"loss": "kl"}, "does not know the label"), ({"loss": "ce"}, "cross-entropy"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            apgd(net(), x, y, eps=0.1, **settings_)
    with pytest.raises(InputError, match="queries"):
        square(net(), x, y, eps=0.1, queries=0)
    with pytest.raises(InputError, match="'pgd' is no attack of the sequence"):
        autoattack(net(), x, y, eps=0.1, attacks=("pgd",))
