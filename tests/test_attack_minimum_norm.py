"""FAB-T, DeepFool and C&W: known distances on linear models, never a smaller one, and foolbox as oracle."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import images, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from nndefense.attacks import carlini_wagner, deepfool, distance, fab
from nndefense.attacks.fast_boundary import to_hyperplane
from nndefense.errors import InputError


def linear(classes: int = 5, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """A linear model of images 1 x 4 x 4 whose decision boundaries run near grey."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
    with torch.no_grad():
        weight = torch.randn(classes, 16, generator=generator) * scale
        model[1].weight.copy_(weight)
        model[1].bias.copy_(torch.randn(classes, generator=generator) * scale - 0.5 * weight.sum(1))
    return model


def grey(seed: int = 1, count: int = 12) -> Tensor:
    """Images so far from black and white that the box plays no part."""
    return 0.4 + 0.2 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def known(model: nn.Module, x: Tensor, norm: str) -> Tensor:
    """The exact distance of each image to its nearest boundary without the box, N."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    y = logits.argmax(1)
    normals = weight[None] - weight[y][:, None]
    gaps = logits.gather(1, y[:, None]) - logits
    dual = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
    return (gaps / dual).scatter(1, y[:, None], torch.inf).amin(1)


@pytest.mark.parametrize("norm", ["linf", "l2", "normalized-l2"])
def test_fab_finds_the_boundary_of_a_linear_model(norm: str) -> None:
    model, x = linear(), grey()
    y = model(x).argmax(1)
    attacked = fab(model, x, y, norm=norm, steps=30)
    least = known(model, x, norm)
    assert (model(attacked).argmax(1) != y).all()
    size = distance(x, attacked, norm)
    assert (size >= least * (1 - 1e-5)).all()
    assert (size <= least * 1.002).all()


def test_deepfool_finds_the_boundary_of_a_linear_model() -> None:
    model, x = linear(), grey()
    y = model(x).argmax(1)
    attacked, least = deepfool(model, x, y), known(model, x, "l2")
    assert (model(attacked).argmax(1) != y).all()
    torch.testing.assert_close(distance(x, attacked, "l2"), 1.02 * (least + 1e-4), rtol=1e-4, atol=1e-6)
    further = distance(x, deepfool(model, x, y, overshoot=0.1), "l2")
    torch.testing.assert_close(further, 1.1 * (least + 1e-4), rtol=1e-4, atol=1e-6)


def test_carlini_wagner_finds_the_boundary_of_a_linear_model() -> None:
    model, x = linear(), grey(count=6)
    y = model(x).argmax(1)
    attacked, least = carlini_wagner(model, x, y, steps=300), known(model, x, "l2")
    assert (model(attacked).argmax(1) != y).all()
    size = distance(x, attacked, "l2")
    assert (size >= least * (1 - 1e-5)).all()
    # Adam moves each of the 16 pixels by about step_size / 2 at a time, so what is much nearer is overshot.
    assert (size <= least * 1.01 + 1e-3).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 5))
def test_nothing_is_nearer_than_the_boundary(seed: int, classes: int) -> None:
    """Also where the box cuts: the distance without it is a lower bound."""
    model = linear(classes, seed)
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    x[0] = x[0].round()
    y = model(x).argmax(1)
    for norm, attacked in (
        ("linf", fab(model, x, y, norm="linf", steps=10)),
        ("l2", fab(model, x, y, norm="l2", steps=10)),
        ("l2", deepfool(model, x, y, steps=5)),
        ("l2", carlini_wagner(model, x, y, steps=20, searches=4, step_size=0.1)),
    ):
        fooled = model(attacked).argmax(1) != y
        assert (distance(x, attacked, norm) >= known(model, x, norm) * (1 - 1e-4) - 1e-6)[fooled].all()
        assert attacked.min() >= 0
        assert attacked.max() <= 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), norm=st.sampled_from(["linf", "l2"]))
def test_the_projection_on_a_hyperplane_in_the_box_is_the_least_step(seed: int, norm: str) -> None:
    """scipy's solvers as oracle: a linear programme for linf, a quadratic one for l2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 2, 3, generator=generator, dtype=torch.float64)
    w = torch.randn(1, 1, 2, 3, generator=generator, dtype=torch.float64)
    inside = torch.rand(1, 1, 2, 3, generator=generator, dtype=torch.float64)
    c = (w * inside).sum().view(1)  # the hyperplane meets the box
    step = to_hyperplane(x, w, c, norm)
    torch.testing.assert_close((w * (x + step)).sum().view(1), c, rtol=0, atol=1e-9)
    assert (x + step).min() >= -1e-12
    assert (x + step).max() <= 1 + 1e-12
    start, normal = x.flatten().numpy(), w.flatten().numpy()
    if norm == "linf":
        bounds = [(-a, 1 - a) for a in start] + [(0, 1)]
        upper = [[*(s * (i == j) for i in range(6)), -1] for j in range(6) for s in (1.0, -1.0)]
        found = linprog([0] * 6 + [1], A_ub=upper, b_ub=[0] * 12, A_eq=[[*normal, 0]],
                        b_eq=[float(c) - normal @ start], bounds=bounds)  # fmt: skip
        least = found.fun
    else:
        found = minimize(lambda d: d @ d, inside.flatten().numpy() - start, jac=lambda d: 2 * d,
                         bounds=[(-a, 1 - a) for a in start], method="SLSQP", options={"ftol": 1e-14},
                         constraints={"type": "eq", "fun": lambda d: normal @ (start + d) - float(c),
                                      "jac": lambda d: normal})  # fmt: skip
        least = found.fun**0.5
    size = float(distance(x, x + step, norm))
    assert size <= least + 1e-5
    assert size >= least - 1e-5


