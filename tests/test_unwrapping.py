"""Nets that were compiled, wrapped for data parallelism, traced, scripted or exported."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BLOCK2, DIGITS, digits, images, untrained
from torch import Tensor, nn

from index_build import build_database
from nndefense import attacks
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError, ModelError
from nndefense.features import FeatureExtractor, FeatureSpec, raw_vectors, spatial_layers
from nndefense.models import Classifier, load_classifier
from nndefense.unwrapping import unwrapped

eager = torch.compile(backend="eager")


class Around(nn.Module):
    """A net in a net, whose own forward method may be replaced."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inner = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits


class Decorated(Around):
    @eager
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_parts(net: nn.Module) -> nn.Module:
    net.block1 = torch.compile(net.block1, backend="eager")
    net.block2.compile(backend="eager")
    return net


def compiled_method(net: nn.Module) -> nn.Module:
    net.forward = torch.compile(net.forward, backend="eager")
    return net


def own_method(net: nn.Module) -> nn.Module:
    outer = Around(torch.compile(net, backend="eager"))
    outer.forward = types.MethodType(Around.forward, outer)
    return outer


def both(net: nn.Module) -> nn.Module:
    inside = nn.Sequential(nn.Identity(), nn.DataParallel(net))
    return nn.DataParallel(torch.compile(inside, backend="eager"))


# How it is wrapped, and where the net's layers are then.
WRAPPINGS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "compiled": (lambda net: torch.compile(net, backend="eager"), ""),
    "compiled in place": (compiled_in_place, ""),
    "compiled parts": (compiled_parts, ""),
    "compiled method": (compiled_method, ""),
    "decorated method": (Decorated, "inner."),
    "a method of its own": (own_method, "inner."),
    "compiled in a wrapper": (lambda net: nn.Sequential(nn.Identity(), torch.compile(net, backend="eager")), "1."),
    "parallel": (nn.DataParallel, ""),
    "parallel, compiled, in a wrapper": (both, "1."),
}


def net() -> nn.Module:
    return untrained().net


def as_classifier(made: nn.Module) -> Classifier:
    return Classifier(made, arch="net", input_shape=(1, 8, 8), classes=DIGITS).eval()


def loaded(made: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    module = types.ModuleType("module_of_the_test")
    module.make = lambda: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "module_of_the_test", module)
    return load_classifier("python:module_of_the_test:make", input_shape=(1, 8, 8))


@pytest.mark.parametrize("name", WRAPPINGS)
@torch.no_grad()
def test_a_wrapped_net_is_the_net_that_it_was_made_from(name: str) -> None:
    wrap, prefix = WRAPPINGS[name]
    batch = images("test", 5)[0]
    given = wrap(net()).eval()
    expected = given(batch)  # The code of the wrapped one is compiled here, without anybody's hooks.
    classifier = as_classifier(given)
    assert torch.equal(classifier(batch), expected)
    assert spatial_layers(classifier.net, batch) == [prefix + layer for layer in spatial_layers(net(), batch)]
    assert spatial_layers(given, batch) == spatial_layers(classifier.net, batch)
    spec = FeatureSpec(f"{prefix}block2", pca=0)
    wanted = FeatureExtractor(net(), BLOCK2, None, batch)(batch)
    assert torch.equal(FeatureExtractor(classifier, spec, None, batch)(batch), wanted)
    assert torch.equal(FeatureExtractor(given, spec, None, batch)(batch), wanted)
    assert torch.equal(raw_vectors(given, [spec.layer], ["avg"], batch)[0][0], wanted)
    assert torch.equal(copy.deepcopy(classifier)(batch), expected)
    if not prefix:
        assert classifier.fingerprint == as_classifier(net()).fingerprint


@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_net_given_stays_wrapped_and_shares_its_numbers(name: str) -> None:
    given = WRAPPINGS[name][0](net()).eval()
    names = [layer for layer, _ in given.named_modules()]
    compiled = [module._compiled_call_impl is not None for module in given.modules()]
    found = unwrapped(given)
    assert [layer for layer, _ in given.named_modules()] == names
    assert [module._compiled_call_impl is not None for module in given.modules()] == compiled
    assert {id(weight) for weight in found.parameters()} == {id(weight) for weight in given.parameters()}
    assert {id(buffer) for buffer in found.buffers()} == {id(buffer) for buffer in given.buffers()}


def test_any_other_net_is_itself() -> None:
    plain = net()
    assert unwrapped(plain) is plain
    around = nn.Sequential(plain, nn.Sequential(), torch.fx.symbolic_trace(net()))
    assert unwrapped(around) is around


