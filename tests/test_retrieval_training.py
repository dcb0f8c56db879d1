"""Training by kernel nearest neighbours: formulas written down again, gradients, rows, refusals, and resuming."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digits
from test_training_durable import needs_fork, survives_kills
from torch import Tensor, nn

from index_build import build_database
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.features import FeatureSpec
from nndefense.models import ARCHITECTURES, Classifier, build_classifier, load_classifier
from nndefense.models.architectures.embedded import EmbeddedNet
from nndefense.training import Batch, InnerAttack, Outcome, kernel_retrieval, make_objective, train_classifier
from nndefense.training.batch import BankRows
from nndefense.training.kernel_retrieval import KernelRetrieval, Unsaturated, log_shares, nearest_rows

Array = np.ndarray
N, M, SIDE, CLASSES, DIMENSION = 6, 15, 3, 4, 2
ALL = 4096


class Base(nn.Module):
    """Two layers with tanh, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Linear(SIDE * SIDE, 4, dtype=torch.float64)
        self.last = nn.Linear(4, DIMENSION, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.first(x.flatten(1) - 0.5)))
        return found


def tiny() -> Classifier:
    torch.manual_seed(1)
    net = EmbeddedNet(Base(), CLASSES).double()
    names = [str(number) for number in range(CLASSES)]
    return Classifier(net, arch="nn-tiny", input_shape=(1, SIDE, SIDE), classes=names).double().train()