def test_an_unreachable_hyperplane_gives_the_nearest_corner() -> None:
    x, w = torch.full((1, 1, 1, 3), 0.5), torch.tensor([1.0, -2.0, 0.0]).view(1, 1, 1, 3)
    for norm in ("linf", "l2"):
        step = to_hyperplane(x, w, torch.tensor([10.0]), norm)
        torch.testing.assert_close(step.flatten(), torch.tensor([0.5, -0.5, 0.0]))
    assert not to_hyperplane(x, torch.zeros_like(w), torch.tensor([1.0]), "l2").any()


@pytest.mark.parametrize("attack", [fab, deepfool, carlini_wagner])
class TestEveryAttack:
    def test_what_is_misclassified_stays_as_it_is(self, attack: Any) -> None:
        model, x = linear(), grey()
        y = model(x).argmax(1)
        y[::2] = (y[::2] + 1) % 5
        attacked = attack(model, x, y, steps=10)
        assert torch.equal(attacked[::2], x[::2])
        assert (model(attacked).argmax(1) != y)[1::2].any()

    def test_each_image_is_attacked_alone(self, attack: Any) -> None:
        x, y = images("test", 6)
        model = trained().eval()
        together = attack(model, x, y, steps=10)
        for i in range(6):
            torch.testing.assert_close(attack(model, x[i : i + 1], y[i : i + 1], steps=10), together[i : i + 1],
                                       rtol=1e-3, atol=1e-3)  # fmt: skip

    def test_bad_input(self, attack: Any) -> None:
        model, x, y = linear(), grey(), torch.zeros(12, dtype=torch.int64)
        for case, message in (
            (lambda: attack(model, (255 * x).byte(), y), "divide by 255"),
            (lambda: attack(model, 9 * x - 4, y), "leave normalisation to the model"),
            (lambda: attack(model, x * torch.nan, y), "NaN"),
            (lambda: attack(model, x, y + 5), "classes 0 to 4"),
            (lambda: attack(model, x, y[:3]), "one class number per image"),
            (lambda: attack(lambda z: model(z).softmax(1), x, y), "remove its softmax"),
            (lambda: attack(linear().train(), x, y), "training mode"),
            (lambda: attack(lambda z: model(z).detach(), x, model(x).argmax(1)), "no gradient"),
            (lambda: attack(model, x, y, steps=0), "steps"),
        ):
            with pytest.raises(InputError, match=message):
                case()

    def test_no_images(self, attack: Any) -> None:
        assert attack(linear(), grey()[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 4, 4)


def test_fab_with_eps_stops_at_the_ball_and_spends_less() -> None:
    x, y = images("test", 40)
    model, calls = trained().eval(), []

    def counting(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return model(batch)

    fab(counting, x, y, norm="linf", steps=5)
    everything = sum(calls)
    calls.clear()
    attacked = fab(counting, x, y, norm="linf", steps=5, eps=0.2)
    assert sum(calls) < everything / 2
    with torch.no_grad():
        fooled = model(attacked).argmax(1) != y
    assert ((distance(x, attacked, "linf") <= 0.2) & fooled).double().mean() > 0.9


def test_fab_restarts_never_make_it_worse() -> None:
    x, y = images("test", 10)
    model = trained().eval()
    one = distance(x, fab(model, x, y, norm="l2", steps=4, targets=2), "l2")
    many = distance(x, fab(model, x, y, norm="l2", steps=4, targets=2, restarts=3,
                           generator=torch.Generator().manual_seed(0)), "l2")  # fmt: skip
    assert (many <= one + 1e-6).all()


@pytest.mark.slow
def test_carlini_wagner_targeted_and_confident() -> None:
    x, y = images("test", 12)
    model, target = trained().eval(), (y + 1) % 10
    attacked = carlini_wagner(model, x, target, steps=100, searches=5, step_size=0.05, targeted=True)
    with torch.no_grad():
        assert (model(attacked).argmax(1) == target).double().mean() > 0.9
        sure = carlini_wagner(model, x, y, steps=100, searches=5, step_size=0.05, confidence=2.0)
        top = model(sure).topk(2, dim=1).values
        moved = distance(x, sure, "l2") > 0
    assert moved.double().mean() > 0.8
    assert (top[:, 0] - top[:, 1] >= 2.0 - 1e-4)[moved].all()


@pytest.fixture(scope="module")
def foolbox() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox", reason="foolbox is not installed: pip install '.[dev]'")


@pytest.mark.slow
class TestAgainstFoolbox:
    """foolbox 3 (Rauber et al. 2020) as oracle."""

    def test_carlini_wagner(self, foolbox: Any) -> None:
        x, y = images("test", 20)
        net = trained().eval()
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        settings = {"steps": 60, "stepsize": 0.05}
        _, theirs, _ = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=7, **settings)(
            model, x, y, epsilons=None
        )
        ours = carlini_wagner(net, x, y, steps=60, step_size=0.05, searches=7)
        with torch.no_grad():
            assert (net(ours).argmax(1) != y).all()
        sizes = [float(distance(x, attacked, "l2").median()) for attacked in (ours, theirs)]
        assert abs(sizes[0] / sizes[1] - 1) < 0.05

    def test_deepfool(self, foolbox: Any) -> None:
        x, y = images("test", 150)
        net = trained().eval()
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        _, theirs, _ = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10)(model, x, y, epsilons=None)
        ours = deepfool(net, x, y)
        with torch.no_grad():
            right = net(x).argmax(1) == y
            assert (net(ours).argmax(1) != y).all()
        sizes = [distance(x, attacked, "l2")[right] for attacked in (ours, theirs)]
        # foolbox adds 1e-4 to every step's length.
        assert abs(float(sizes[0].median() / sizes[1].median()) - 1) < 0.01
        assert ((sizes[0] / sizes[1] - 1).abs() < 0.02).double().mean() > 0.9
