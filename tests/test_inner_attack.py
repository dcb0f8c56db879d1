"""The attack inside a training step: it is PGD, and the net is afterwards as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks import pgd
from nndefense.attacks.wrappers import attacked_in
from nndefense.errors import InputError
from nndefense.training import InnerAttack


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(6 * 36, 4),
    )


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 6, 6, generator=generator), torch.arange(n) % 4


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


NORMS = {"linf": 0.1, "l2": 0.7, "normalized-l2": 0.2}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"step_size": 0.03}, {"start": "none"}], ids=str)
def test_it_is_pgd_from_the_same_start(norm: str, loss: str, settings: dict[str, Any]) -> None:
    model, (x, y) = net(), batch()
    eps = NORMS[norm]
    torch.manual_seed(5)
    ours = InnerAttack(eps=eps, norm=norm, steps=4, **settings)(model.train(), x, y, loss=loss)
    theirs = {key: value for key, value in settings.items() if key != "start"}
    torch.manual_seed(5)
    expected = pgd(
        model.eval(),
        x,
        y,
        eps=eps,
        norm=norm,
        steps=4,
        loss=loss,
        random_start=settings.get("start") != "none",
        **theirs,
    )
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, x)


@pytest.mark.parametrize("norm", NORMS)
def test_the_divergence_is_raised_as_by_pgd(norm: str) -> None:
    model, (x, y) = net(), batch()
    with torch.no_grad():
        clean = model.eval()(x)
    torch.manual_seed(5)
    ours = InnerAttack(eps=NORMS[norm], norm=norm, steps=3)(model.train(), x, clean, loss="kl")
    torch.manual_seed(5)
    assert torch.equal(ours, pgd(model.eval(), x, y, eps=NORMS[norm], norm=norm, steps=3, loss="kl"))


def test_the_gaussian_start_is_that_of_trades() -> None:
    """The inner loop of TRADES as its code has it, in other words: noise, sign steps, the ball, the box."""
    model, (x, _) = net(), batch()
    x[0] = 0.0  # where the noise leaves the box
    with torch.no_grad():
        p = model.eval()(x).softmax(1)
    torch.manual_seed(9)
    moved = x + 0.001 * torch.randn(x.shape)
    for _ in range(5):
        moved = moved.detach().requires_grad_(True)
        divergence = (p * (p.log() - model(moved).log_softmax(1))).sum()
        (slope,) = torch.autograd.grad(divergence, moved)
        moved = moved.detach() + 0.02 * torch.sign(slope)
        moved = torch.max(torch.min(moved, x + 0.05), x - 0.05).clamp(0, 1)
    torch.manual_seed(9)
    attack = InnerAttack(eps=0.05, steps=5, step_size=0.02, start="gaussian")
    ours = attack(model, x, model(x).detach(), loss="kl")
    # The last bits of a gradient near 0 decide its sign.
    assert float(((ours - moved).abs() < 1e-6).float().mean()) > 0.99


def test_the_gaussian_start_is_not_projected_first() -> None:
    model, (x, y) = net().eval(), batch()
    x[0], x[1] = 0.0, 1.0
    seen: list[Tensor] = []

    def noting(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        logits: Tensor = model(images)
        return logits

    torch.manual_seed(9)
    InnerAttack(eps=0.05, steps=2, start="gaussian", start_scale=0.1)(noting, x, y)
    torch.manual_seed(9)
    assert torch.equal(seen[0], x + 0.1 * torch.randn(x.shape))
    assert float(seen[0].min()) < 0
    assert float(seen[1].min()) >= 0


def test_a_single_fast_step() -> None:
    model, (x, y) = net(), batch()
    attack = InnerAttack.single_step(0.1)
    assert (attack.steps, attack.start, attack.step_size) == (1, "uniform", 0.125)
    torch.manual_seed(2)
    start = (x + (2 * torch.rand(x.shape) - 1) * 0.1).clamp(0, 1).requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(model.eval()(start), y), start)
    expected = (start.detach() + 0.125 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.manual_seed(2)
    assert torch.allclose(attack(model.train(), x, y), expected, atol=1e-6)
    # No image of the batch stays at its start, and most pixels end on the rim of the ball or of the box.
    assert float(((expected - x).abs() > 0.0999).float().mean()) > 0.5


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_the_net_is_afterwards_as_it_was(mode: str, training: bool) -> None:
    model, (x, y) = net().train(training), batch()
    model[3].train(not training)  # one part that stands apart
    model[5].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    modes = [module.training for module in model.modules()]
    before, buffers = state(model), [id(buffer) for buffer in model.buffers()]
    attacked = InnerAttack(eps=0.1, steps=3, mode=mode)(model, x, y)
    assert not attacked.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [id(buffer) for buffer in model.buffers()] == buffers
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["5.bias"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["5.weight"]
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))


class Watched(nn.Module):
    """Notes at each pass how it is used."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.inner, self.fail = net(), fail
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        learning = any(parameter.requires_grad for parameter in self.parameters())
        self.seen.append((self.training, self.inner[1].training, learning))
        if self.fail:
            raise RuntimeError("broken")
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_no_graph_to_the_weights_and_one_pass_a_step(mode: str) -> None:
    model, (x, y) = Watched().train(), batch()
    InnerAttack(eps=0.1, steps=7, mode=mode)(model, x, y)
    assert model.seen == [(mode == "train", mode == "train", False)] * 7


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_net_that_fails_is_put_back_too(mode: str) -> None:
    model, (x, y) = Watched(fail=True).train(), batch()
    buffers = [id(buffer) for buffer in model.buffers()]
    with pytest.raises(RuntimeError, match="broken"):
        InnerAttack(eps=0.1, mode=mode)(model, x, y)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [id(buffer) for buffer in model.buffers()] == buffers


