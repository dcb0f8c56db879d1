"""FGSM and PGD: exact cases, budgets, foolbox as oracle, settings, errors, and what they leave alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks import LOSSES, NORMS, apgd, fgsm, norms, pgd, radius, registry, square
from nndefense.attacks.norms import length, project, random_in_ball, steepest
from nndefense.errors import InputError


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits, N x 1 x 8 x 8 in [0, 1], and their labels."""
    data = load_digits()
    return torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)


@pytest.fixture(scope="module")
def net(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small convolutional net, trained on 1,297 digits; the last 500 are for the tests."""
    images, labels = digits[0][:1297], digits[1][:1297]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            for batch in torch.randperm(1297).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    model.zero_grad()
    return model.eval()


def sizes(delta: Tensor, norm: str) -> Tensor:
    return delta.flatten(1).abs().amax(1) if norm == "linf" else length(delta)


def linear(weights: Tensor, bias: float) -> nn.Module:
    """A two-class linear model whose margin is w.x + b."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(weights.numel(), 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weights / 2, weights / 2]))
        model[1].bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    return model.eval()


class TestLinearModel:
    """On a linear score the worst case has a closed form: the margin falls by eps times the dual norm of w."""

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd from x"])
    def test_worst_case_inside_the_box(self, norm: str, attack: str) -> None:
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(3 * 4 * 5, generator=generator)
        x = 0.3 + 0.4 * torch.rand(6, 3, 4, 5, generator=generator)  # far enough from 0 and 1 for every eps below
        eps = {"linf": 0.05, "l2": 0.25, "normalized-l2": 0.05}[norm]
        model = linear(weights, 0.1)
        y = torch.ones(6, dtype=torch.int64)
        if attack == "fgsm":
            attacked = fgsm(model, x, y, eps=eps, norm=norm)
        else:
            step = eps / 4  # each step shrinks what a random start left across w by a fifth
            attacked = pgd(
                model, x, y, eps=eps, norm=norm, steps=60, step_size=step, random_start=attack == "pgd",
                generator=generator,
            )  # fmt: skip
        fall = (x - attacked).flatten(1) @ weights
        dual = weights.abs().sum() if norm == "linf" else weights.norm()
        expected = radius(x, eps, norm) * dual
        torch.testing.assert_close(fall, expected, rtol=1e-5, atol=1e-5)

    def test_worst_case_with_the_box(self) -> None:
        """Where the box cuts linf, the worst point takes each pixel as far as the box allows."""
        weights = torch.tensor([1.0, -2.0, 3.0, -4.0])
        x = torch.tensor([0.02, 0.99, 0.5, 0.5]).view(1, 1, 2, 2)
        attacked = pgd(linear(weights, 0.0), x, torch.tensor([1]), eps=0.1, steps=20, random_start=False)
        torch.testing.assert_close(attacked.flatten(), torch.tensor([0.0, 1.0, 0.4, 0.6]))

    def test_targeted_mirrors_untargeted(self) -> None:
        x = torch.full((1, 1, 2, 2), 0.5)
        model = linear(torch.tensor([1.0, -2.0, 3.0, -4.0]), 0.0)
        away = fgsm(model, x, torch.tensor([1]), eps=0.1)
        towards = fgsm(model, x, torch.tensor([0]), eps=0.1, targeted=True)
        torch.testing.assert_close(away, towards)


@pytest.mark.filterwarnings("ignore:.*holds every image")
@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(0, 3, width=32),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    steps=st.integers(1, 4),
)
def test_budget_is_never_exceeded(
    norm: str, seed: int, eps: float, shape: tuple[int, int, int, int], steps: int
) -> None:
    generator, eps = torch.Generator().manual_seed(seed), min(eps, 1.0) if norm == "linf" else eps
    x = torch.rand(shape, generator=generator)
    x[0].clamp_(0.0, 1.0).round_()  # an image in the corners of the box
    weights = torch.randn(10, x[0].numel(), generator=generator)
    y = torch.randint(10, (shape[0],), generator=generator)

    def model(images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ weights.T)

    for attacked in (
        fgsm(model, x, y, eps=eps, norm=norm),
        pgd(model, x, y, eps=eps, norm=norm, steps=steps, restarts=2, generator=generator),
    ):
        assert attacked.shape == x.shape
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert (sizes(attacked - x, norm) <= radius(x, eps, norm) * (1 + 1e-6) + 1e-6).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-30, 1e6), norm=st.sampled_from(["l2", "normalized-l2"]))
def test_steepest_has_length_one_however_small_the_gradient(seed: int, scale: float, norm: str) -> None:
    gradient = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * scale
    torch.testing.assert_close(length(steepest(gradient, norm)), torch.ones(3), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.floats(0.01, 6), norm=st.sampled_from(["l2", "normalized-l2"]))
