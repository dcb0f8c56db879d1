"""A defence is in evaluation mode whatever is called on it, and never changes the classifier's buffers."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import DIGITS, digits, images
from torch import Tensor, nn

from index_build import build_database
from nndefense import attacks
from nndefense.attacks.retrieval import Knowledge
from nndefense.database import ImageDatabase
from nndefense.defenses import NearestNeighborDefense, RelaxedDefense
from nndefense.defenses.transforms import bit_depth_reduction, crop_ensemble
from nndefense.errors import InputError
from nndefense.features import FeatureExtractor, FeatureSpec
from nndefense.guard import Guard
from nndefense.models import Classifier, build_classifier
from nndefense.modes import EvaluationOnly, evaluating


class Net(nn.Module):
    """Batch normalisation and dropout before the feature layer and after it; with ``hooked`` it cannot be traced."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.hooked = hooked
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.features = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
        self.last = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 10))

    def forward(self, x: Tensor) -> Tensor:
        if self.hooked and not bool((x.sum() > -1).item()):
            return x
        seen = nn.functional.dropout(self.features(self.first(x)), 0.5, self.training)
        logits: Tensor = self.last(seen.mean((2, 3), keepdim=True))
        return logits


@functools.cache
def classifier(hooked: bool) -> Classifier:
    torch.manual_seed(0)
    net = Net(hooked)
    net(images("train", 64)[0])  # Running statistics that are not those of any later batch.
    return Classifier(net, arch="net", input_shape=(1, 8, 8), classes=DIGITS).eval()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> ImageDatabase:
    rows = digits("train").subset(np.arange(100))
    spec = FeatureSpec("features", "grid2", pca=5)
    return build_database(rows, classifier(False), spec, tmp_path_factory.mktemp("rows"), progress=False)


def nearest(net: Classifier, database: ImageDatabase) -> nn.Module:
    return NearestNeighborDefense(net, database, k=5)


def relaxed(net: Classifier, database: ImageDatabase) -> nn.Module:
    return RelaxedDefense(NearestNeighborDefense(net, database, k=5).surface(Knowledge.WHITE))


def extractor(net: Classifier, database: ImageDatabase) -> nn.Module:
    return FeatureExtractor(net, database.feature, database.pca, images("train", 2)[0])


DEFENSES: dict[str, Callable[[Classifier, ImageDatabase], nn.Module]] = {
    "nearest": nearest,
    "relaxed": relaxed,
    "extractor": extractor,
    "bits": lambda net, database: bit_depth_reduction(net),
    "crops": lambda net, database: crop_ensemble(net, crops=4, seed=1).fixed(2),
    "crops' surface": lambda net, database: crop_ensemble(net, crops=4, seed=1).fixed(2).attack_model(),
}


def every_module(defense: nn.Module) -> nn.Module:
    for module in defense.modules():
        module.training = True
    return defense


def in_a_parent(defense: nn.Module) -> nn.Module:
    nn.Sequential(nn.Identity(), nn.ModuleList([defense])).train()
    return defense


def beside_its_net(defense: nn.Module) -> nn.Module:
    nets = [module for module in defense.modules() if isinstance(module, Classifier)]
    nn.ModuleList([defense, *nets]).train()
    return defense


CALLS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": lambda defense: defense.train(),
    "a parent's train": in_a_parent,
    "its net's train": beside_its_net,
    "apply": lambda defense: defense.apply(lambda module: module.train()),
    "every flag": every_module,
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda defense: copy.deepcopy(copy.deepcopy(defense)),
    "deepcopy, train": lambda defense: in_a_parent(copy.deepcopy(defense)),
    "copy in training": lambda defense: copy.deepcopy(every_module(defense)),
}


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("hooked", [False, True], ids=["traced", "hooked"])
def test_no_call_changes_an_answer_or_a_buffer(database, name, call, hooked):
    net = copy.deepcopy(classifier(hooked))
    defense = DEFENSES[name](net, database)
    x, _ = images("test", 12)
    expected = defense(x)
    defense = CALLS[call](defense)
    before = {key: value.clone() for key, value in defense.state_dict().items()}
    modes = [module.training for module in defense.modules()]
    torch.testing.assert_close(defense(x), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in defense.state_dict().items())
    # And who trains the shared net goes on training it.
    assert [module.training for module in defense.modules()] == modes


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("hooked", [False, True], ids=["traced", "hooked"])
def test_making_a_defence_leaves_its_net_in_evaluation_mode(database, name, hooked):
    net = copy.deepcopy(classifier(hooked))
    DEFENSES[name](net, database)
    assert not any(module.training for module in net.modules())