def a_bank() -> BankRows:
    vectors = 1.5 * torch.randn(M, DIMENSION, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return BankRows(vectors.float(), torch.arange(M) % CLASSES)


OWN = torch.tensor([3, 14, 0, 7, 8, 1])


def the_batch() -> Batch:
    images = torch.rand(N, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return Batch(images, OWN % CLASSES, bank=a_bank(), own=OWN)


def move(x: Tensor) -> Tensor:
    return (x + 0.3 * torch.sin(40 * x)).clamp(0, 1)


class Fixed:
    """An attack whose result is known; it notes what the model that it is given answers."""

    def __call__(self, model: nn.Module, images: Tensor, y: Tensor, *, loss: str = "cross-entropy") -> Tensor:
        self.loss, self.y, self.answer = loss, y, model(images).detach()
        return move(images)


class Numbers:
    """The same in NumPy, one row at a time."""

    def __init__(self, classifier: Classifier) -> None:
        self.weights = {name: value.detach().numpy().copy() for name, value in classifier.net.named_parameters()}

    def g(self, x: Array) -> Array:
        w = self.weights
        hidden = np.tanh((x.reshape(len(x), -1) - 0.5) @ w["base.first.weight"].T + w["base.first.bias"])
        found = hidden @ w["embedding.weight"].T
        return np.asarray((found - found.mean(0)) / np.sqrt(found.var(0) + 1e-5))

    def head(self, g: Array) -> Array:
        logits = g @ self.weights["head.weight"].T + self.weights["head.bias"]
        e = np.exp(logits)
        return np.asarray(e / e.sum(-1, keepdims=True))

    def p(self, x: Array, votes: str = "labels", own: bool = True) -> Array:
        bank, temperature = a_bank(), math.exp(float(self.weights["log_temperature"]))
        result = np.zeros((len(x), CLASSES))
        for i, g in enumerate(self.g(x)):
            for j, row in enumerate(bank.vectors.double().numpy()):
                if not own or OWN[i] != j:
                    vote = np.eye(CLASSES)[int(bank.labels[j])] if votes == "labels" else self.head(row)
                    result[i] += math.exp(-((g - row) ** 2).sum() / temperature) * vote
        return result / result.sum(1, keepdims=True)


X, Y = the_batch().images.numpy(), the_batch().labels.numpy()
MOVED = move(the_batch().images).numpy()


def ce(p: Array) -> float:
    return float(-np.log(p[np.arange(N), Y]).mean())


def by_hand(name: str, numbers: Numbers, votes: str, head: float) -> float:
    p, moved = numbers.p(X, votes), numbers.p(MOVED, votes)
    seen = MOVED if name == "retrieval" else X
    loss = ce(moved) if name == "retrieval" else ce(p)
    if name == "retrieval-trades":
        loss += 6 * float((p * np.log(p / moved)).sum(1).mean())
    return loss + head * ce(numbers.head(numbers.g(seen)))


NAMES = ("retrieval-standard", "retrieval", "retrieval-trades")


@pytest.mark.parametrize("votes", ["labels", "posteriors"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_written_down_again(name: str, votes: str) -> None:
    classifier, attack = tiny(), Fixed()
    outcome = make_objective(name, rows=ALL, votes=votes, head=0.7)(classifier, the_batch(), attack)
    numbers = Numbers(classifier)
    assert float(outcome.loss.detach()) == pytest.approx(by_hand(name, numbers, votes, 0.7), rel=1e-9)
    for logits, images in ((outcome.clean, X), (outcome.robust, MOVED)):
        if logits is not None:
            assert np.allclose(logits.exp().numpy(), numbers.p(images, votes), atol=1e-9)
    if name != "retrieval-standard":
        # What is attacked is the retrieval without the image's own row, not the head.
        assert np.allclose(attack.answer.exp().numpy(), numbers.p(X, votes), atol=1e-9)
        assert attack.loss == ("kl" if name == "retrieval-trades" else "cross-entropy")
    assert classifier.training


def slopes(loss: Callable[[], Tensor], parameters: list[nn.Parameter], step: float = 1e-6) -> Tensor:
    found = []
    with torch.no_grad():
        for parameter in parameters:
            flat = parameter.view(-1)
            for entry in range(len(flat)):
                kept = float(flat[entry])
                sides = []
                for moved in (kept + step, kept - step):
                    flat[entry] = moved
                    sides.append(float(loss()))
                flat[entry] = kept
                found.append((sides[0] - sides[1]) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_by_finite_differences(name: str) -> None:
    """To every weight and to the temperature, with the attacked images held fixed; the head's own is another test's."""
    classifier = tiny()
    objective = make_objective(name, rows=ALL, head=0)
    parameters = [value for key, value in classifier.net.named_parameters() if not key.startswith("head")]

    def loss() -> Tensor:
        return objective(classifier, the_batch(), Fixed()).loss

    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
    assert torch.allclose(found, slopes(loss, parameters), rtol=1e-5, atol=1e-8)
    assert float(found[-1].abs()) > 1e-3


@pytest.mark.parametrize("votes", ["labels", "posteriors"])
def test_the_gradient_to_the_images(votes: str) -> None:
    classifier, batch = tiny().eval(), the_batch()
    for own in (OWN, None):
        model = KernelRetrieval(classifier, a_bank(), ALL, votes, own)
        assert torch.autograd.gradcheck(model, batch.images.clone().requires_grad_(True))


def test_the_heads_loss_moves_the_head_alone() -> None:
    classifier = tiny()
    with_head, without = (
        torch.autograd.grad(
            make_objective("retrieval", rows=ALL, head=head)(classifier, the_batch(), Fixed()).loss,
            list(classifier.net.parameters()),
            allow_unused=True,
        )
        for head in (1.0, 0.0)
    )
    for (name, _), one, other in zip(classifier.net.named_parameters(), with_head, without, strict=True):
        assert one is not None
        if name.startswith("head"):
            assert float(one.abs().sum()) > 0
            assert other is None or not bool(other.any())
        else:
            assert other is not None
            assert torch.equal(one, other)


@pytest.mark.parametrize("block", [1, 40, 2**23])
@pytest.mark.parametrize("m", [2, 8, 9, 4096])
def test_the_nearest_rows(monkeypatch: pytest.MonkeyPatch, block: int, m: int) -> None:
    """Against a sort of all distances: as many of each class without one's own, or the nearest of all."""
    monkeypatch.setattr(kernel_retrieval, "_BLOCK", block)
    bank, queries = a_bank(), torch.randn(N, DIMENSION, generator=torch.Generator().manual_seed(2))
    far = torch.cdist(queries, bank.vectors)
    numbers, found = nearest_rows(queries, bank, m)
    assert [row.tolist() for row in numbers] == far.argsort(1)[:, :m].tolist()
    assert bool(found.all())
    numbers, found = nearest_rows(queries, bank, m, OWN)
    for i in range(N):
        expected = set()
        for label in range(CLASSES):
            ones = [j for j in far[i].argsort().tolist() if bank.labels[j] == label and j != OWN[i]]
            expected |= set(ones[: max(1, m // CLASSES)])
        assert sorted(numbers[i][found[i]].tolist()) == sorted(expected)


def test_a_class_without_votes_has_a_finite_share_and_no_gradient() -> None:
    weights = torch.tensor([[-1.0, -torch.inf, -3.0], [-900.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 0], [0, 2, 2]])
    shares = log_shares(weights, labels, 4)
    assert bool(shares.isfinite().all())
    assert shares[0, 1] == shares[0, 3] <= math.log(1e-11)
    # Far away, but there: exact, and above the class that has none.
    assert float(shares[1, 0].detach()) == pytest.approx(-899 - math.log(2))
    assert shares[1, 1] == shares[1, 0]
    for absent in (shares[0, 1], shares[1, 3]):
        (gradient,) = torch.autograd.grad(absent + 0 * weights.clamp_min(-1e3).sum(), weights, retain_graph=True)
        assert not bool(gradient.any())


def test_an_image_alone_in_its_class_does_not_stop_a_training() -> None:
    bank = BankRows(a_bank().vectors[:5], torch.tensor([0, 1, 1, 2, 2]))
    batch = Batch(the_batch().images[:1], torch.tensor([0]), bank=bank, own=torch.tensor([0]))
    classifier = tiny()
    loss = make_objective("retrieval-trades")(classifier, batch, InnerAttack(eps=0.1, steps=2)).loss
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in classifier.parameters())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith("nn-")])
def test_an_embedding_in_front_of_a_head(name: str) -> None:
    assert name.removeprefix("nn-") in ARCHITECTURES
    with torch.device("meta"):
        net = ARCHITECTURES[name].build((3, 32, 32), 7)
        assert isinstance(net, EmbeddedNet)
        images = torch.rand(2, 3, 32, 32)
        assert net.embed(images).shape == (2, 64)
        assert net(images).shape == (2, 7)
        base = ARCHITECTURES[name.removeprefix("nn-")].build((3, 32, 32), 64)
    # The embedding has no bias: what standardises it would take it away.
    head = 64 * 7 + 7
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in base.parameters()) - 64 + head + 1


def test_no_training_makes_distances_outgrow_a_temperature() -> None:
    net = build_classifier("nn-strided-cnn", input_shape=(1, 28, 28), classes=("a", "b"), seed=0).net
    assert isinstance(net, EmbeddedNet)
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = net.train().embed(images[:1])
        for scale in (1e2, 1e4):
            net.embedding.weight.mul_(scale)
            for _ in range(300):
                seen = net.train().embed(images)
            for found in (seen, net.eval().embed(images)):
                far = torch.cdist(found, found).square().sum() / (40 * 39)
                assert float(far) == pytest.approx(2 * 64, rel=0.1)
    # One image has no variance of its own, and changes nothing.
    assert alone.isfinite().all()
    assert torch.equal(net.train().embed(images[:1]), net.eval().embed(images[:1]))


def fresh(seed: int = 0) -> Classifier:
    return build_classifier("nn-small-cnn", input_shape=(1, 8, 8), classes=digits("train").classes, seed=seed)


def few(**changes: Any) -> dict[str, Any]:
    """A training with all that has a state: a pool, momentum, a moving average, the best weights."""
    return {
        "dataset": digits("train").subset(range(40)),
        "objective": make_objective("retrieval", rows=20),
        "attack": InnerAttack(eps=0.1, steps=1),
        "unlabelled": digits("train").subset(range(64, 100)),
        "unlabelled_per_batch": 6,
        "validation": digits("test").subset(range(20)),
        "optimizer": "sgd",
        "lr": 0.02,
        "ema": 0.9,
        "keep_best": True,
        "augment": True,
        "epochs": 2,
        "batch_size": 10,
        "refresh_steps": 3,
        "device": "cpu",
        "progress": False,
        **changes,
    }


class Stopped(Exception):
    pass


class Stopping(InnerAttack):
    """Raises at its call of a number; it describes itself as the attack that it else is."""

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        calls = self.__dict__.get("calls", 0) + 1
        self.__dict__["calls"] = calls
        if calls == self.__dict__["stop"]:
            raise Stopped
        return super().__call__(*arguments, **named)


@pytest.mark.parametrize("stops", [(3,), pytest.param((2, 4, 5, 6, 8), marks=pytest.mark.slow)], ids=str)
def test_a_training_goes_on_with_the_rows_that_it_had(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Stopped between two refreshes and at them; its weights are those of one that never stopped."""
    check = InnerAttack(eps=0.1, steps=1)
    expected = train_classifier(fresh(), **few(validation_attack=check))
    for stop in stops:
        attack = Stopping(eps=0.1, steps=1)
        attack.__dict__["stop"] = stop
        out = tmp_path / str(stop)
        changed = few(attack=attack, validation_attack=check, checkpoint_steps=1, out=out)
        with pytest.raises(Stopped):
            train_classifier(fresh(), **changed)
        found = train_classifier(fresh(), **changed | {"resume": True})
        assert found.fingerprint == expected.fingerprint
    again = load_classifier(out)
    assert again.info["retrieval"]["temperature"] == pytest.approx(again.net.temperature)
    assert again.info["retrieval"]["rows"] == 76


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("name", ["retrieval", "retrieval-trades"])
def test_killed_at_random_moments_a_training_has_the_rows_and_weights_of_one_that_was_not(
    tmp_path: Path, name: str
) -> None:
    settings = few(objective=make_objective(name, rows=20), epochs=5, checkpoint_steps=1)
    survives_kills(tmp_path / "net", lambda **options: train_classifier(fresh(), **settings, **options))


def test_other_rows_are_another_training(tmp_path: Path) -> None:
    attack = Stopping(eps=0.1, steps=1)
    attack.__dict__["stop"] = 2
    settings = few(attack=attack, out=tmp_path, keep_best=False, validation=None)
    with pytest.raises(Stopped):
        train_classifier(fresh(), **settings)
    for changes, words in (
        ({"objective": make_objective("retrieval", rows=22)}, r"objective \(retrieval\(rows=20.0.*rows=22.0"),
        ({"objective": make_objective("retrieval", rows=20, votes="posteriors")}, "votes=labels.*votes=posteriors"),
        ({"refresh_steps": None}, r"refresh steps \(3, not None\)"),
        ({"unlabelled": digits("train").subset(range(64, 101))}, "unlabelled data"),
    ):
        with pytest.raises(InputError, match=words):
            train_classifier(fresh(), **settings | changes, resume=True)


def test_the_bank_is_of_images_as_they_are_and_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    """Each batch sees the rows of its epoch's begin: embeddings in evaluation mode, labelled images then the pool."""
    seen: list[Batch] = []

    def noting(model: nn.Module, images: Tensor, y: Tensor, **_: str) -> Tensor:
        assert isinstance(model, Unsaturated)
        model = model.retrieval
        assert isinstance(model, KernelRetrieval)
        seen.append(Batch(images, y, bank=BankRows(model.rows.vectors.clone(), model.rows.labels), own=model.own))
        return images

    settings = few(attack=noting, epochs=1, refresh_steps=None, validation=None, keep_best=False, augment=False)
    start = fresh().eval()
    found = train_classifier(fresh(), **settings)
    everything = [settings["dataset"], settings["unlabelled"]]
    images = torch.cat([one.batch(range(len(one)))[0] for one in everything])
    labels = torch.cat([torch.from_numpy(one.labels) for one in everything])
    assert isinstance(start.net, EmbeddedNet)
    for batch in seen:
        assert batch.bank is not None
        assert torch.allclose(batch.bank.vectors, start.net.embed(start.normalised(images)).detach(), atol=1e-6)
        assert torch.equal(batch.bank.labels, labels)
        assert torch.equal(batch.images, images[batch.own])
        assert torch.equal(batch.labels, labels[batch.own])
    assert not any("bank" in name or "vectors" in name for name in found.state_dict())


def test_the_control_needs_nothing_special() -> None:
    plain = {"unlabelled": None, "unlabelled_per_batch": None, "refresh_steps": None}
    begun, net = fresh(), fresh()
    train_classifier(net, **few(objective="adversarial", epochs=1, **plain))
    assert isinstance(net.net, EmbeddedNet)
    assert isinstance(begun.net, EmbeddedNet)
    assert net.net.temperature == begun.net.temperature
    assert not torch.equal(net.net.embedding.weight, begun.net.embedding.weight)
    assert "retrieval" not in net.info


@pytest.mark.slow
def test_what_is_checked_is_the_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of nonsense changes no figure of a check: what is measured are the rows' votes."""
    found = train_classifier(fresh(), **few(objective=make_objective("retrieval", rows=20, head=0), ema=None))
    other = fresh()
    assert isinstance(other.net, EmbeddedNet)
    with torch.no_grad():
        other.net.head.weight.neg_()
    again = train_classifier(other, **few(objective=make_objective("retrieval", rows=20, head=0), ema=None))
    names = ("validation_accuracy", "robust_validation_accuracy")
    for one, two in zip(found.info["history"], again.info["history"], strict=True):
        assert [one[name] for name in names] == [two[name] for name in names]


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's own stand-in: the same weights, and no graph for every step."""
    compiled, graphs = torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def eager(model: Any, **options: Any) -> Any:
        return compiled(model, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", eager)
    plain = few(validation=None, keep_best=False, epochs=1, batch_size=20, unlabelled=None, unlabelled_per_batch=None)
    other = train_classifier(fresh(), **plain, compile=True)
    longer = len(graphs)
    assert other.fingerprint == train_classifier(fresh(), **plain).fingerprint
    train_classifier(fresh(), **plain | {"epochs": 3}, compile=True)
    assert len(graphs) <= 2 * longer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "retrieval", "attack": None}, "the objective retrieval attacks its images"),
        ({"unlabelled": None}, "there are no unlabelled images"),
        ({"dataset": digits("train").subset([0]), "batch_size": 1}, "retrieves other images than the one itself"),
        ({"validation": None, "keep_best": False, "stop_on_collapse": True}, "images held out: give a validation set"),
        ({"refresh_steps": 0}, "number of steps between refreshes of the rows must be a whole number from 1 up"),
        ({"objective": "rst-at"}, "the objective rst-at has no rows to refresh"),
    ],
)
def test_trainings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        train_classifier(fresh(), **few(**changes))


@pytest.mark.parametrize("name", NAMES)
def test_a_net_without_an_embedding(name: str) -> None:
    other = build_classifier("small-cnn", input_shape=(1, 8, 8), classes=digits("train").classes)
    words = "small-cnn has no embedding to retrieve by: choose an architecture whose name begins with nn-"
    with pytest.raises(InputError, match=words):
        train_classifier(other, **few(objective=name))
    with pytest.raises(InputError, match="Base has no embedding"):
        make_objective(name)(Base(), the_batch(), Fixed())
    with pytest.raises(InputError, match=f"the objective {name} needs rows to retrieve from"):
        make_objective(name)(tiny(), Batch(the_batch().images, the_batch().labels), Fixed())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"rows": 1}, "rows of the objective retrieval is 1, but must be between 2 and 4096"),
        ({"rows": 2.5}, "rows of the objective retrieval is 2.5, but must be a whole number"),
        ({"votes": "images"}, "votes of the objective retrieval is 'images', but must be one of labels, posteriors"),
        ({"head": -1}, "head of the objective retrieval is -1"),
    ],
)
def test_weights_that_cannot_be(weights: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_objective("retrieval", **weights)


class Counted(Base):
    """Notes the mode of each pass, and whether weights learn."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()  # type: ignore[assignment]
        self.passes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append((self.training, torch.is_grad_enabled() and self.first.weight.requires_grad))
        return super().forward(x)


@pytest.mark.parametrize(("name", "attacking", "learning"), [(NAMES[0], 0, 1), (NAMES[1], 3, 1), (NAMES[2], 4, 2)])
def test_the_passes_are_those_of_the_control(name: str, attacking: int, learning: int) -> None:
    """The rows cost none, and are searched for once for the attack and once for each pass of the loss."""
    classifier = tiny()
    assert isinstance(classifier.net, EmbeddedNet)
    classifier.net.base = counted = Counted()
    make_objective(name)(classifier, the_batch(), InnerAttack(eps=0.1, steps=3, start="gaussian"))
    assert counted.passes == [(False, False)] * attacking + [(True, True)] * learning


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_twice_alike(name: str) -> None:
    attack = None if name == "retrieval-standard" else InnerAttack(eps=0.1, steps=1)
    train: Callable[[], Classifier] = functools.partial(
        train_classifier, **few(objective=name, attack=attack, validation=None, keep_best=False, epochs=1)
    )
    before = fresh().fingerprint
    found = [train(fresh()) for _ in range(2)]  # type: ignore[call-arg]
    assert found[0].fingerprint == found[1].fingerprint != before
    (row,) = found[0].info["history"]
    assert math.isfinite(row["loss"])
    assert row["loss"] == pytest.approx(row["retrieval_loss"] + row["head_loss"], rel=1e-4)


def test_the_outcome_is_one_of_the_batch() -> None:
    outcome = make_objective("retrieval-trades")(tiny(), the_batch(), InnerAttack(eps=0.1, steps=2, start="gaussian"))
    assert isinstance(outcome, Outcome)
    assert outcome.clean is not None
    assert outcome.clean.shape == (N, CLASSES)
    assert all(part.shape == () and not part.requires_grad for part in outcome.parts.values())


def test_the_defence_answers_as_the_training_did(tmp_path: Path) -> None:
    """The net's embeddings of its training set as a database, its labels and its temperature as the rule."""
    rows, queries = digits("train").subset(range(200)), digits("test").batch(range(40))[0]
    options: dict[str, Any] = {"epochs": 1, "batch_size": 50, "device": "cpu", "progress": False}
    attack = InnerAttack(eps=0.1, steps=1)
    net = fresh()
    # So narrow a kernel that its votes are not those of the head.
    torch.nn.init.constant_(net.net.log_temperature, -6)
    net = train_classifier(net, rows, objective="retrieval", attack=attack, **options)
    database = build_database(rows, net, FeatureSpec("embedding", "flatten", 0), tmp_path / "rows", progress=False)
    temperature = net.info["retrieval"]["temperature"]
    defense = NearestNeighborDefense(net, database, 200, "uniform", votes="labels", temperature=temperature)
    with torch.no_grad():
        vectors = kernel_retrieval.embeddings(net, rows.batch(range(200))[0])
        bank = BankRows(vectors, torch.from_numpy(rows.labels))
        expected = KernelRetrieval(net, bank, ALL)(queries).softmax(1)
        assert torch.allclose(defense(queries).exp(), expected, atol=1e-5)
    assert float((expected - net(queries).softmax(1)).detach().abs().max()) > 0.1


def test_an_attack_is_shown_answers_that_leave_it_a_gradient() -> None:
    """A narrow kernel gives a class all votes that float32 resolves; unsaturated, the same images can be moved."""
    net = fresh()
    torch.nn.init.constant_(net.net.log_temperature, -14)
    images, labels = digits("train").batch(range(N))
    bank = BankRows(kernel_retrieval.embeddings(net, images).detach(), labels)
    saturated = KernelRetrieval(net, bank, ALL).eval()
    shown = Unsaturated(saturated)
    logits = shown(images)
    assert torch.equal(logits.argmax(1), saturated(images).argmax(1))
    top = logits.topk(2).values
    assert float((top[:, 0] - top[:, 1]).max().detach()) <= 5 + 1e-3

    def moved(model: nn.Module) -> int:
        attacked = InnerAttack(eps=0.1, steps=1, start="none")(model, images, labels)
        return int((attacked != images).flatten(1).any(1).sum())

    assert moved(saturated) < N / 2
    assert moved(shown) == N