def test_a_ball_that_holds_every_image_is_warned_of_and_no_other(seed: int, eps: float, norm: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 3, 3, generator=generator).round() if seed % 2 else torch.rand(1, 2, 2, 3, generator=generator)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = float(radius(x, eps, norm))
    # The farthest corner, pixel by pixel, among all of them.
    numbers = torch.arange(2 ** x.numel())
    corners = (numbers[:, None] >> torch.arange(x.numel()) & 1).to(x.dtype)
    assert bool(said) == (found >= float(length(corners - x.flatten()).max()))
    assert all("holds every image" in str(warning.message) for warning in said)


def test_an_linf_radius_that_cannot_be_meant_is_refused_by_every_attack(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0][:2], digits[1][:2]
    assert radius(x, 1.0, "linf").tolist() == [1.0, 1.0]
    for eps in (16, 1.5, torch.tensor([0.1, 16.0])):
        for name in (name for name in registry.names() if "surface" not in registry.get(name).needs):
            attack, norm = registry.get(name), "linf"
            if norm not in attack.norms or attack.least:
                continue
            with pytest.raises(InputError, match=r"is (16|1.5) in linf.*/255 = 0\.0"):
                attack.run(lambda images: images.flatten(1), x, y, effort=2, restarts=1, loss="cross-entropy",
                           eps=eps, norm=norm, generator=None)  # fmt: skip
    # A step may be longer than the radius, and an l2 radius than 1.
    assert pgd(lambda images: images.flatten(1), x, y, eps=1.0, steps=1, step_size=1.25).shape == x.shape
    assert float(radius(x, 2.0, "l2")[0]) == 2.0
    with pytest.raises(InputError, match=r"of \[0, 1\] already$"):
        radius(x, 300.0, "linf")


def test_zero_gradient_moves_nothing() -> None:
    x = torch.rand(2, 1, 3, 3)
    attacked = pgd(lambda images: images.sum((1, 2, 3))[:, None] * torch.zeros(5), x, torch.zeros(2, dtype=torch.int64),
                   eps=0.1, norm="l2", steps=3, random_start=False)  # fmt: skip
    torch.testing.assert_close(attacked, x)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_an_exact_projection_reaches_the_sphere_and_farther(
    attack: Any, net: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits[0][-40:], digits[1][-40:]
    found = [
        attack(
            net, x, y, eps=1.0, norm="l2", steps=10, exact_projection=exact, generator=torch.Generator().manual_seed(0)
        )
        for exact in (False, True)
    ]
    sizes = [norms.distance(x, images, "l2") for images in found]
    assert float(sizes[1].max()) <= 1
    assert float(sizes[1].mean()) > float(sizes[0].mean())
    loss = [float(F.cross_entropy(net(images), y).detach()) for images in found]
    assert attack is apgd or loss[1] > loss[0]


@pytest.mark.parametrize("norm", ["linf", "l2", "normalized-l2"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.floats(0.01, 1.0), far=st.floats(0.01, 5.0))
def test_the_exact_projection_is_the_nearest_point_of_ball_and_box(
    norm: str, seed: int, eps: float, far: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, 5, 5, generator=draw).round(decimals=1)
    moved = x + far * torch.randn(x.shape, generator=draw)
    radii = norms.radius(x, eps, norm)
    found = norms.projector(x, radii, norm, exact=True)(moved)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert bool((norms.distance(x, found, norm) <= radii + 1e-6).all())
    # By halving s in clamp(x + s (z - x)), in double precision.
    origin, delta, limit = x.double(), (moved - x).double(), radii.double() * (1 - 1e-6)
    low, high = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for _ in range(50 if norm != "linf" else 0):
        middle = (low + high) / 2
        inside = norms.length((origin + middle[:, None, None, None] * delta).clamp(0, 1) - origin) <= limit
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    wanted = (origin + low[:, None, None, None] * delta).clamp(0, 1)
    if norm == "linf":
        wanted = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1).double()
    assert float((found - wanted).abs().max()) < 1e-5
    # Never farther from the point than projecting on one after the other.
    plain = norms.projector(x, radii, norm)(moved)
    assert bool((norms.length(found - moved) <= norms.length(plain - moved) + 1e-5).all())


def test_no_exact_projection_leaves_the_ball_in_large_images() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 224, 224, generator=draw)
    for eps, far in ((0.03, 0.09), (0.06, 0.18), (0.06, 0.09)):
        radii = norms.radius(x, eps, "normalized-l2")
        found = norms.projector(x, radii, "normalized-l2", exact=True)(x + far * torch.randn(x.shape, generator=draw))
        assert bool((norms.length((found - x).double()) <= radii.double()).all())


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_idempotent_and_keeps_what_is_inside(norm: str) -> None:
    delta = torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    radii = sizes(delta, norm) * torch.tensor([0.5, 2.0] * 4)
    once = project(delta, radii, norm)
    torch.testing.assert_close(project(once, radii, norm), once, rtol=1e-5, atol=0)
    assert torch.equal(once[1::2], delta[1::2])
    torch.testing.assert_close(sizes(once, norm)[::2], radii[::2], rtol=1e-5, atol=0)


