"""Batch normalisation folded into convolutions: the same outputs, and nothing touched that might not be the same."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DIGITS
from torch import Tensor, nn

from index_build.mapper import Mapper
from nndefense.features import FeatureSpec
from nndefense.models import build_classifier, load_classifier
from nndefense.models.folding import fold_batch_norms


def unsettled(net: nn.Module) -> nn.Module:
    """The net in float64 with batch normalisations that have seen something, in evaluation mode."""
    source = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=source) + 0.1
    return net.double().eval()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Chain(nn.Module):
    """A convolution and its normalisation, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.norm(self.stem(inputs))
        return out


class Twice(Chain):
    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.stem(inputs)
        out: Tensor = self.norm(maps) + maps
        return out


class Shared(Chain):
    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.norm(self.stem(inputs)) + self.stem(1 - inputs)
        return out


class Branching(Chain):
    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.norm(self.stem(inputs if inputs.mean() > 0 else -inputs))
        return out


@pytest.mark.parametrize(
    ("spec", "shape", "count"), [("resnet18", (3, 40, 40), 20), ("mobilenet_v2", (3, 40, 40), 52), ("", (1, 12, 12), 3)]
)
def test_outputs_stay_and_every_pair_is_folded(spec: str, shape: tuple[int, ...], count: int) -> None:
    if spec:
        net: nn.Module = load_classifier(f"torchvision:{spec}:none")
    else:
        net = build_classifier("small-cnn", input_shape=(1, 12, 12), classes=DIGITS, seed=0)
    unsettled(net)
    folded = copy.deepcopy(net)
    assert fold_batch_norms(folded) == count
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in net.named_modules()]
    torch.testing.assert_close(folded(images(2, *shape)), net(images(2, *shape)), rtol=1e-9, atol=1e-9)


def test_a_convolution_without_affine_normalisation_or_with_a_bias() -> None:
    for bias, affine in ((False, False), (True, True), (True, False)):
        net = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine), nn.ReLU()))
        folded = copy.deepcopy(net)
        assert fold_batch_norms(folded) == 1
        torch.testing.assert_close(folded(images(2, 3, 8, 8)), net(images(2, 3, 8, 8)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Twice, Shared, Branching])
def test_what_might_not_be_the_same_is_left_alone(kind: type[Chain]) -> None:
    net = unsettled(kind())
    before = net(images(2, 3, 8, 8))
    assert fold_batch_norms(net) == 0
    assert torch.equal(net(images(2, 3, 8, 8)), before)


def test_training_mode_hooks_and_statistics_of_the_batch_are_left_alone() -> None:
    training = Chain().double()
    assert fold_batch_norms(training) == 0
    hooked = unsettled(Chain())
    hooked.stem[0].register_forward_hook(lambda *parts: None)  # type: ignore[index, union-attr]
    assert fold_batch_norms(hooked) == 0
    batch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batch_norms(batch) == 0
    normed = unsettled(Chain())
    normed.stem[0] = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3).double()).eval()  # type: ignore[index, operator]
    assert fold_batch_norms(normed) == 0


def test_a_convolution_of_two_names_is_left_alone() -> None:
    # A feature layer may be called by either name, and only one would get the folded module.
    net = Chain()
    net.alias = net.stem[0]
    unsettled(net)
    assert fold_batch_norms(net) == 0


def test_kept_layers_give_what_they_gave() -> None:
    for keep, count in (("stem", 0), ("stem.0", 0), ("norm", 1)):
        net = unsettled(Chain())
        folded = copy.deepcopy(net)
        assert fold_batch_norms(folded, [keep]) == count
        found = []
        for one in (net, folded):
            one.get_submodule(keep).register_forward_hook(lambda module, args, output: found.append(output))  # noqa: B023
            one(images(2, 3, 8, 8))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_features_before_the_normalisation_are_mapped_as_they_are() -> None:
    # The layer "block1.0" is the convolution itself: folding would scale its features.
    classifier = build_classifier("small-cnn", input_shape=(1, 12, 12), classes=DIGITS, seed=0)
    unsettled(classifier).float()
    batch = images(4, 1, 12, 12).float()
    features = [FeatureSpec("block1.0", "avg", pca=0), FeatureSpec("block2", "avg", pca=0)]
    plain = Mapper(classifier, features, torch.device("cpu"))(batch)
    other = Mapper(classifier, features, torch.device("cpu"), precision="float32", channels_last=True)
    mapped = other(batch)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in other._net.modules()) == 1
    assert sum(isinstance(module, nn.BatchNorm2d) for module in classifier.modules()) == 3
    torch.testing.assert_close(mapped.posteriors, plain.posteriors, rtol=1e-4, atol=1e-5)
    for some, true in zip(mapped.vectors, plain.vectors, strict=True):
        torch.testing.assert_close(some, true, rtol=1e-4, atol=1e-5)