def test_training_mode_sees_the_statistics_of_the_batch() -> None:
    model, (x, y) = net(), batch()
    model[3].p = 0.0
    attack = InnerAttack(eps=0.1, steps=1, step_size=0.1, start="none", mode="train")
    clean = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(net_without_memory(model)(clean), y), clean)
    assert torch.equal(attack(model, x, y), (x + 0.1 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1))
    other = InnerAttack(eps=0.1, steps=1, step_size=0.1, start="none")(model, x, y)
    assert not torch.equal(attack(model, x, y), other)


def net_without_memory(model: nn.Sequential) -> nn.Sequential:
    copied = net()
    copied.load_state_dict(model.state_dict())
    copied[3].p = 0.0
    return copied.train()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed(mode: str) -> None:
    model, (x, y) = net().train(), batch()
    model[3].p = 0.0
    loss = F.cross_entropy(model(x), y)
    InnerAttack(eps=0.1, steps=2, mode=mode)(model, x, y)
    loss.backward()
    fresh = net_without_memory(net())
    F.cross_entropy(fresh(x), y).backward()
    assert torch.equal(model[0].weight.grad, fresh[0].weight.grad)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_ball_and_box(norm: str, start: str) -> None:
    model, (x, y) = net(), batch()
    x[0], x[1] = 0.0, 1.0
    eps = NORMS[norm]
    attacked = InnerAttack(eps=eps, norm=norm, steps=3, start=start, start_scale=0.5)(model, x, y)
    assert attacked.shape == x.shape
    assert attacked.dtype == x.dtype
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1
    delta = (attacked - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    limit = eps * x.flatten(1).norm(dim=1) if norm == "normalized-l2" else torch.full((len(x),), eps)
    assert bool((size <= limit + 1e-6).all())
    assert float((size / limit.clamp_min(1e-3)).max()) > 0.9
    still = InnerAttack(eps=0.0, norm=norm, start=start)(model, x, y)
    assert torch.allclose(still, x, atol=1e-7)


def test_chance_comes_from_the_default_generator_alone() -> None:
    model, (x, y) = net(), batch()
    attack = InnerAttack(eps=0.1, steps=1)
    torch.manual_seed(3)
    first, second = attack(model, x, y), attack(model, x, y)
    torch.manual_seed(3)
    assert torch.equal(attack(model, x, y), first)
    assert not torch.equal(first, second)


def test_it_works_inside_no_grad_and_keeps_the_layout() -> None:
    model, (x, y) = net().to(memory_format=torch.channels_last), batch()
    three = x.repeat(1, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        attacked = InnerAttack(eps=0.1, steps=2)(model, three, y)
    assert attacked.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(attacked, x)


def test_small_gradients_survive_float16() -> None:
    """A net so sure of itself that its gradients are below what float16 can hold."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4, bias=False))
    x, y = torch.full((4, 1, 6, 6), 0.5), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        model[1].weight.fill_(-0.5)
        model[1].weight[0] = 0.5
    attack = InnerAttack(eps=0.1, steps=1, start="none")
    with torch.autocast("cpu", dtype=torch.float16):
        (slope,) = torch.autograd.grad(
            F.cross_entropy(model(z := x.clone().requires_grad_(True)), y, reduction="sum"), z
        )
        attacked = attack(model, x, y)
    assert float(slope.abs().max()) == 0
    assert bool((attacked < x).all())


def test_the_record_is_plain() -> None:
    attack = InnerAttack(eps=0.3, norm="l2", steps=40, step_size=0.01, start="gaussian")
    assert json.loads(json.dumps(attack.as_dict())) == {
        "name": "pgd",
        "norm": "l2",
        "eps": 0.3,
        "steps": 40,
        "step_size": 0.01,
        "start": "gaussian",
        "start_scale": 0.001,
        "mode": "eval",
        "momentum": 0.0,
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": 8}, r"is 8 in linf.*8/255 = 0\.0314"),
        ({"eps": math.nan}, "eps is nan"),
        ({"eps": math.inf}, "eps is inf"),
        ({"eps": True}, "eps is True"),
        ({"eps": "0.1"}, "eps is 0.1"),
        ({"norm": "l1"}, "norm is 'l1'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"step_size": -1}, "step_size is -1"),
        ({"step_size": math.nan}, "step_size is nan"),
        ({"start": "normal"}, "start is 'normal'"),
        ({"start_scale": -1}, "start_scale is -1"),
        ({"mode": "test"}, "mode is 'test'"),
        ({"momentum": math.inf}, "momentum is inf"),
    ],
)
def test_settings_that_make_no_attack(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        InnerAttack(**{"eps": 0.1, **settings})
    assert "must be" in str(error.value)


def test_a_fast_step_of_a_bad_size_is_named_as_such() -> None:
    with pytest.raises(InputError, match=r"^eps is -1"):
        InnerAttack.single_step(-1)


def test_calls_that_make_no_attack() -> None:
    model, (x, y) = net(), batch()
    attack = InnerAttack(eps=0.1)
    with pytest.raises(InputError, match="loss is 'entropy'"):
        attack(model, x, y, loss="entropy")
    with pytest.raises(InputError, match="labels have shape"):
        attack(model, x, y[:3])
    with pytest.raises(InputError, match="clean logits have shape"):
        attack(model, x, y, loss="kl")
    with pytest.raises(InputError, match="start='gaussian'"):
        InnerAttack(eps=0.1, start="none")(model, x, model(x), loss="kl")
    with pytest.raises(InputError, match="no gradient"):
        attack(lambda images: torch.zeros(len(images), 4), x, y)


def test_a_callable_that_is_no_module_is_left_alone() -> None:
    x, y = batch()
    with attacked_in(lambda images: images, "train"):
        pass
    attacked = InnerAttack(eps=0.1, steps=1)(lambda images: images.flatten(1)[:, :4], x, y)
    assert bool((attacked.flatten(1)[:, 4:] - x.flatten(1)[:, 4:]).abs().max() <= 0.1 + 1e-6)


def test_a_compiled_net_is_attacked_alike_and_put_back() -> None:
    model, (x, y) = net().train(), batch()
    compiled = torch.compile(model, backend="eager")
    attack = InnerAttack(eps=0.1, steps=3)
    torch.manual_seed(6)
    expected = attack(model, x, y)
    before = state(model)
    torch.manual_seed(6)
    assert torch.equal(attack(compiled, x, y), expected)
    assert compiled.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    InnerAttack(eps=0.1, steps=3, mode="train")(compiled, x, y)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    F.cross_entropy(compiled(x), y).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert int(model[1].num_batches_tracked) == 1
