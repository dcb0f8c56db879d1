"""What a net of one's own is refused for when it is loaded, and that the reason given is the true one."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import untrained
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.errors import ModelError
from nndefense.models import Classifier, load_classifier

SHAPE = (1, 8, 8)


class Built(nn.Module):
    """The small net behind a function of the images, and before one of the logits."""

    def __init__(self, before: Callable[[Tensor], Tensor] | None = None, after: Callable[..., Tensor] | None = None):
        super().__init__()
        self.net, self.before, self.after = untrained().net, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.before(x) if self.before else x)
        return self.after(logits, x) if self.after else logits


def loaded(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    module = types.ModuleType("module_of_the_test")
    module.make = lambda: net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "module_of_the_test", module)
    return load_classifier("python:module_of_the_test:make", input_shape=SHAPE)


def refusal(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(ModelError) as error:
        loaded(net, monkeypatch)
    text = str(error.value)
    assert "\n" not in text
    return text


def rarely(logits: Tensor, x: Tensor) -> Tensor:
    return logits + 1 if torch.rand(()) < 0.3 else logits


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Built(lambda x: F.dropout(x, 0.2, training=True)),
    "dropout of logits": lambda: Built(after=lambda logits, x: F.dropout(logits, 0.1)),
    "weak noise": lambda: Built(after=lambda logits, x: logits + 1e-4 * torch.randn_like(logits)),
    "for bright images": lambda: Built(lambda x: F.dropout(x, 0.2) if float(x.mean()) > 0.9 else x),
    "for black images": lambda: Built(after=lambda z, x: z + torch.rand_like(z) * (x.mean((1, 2, 3)) == 0)[:, None]),
    "for one image": lambda: Built(lambda x: F.dropout(x, 0.2) if len(x) == 1 else x),
    "rarely": lambda: Built(after=rarely),
    "NumPy's": lambda: Built(after=lambda logits, x: logits + float(np.random.rand())),  # noqa: NPY002
    "Python's": lambda: Built(after=lambda logits, x: logits + (random.random() < 0.3)),
    "traced in training mode": lambda: torch.jit.trace(
        nn.Sequential(nn.Dropout(0.3), untrained().net), torch.rand(1, *SHAPE), check_trace=False
    ),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.filterwarnings("ignore")
def test_a_random_net_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is random" in refusal(RANDOM[name](), monkeypatch)


def batch_statistics(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


class Untracked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm2d(1, track_running_stats=False), untrained().net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.norm(x))
        return logits


DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "no running statistics": Untracked,
    "functional batch norm": lambda: Built(batch_statistics),
    "a weak branch": lambda: Built(lambda x: x + 0.05 * batch_statistics(x)),
    "centred logits": lambda: Built(after=lambda logits, x: logits - logits.mean(0, keepdim=True)),
    "the largest pixel": lambda: Built(lambda x: x / x.amax().clamp_min(1e-3)),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_net_that_looks_at_the_batch_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "depend on the other images of its batch" in refusal(DEPENDENT[name](), monkeypatch)


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return x + 0.1 * torch.rand(x.shape[1:])


FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "dropout that is off": lambda: nn.Sequential(nn.Dropout(0.5), untrained().net),
    "norm of each image": lambda: Built(lambda x: F.instance_norm(x)),
    "noise of its own seed": lambda: Built(seeded),
    "noise without effect": lambda: Built(after=lambda logits, x: logits + 0 * torch.randn_like(logits)),
    "logits far from 0": lambda: Built(after=lambda logits, x: logits + 100),
    "half inside": lambda: Built(lambda x: x.half().float()),
    "dynamically quantised": lambda: torch.ao.quantization.quantize_dynamic(untrained().net.eval(), {nn.Linear}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_function_of_the_image_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(loaded(FUNCTIONS[name](), monkeypatch).classes) == 10


def test_loading_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    net = Built(after=lambda logits, x: logits + 0 * torch.randn_like(logits))
    torch.manual_seed(1)
    loaded(net, monkeypatch)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", ["whole", "last"])
def test_of_half_and_double_nets_the_numbers_are_named(
    kind: torch.dtype, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = untrained().net
    (net if part == "whole" else net.fc).to(kind)
    text = refusal(net, monkeypatch)
    assert str(kind).removeprefix("torch.") in text
    assert text.endswith("return net.float()")
    assert loaded(net.float(), monkeypatch).classes


def test_a_half_net_that_casts_for_itself_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Built(lambda x: x.bfloat16(), lambda logits, x: logits.float())
    net.net.bfloat16()
    assert loaded(net, monkeypatch).classes


def test_a_net_for_one_size_of_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, words in ((1, "takes 1 image at a time"), (2, "takes 2 images at a time")):
        net = Built(lambda x, count=count: x.reshape(count, *SHAPE))
        assert words in refusal(net, monkeypatch)

    def no_single(x: Tensor) -> Tensor:
        assert len(x) > 1
        return x

    assert "but not one (AssertionError" in refusal(Built(no_single), monkeypatch)
    assert "squeeze()" in refusal(Built(after=lambda logits, x: logits.squeeze()), monkeypatch)
    program = torch.export.export(untrained().net.eval(), (torch.rand(2, *SHAPE),))
    assert "takes 2 images at a time" in refusal(torch.export.unflatten(program), monkeypatch)
