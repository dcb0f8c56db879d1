"""Every objective against its paper's formula, written down again in NumPy; gradients, passes and refusals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digits, untrained
from torch import Tensor, nn

from nndefense.attacks import SpatialAttack
from nndefense.errors import InputError
from nndefense.training import (
    OBJECTIVES,
    Batch,
    BatchAttack,
    EnsembleAttack,
    InnerAttack,
    Outcome,
    find_spec,
    make_objective,
    objective_name,
    train_classifier,
)
from nndefense.training.objectives import standard, trades

Array = np.ndarray
N, SIDE, HIDDEN, CLASSES = 9, 3, 5, 4
LABELLED = np.array([True, False, True, True, False, False, True, False, False])
CLEAN_LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0])


class Toy(nn.Module):
    """Two layers with tanh, in float64: small enough to be written down again."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Linear(SIDE * SIDE, HIDDEN, dtype=torch.float64)
        self.second = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = 1.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(x.flatten(1) - 0.5)))
        return logits


class Numbers:
    """The same net in NumPy, with the gradient to its images worked out by hand."""

    def __init__(self, model: Toy) -> None:
        self.a, self.b = (t.detach().numpy().copy() for t in (model.first.weight, model.first.bias))
        self.c, self.d = (t.detach().numpy().copy() for t in (model.second.weight, model.second.bias))

    def probabilities(self, x: Array) -> Array:
        z = np.tanh((x.reshape(len(x), -1) - 0.5) @ self.a.T + self.b) @ self.c.T + self.d
        e = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    def ce(self, x: Array, y: Array) -> Array:
        return np.array([-math.log(row[label]) for row, label in zip(self.probabilities(x), y, strict=True)])

    def kl(self, x: Array, moved: Array) -> Array:
        p, q = self.probabilities(x), self.probabilities(moved)
        return np.asarray((p * np.log(p / q)).sum(1))

    def slope(self, x: Array, target: Array) -> Array:
        """Gradient of -sum_k target_k log q_k(x): of the cross-entropy, and of the divergence from ``target``."""
        h = np.tanh((x.reshape(len(x), -1) - 0.5) @ self.a.T + self.b)
        back = ((self.probabilities(x) - target) @ self.c * (1 - h**2)) @ self.a
        return np.asarray(back.reshape(x.shape))

    def pgd(self, x: Array, start: Array, target: Array, eps: float, size: float, steps: int) -> Array:
        moved = start
        for _ in range(steps):
            moved = np.clip(moved + size * np.sign(self.slope(moved, target)), x - eps, x + eps).clip(0, 1)
        return moved


@pytest.fixture
def model() -> Toy:
    return Toy().train()


@pytest.fixture
def numbers(model: Toy) -> Numbers:
    return Numbers(model)


