"""What a net keeps in its state beside plain tensors: extra state, packed weights, constants of TorchScript."""

from __future__ import annotations

import copy
import datetime
import enum
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DIGITS, digits, images, untrained
from torch import nn
from torch.ao import quantization
from torch.testing._internal.two_tensor import TwoTensor

from index_build import build_database
from nndefense import attacks
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.features import FeatureSpec, spatial_layers
from nndefense.models import Classifier
from nndefense.training import train_classifier

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Thing:
    """An object without a text of its own."""

    def __init__(self, number: Any) -> None:
        self.number = number


class Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.net, self.state = untrained().net, state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x)
        return logits


def as_classifier(net: nn.Module) -> Classifier:
    return Classifier(net, arch="net", input_shape=(1, 8, 8), classes=DIGITS).eval()


def around_itself() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


STATES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "dict": (lambda: {"a": 1, "b": 2}, lambda: {"a": 2, "b": 1}),
    "nested": (lambda: {"a": [torch.ones(2), (None, "x")]}, lambda: {"a": [torch.zeros(2), (None, "x")]}),
    "bytes": (lambda: io.BytesIO(b"one"), lambda: io.BytesIO(b"two")),
    "array": (lambda: np.arange(3), lambda: np.arange(3)[::-1]),
    "scalar": (lambda: np.float32(1), lambda: np.float64(1)),
    "set": (lambda: {"x", "y", "z"}, lambda: {"x", "y"}),
    "kind": (lambda: Kind.ONE, lambda: Kind.TWO),
    "date": (lambda: datetime.date(2020, 1, 1), lambda: datetime.date(2020, 1, 2)),
    "object": (lambda: Thing(torch.ones(1)), lambda: Thing(torch.zeros(1))),
    "function": (lambda: as_classifier, lambda: around_itself),
    "type": (lambda: torch.qint8, lambda: torch.float16),
    "itself": (around_itself, lambda: [1, [1]]),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda: torch.ones(3, 3).to_sparse()),
    "tensor of tensors": (
        lambda: TwoTensor(torch.ones(2), torch.zeros(2)),
        lambda: TwoTensor(torch.ones(2), torch.ones(2)),
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.quantize_per_tensor(torch.ones(2) * 2, 0.2, 0, torch.qint8),
    ),
    "quantised by channel": (
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.tensor([0.1, 0.2]), torch.zeros(2), 0, torch.qint8),
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.tensor([0.1, 0.3]), torch.zeros(2), 0, torch.qint8),
    ),
    "lock": (lambda: None, lambda: warnings.catch_warnings()),
}


@pytest.mark.parametrize("name", STATES)
def test_whatever_stands_in_a_state_is_a_part_of_the_fingerprint(name: str) -> None:
    same, other = STATES[name]
    found = as_classifier(Extra(same())).fingerprint
    assert as_classifier(Extra(same())).fingerprint == found
    assert as_classifier(Extra(other())).fingerprint != found


@pytest.mark.slow
def test_the_fingerprint_of_any_state_is_the_same_in_another_process() -> None:
    names = [name for name in STATES if name != "lock"]
    each = f"for name in {names}: print(as_classifier(Extra(STATES[name][0]())).fingerprint)"
    code = f"import warnings; warnings.simplefilter('ignore')\nfrom test_state import *\n{each}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.stdout.split() == [as_classifier(Extra(STATES[name][0]())).fingerprint for name in names], run.stderr


class Stubs(nn.Module):
    """The small net with the borders between floats and whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.net, self.out = quantization.QuantStub(), untrained().net, quantization.DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.net(self.into(x)))
        return logits


def dynamic(kind: torch.dtype = torch.qint8) -> nn.Module:
    return quantization.quantize_dynamic(untrained().net.eval(), {nn.Linear}, dtype=kind)


def static() -> nn.Module:
    net = Stubs().eval()
    net.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(net, inplace=True)
    net(images("train", 32)[0])
    return quantization.convert(net, inplace=True)


QUANTISED: dict[str, Callable[[], nn.Module]] = {
    "dynamic": dynamic,
    "float16": lambda: dynamic(torch.float16),
    "static": static,
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_net_has_layers_a_database_and_answers_but_no_gradient(name: str, tmp_path: Path) -> None:
    classifier, batch = as_classifier(QUANTISED[name]()), images("test", 6)
    assert classifier.fingerprint == copy.deepcopy(classifier).fingerprint != as_classifier(untrained().net).fingerprint
    layer = next(layer for layer in spatial_layers(classifier.net, batch[0]) if "block2" in layer)
    rows = digits("train").subset(np.arange(40))
    database = build_database(rows, classifier, FeatureSpec(layer, pca=0), tmp_path, progress=False)
    answers = NearestNeighborDefense(classifier, database, k=3)(batch[0])
    assert bool(answers.isfinite().all())
    for attack in (
        lambda: attacks.pgd(classifier, *batch, eps=0.1, steps=2),
        lambda: attacks.deepfool(classifier, *batch),
    ):
        with pytest.raises(InputError, match="before it was quantised"):
            attack()


@pytest.mark.parametrize("name", QUANTISED)
def test_other_quantised_weights_are_another_net(name: str) -> None:
    one, other = as_classifier(QUANTISED[name]()), untrained(seed=1)
    assert one.fingerprint == as_classifier(QUANTISED[name]()).fingerprint
    bare = quantization.quantize_dynamic(other.net.eval(), {nn.Linear}) if name == "dynamic" else other.net
    assert as_classifier(bare).fingerprint != one.fingerprint


def test_the_weights_of_frozen_torchscript_are_in_its_fingerprint() -> None:
    def frozen(seed: int) -> Classifier:
        traced = torch.jit.trace(untrained(seed=seed).net.eval(), torch.rand(1, 1, 8, 8))
        return as_classifier(nn.Sequential(torch.jit.freeze(traced)))

    assert not tuple(frozen(0).net.parameters())
    assert frozen(0).fingerprint == frozen(0).fingerprint != frozen(1).fingerprint


def test_a_net_with_extra_state_can_be_trained() -> None:
    classifier = as_classifier(Extra({"version": 1}))
    before = classifier.fingerprint
    found = train_classifier(
        classifier,
        digits("train").subset(np.arange(64)),
        epochs=1,
        batch_size=32,
        device="cpu",
        ema=0.9,
        progress=False,
    )
    assert found.net.state == {"version": 1}
    assert found.fingerprint != before