def test_random_start_is_uniform_in_the_ball() -> None:
    """In d dimensions the length of a uniform draw has P(length <= r) = (r / radius)^d."""
    x = torch.zeros(20_000, 1, 1, 3)
    draws = length(random_in_ball(x, torch.full((20_000,), 2.0), "l2", torch.Generator().manual_seed(0)))
    for share in (0.25, 0.5, 0.75):
        measured = (draws <= 2 * share ** (1 / 3)).double().mean().item()
        assert abs(measured - share) < 0.015
    flat = random_in_ball(x, torch.full((20_000,), 0.5), "linf", torch.Generator().manual_seed(0)).flatten()
    assert flat.abs().max() <= 0.5
    assert abs((flat < -0.25).double().mean().item() - 0.25) < 0.01


class TestRadius:
    def test_normalized_l2_is_per_image(self) -> None:
        x = torch.zeros(3, 1, 2, 2)
        x[1], x[2] = 0.5, 1.0
        torch.testing.assert_close(radius(x, 0.1, "normalized-l2"), torch.tensor([0.0, 0.1, 0.2]))

    @pytest.mark.parametrize("norm", NORMS)
    def test_one_eps_per_image(self, net: nn.Module, digits: tuple[Tensor, Tensor], norm: str) -> None:
        x, y = digits[0][-4:], digits[1][-4:]
        eps = torch.tensor([0.0, 0.05, 0.1, 0.2])
        together = pgd(net, x, y, eps=eps, norm=norm, steps=5, random_start=False)
        for i in range(4):
            alone = pgd(net, x[i : i + 1], y[i : i + 1], eps=float(eps[i]), norm=norm, steps=5, random_start=False)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(together[0], x[0])


@pytest.fixture(scope="module")
def foolbox() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox", reason="foolbox is not installed: pip install '.[dev]'")


def agree(ours: Tensor, theirs: Tensor, model: nn.Module) -> None:
    """The same decision on every image, and equal pixels but for a thousandth."""
    with torch.no_grad():
        assert torch.equal(model(ours).argmax(1), model(theirs).argmax(1))
    different = ((ours - theirs).abs() > 1e-5).double().mean().item()
    assert different <= 1e-3, f"{different:.2%} of the pixels differ"


class TestAgainstFoolbox:
    """foolbox 3 (Rauber et al. 2020) as oracle, on 500 real digits."""

    @pytest.mark.parametrize("eps", [0.03, 0.1, 0.2])
    def test_fgsm(self, foolbox: Any, net: nn.Module, digits: tuple[Tensor, Tensor], eps: float) -> None:
        x, y = digits[0][-500:], digits[1][-500:]
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        _, theirs, _ = foolbox.attacks.LinfFastGradientAttack(random_start=False)(model, x, y, epsilons=eps)
        agree(fgsm(net, x, y, eps=eps), theirs, net)

    @pytest.mark.parametrize("eps", [0.3, 1.0])
    def test_fgsm_l2(self, foolbox: Any, net: nn.Module, digits: tuple[Tensor, Tensor], eps: float) -> None:
        x, y = digits[0][-500:], digits[1][-500:]
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        _, theirs, _ = foolbox.attacks.L2FastGradientAttack(random_start=False)(model, x, y, epsilons=eps)
        agree(fgsm(net, x, y, eps=eps, norm="l2"), theirs, net)

    @pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("linf", 0.1), ("l2", 0.3), ("l2", 1.0)])
    def test_pgd(self, foolbox: Any, net: nn.Module, digits: tuple[Tensor, Tensor], norm: str, eps: float) -> None:
        x, y = digits[0][-500:], digits[1][-500:]
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
        step = eps / 4
        _, theirs, _ = kind(abs_stepsize=step, steps=10, random_start=False)(model, x, y, epsilons=eps)
        agree(pgd(net, x, y, eps=eps, norm=norm, steps=10, step_size=step, random_start=False), theirs, net)