def the_images() -> Tensor:
    return torch.rand(N, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def the_batch(mixed: bool = False) -> Batch:
    mask = torch.from_numpy(LABELLED) if mixed else None
    return Batch(the_images(), torch.from_numpy(CLEAN_LABELS), mask)


def move(x: Tensor) -> Tensor:
    """A fixed perturbation, the same for an image wherever it stands in its batch."""
    return (x + 0.3 * torch.sin(40 * x)).clamp(0, 1)


class Fixed:
    """An attack whose result is known; it notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, str]] = []

    def __call__(self, model: nn.Module, images: Tensor, y: Tensor, *, loss: str = "cross-entropy") -> Tensor:
        self.calls.append((images, y, loss))
        return move(images)


X, Y = the_images().numpy(), CLEAN_LABELS
MOVED = move(the_images()).numpy()
L, U = LABELLED, ~LABELLED


def value(outcome: Outcome) -> float:
    return float(outcome.loss.detach())


def papers_rst_at(net: Numbers, mix: float, a: float, b: float) -> float:
    def mean(values: Array, weight: float) -> float:
        above = (1 - weight) * values[L].sum() + weight * values[U].sum()
        return float(above / ((1 - weight) * L.sum() + weight * U.sum()))

    return (1 - mix) * mean(net.ce(X, Y), a) + mix * mean(net.ce(MOVED, Y), b)


def papers_rst_trades(net: Numbers, beta: float, u: float) -> float:
    each = net.ce(X, Y) + beta * net.kl(X, MOVED)
    total = ((1 - u) * each[L]).sum() + (u * each[U]).sum()
    return float(total / ((1 - u) * L.sum() + u * U.sum()))


def papers_rst(net: Numbers, alpha: float, beta: float, gamma: float, lamb: float) -> float:
    clean, worst = net.ce(X, Y), net.ce(MOVED, Y)
    return float(alpha * clean[L].mean() + beta * worst[L].mean() + gamma * clean[U].mean() + lamb * worst[U].mean())


# Those that retrieve stand in tests/test_retrieval_training.py.
WITHOUT_ROWS = [name for name, spec in OBJECTIVES.items() if not spec.rows]
# Name, weights, whether the batch has unlabelled images, and the formula.
FORMULAS: list[tuple[str, dict[str, Any], bool, Callable[[Numbers], float]]] = [
    ("standard", {}, False, lambda net: net.ce(X, Y).mean()),
    ("adversarial", {}, False, lambda net: net.ce(MOVED, Y).mean()),
    ("half-half", {"mix": "loss"}, False, lambda net: (net.ce(X, Y).mean() + net.ce(MOVED, Y).mean()) / 2),
    ("half-half", {}, False, lambda net: np.concatenate([net.ce(MOVED, Y)[: N // 2], net.ce(X, Y)[N // 2 :]]).mean()),
    ("trades", {}, False, lambda net: net.ce(X, Y).mean() + 6 * net.kl(X, MOVED).mean()),
    ("trades", {"beta": 0.5}, False, lambda net: net.ce(X, Y).mean() + net.kl(X, MOVED).sum() / N / 2),
    ("interpolated", {"alpha": 0}, False, lambda net: (net.ce(X, Y).mean() + net.ce(MOVED, Y).mean()) / 2),
    ("self-training", {}, True, lambda net: papers_rst_at(net, 0.0, 0.9, 0.123)),
    ("self-training", {"std_unlabelled": 0.2}, True, lambda net: papers_rst_at(net, 0.0, 0.2, 0.123)),
    ("rst", {}, True, lambda net: papers_rst(net, 0.05, 0.25, 0.45, 0.25)),
    (
        "rst",
        {"std_labelled": 1.0, "rob_labelled": 2.0, "std_unlabelled": 3.0, "rob_unlabelled": 4.0},
        True,
        lambda net: papers_rst(net, 1, 2, 3, 4),
    ),
    ("rst-at", {}, True, lambda net: papers_rst_at(net, 0.5, 0.9, 0.5)),
    (
        "rst-at",
        {"mix": 0.8, "std_unlabelled": 0.3, "rob_unlabelled": 0.6},
        True,
        lambda net: papers_rst_at(net, 0.8, 0.3, 0.6),
    ),
    ("rst-at", {"std_unlabelled": 0, "rob_unlabelled": 0}, True, lambda net: papers_rst_at(net, 0.5, 0, 0)),
    ("rst-trades", {}, True, lambda net: net.ce(X, Y).mean() + 6 * net.kl(X, MOVED).mean()),
    ("rst-trades", {"beta": 2, "unlabelled": 0.7}, True, lambda net: papers_rst_trades(net, 2, 0.7)),
    ("robust-consistency", {}, True, lambda net: net.ce(X, Y)[L].mean() + 6 * net.kl(X, MOVED).mean()),
]


def shown(value: object) -> str:
    """A part of a case's name, the same in every process."""
    return "by hand" if callable(value) else str(value)[:40]


@pytest.mark.parametrize(("name", "weights", "mixed", "formula"), FORMULAS, ids=shown)
def test_the_papers_formula(
    model: Toy, numbers: Numbers, name: str, weights: dict[str, Any], mixed: bool, formula: Callable[[Numbers], float]
) -> None:
    attack = Fixed()
    outcome = make_objective(name, **weights)(model, the_batch(mixed), attack)
    assert outcome.loss.shape == ()
    assert value(outcome) == pytest.approx(float(formula(numbers)), rel=1e-12)
    outcome.loss.backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())
    for logits, images in ((outcome.clean, X), (outcome.robust, MOVED)):
        if logits is not None:
            assert not logits.requires_grad
            assert np.allclose(logits.softmax(1).numpy(), numbers.probabilities(images), atol=1e-12)
    assert all(part.shape == () and not part.requires_grad for part in outcome.parts.values())
    if OBJECTIVES[name].attack:
        ((images, goal, loss),) = attack.calls
        if name in ("trades", "rst-trades", "robust-consistency"):
            assert loss == "kl"
            assert not goal.requires_grad
            assert np.allclose(goal.softmax(1).numpy(), numbers.probabilities(X), atol=1e-12)
        else:
            assert loss == "cross-entropy"
            assert np.array_equal(goal.numpy(), Y[: len(images)])


