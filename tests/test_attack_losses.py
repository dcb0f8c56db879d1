"""The losses: values by hand, what shifting and scaling the logits does, log-probabilities, and their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nndefense.attacks import LOSSES, cross_entropy, dlr, kl, margin, targeted_dlr
from nndefense.attacks.losses import find_loss
from nndefense.errors import InputError

LOGITS = torch.tensor([[3.0, 1.0, -1.0, 0.0], [0.5, 2.5, 1.5, -0.5]])
LABELS = torch.tensor([0, 2])


def test_values_by_hand() -> None:
    torch.testing.assert_close(margin(LOGITS, LABELS), torch.tensor([-2.0, 1.0]))
    torch.testing.assert_close(dlr(LOGITS, LABELS), torch.tensor([-2.0 / 3.0, 1.0 / 2.0]))
    # (z_t - z_y) / (z_1 - (z_3 + z_4) / 2): -3 / 3.5 and 1 / 2.5.
    found = targeted_dlr(LOGITS, LABELS, torch.tensor([3, 1]))
    torch.testing.assert_close(found, torch.tensor([-3.0 / 3.5, 1.0 / 2.5]))
    by_hand = -torch.log(LOGITS.exp()[[0, 1], LABELS] / LOGITS.exp().sum(1))
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS), by_hand)
    p, q = LOGITS.flip(1).softmax(1), LOGITS.softmax(1)
    torch.testing.assert_close(kl(LOGITS, LOGITS.flip(1)), (p * (p / q).log()).sum(1))


def every(logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    values = {name: loss(logits, y) for name, loss in LOSSES.items() if name != "kl"}
    return values | {"targeted": targeted_dlr(logits, y, (y + 1) % logits.shape[1]), "kl": kl(logits, LOGITS_OF_KL)}


LOGITS_OF_KL = torch.linspace(-2, 2, 18, dtype=torch.float64).view(3, 6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50), scale=st.floats(0.1, 20))
def test_a_shift_changes_nothing_and_log_probabilities_are_a_shift(seed: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(6, (3,), generator=generator)
    for moved in (logits + shift, logits.log_softmax(1)):
        expected = every(logits, y)
        for name, found in every(moved, y).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-8, atol=1e-8, msg=name)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 1000))
def test_dlr_ignores_the_scale_and_stays_in_its_range(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(7, (5,), generator=generator)
    torch.testing.assert_close(dlr(scale * logits, y), dlr(logits, y), rtol=1e-6, atol=1e-6)
    assert dlr(logits, y).min() >= -1 - 1e-9
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) > 0, wrong)
    assert torch.equal(dlr(logits, y) > 0, wrong)
    assert (kl(logits, logits.flip(1)) >= -1e-12).all()
    torch.testing.assert_close(kl(logits, logits), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [*LOSSES, "targeted"])
def test_gradients_through_log_probabilities_are_those_through_logits(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 5])
    (direct,) = torch.autograd.grad(every(logits, y)[name].sum(), logits)
    (through,) = torch.autograd.grad(every(logits.log_softmax(1), y)[name].sum(), logits)
    torch.testing.assert_close(through, direct)
    assert direct.abs().sum() > 0


def test_too_few_classes() -> None:
    with pytest.raises(InputError, match="at least 3 classes, but the model has 2: use loss='margin'"):
        dlr(LOGITS[:, :2], torch.tensor([0, 1]))
    with pytest.raises(InputError, match="at least 4 classes"):
        targeted_dlr(LOGITS[:, :3], LABELS, LABELS)


def test_losses_by_name() -> None:
    assert find_loss("margin") is margin
    assert find_loss(margin) is margin
    with pytest.raises(InputError, match="'ce'"):
        find_loss("ce")
