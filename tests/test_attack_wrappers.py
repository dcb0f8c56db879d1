"""EOT, BPDA, the counters, and the bill of an attack."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images, trained
from torch import Tensor, nn

from nndefense.attacks import (
    Bpda,
    Counted,
    Eot,
    WorstCase,
    apgd,
    autoattack,
    carlini_wagner,
    check_labels,
    check_logits,
    check_model,
    cross_entropy,
    deepfool,
    fgsm,
    pgd,
    run,
    square,
)
from nndefense.attacks.losses import loss_and_gradient
from nndefense.errors import InputError


def net() -> nn.Module:
    return trained().eval()


def noisy(x: Tensor) -> Tensor:
    """A net behind noise: a defence that is random."""
    return net()(x + 0.2 * torch.randn_like(x))


class TestEot:
    def test_of_a_deterministic_net_it_is_the_net(self) -> None:
        x, y = images("test", 20)
        torch.testing.assert_close(Eot(net(), 3)(x), net()(x).log_softmax(1), rtol=1e-5, atol=1e-5)
        for average in ("probabilities", "gradients"):
            _, _, gradient = loss_and_gradient(Eot(net(), 3, average=average), x, y, cross_entropy)
            torch.testing.assert_close(gradient, loss_and_gradient(net(), x, y, cross_entropy)[2], rtol=1e-3, atol=1e-5)

    def test_averages_by_hand(self) -> None:
        logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]])]
        draws = iter(4 * logits)
        x, y = torch.rand(1, 1, 2, 2), torch.tensor([0])

        def model(batch: Tensor) -> Tensor:
            return next(draws) * (1 + 0 * batch.sum())

        mean = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
        torch.testing.assert_close(Eot(model, 2)(x).exp(), mean)
        torch.testing.assert_close(loss_and_gradient(Eot(model, 2), x, y, cross_entropy)[0], -mean[:, 0].log())
        losses = torch.stack([cross_entropy(z, y) for z in logits]).mean(0)
        found = loss_and_gradient(Eot(model, 2, average="gradients"), x, y, cross_entropy)[0]
        torch.testing.assert_close(found, losses)

    def test_the_average_of_gradients_is_one(self) -> None:
        x, y = images("test", 8)
        generator = torch.Generator().manual_seed(0)
        _, _, together = loss_and_gradient(Eot(noisy, 4, average="gradients", generator=generator), x, y, cross_entropy)
        seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            alone = [loss_and_gradient(noisy, x, y, cross_entropy)[2] for _ in range(4)]
        torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)

    def test_a_generator_makes_it_repeatable_and_leaves_the_global_one_alone(self) -> None:
        x, y = images("test", 10)
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        runs = []
        for seed in (0, 0, 1):
            model = Eot(noisy, 2, generator=torch.Generator().manual_seed(seed))
            runs.append(pgd(model, x, y, eps=0.1, steps=3, random_start=False))
            assert not torch.equal(model(x), model(x))  # fresh draws at each call
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_it_attacks_a_random_defence_better_than_one_draw(self) -> None:
        x, y = images("test", 80)

        def fooled(attacked: Tensor) -> float:
            torch.manual_seed(1)
            with torch.no_grad():
                return sum(float((noisy(attacked).argmax(1) != y).double().mean()) for _ in range(20)) / 20

        torch.manual_seed(0)
        one = pgd(noisy, x, y, eps=0.08, steps=8, random_start=False)
        many = pgd(Eot(noisy, 16), x, y, eps=0.08, steps=8, random_start=False)
        assert fooled(many) > fooled(one)

    def test_bad_settings(self) -> None:
        with pytest.raises(InputError, match="samples"):
            Eot(noisy, 0)
        with pytest.raises(InputError, match="probabilities, gradients"):
            Eot(noisy, 2, average="logits")


def coarse(x: Tensor) -> Tensor:
    return (4 * x).round() / 4


class TestBpda:
    def test_true_value_and_substituted_gradient(self) -> None:
        x = torch.rand(3, 1, 4, 4, requires_grad=True)
        out = Bpda(coarse)(x)
        assert torch.equal(out, coarse(x))
        weights = torch.randn(3, 1, 4, 4)
        (gradient,) = torch.autograd.grad((weights * out).sum(), x)
        assert torch.equal(gradient, weights)
        out = Bpda(coarse, backward=lambda z: 3 * z)(x)
        assert torch.equal(out, coarse(x))
        (gradient,) = torch.autograd.grad((weights * out).sum(), x)
        torch.testing.assert_close(gradient, 3 * weights)
        with torch.no_grad():
            assert torch.equal(Bpda(coarse)(x), coarse(x))

    def test_it_breaks_what_quantising_seems_to_defend(self) -> None:
        x, y = images("test", 100)

        def right(attacked: Tensor) -> float:
            with torch.no_grad():
                return float((net()(coarse(attacked)).argmax(1) == y).double().mean())

        blind = pgd(lambda z: net()(coarse(z)), x, y, eps=0.15, steps=10, random_start=False)
        seen = pgd(lambda z: net()(Bpda(coarse)(z)), x, y, eps=0.15, steps=10, random_start=False)
        assert right(blind) > 0.9  # rounding has gradient 0, so nothing moves
        assert right(seen) < 0.3

    def test_a_whole_defence_with_an_image_sized_substitute_is_refused(self) -> None:
        with pytest.raises(InputError, match="they must be equal"):
            Bpda(net())(torch.rand(2, 1, 8, 8))

    def test_a_whole_defence(self) -> None:
        x, y = images("test", 20)

        def defence(z: Tensor) -> Tensor:
            return torch.from_numpy(net()(z).numpy())  # leaves torch, so no gradient

        attacked = fgsm(Bpda(defence, net()), x, y, eps=0.1)
        assert torch.equal(attacked, fgsm(net(), x, y, eps=0.1))


def test_wrappers_take_the_mode_of_what_they_wrap() -> None:
    for wrapped in (Eot(net(), 2), Bpda(coarse), Bpda(coarse, net()), Counted(net()), Counted(Eot(net(), 2))):
        check_model(wrapped)
    for wrapped in (Eot(nn.Dropout(), 2), Bpda(nn.Dropout()), Counted(nn.Dropout())):
        with pytest.raises(InputError, match="training mode"):
            check_model(wrapped)
        check_model(wrapped.eval())


class TestCounting:
    def test_pgd(self) -> None:
        x, y = images("test", 10)
        bill = run(pgd, net(), x, y, eps=0.1, steps=7)
        assert (bill.forwards, bill.backwards, bill.queries) == (70, 70, 0)
        bill = run(pgd, net(), x, y, eps=1e-6, steps=7, restarts=3)
        right = int((net()(x).argmax(1) == y).sum())
        assert bill.forwards == 10 * 8 + 2 * right * 8
        assert (bill.backwards, bill.queries) == (10 * 7 + 2 * right * 7, 10 + 2 * right)
        assert run(fgsm, net(), x, y, eps=0.1).forwards == 10

    def test_kl_costs_one_forward_more(self) -> None:
        x, y = images("test", 10)
        assert run(pgd, net(), x, y, eps=0.1, steps=3, loss="kl").forwards == 40

    def test_eot_draws_count(self) -> None:
        x, y = images("test", 10)
        for average in ("probabilities", "gradients"):
            bill = run(pgd, Eot(net(), 5, average=average), x, y, eps=0.1, steps=3)
            assert (bill.forwards, bill.backwards, bill.queries) == (150, 150, 0)
            assert bill.images.shape == x.shape

    def test_other_attacks(self) -> None:
        x, y = images("test", 10)
        right = int((net()(x).argmax(1) == y).sum())
        bill = run(square, net(), x, y, eps=1e-6, queries=9)
        assert (bill.forwards, bill.backwards, bill.queries) == (10 + 8 * right, 0, 10 + 8 * right)
        bill = run(apgd, net(), x, y, eps=1e-6, steps=4)
        assert bill.forwards == bill.backwards == 10 + 4 * right
        bill = run(carlini_wagner, net(), x, y, steps=3, searches=2, abort_early=False)
        assert (bill.forwards, bill.backwards) == (10 + 6 * right, 6 * right)
        bill = run(deepfool, net(), x, y, steps=1)
        assert (bill.forwards, bill.backwards) == (10 + 2 * right, 9 * right)

    def test_result(self) -> None:
        x, y = images("test", 10)
        bill = run(pgd, net(), x, y, eps=0.3, steps=10)
        with torch.no_grad():
            assert torch.equal(bill.success, net()(bill.images).argmax(1) != y)
        assert bill.success_rate == float(bill.success.double().mean())
        assert bill.seconds > 0
        assert bill.broken_by is None
        aimed = run(pgd, net(), x, (y + 1) % 10, eps=0.6, steps=20, targeted=True)
        with torch.no_grad():
            assert torch.equal(aimed.success, net()(aimed.images).argmax(1) == (y + 1) % 10)
        whole = run(autoattack, net(), x, y, eps=0.3, steps=3, targets=2, queries=3)
        assert whole.broken_by is not None
        assert [by != "" for by in whole.broken_by] == whole.success.tolist()
        assert math.isnan(WorstCase(x[:0], ()).robust_accuracy)

    def test_transfer_is_judged_by_the_victim(self) -> None:
        x, y = images("test", 40)
        direct = run(pgd, net(), x, y, eps=0.1, steps=5, random_start=False)
        carried = run(pgd, net(), x, y, judge=lambda z: net()(coarse(z)), eps=0.1, steps=5, random_start=False)
        assert torch.equal(direct.images, carried.images)
        with torch.no_grad():
            assert torch.equal(carried.success, net()(coarse(carried.images)).argmax(1) != y)

    def test_counting_changes_nothing(self) -> None:
        x, y = images("test", 10)
        assert torch.equal(
            pgd(Counted(net()), x, y, eps=0.1, steps=3, random_start=False),
            pgd(net(), x, y, eps=0.1, steps=3, random_start=False),
        )


class TestChecks:
    def test_what_looks_like_probabilities(self) -> None:
        y = torch.tensor([0, 1])
        logits = torch.randn(2, 5)
        check_logits(logits, y)
        check_logits(logits.log_softmax(1), y)
        check_logits(logits.softmax(1) + 1, y)
        for wrong in (logits.softmax(1), torch.eye(5)[:2], logits.softmax(1).half()):
            with pytest.raises(InputError, match="probabilities"):
                check_logits(wrong, y)

    def test_labels(self) -> None:
        x = torch.rand(2, 1, 2, 2)
        check_labels(torch.tensor([0, 1], dtype=torch.int32), x)
        for wrong in ([0, 1], torch.tensor([True, False]), torch.tensor([0.0, 1.0]), torch.tensor([0])):
            with pytest.raises(InputError, match="class number"):
                check_labels(wrong, x)  # type: ignore[arg-type]

    def test_each_error_is_one_line(self) -> None:
        with pytest.raises(InputError) as caught:
            check_model(nn.Dropout())
        assert "\n" not in str(caught.value)