def test_the_list_of_formulas_is_whole() -> None:
    # Below, and in tests/test_ensemble_adversarial.py and tests/test_logit_pairing.py.
    drawing = {"worst-of-10", "random-augmentation", "noise-augmentation"}
    elsewhere = {"ensemble-adversarial", "alp", "clp"}
    assert {name for name, *_ in FORMULAS} == set(WITHOUT_ROWS) - drawing - elsewhere
    for name, weights, mixed, _ in FORMULAS:
        assert OBJECTIVES[name].unlabelled is mixed
        assert weights.keys() <= OBJECTIVES[name].weights.keys()


def test_what_the_weights_of_rst_come_to() -> None:
    """Half of the batch labelled: .05, .45, .25 and .25 for the four means, so that rst and rst-at agree."""
    model, attack = Toy(), Fixed()
    half = Batch(the_images()[:8], torch.from_numpy(Y[:8]), torch.arange(8) % 2 == 0)
    by_code, general = make_objective("rst-at")(model, half, attack), make_objective("rst")(model, half, attack)
    assert value(by_code) == pytest.approx(value(general), rel=1e-12)
    other = Batch(half.images[:7], half.labels[:7], torch.arange(7) % 3 == 0)
    assert value(make_objective("rst-at")(model, other, attack)) != pytest.approx(
        value(make_objective("rst")(model, other, attack)), rel=1e-6
    )


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", [name for name, spec in OBJECTIVES.items() if spec.unlabelled])
def test_a_batch_without_one_kind_is_finite(name: str, labelled: bool) -> None:
    batch = Batch(the_images(), torch.from_numpy(Y), torch.full((N,), labelled))
    assert math.isfinite(value(make_objective(name)(Toy(), batch, Fixed())))


@pytest.mark.parametrize("share", [0, 1])
def test_a_weight_that_nothing_bears_is_no_division_by_zero(share: float) -> None:
    batch = Batch(the_images(), torch.from_numpy(Y), torch.full((N,), share == 1))
    objective = make_objective("rst-at", std_unlabelled=share, rob_unlabelled=share)
    assert value(objective(Toy(), batch, Fixed())) == 0