class TestStrength:
    def test_a_larger_budget_and_more_steps_fool_more(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y = digits[0][-500:], digits[1][-500:]

        def accuracy(attacked: Tensor) -> float:
            with torch.no_grad():
                return float((net(attacked).argmax(1) == y).double().mean())

        clean = accuracy(x)
        by_eps = [accuracy(pgd(net, x, y, eps=eps, norm="normalized-l2", steps=20)) for eps in (0.1, 0.2, 0.4)]
        assert clean > 0.92  # the last writers are not among those that it was trained on
        assert clean > by_eps[0] > by_eps[1] > by_eps[2]
        assert by_eps[2] < 0.01
        assert accuracy(pgd(net, x, y, eps=0.15, steps=20)) < accuracy(fgsm(net, x, y, eps=0.15))

    def test_restarts_keep_the_worst_case(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y = digits[0][-200:], digits[1][-200:]

        def fooled(restarts: int) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            attacked = pgd(net, x, y, eps=0.09, steps=3, restarts=restarts, generator=generator)
            with torch.no_grad():
                return net(attacked).argmax(1) != y

        # The first restart draws the same start both times, so what it fooled stays fooled.
        assert (fooled(1) <= fooled(5)).all()
        assert fooled(5).sum() > fooled(1).sum()

    @pytest.mark.parametrize(
        ("attack", "effort"),
        [
            (pgd, {"steps": 40}),
            (pgd, {"steps": 20, "restarts": 3, "loss": "margin"}),
            (apgd, {"steps": 20}),
            (apgd, {"steps": 20, "loss": "margin", "restarts": 2}),
            (square, {"queries": 300}),
        ],
    )
    def test_targeted_reaches_the_target(
        self, attack: Any, effort: dict[str, Any], net: nn.Module, digits: tuple[Tensor, Tensor]
    ) -> None:
        x, y = digits[0][-100:], digits[1][-100:]
        target = (y + 1) % 10
        attacked = attack(net, x, target, eps=0.5, targeted=True, generator=torch.Generator().manual_seed(0), **effort)
        assert bool((sizes(attacked - x, "linf") <= 0.5).all())
        with torch.no_grad():
            assert (net(attacked).argmax(1) == target).double().mean() > 0.9

    def test_apgd_does_not_choose_classes_where_one_is_given(
        self, net: nn.Module, digits: tuple[Tensor, Tensor]
    ) -> None:
        with pytest.raises(InputError, match="finds for itself"):
            apgd(net, digits[0][:2], digits[1][:2], eps=0.1, targets=3, targeted=True)


class TestLeavesTheModelAlone:
    def test_mode_parameters_gradients_and_buffers(self, digits: tuple[Tensor, Tensor]) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10))
        x, y = digits[0][:8], digits[1][:8]
        F.cross_entropy(model(x), y).backward()
        model.eval()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        x_before = x.clone()
        fgsm(model, x, y, eps=0.1)
        pgd(model, x, y, eps=0.1, steps=3, restarts=2)
        assert not any(module.training for module in model.modules())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
            assert parameter.requires_grad
        assert torch.equal(x, x_before)
        assert not x.requires_grad

    def test_a_model_in_training_mode_is_refused(self, digits: tuple[Tensor, Tensor]) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).eval()
        model[1].train()
        x, y = digits[0][:8], digits[1][:8]
        with pytest.raises(InputError, match=r"training mode \(its part '1'\): call model.eval\(\) first"):
            fgsm(model, x, y, eps=0.1)
        with pytest.raises(InputError, match="training mode"):
            pgd(model.train(), x, y, eps=0.1, steps=2)
        assert model.training  # nothing was switched in silence
        # A function is taken as it is: that is how a model that is random on purpose is attacked.
        assert fgsm(lambda images: model(images), x, y, eps=0.1).shape == x.shape

    def test_works_under_no_grad_and_on_any_callable(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y = digits[0][-20:], digits[1][-20:]
        with torch.no_grad():
            attacked = fgsm(lambda images: net(images), x, y, eps=0.1)
        assert torch.equal(attacked, fgsm(net, x, y, eps=0.1))

    def test_a_step_costs_one_forward_and_the_seed_decides(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y, calls = digits[0][-20:], digits[1][-20:], []

        def counting(images: Tensor) -> Tensor:
            calls.append(len(images))
            return net(images)

        runs = [pgd(counting, x, y, eps=0.1, steps=7, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
        assert calls == [20] * 21
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])


def momentum_by_hand(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, mu: float) -> Tensor:
    """MI-FGSM as its paper writes it, one image after another."""
    found = []
    for image, label in zip(x, y, strict=True):
        now, g = image.clone(), torch.zeros_like(image)
        for _ in range(steps):
            leaf = now.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf[None]), label[None]), leaf)
            g = mu * g + gradient / gradient.abs().sum()
            now = torch.clamp(
                torch.maximum(torch.minimum(now + eps / steps * g.sign(), image + eps), image - eps), 0, 1
            )
        found.append(now)
    return torch.stack(found)


