"""The mapper: precision and layout change nothing beyond the tolerance, and the caller's net stays as it is."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import trained, untrained
from torch import Tensor, nn

import index_build.mapper as module
from index_build.mapper import POSTERIOR_TOLERANCE, VECTOR_TOLERANCE, Mapper
from nndefense.errors import InputError
from nndefense.features import FeatureSpec, pooled, tapped
from nndefense.models import Classifier, build_classifier

CPU = torch.device("cpu")
FEATURES = (FeatureSpec("block1", "grid2", pca=0), FeatureSpec("block2", "avg", pca=0), FeatureSpec("fc", pca=0))
PLANS = [("float32", False), ("float32", True), ("bfloat16", True), ("bfloat16", False)]


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


class Counting(nn.Module):
    """A net that counts its passes, with a layer whose successor works in place."""

    def __init__(self, huge: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4 * 36, 10)
        self.passes = 0
        self.huge = huge

    def forward(self, x: Tensor) -> Tensor:
        Counting.total += 1
        x = self.fc(self.relu(self.conv(x)).flatten(1))
        # Near 4,000 the numbers of bfloat16 are 16 apart.
        return x * 30 + 4000 if self.huge else x

    total = 0


def counting(huge: bool = False) -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        Counting(huge), arch="counting", input_shape=(1, 8, 8), classes=[str(i) for i in range(10)]
    ).eval()


@pytest.mark.parametrize(("precision", "channels_last"), PLANS)
def test_every_precision_gives_what_float32_gives_within_the_tolerance(precision, channels_last):
    classifier = trained().eval()
    with torch.no_grad(), tapped(classifier, ["net.block1", "net.block2", "net.fc"]) as outputs:
        posteriors = classifier(images()).softmax(1)
    mapped = Mapper(classifier, FEATURES, CPU, precision=precision, channels_last=channels_last)(images())
    assert mapped.posteriors.dtype == torch.float32
    assert float((mapped.posteriors - posteriors).abs().max()) <= (1e-6 if precision == "float32" else 0.05)
    for vectors, feature, layer in zip(mapped.vectors, FEATURES, ("block1", "block2", "fc"), strict=True):
        wanted = pooled(outputs[f"net.{layer}"], feature)
        assert vectors.dtype == torch.float32
        assert float(((vectors - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) <= (
            1e-5 if precision == "float32" else VECTOR_TOLERANCE
        )


def test_a_net_that_cannot_be_copied_runs_as_it_is_in_plain_float32():
    classifier = counting()
    classifier.lock = threading.Lock()
    mapped = Mapper(classifier, [FeatureSpec("conv", "avg", pca=0)], CPU)(images())
    with torch.no_grad():
        assert torch.equal(mapped.posteriors, classifier(images()).softmax(1))


def test_one_pass_serves_all_layers_and_in_place_work_does_not_reach_them():
    classifier = counting()
    mapper = Mapper(classifier, [FeatureSpec("conv", "flatten", pca=0), FeatureSpec("conv", "max", pca=0)], CPU)
    mapper(images(1))  # looks at the layers, once
    Counting.total = 0
    mapped = mapper(images(4))
    assert Counting.total == 1
    assert float(mapped.vectors[0].min()) < 0
    assert torch.equal(mapped.vectors[0].view(4, 4, 36).amax(2), mapped.vectors[1])


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_the_callers_classifier_stays_as_it_was(precision):
    classifier = untrained()
    before = classifier.fingerprint
    strides = [tensor.stride() for tensor in classifier.parameters()]
    Mapper(classifier, FEATURES[:1], CPU, precision=precision)(images())
    assert classifier.fingerprint == before
    assert all(tensor.dtype == torch.float32 for tensor in classifier.parameters())
    assert [tensor.stride() for tensor in classifier.parameters()] == strides


def test_auto_takes_the_fastest_of_what_is_near_enough(monkeypatch):
    rates = {"float32": 100.0, "float32, channels last": 120.0, "bfloat16, channels last": 300.0}
    monkeypatch.setattr(Mapper, "_rate", lambda self, probe: rates[module._name(*self._plan)])
    near = Mapper(trained().eval(), FEATURES[1:2], CPU, precision="auto")
    choice = near.resolve(images())
    assert (choice.precision, choice.channels_last) == ("bfloat16", True)
    assert "3.00 times" in choice.why
    assert 0 < choice.vector_error <= VECTOR_TOLERANCE
    assert choice.posterior_error <= POSTERIOR_TOLERANCE
    assert choice.rates == rates
    # Logits so large that bfloat16 cannot tell them apart.
    far = Mapper(counting(huge=True), [FeatureSpec("conv", "avg", pca=0)], CPU, precision="auto")
    choice = far.resolve(images(64))
    assert (choice.precision, choice.channels_last) == ("float32", True)
    rates["float32, channels last"] = 104.0
    choice = Mapper(counting(huge=True), [FeatureSpec("conv", "avg", pca=0)], CPU, precision="auto").resolve(images(64))
    assert (choice.precision, choice.channels_last) == ("float32", False)
    assert "nothing" in choice.why
    assert choice.posterior_error == choice.vector_error == 0


def test_auto_is_resolved_once_and_a_recorded_choice_gives_the_same_bits():
    mapper = Mapper(trained().eval(), FEATURES, CPU, precision="auto")
    assert mapper.choice is None
    first = mapper(images())
    choice = mapper.choice
    mapper(images(seed=1))
    assert mapper.choice is choice
    assert set(choice.rates) == {"float32", "float32, channels last", "bfloat16, channels last"}
    again = Mapper(trained().eval(), FEATURES, CPU, precision=choice.precision, channels_last=choice.channels_last)
    assert torch.equal(again(images()).posteriors, first.posteriors)
    assert all(torch.equal(a, b) for a, b in zip(again(images()).vectors, first.vectors, strict=True))


def test_a_given_precision_is_not_measured(monkeypatch):
    monkeypatch.setattr(Mapper, "_rate", lambda self, probe: pytest.fail("measured"))
    mapper = Mapper(untrained(), FEATURES, CPU, precision="float32")
    mapper(images())
    assert (mapper.choice.precision, mapper.choice.channels_last, mapper.choice.rates) == ("float32", False, {})
    assert Mapper(untrained(), FEATURES, CPU, precision="bfloat16").choice.channels_last


def test_over_keeps_order_and_what_it_was_given():
    mapper = Mapper(trained().eval(), FEATURES, CPU)
    batches = [(number, images(count, seed=number)) for number, count in enumerate((4, 1, 7))]
    found = list(mapper.over(batches))
    assert [what for what, _ in found] == [0, 1, 2]
    for (_, mapped), (_, some) in zip(found, batches, strict=True):
        assert torch.equal(mapped.posteriors, mapper(some).posteriors)
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        list(mapper.over([("x", images() + 1)]))
    assert not list(mapper.over([]))


@pytest.mark.parametrize("precision", ["half", "fp32", "", "int8"])
def test_unknown_precisions_are_refused(precision):
    with pytest.raises(InputError, match="precision is"):
        Mapper(untrained(), FEATURES, CPU, precision=precision)


def test_nan_from_a_precision_is_never_within_the_tolerance():
    exact = module.Mapped(torch.full((2, 2), 0.5), (torch.ones(2, 3),))
    broken = module.Mapped(torch.full((2, 2), torch.nan), (torch.full((2, 3), torch.nan),))
    assert module._errors(broken, exact) == (float("inf"), float("inf"))
    assert module._errors(exact, exact) == (0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_on_a_gpu_batches_overlap_and_nothing_is_mixed_up(precision):
    classifier = build_classifier(
        "small-cnn", input_shape=(1, 8, 8), classes=[str(i) for i in range(10)], seed=0
    ).eval()
    wanted = Mapper(classifier, FEATURES, CPU)
    batches = [(number, images(1 + number % 5, seed=number)) for number in range(20)]
    expected = [wanted(some) for _, some in batches]
    mapper = Mapper(classifier.to("cuda"), FEATURES, torch.device("cuda"), precision=precision)
    found = list(mapper.over(batches))
    assert [what for what, _ in found] == list(range(20))
    for (_, mapped), other in zip(found, expected, strict=True):
        assert mapped.posteriors.device.type == "cpu"
        torch.testing.assert_close(mapped.posteriors, other.posteriors, atol=0.02, rtol=0)
        for vectors, true in zip(mapped.vectors, other.vectors, strict=True):
            assert float(((vectors - true).norm(dim=1) / true.norm(dim=1)).max()) < 0.03
    classifier.to("cpu")