@pytest.mark.parametrize("name", ["adversarial", "rst-at"])
def test_with_the_attack_written_down_again(model: Toy, numbers: Numbers, name: str) -> None:
    """Madry et al.: a uniform start, sign steps on the cross-entropy, the ball, the box."""
    batch = the_batch(name == "rst-at")
    torch.manual_seed(11)
    loss = value(make_objective(name)(model, batch, InnerAttack(eps=0.2, steps=5, step_size=0.06)))
    torch.manual_seed(11)
    noise = (2 * torch.rand(X.shape, dtype=torch.float64) - 1).numpy()
    moved = numbers.pgd(X, np.clip(X + 0.2 * noise, 0, 1), np.eye(CLASSES)[Y], 0.2, 0.06, 5)
    if name == "adversarial":
        assert loss == pytest.approx(numbers.ce(moved, Y).mean(), rel=1e-9)
        assert loss > numbers.ce(X, Y).mean() + 0.1
    else:
        weights = np.where(L, 0.1, 0.9)
        natural, worst = (weights * numbers.ce(X, Y)).sum() / weights.sum(), numbers.ce(moved, Y).mean()
        assert loss == pytest.approx((natural + worst) / 2, rel=1e-9)


@pytest.mark.parametrize("name", ["trades", "rst-trades"])
def test_trades_with_its_attack_written_down_again(model: Toy, numbers: Numbers, name: str) -> None:
    """A start of x + .001 N(0, I), outside the box if need be; steps on the divergence, then beta times it."""
    attack = InnerAttack(eps=0.2, steps=6, step_size=0.05, start="gaussian")
    torch.manual_seed(12)
    loss = value(make_objective(name, beta=3.0)(model, the_batch(name == "rst-trades"), attack))
    torch.manual_seed(12)
    start = X + 0.001 * torch.randn(X.shape, dtype=torch.float64).numpy()
    moved = numbers.pgd(X, start, numbers.probabilities(X), 0.2, 0.05, 6)
    assert loss == pytest.approx(numbers.ce(X, Y).mean() + 3 * numbers.kl(X, moved).mean(), rel=1e-9)
    assert numbers.kl(X, moved).mean() > 0.05


def test_interpolated_with_its_draws_written_down_again(model: Toy, numbers: Numbers) -> None:
    torch.manual_seed(13)
    loss = value(make_objective("interpolated", alpha=0.7)(model, the_batch(), Fixed()))
    torch.manual_seed(13)
    total, ratios = 0.0, []
    for images in (X, MOVED):
        ratio = float(torch.distributions.Beta(0.7, 0.7).sample())
        other = torch.randperm(N).numpy()
        mixed = ratio * images + (1 - ratio) * images[other]
        total += (ratio * numbers.ce(mixed, Y) + (1 - ratio) * numbers.ce(mixed, Y[other])).mean() / 2
        ratios.append(ratio)
    assert loss == pytest.approx(total, rel=1e-9)
    assert ratios[0] != ratios[1]


@pytest.mark.parametrize(("name", "draws"), [("worst-of-10", 10), ("random-augmentation", 1)])
@pytest.mark.parametrize("mix", [None, 1.0, 0.3])
def test_rotations(model: Toy, numbers: Numbers, name: str, draws: int, mix: float | None) -> None:
    batch = the_batch()
    objective = make_objective(name) if mix is None else make_objective(name, mix=mix)
    torch.manual_seed(14)
    outcome = objective(model, batch, None)
    torch.manual_seed(14)
    given = objective(model, batch, SpatialAttack(draws=draws))
    torch.manual_seed(14)
    moved = SpatialAttack(draws=draws)(model, batch.images, batch.labels).numpy()
    b = 0.5 if mix is None else mix
    expected = (1 - b) * numbers.ce(X, Y).mean() + b * numbers.ce(moved, Y).mean()
    assert value(outcome) == pytest.approx(expected, rel=1e-12)
    assert value(given) == value(outcome)


@pytest.mark.parametrize("draws", [10, 1])
def test_rst_with_rotations(model: Toy, numbers: Numbers, draws: int) -> None:
    batch, attack = the_batch(mixed=True), SpatialAttack(draws=draws)
    torch.manual_seed(15)
    loss = value(make_objective("rst-at")(model, batch, attack))
    torch.manual_seed(15)
    moved = attack(model, batch.images, batch.labels).numpy()
    weights = np.where(L, 0.1, 0.9)
    natural = (weights * numbers.ce(X, Y)).sum() / weights.sum()
    assert loss == pytest.approx((natural + numbers.ce(moved, Y).mean()) / 2, rel=1e-12)