class TestSettings:
    def test_momentum_is_mi_fgsm(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y = digits[0][-50:], digits[1][-50:]
        ours = pgd(net, x, y, eps=0.1, steps=8, step_size=0.1 / 8, random_start=False, momentum=1.0)
        agree(ours, momentum_by_hand(net, x, y, 0.1, 8, 1.0), net)
        plain = pgd(net, x, y, eps=0.1, steps=8, step_size=0.1 / 8, random_start=False)
        assert not torch.equal(ours, plain)

    @pytest.mark.parametrize("loss", ["cross-entropy", "margin", "dlr", "kl"])
    @pytest.mark.parametrize("norm", NORMS)
    def test_every_loss_fools(self, net: nn.Module, digits: tuple[Tensor, Tensor], loss: str, norm: str) -> None:
        x, y = digits[0][-100:], digits[1][-100:]
        eps = {"linf": 0.15, "l2": 0.9, "normalized-l2": 0.3}[norm]
        generator = torch.Generator().manual_seed(0)
        attacked = pgd(net, x, y, eps=eps, norm=norm, steps=10, loss=loss, generator=generator)
        with torch.no_grad():
            assert (net(attacked).argmax(1) != y).double().mean() > 0.6

    def test_a_callable_is_a_loss(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y = digits[0][-20:], digits[1][-20:]
        own = pgd(net, x, y, eps=0.1, steps=3, random_start=False,
                  loss=lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"))  # fmt: skip
        assert torch.equal(own, pgd(net, x, y, eps=0.1, steps=3, random_start=False))

    def test_a_targeted_loss_is_the_negative_one(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y = digits[0][-20:], digits[1][-20:]
        towards = fgsm(net, x, (y + 1) % 10, eps=0.1, loss="margin", targeted=True)
        away = fgsm(net, x, (y + 1) % 10, eps=0.1, loss=lambda z, t: -LOSSES["margin"](z, t))
        assert torch.equal(towards, away)

    def test_log_probabilities_do_as_well_as_logits(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        # In float64, and in l2: the sign of a gradient that is 0 is that of its rounding error.
        x, y, exact = digits[0][-100:].double(), digits[1][-100:], copy.deepcopy(net).double()
        for loss in ("cross-entropy", "margin", "dlr"):
            ours = fgsm(lambda images: exact(images).log_softmax(1), x, y, eps=0.5, norm="l2", loss=loss)
            agree(ours, fgsm(exact, x, y, eps=0.5, norm="l2", loss=loss), exact)

    def test_restarts_attack_only_what_stands(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y, sizes = digits[0][-100:], digits[1][-100:], []

        def counting(images: Tensor) -> Tensor:
            sizes.append(len(images))
            return net(images)

        attacked = pgd(counting, x, y, eps=0.09, steps=3, restarts=4, generator=torch.Generator().manual_seed(0))
        runs = [sizes[i : i + 4] for i in range(0, len(sizes), 4)]  # three steps and the judgement
        assert all(len(set(run)) == 1 for run in runs)
        each = [run[0] for run in runs]
        assert each[0] == 100
        assert each == sorted(each, reverse=True)
        assert 0 < each[1] < 100
        with torch.no_grad():
            assert int((net(attacked).argmax(1) == y).sum()) <= each[-1]

    def test_no_more_restarts_once_all_are_fooled(self, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        x, y, calls = digits[0][-20:], digits[1][-20:], []

        def counting(images: Tensor) -> Tensor:
            calls.append(len(images))
            return net(images)

        pgd(counting, x, y, eps=0.6, steps=10, restarts=50)
        assert len(calls) <= 22


class TestErrors:
    x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ((torch.rand(2, 1, 4, 4) * 255).byte(), "divide by 255"),
            (torch.rand(2, 1, 4, 4) * 255, r"must lie in \[0, 1\]"),
            (torch.randn(2, 1, 4, 4), "leave normalisation to the model"),
            (torch.full((2, 1, 4, 4), torch.nan), "NaN"),
            (torch.rand(1, 4, 4), r"images\[None\]"),
            (np.zeros((2, 1, 4, 4)), "torch tensor"),
        ],
    )
    def test_images(self, images: Tensor, message: str) -> None:
        with pytest.raises(InputError, match=message):
            fgsm(linear(torch.ones(16), 0.0), images, self.y, eps=0.1)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"eps": -0.1}, "at least 0"),
            ({"eps": float("nan")}, "finite"),
            ({"eps": torch.tensor([0.1, 0.2, 0.3])}, "one per image"),
            ({"norm": "l1"}, "must be one of"),
            ({"steps": 0}, "at least 1"),
            ({"restarts": 0}, "at least 1"),
            ({"restarts": 2, "random_start": False}, "same path"),
            ({"steps": 2.5}, "whole number"),
            ({"momentum": -1.0}, "momentum"),
            ({"loss": "hinge"}, "cross-entropy, margin, dlr, kl"),
            ({"loss": "kl", "targeted": True}, "no target"),
            ({"loss": "kl", "random_start": False}, "flat at the clean image"),
            ({"loss": "dlr"}, "at least 3 classes"),
            ({"loss": lambda logits, y: logits.sum()}, "one value per image"),
        ],
    )
    def test_settings(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            pgd(linear(torch.ones(16), 0.0), self.x, self.y, **({"eps": 0.1, "steps": 2} | settings))

    @pytest.mark.parametrize("y", [torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])])
    def test_labels(self, y: Tensor) -> None:
        with pytest.raises(InputError, match="one class number per image"):
            fgsm(linear(torch.ones(16), 0.0), self.x, y, eps=0.1)

    @pytest.mark.parametrize("y", [torch.tensor([0, 2]), torch.tensor([-1, 0])])
    @pytest.mark.parametrize("loss", ["cross-entropy", "margin", "kl"])
    def test_labels_that_the_model_does_not_know(self, y: Tensor, loss: str) -> None:
        with pytest.raises(InputError, match="has the classes 0 to 1"):
            pgd(linear(torch.ones(16), 0.0), self.x, y, eps=0.1, steps=2, loss=loss)

    def test_probabilities_instead_of_logits(self) -> None:
        net, calls = linear(torch.ones(16), 0.0), []

        def softmaxed(images: Tensor) -> Tensor:
            calls.append(1)
            return net(images).softmax(1)

        with pytest.raises(InputError, match="remove its softmax"):
            pgd(softmaxed, self.x, self.y, eps=0.1, steps=5)
        assert calls == [1]  # seen in the first forward pass, which is the first step's

    def test_logits_that_are_no_numbers(self) -> None:
        with pytest.raises(InputError, match="clamp_min"):
            fgsm(lambda images: torch.log(images[:, 0, 0, :3] * 0), self.x, self.y, eps=0.1)
        with pytest.raises(InputError, match="logits 2 x K"):
            fgsm(lambda images: images, self.x, self.y, eps=0.1)

    def test_fgsm_on_the_kl_divergence(self) -> None:
        with pytest.raises(InputError, match="pgd with a random start"):
            fgsm(linear(torch.ones(16), 0.0), self.x, self.y, eps=0.1, loss="kl")

    def test_a_model_that_ignores_the_images(self) -> None:
        bias = nn.Parameter(torch.randn(3))
        with pytest.raises(InputError, match="no gradient"):
            fgsm(lambda images: bias.expand(len(images), 3), self.x, self.y, eps=0.1)

    def test_a_model_without_gradient(self) -> None:
        with pytest.raises(InputError, match="no gradient"):
            fgsm(lambda images: torch.rand(len(images), 3), self.x, self.y, eps=0.1)