def test_a_part_under_two_names_stays_one() -> None:
    shared = torch.compile(nn.Conv2d(1, 1, 3), backend="eager")
    found = unwrapped(nn.Sequential(shared, nn.ReLU(), shared))
    assert found[0] is found[2]
    assert isinstance(found[0], nn.Conv2d)


def test_layers_are_found_by_the_names_that_wrappers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = images("test", 2)[0]
    classifier = loaded(nn.DataParallel(torch.compile(net(), backend="eager")), monkeypatch)
    for name in ("module._orig_mod.block2", "_orig_mod.block2", "module.block2", "block2"):
        assert FeatureExtractor(classifier, FeatureSpec(name, pca=0), None, batch)(batch).shape == (2, 64)
    module = as_classifier(nn.ModuleDict({"module": nn.Conv2d(1, 2, 3)}))
    assert "module" in module.layers()


def test_what_is_said_on_a_wrapper_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrap in (nn.DataParallel, lambda inner: torch.compile(inner, backend="eager")):
        given = wrap(net())
        given.classes = list("abcdefghij")
        assert loaded(given, monkeypatch).classes == tuple("abcdefghij")
        inner = net()
        inner.classes = list("abcdefghij")
        assert loaded(wrap(inner), monkeypatch).classes == tuple("abcdefghij")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda given: torch.compile(given, backend="eager")])
def test_a_database_of_the_net_is_one_of_the_wrapped_net(wrap: Callable[..., Classifier], tmp_path: Path) -> None:
    rows, batch = digits("train").subset(np.arange(60)), images("test", 6)[0]
    plain, wrapped = as_classifier(net()), as_classifier(wrap(net()))
    database = build_database(rows, plain, BLOCK2, tmp_path / "plain", progress=False)
    expected = NearestNeighborDefense(plain, database, k=5)(batch)
    assert torch.equal(NearestNeighborDefense.open(tmp_path / "plain", wrapped, k=5)(batch), expected)
    # The classifier may be wrapped as a whole, too.
    outer = wrap(plain)
    assert torch.equal(NearestNeighborDefense(outer, database, k=5)(batch), expected)
    assert torch.equal(NearestNeighborDefense.open(tmp_path / "plain", outer, k=5)(batch), expected)
    again = build_database(rows, outer, BLOCK2, tmp_path / "again", progress=False)
    assert again.fingerprint == database.fingerprint


def traced(given: nn.Module) -> nn.Module:
    return torch.jit.trace(given, torch.rand(1, 1, 8, 8))


TORCHSCRIPT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "traced": traced,
    "scripted": torch.jit.script,
    "frozen": lambda given: torch.jit.freeze(traced(given)),
    "in a wrapper": lambda given: nn.Sequential(nn.Identity(), torch.jit.script(given)),
}


@pytest.mark.parametrize("name", TORCHSCRIPT)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_classifies_and_is_attacked_but_has_no_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, labels = images("test", 4)
    classifier, plain = loaded(TORCHSCRIPT[name](net().eval()), monkeypatch), as_classifier(net())
    assert torch.allclose(classifier(batch), plain(batch), atol=1e-5)
    attacked = attacks.pgd(classifier, batch, labels, eps=0.1, steps=3, random_start=False)
    expected = attacks.pgd(plain, batch, labels, eps=0.1, steps=3, random_start=False)
    assert (attacked - expected).abs().mean() < 1e-3
    layer = "1.block2" if name == "in a wrapper" else "block2"
    for look in (
        lambda: FeatureExtractor(classifier, FeatureSpec(layer), None, batch),
        lambda: spatial_layers(classifier.net, batch),
        lambda: raw_vectors(classifier, [layer], ["avg"], batch),
    ):
        with pytest.raises(InputError, match=r"TorchScript .*: give the net that it was made from"):
            look()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_beside_torchscript_are_found() -> None:
    batch = images("test", 2)[0]
    front = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sequential(nn.BatchNorm2d(1)), torch.jit.script(net()))
    assert spatial_layers(front.eval(), batch) == ["0", "1.0"]
    assert FeatureExtractor(front, FeatureSpec("1", "flatten", pca=0), None, batch)(batch).shape == (2, 64)


def test_an_exported_program_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = images("test", 3)[0]
    size = torch.export.Dim("size")
    program = torch.export.export(net().eval(), (batch,), dynamic_shapes=({0: size},))
    with pytest.raises(ModelError, match=r"torch\.export\.unflatten\(program\)"):
        loaded(program.module(), monkeypatch)
    classifier = loaded(torch.export.unflatten(program), monkeypatch)
    extractor = FeatureExtractor(classifier, BLOCK2, None, batch)
    assert torch.allclose(extractor(batch), FeatureExtractor(net(), BLOCK2, None, batch)(batch), atol=1e-6)