def slopes(loss: Callable[[], Tensor], parameters: list[Tensor], step: float = 1e-5) -> Tensor:
    """Central differences, one weight at a time."""
    found = []
    with torch.no_grad():
        for parameter in parameters:
            for entry in range(parameter.numel()):
                flat, kept = parameter.view(-1), float(parameter.view(-1)[entry])
                flat[entry] = kept + step
                above = float(loss())
                flat[entry] = kept - step
                below = float(loss())
                flat[entry] = kept
                found.append((above - below) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", ["trades", "rst-trades", "robust-consistency", "rst-at", "interpolated"])
def test_the_gradient_by_finite_differences(model: Toy, name: str) -> None:
    """With the attacked images held fixed: the gradient runs through both predictions of the divergence."""
    batch, objective = the_batch(OBJECTIVES[name].unlabelled), make_objective(name)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return objective(model, batch, Fixed()).loss

    parameters = list(model.parameters())
    expected = slopes(loss, parameters)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert float(found.abs().max()) > 0.1


def test_a_constant_clean_prediction_would_be_another_gradient(model: Toy) -> None:
    """The case above does see the difference: TRADES with its p(x) held constant."""
    batch = the_batch()
    p = model(batch.images).softmax(1)

    def gradient(target: Tensor) -> Tensor:
        q = model(move(batch.images)).log_softmax(1)
        loss = (target * (target.log() - q)).sum(1).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])

    difference = (gradient(p) - gradient(p.detach())).abs().max()
    assert float(difference) > 1e-2