def test_the_net_in_training_mode_would_answer_otherwise():
    net = copy.deepcopy(classifier(False)).train()
    x, _ = images("test", 12)
    before = copy.deepcopy(net.state_dict())
    assert not torch.allclose(net(x), net(x))
    assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_defence_is_never_in_training_mode_and_takes_its_net_out_of_it(database):
    net = copy.deepcopy(classifier(False))
    defense = bit_depth_reduction(net)
    parent = nn.ModuleDict({"net": net, "defense": defense}).train()
    assert net.training
    assert not defense.training
    parent.eval()
    assert not any(module.training for module in parent.modules())
    assert not EvaluationOnly().training
    assert not EvaluationOnly().train().training


def test_a_copy_follows_its_own_net(database):
    net = copy.deepcopy(classifier(False))
    x, _ = images("test", 12)
    both = nn.ModuleDict({"net": net, "extractor": extractor(net, database)})
    other = copy.deepcopy(both)
    with torch.no_grad():
        for value in other["net"].parameters():
            value.add_(0.1)
        other["net"].mean.add_(0.1)
    assert not torch.allclose(other["extractor"](x), both["extractor"](x))
    fresh = extractor(other["net"], database)
    torch.testing.assert_close(other["extractor"](x), fresh(x), rtol=0, atol=1e-6)


def test_a_guard_answers_the_same_while_its_net_is_trained(database):
    net = copy.deepcopy(classifier(False))
    guard = Guard(net, database, 5, "uniform")
    x, _ = images("test", 6)
    expected = [found.to_json() for found in guard.predict(x)]
    statistics = net.net.first[1].running_mean.clone()
    net.train()
    assert [found.to_json() for found in guard.predict(x)] == expected
    assert torch.equal(net.net.first[1].running_mean, statistics)
    assert net.training


def test_passes_of_several_threads_may_overlap():
    net = copy.deepcopy(classifier(False)).train()
    net.net.last.eval()
    modes = [module.training for module in net.modules()]
    entered, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def longer() -> None:
        with evaluating(net):
            entered.set()
            leave.wait()
            seen.append(any(module.training for module in net.modules()))

    thread = threading.Thread(target=longer)
    with evaluating(net), evaluating(net.net):
        thread.start()
        entered.wait()
        assert not any(module.training for module in net.modules())
    leave.set()
    thread.join()
    assert seen == [False]
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluating(net):
        1 / 0  # noqa: B018
    assert [module.training for module in net.modules()] == modes


def test_attacks_under_inference_mode_are_those_outside_it(database):
    net = copy.deepcopy(classifier(False))
    surface = NearestNeighborDefense(net, database, k=5).surface(Knowledge.WHITE)
    x, y = images("test", 4)
    calls = {
        "fgsm": lambda x, y: attacks.fgsm(net, x, y, eps=0.1),
        "pgd": lambda x, y: attacks.pgd(net, x, y, eps=torch.full((4,), 0.1), steps=2, random_start=False),
        "apgd": lambda x, y: attacks.apgd(net, x, y, eps=0.1, steps=3),
        "fab": lambda x, y: attacks.fab(net, x, y, eps=0.1, steps=2),
        "deepfool": lambda x, y: attacks.deepfool(net, x, y, steps=2),
        "carlini-wagner": lambda x, y: attacks.carlini_wagner(net, x, y, steps=2),
        "soft": lambda x, y: attacks.retrieval.soft_top_k(surface, x, y, eps=0.1, norm="l2", steps=2),
    }
    for name, call in calls.items():
        torch.manual_seed(0)
        expected = call(x, y)
        torch.manual_seed(0)
        with torch.inference_mode():
            found = call(x.clone(), y.clone())  # Their tensors are made there, too.
        expected, found = (getattr(made, "images", made) for made in (expected, found))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)
        assert not found.is_inference()


def test_what_is_loaded_under_inference_mode_can_be_attacked(database):
    x, y = images("test", 4)
    with torch.inference_mode():
        net = build_classifier("small-cnn", input_shape=(1, 8, 8), classes=DIGITS)
        defense = NearestNeighborDefense(classifier(False), ImageDatabase.open(database.path), k=5)
        surface = defense.surface(Knowledge.WHITE)
        answers = defense(x)
    assert torch.equal(NearestNeighborDefense(classifier(False), database, k=5)(x), answers)
    attacks.pgd(net, x, y, eps=0.1, steps=1)
    attacks.retrieval.soft_top_k(surface, x, y, eps=0.1, norm="l2", steps=1)
    with torch.inference_mode():
        own = copy.deepcopy(net)
        own.mean = own.mean + 0
    with pytest.raises(InputError, match=r"torch\.inference_mode\(\).*outside it"):
        attacks.pgd(own, x, y, eps=0.1, steps=1)
