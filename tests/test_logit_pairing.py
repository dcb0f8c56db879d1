"""Adversarial and clean logit pairing against their formulas in NumPy, and what they withstand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import fails, nndefense
from helpers import digits, images, untrained
from numbers_net import CLASSES, SIDE, Numbers, slopes, tanh_net
from torch import Tensor, nn

from nndefense.attacks import pgd
from nndefense.errors import InputError
from nndefense.models import load_classifier
from nndefense.training import Batch, InnerAttack, make_objective, train_classifier
from nndefense.training.objectives.supervised import EXAMPLES_WEIGHT, IMAGENET_WEIGHT
from nndefense.training.validation import stronger

N = 9
Y = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0])


def the_images() -> Tensor:
    return torch.rand(N, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


X = the_images().numpy()


def the_batch(size: int = N) -> Batch:
    return Batch(the_images()[:size], torch.from_numpy(Y[:size]))


def move(x: Tensor) -> Tensor:
    return (x + 0.3 * torch.sin(40 * x)).clamp(0, 1)


def fixed(model: nn.Module, batch: Tensor, y: Tensor, *, loss: str = "cross-entropy") -> Tensor:
    return move(batch)


MOVED = move(the_images()).numpy()


def papers_alp(net: Numbers, moved: np.ndarray, weight: float, smoothing: float) -> float:
    both = np.concatenate([net.ce(X, Y, smoothing), net.ce(moved, Y, smoothing)])
    total = sum(float((a - b) ** 2) for a, b in zip(net.logits(X).ravel(), net.logits(moved).ravel(), strict=True))
    return float(both.sum() / (2 * N) + weight * total / (N * CLASSES))


@pytest.mark.parametrize(
    ("weights", "pairing", "smoothing"),
    [
        ({}, 0.5, 0.1),
        ({"pairing": IMAGENET_WEIGHT}, 0.25, 0.1),
        ({"pairing": 3, "smoothing": 0}, 3.0, 0.0),
        ({"pairing": 0, "smoothing": 0.4, "passes": "separate"}, 0.0, 0.4),
        ({"passes": "separate"}, EXAMPLES_WEIGHT, 0.1),
    ],
)
def test_adversarial_logit_pairing(weights: dict[str, Any], pairing: float, smoothing: float) -> None:
    model = tanh_net()
    net = Numbers(model)
    outcome = make_objective("alp", **weights)(model, the_batch(), fixed)
    assert float(outcome.loss.detach()) == pytest.approx(papers_alp(net, MOVED, pairing, smoothing), rel=1e-12)
    for logits, batch in ((outcome.clean, X), (outcome.robust, MOVED)):
        assert logits is not None
        assert not logits.requires_grad
        assert np.allclose(logits.numpy(), net.logits(batch), atol=1e-12)
    assert set(outcome.parts) == {"clean_loss", "robust_loss", "pairing_loss"}


def test_with_the_authors_attack_written_down_again() -> None:
    """PGD towards the class that is least likely at the clean image, from a uniform start."""
    model = tanh_net()
    net = Numbers(model)
    torch.manual_seed(5)
    attack = InnerAttack(eps=0.2, steps=4, step_size=0.06, target="least-likely")
    loss = float(make_objective("alp")(model, the_batch(), attack).loss.detach())
    torch.manual_seed(5)
    noise = (2 * torch.rand(X.shape, dtype=torch.float64) - 1).numpy()
    moved, goal = np.clip(X + 0.2 * noise, 0, 1), net.logits(X).argmin(1)
    for _ in range(4):
        moved = np.clip(moved - 0.06 * np.sign(net.slope(moved, goal)), X - 0.2, X + 0.2).clip(0, 1)
    assert loss == pytest.approx(papers_alp(net, moved, 0.5, 0.1), rel=1e-12)
    assert (net.ce(moved, goal) < net.ce(X, goal)).all()


def test_the_least_likely_class_is_chosen_once_and_as_in_a_targeted_attack() -> None:
    model = tanh_net().eval()
    x, y = the_images(), torch.from_numpy(Y)
    goal = model(x).argmin(1)
    ours = InnerAttack(eps=0.3, steps=6, step_size=0.1, start="none", target="least-likely")(model, x, y)
    theirs = pgd(model, x, goal, eps=0.3, steps=6, step_size=0.1, random_start=False, targeted=True)
    assert torch.equal(ours, theirs)
    assert not torch.equal(goal, model(ours).argmin(1))
    assert torch.equal(ours, InnerAttack(eps=0.3, steps=6, step_size=0.1, start="none", target="least-likely")(
        model, x, (y + 1) % CLASSES
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "weights"),
    [("alp", {}), ("alp", {"pairing": 2.0, "passes": "separate"}), ("clp", {}), ("clp", {"noise": 0.2})],
)
def test_gradients_by_finite_differences(name: str, weights: dict[str, Any]) -> None:
    """With the attacked images held fixed: through both logits of a pair."""
    model = tanh_net()
    objective = make_objective(name, **weights)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return objective(model, the_batch(), fixed).loss

    parameters = list(model.parameters())
    expected = slopes(loss, parameters)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert float(found.abs().max()) > 0.1


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_clean_logit_pairing(size: int, smoothing: float) -> None:
    """The first half with the second; without a partner the last one of an odd number."""
    model = tanh_net()
    net = Numbers(model)
    outcome = make_objective("clp", pairing=0.7, smoothing=smoothing)(model, the_batch(size), None)
    z, half = net.logits(X[:size]), size // 2
    distance = float(np.mean((z[:half] - z[half : 2 * half]) ** 2)) if half else 0.0
    expected = float(net.ce(X[:size], Y[:size], smoothing).mean()) + 0.7 * distance
    assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert outcome.robust is None
    assert outcome.clean is not None


def test_clean_logit_pairing_with_noise() -> None:
    model = tanh_net()
    net = Numbers(model)
    torch.manual_seed(9)
    outcome = make_objective("clp", noise=0.3)(model, the_batch(), None)
    torch.manual_seed(9)
    noisy = np.clip(X + 0.3 * torch.randn(X.shape, dtype=torch.float64).numpy(), 0, 1)
    z, half = net.logits(noisy), N // 2
    expected = float(net.ce(noisy, Y, 0.1).mean()) + 0.5 * float(np.mean((z[:half] - z[half : 2 * half]) ** 2))
    assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-12)
    # No image went through the net as it is.
    assert outcome.clean is None


def test_one_pass_or_two_where_a_layer_looks_at_the_batch() -> None:
    batch = Batch(*images("train", 12))
    losses = {}
    for passes in ("joint", "separate"):
        classifier = untrained().train()
        outcome = make_objective("alp", passes=passes)(classifier, batch, InnerAttack(eps=0.2, steps=2))
        losses[passes] = float(outcome.loss.detach())
        assert int(classifier.net.block1[1].num_batches_tracked) == (1 if passes == "joint" else 2)
    assert losses["joint"] != pytest.approx(losses["separate"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("alp", {"pairing": -1.0}, "pairing of the objective alp is -1.0, but must be finite and at least 0"),
        ("alp", {"smoothing": 1.5}, "smoothing of the objective alp is 1.5, but must be between 0 and 1"),
        ("alp", {"passes": "both"}, "passes of the objective alp is 'both', but must be one of joint, separate"),
        ("clp", {"noise": math.nan}, "noise of the objective clp is nan"),
        ("clp", {"passes": "joint"}, "the objective clp has no weight 'passes'"),
    ],
)
def test_weights_that_cannot_be(name: str, weights: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_objective(name, **weights)


def test_attacks_and_images_that_cannot_be() -> None:
    model, mixed = tanh_net(), Batch(the_images(), torch.from_numpy(Y), torch.arange(N) < 4)
    with pytest.raises(InputError, match="the objective alp needs an attack"):
        make_objective("alp")(model, the_batch(), None)
    for name in ("alp", "clp"):
        with pytest.raises(InputError, match=f"the objective {name} has no use for unlabelled images"):
            make_objective(name)(model, mixed, fixed)
    with pytest.raises(InputError, match="target is 'likely', but must be one of label, predicted, least-likely"):
        InnerAttack(eps=0.1, target="likely")
    attack = InnerAttack(eps=0.1, target="least-likely")
    with pytest.raises(InputError, match="knows no classes"):
        attack(model, the_images(), model(the_images()), loss="kl")


def test_the_checks_lead_away_from_the_label() -> None:
    """A net can withstand every step towards the least likely class and none away from its own."""
    training = InnerAttack(eps=0.3, steps=20, step_size=0.02, target="least-likely")
    assert stronger(training) == InnerAttack(eps=0.3, steps=20, step_size=0.02)
    assert stronger(InnerAttack.fgsm(0.3)) == InnerAttack(eps=0.3, steps=10)
    assert "target" not in InnerAttack(eps=0.3).as_dict()
    assert training.as_dict()["target"] == "least-likely"


def under_attack(classifier: nn.Module, **settings: Any) -> float:
    """The share of 200 test images that stay right under PGD at 0.25."""
    x, y = images("test", 200)
    if settings.pop("targeted", False):
        y_goal = classifier(x).argmin(1)
        moved = pgd(classifier, x, y_goal, targeted=True, eps=0.25, **settings)
    else:
        moved = pgd(classifier, x, y, eps=0.25, **settings)
    return float((classifier(moved).argmax(1) == y).float().mean())


@pytest.mark.slow
def test_what_adversarial_logit_pairing_withstands() -> None:
    """It learns, holds the attack of its training, and loses far more to steps away from the label."""
    options = {"epochs": 12, "batch_size": 64, "lr": 1e-2, "device": "cpu", "progress": False}
    attack = InnerAttack(eps=0.25, steps=3, target="least-likely")
    net = untrained(arch="strided-cnn")
    classifier = train_classifier(net, digits("train"), objective="alp", attack=attack, **options)
    x, y = images("test", 200)
    clean = float((classifier(x).argmax(1) == y).float().mean())
    seen = under_attack(classifier, steps=5, targeted=True, generator=torch.Generator().manual_seed(0))
    unseen = under_attack(classifier, steps=40, restarts=2, generator=torch.Generator().manual_seed(0))
    assert clean > 0.9
    assert seen > 0.75
    assert unseen < seen - 0.2


def test_the_command(tmp_path: Path) -> None:
    quick = (
        "train",
        "--dataset",
        "digits:train[:200]",
        "--device",
        "cpu",
        "--quiet",
        "--epochs",
        1,
        "--batch-size",
        50,
    )
    said = nndefense(*quick, "--out", tmp_path / "a", "--objective", "alp", "--eps", 0.2, "--steps", 2, "--json").json
    assert said["objective"] == "alp(pairing=0.5, smoothing=0.1, passes=joint)"
    attack = load_classifier(tmp_path / "a").info["attack"]
    assert attack == InnerAttack(eps=0.2, steps=2, target="least-likely").as_dict()
    words = ("--objective", "alp", "--attack", "fgsm", "--eps", 0.2, "--target", "label", "--weight", "pairing=0.25")
    nndefense(*quick, "--out", tmp_path / "b", *words)
    info = load_classifier(tmp_path / "b").info
    assert info["attack"] == InnerAttack.fgsm(0.2, target="label").as_dict()
    assert info["objective"].startswith("alp(pairing=0.25")
    nndefense(*quick, "--out", tmp_path / "c", "--objective", "clp", "--weight", "noise=0.2")
    assert load_classifier(tmp_path / "c").info["attack"] is None
    fails(2, "the objective alp attacks its images: give --eps", *quick, "--out", tmp_path / "d", "--objective", "alp")