class Counted(nn.Module):
    """A net with batch normalisation that notes each pass: its mode, its images, whether weights learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, CLASSES))
        self.net.double()
        self.passes: list[tuple[bool, Tensor, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and self.net[0].weight.requires_grad
        self.passes.append((self.net[1].training, x.detach().clone(), learning))
        logits: Tensor = self.net(x)
        return logits


def test_noise_augmentation_sees_noisy_images_inside_the_box_alone(model: Toy) -> None:
    torch.manual_seed(3)
    noise = torch.randn_like(the_batch().images)
    for sigma in (0.0, 0.4):
        torch.manual_seed(3)
        outcome = make_objective("noise-augmentation", sigma=sigma)(model, the_batch(), None)
        seen = (the_batch().images + sigma * noise).clamp(0, 1)
        by_hand = torch.nn.functional.cross_entropy(model(seen), the_batch().labels)
        assert float(outcome.loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-12)
        assert outcome.clean is None


def an_attack(name: str, steps: int) -> BatchAttack | None:
    """What the objective attacks with; the pool of an ensemble is the model itself."""
    if name == "ensemble-adversarial":
        return EnsembleAttack([], InnerAttack(eps=0.1, steps=steps, target="predicted"))
    return InnerAttack(eps=0.1, steps=steps) if OBJECTIVES[name].attack else None


STEPS = 5
# Passes in evaluation mode beyond the attack's steps, and passes in training mode.
PASSES = {
    "standard": (None, 1),
    "noise-augmentation": (None, 1),
    "half-half": (0, 1),
    "adversarial": (0, 1),
    "trades": (1, 2),
    "interpolated": (0, 2),
    "worst-of-10": (10 - STEPS, 2),
    "random-augmentation": (-STEPS, 2),
    "self-training": (None, 1),
    "rst": (0, 2),
    "rst-at": (0, 2),
    "rst-trades": (1, 2),
    "robust-consistency": (1, 2),
    # The prediction that the steps lead away from.
    "ensemble-adversarial": (1, 2),
    "alp": (0, 1),
    "clp": (None, 1),
}


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_passes_and_statistics(name: str) -> None:
    model, batch = Counted().train(), the_batch(OBJECTIVES[name].unlabelled)
    attack = an_attack(name, STEPS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outcome = make_objective(name)(model, batch, attack)
    extra, outer = PASSES[name]
    attacking = [x for training, x, _ in model.passes if not training]
    assert len(attacking) == (0 if extra is None else STEPS + extra)
    # K + 1 passes: the clean images are seen once before the steps, and never again by the attack.
    clean_passes = sum(x.shape == batch.images.shape and bool(torch.equal(x, batch.images)) for x in attacking)
    assert clean_passes == (1 if extra == 1 else 0)
    assert [(training, learning) for training, _, learning in model.passes[len(attacking) :]] == [(True, True)] * outer
    assert all(not learning for training, _, learning in model.passes if not training)
    if outer == 2 and name != "interpolated":
        # The clean pass comes last: the running statistics lean towards it.
        assert torch.equal(model.passes[-1][1], batch.images)
        assert not torch.equal(model.passes[-2][1], batch.images)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    # The running statistics are those of the passes in training mode, in their order, and of nothing else.
    plain = Counted().train()
    plain.load_state_dict(before)
    for training, x, _ in model.passes:
        if training:
            plain(x)
    after = plain.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    assert int(after["net.1.num_batches_tracked"]) == outer
    outcome.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_attacks_mode_holds_for_the_clean_prediction_too() -> None:
    model, batch = Counted().train(), the_batch()
    attack = InnerAttack(eps=0.1, steps=2, start="gaussian", mode="train")
    make_objective("trades")(model, batch, attack)
    assert [(training, learning) for training, _, learning in model.passes] == [(True, False)] * 3 + [(True, True)] * 2
    # Yet only the two passes of the loss count for the running statistics.
    assert int(model.net[1].num_batches_tracked) == 2


@pytest.mark.parametrize("name", ["trades", "adversarial", "rst-trades"])
def test_the_attacks_passes_in_16_bits_do_not_cut_the_weights_off(name: str) -> None:
    """Autocast keeps the weights that it has cast: ones cast without a graph must not serve the loss."""
    model, batch = Counted().float().train(), the_batch(OBJECTIVES[name].unlabelled)
    batch = Batch(batch.images.float(), batch.labels, batch.labelled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = make_objective(name)(model, batch, InnerAttack(eps=0.1, steps=2))
    outcome.loss.backward()
    assert outcome.loss.dtype == torch.float32
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_half_of_the_batch(size: int) -> None:
    model, attack = Toy(), Fixed()
    batch = Batch(the_images()[:size], torch.from_numpy(Y[:size]))
    outcome = make_objective("half-half")(model, batch, attack)
    half = size // 2
    assert [len(images) for images, *_ in attack.calls] == ([half] if half else [])
    assert outcome.clean is None
    assert outcome.robust is None
    right = (model(torch.cat([move(batch.images[:half]), batch.images[half:]])).argmax(1) == batch.labels).double()
    assert float(outcome.parts["clean_accuracy"]) == pytest.approx(float(right[half:].mean()))
    assert ("robust_accuracy" in outcome.parts) is (half > 0)
    if half:
        assert float(outcome.parts["robust_accuracy"]) == pytest.approx(float(right[:half].mean()))


@pytest.mark.parametrize("name", [name for name in WITHOUT_ROWS if OBJECTIVES[name].attack])
def test_an_attack_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"the objective {name} needs an attack"):
        make_objective(name)(Toy(), the_batch(OBJECTIVES[name].unlabelled), None)


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_unlabelled_images_that_are_not_there_or_not_wanted(name: str) -> None:
    wants = OBJECTIVES[name].unlabelled
    words = f"the objective {name} " + ("needs unlabelled images" if wants else "has no use for unlabelled images")
    with pytest.raises(InputError, match=words):
        make_objective(name)(Toy(), the_batch(not wants), None if "of-10" in name or "random" in name else Fixed())


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("traids", {}, "there is no objective 'traids': choose one of standard, half-half"),
        ("trades", {"gamma": 1.0}, "trades has no weight 'gamma': it takes beta"),
        ("standard", {"beta": 1.0}, "standard has no weight 'beta': it takes none"),
        ("trades", {"beta": -1.0}, "beta of the objective trades is -1.0, but must be finite and at least 0"),
        ("trades", {"beta": math.nan}, "beta of the objective trades is nan"),
        ("trades", {"beta": math.inf}, "beta of the objective trades is inf"),
        ("trades", {"beta": "6"}, "beta of the objective trades is '6'"),
        ("rst-at", {"mix": 1.1}, "mix of the objective rst-at is 1.1, but must be between 0 and 1"),
        ("rst-at", {"std_unlabelled": True}, "std_unlabelled of the objective rst-at is True"),
        ("half-half", {"mix": 0.5}, "mix of the objective half-half is 0.5, but must be one of batch, loss"),
    ],
)
def test_objectives_that_do_not_exist(name: str, weights: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_objective(name, **weights)


def test_a_mix_that_does_not_exist_is_refused_by_the_function_too() -> None:
    with pytest.raises(InputError, match="mix is 'both'"):
        OBJECTIVES["half-half"].function(Toy(), the_batch(), Fixed(), mix="both")


@pytest.mark.parametrize("attack", [SpatialAttack(draws=3), InnerAttack(eps=0.1), Fixed()], ids=["3", "pgd", "other"])
@pytest.mark.parametrize("name", ["worst-of-10", "random-augmentation"])
def test_rotations_with_another_attack(name: str, attack: Any) -> None:
    with pytest.raises(InputError, match=f"the objective {name} takes a SpatialAttack"):
        make_objective(name)(Toy(), the_batch(), attack)


def mine(model: nn.Module, batch: Batch, attack: Any, *, power: float = 1.0) -> Outcome:
    return Outcome(model(batch.images).abs().mean() ** power)


class Described:
    description = "own(3)"

    def __call__(self, model: nn.Module, batch: Batch, attack: Any) -> Outcome:
        return mine(model, batch, attack)


def test_names_for_the_record() -> None:
    assert objective_name(standard) == objective_name(make_objective("standard")) == "standard"
    assert objective_name(trades) == objective_name(make_objective("trades", beta=6)) == "trades(beta=6.0)"
    assert objective_name(make_objective("half-half", mix="loss")) == "half-half(mix=loss)"
    assert objective_name(make_objective("rst-at", mix=1)) == "rst-at(mix=1.0, std_unlabelled=0.9, rob_unlabelled=0.5)"
    assert objective_name(mine) == "mine"
    # No address of an object, which would differ when a training is resumed.
    assert objective_name(functools.partial(mine, power=2.0)) == "mine(power=2.0)"
    assert objective_name(Described()) == "own(3)"
    assert find_spec(make_objective("trades", beta=2.0)) is find_spec(trades) is OBJECTIVES["trades"]
    assert find_spec(mine) is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_described(name: str) -> None:
    spec = OBJECTIVES[name]
    assert spec.summary
    assert spec.function.__doc__
    assert spec.limits.keys() == spec.weights.keys()
    for weight, default in spec.weights.items():
        make_objective(name, **{weight: default})


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_every_objective_trains_and_twice_alike(name: str) -> None:
    spec = OBJECTIVES[name]
    runs = []
    for _ in range(2):
        classifier = untrained()
        before = classifier.fingerprint
        train_classifier(
            classifier,
            digits("train").subset(range(40)),
            objective=name,
            attack=an_attack(name, 2),
            unlabelled=digits("train").subset(range(40, 100)) if spec.unlabelled else None,
            epochs=1,
            batch_size=20,
            device="cpu",
            progress=False,
        )
        assert classifier.fingerprint != before
        (row,) = classifier.info["history"]
        assert math.isfinite(row["loss"])
        assert classifier.info["objective"] == objective_name(spec.function)
        runs.append(classifier.fingerprint)
    assert runs[0] == runs[1]
