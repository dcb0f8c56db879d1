"""The loop's choices: schedules, averages, precision, best weights, catastrophic overfitting, and what is shown."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nndefense.datasets import ImageDataset, open_dataset
from nndefense.errors import InputError
from nndefense.models import Classifier, build_classifier
from nndefense.training import (
    Batch,
    BatchAttack,
    InnerAttack,
    Outcome,
    TrainingSettings,
    accuracy,
    standard,
    train_classifier,
)
from nndefense.training.settings import SettingsOptions, learning_rate, make_settings, setting_defaults
from nndefense.training.step import Precision, WeightAverage, unsafe
from nndefense.training.validation import CatastrophicOverfitting, collapsed, stronger

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"epochs": 3, "batch_size": 20, "device": "cpu", "progress": False}
ATTACK = InnerAttack(eps=0.1, steps=2)


@pytest.fixture(scope="module")
def few() -> ImageDataset:
    return open_dataset("digits:train").subset(range(100))


@pytest.fixture(scope="module")
def held() -> ImageDataset:
    return open_dataset("digits:test").subset(range(60))


def fresh(dataset: ImageDataset) -> Classifier:
    return build_classifier("small-cnn", input_shape=dataset.shape, classes=dataset.classes, seed=0)


# --- settings and schedules


def settings(**options: Any) -> TrainingSettings:
    return TrainingSettings(**{"epochs": 10, "batch_size": 4, "lr": 0.2} | options)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, {0: 0.2, 25: 0.1 * (1 + 0.5**0.5), 50: 0.1, 99: 0.2 * 0.5 * (1 - 0.99950656)}),
        ({"schedule": "none"}, {0: 0.2, 99: 0.2}),
        ({"schedule": "step", "milestones": (5, 7.5)}, {0: 0.2, 49: 0.2, 50: 0.02, 74: 0.02, 75: 0.002, 99: 0.002}),
        ({"schedule": "step", "milestones": [5], "gamma": 0.5}, {49: 0.2, 50: 0.1}),
        # Up over 40 of 100 steps, down over 60; the step itself counts, and the last is not lost.
        ({"schedule": "one-cycle"}, {0: 0.005, 19: 0.1, 39: 0.2, 40: 0.2, 70: 0.1, 99: 0.2 / 60}),
        ({"schedule": "cyclic", "peak": 0.5}, {0: 0.004, 49: 0.2, 50: 0.2, 75: 0.1}),
        ({"schedule": "none", "warmup": 2}, {0: 0.01, 9: 0.1, 19: 0.2, 20: 0.2}),
        ({"warmup": 1}, {0: 0.02, 4: 0.1 * 0.5 * (1 + 0.99211470), 50: 0.1}),
    ],
)
def test_learning_rates(options: dict[str, Any], rates: dict[int, float]) -> None:
    chosen = settings(**options)
    assert {step: learning_rate(chosen, step, 100) for step in rates} == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "step"}, "needs milestones"),
        ({"schedule": "step", "milestones": [10]}, "milestones 10 must lie between 0 and the 10 epochs"),
        ({"schedule": "wave"}, "choose one of cosine, step, one-cycle, none"),
        ({"precision": "int8"}, "choose one of float32, bfloat16, float16"),
        ({"momentum": 1.0}, "momentum must be 0 or more and below 1"),
        ({"optimizer": "sgd", "momentum": 0.0}, "Nesterov"),
        ({"warmup": 10}, "warm-up in epochs must be 0 or more and below 10"),
        ({"gamma": 0}, "gamma"),
        ({"peak": 1.0}, "peak"),
        ({"ema": 1.0}, "moving average of the weights must be above 0 and below 1"),
        ({"clip_norm": 0.0}, "gradients are clipped must be above 0"),
        ({"clip_norm": float("nan")}, "gradients are clipped must be above 0"),
        ({"patience": 0}, "patience in epochs"),
        ({"checks_per_epoch": 0}, "number of checks"),
        ({"steps_per_epoch": 0}, "steps an epoch"),
        ({"unlabelled_per_batch": 0}, "unlabelled images a batch"),
    ],
)
def test_impossible_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        settings(**options)
    assert words in str(error.value)


def test_the_options_are_the_settings() -> None:
    assert set(SettingsOptions.__annotations__) == {field.name for field in fields(TrainingSettings)}
    assert set(setting_defaults()) == set(SettingsOptions.__annotations__) - {"epochs", "batch_size"}
    with pytest.raises(InputError, match="a training has no setting 'learning_rate': choose from epochs,"):
        make_settings(100, {"learning_rate": 1})
    chosen = make_settings(100, {"patience": 3, "milestones": (1, 2), "schedule": "step"})
    assert chosen.keep_best
    assert json.loads(json.dumps(chosen.as_dict())) == chosen.as_dict()
    assert (chosen.epochs, chosen.batch_size) == (20, 16)


# --- the parts of a step


def test_clipping_bounds_a_step(few: ImageDataset) -> None:
    moved = {}
    for clip in (None, 1e-3):
        classifier = fresh(few)
        before = torch.cat([weight.detach().flatten().clone() for weight in classifier.parameters()])
        train_classifier(
            classifier,
            few,
            **QUICK | {"epochs": 1, "batch_size": 100},
            optimizer="sgd",
            lr=0.5,
            momentum=0.0,
            nesterov=False,
            schedule="none",
            clip_norm=clip,
        )
        after = torch.cat([weight.detach().flatten() for weight in classifier.parameters()])
        moved[clip] = float((after - before).norm())
    assert moved[1e-3] == pytest.approx(0.5e-3, rel=1e-2)
    assert moved[None] > 0.1


def test_the_average_follows_the_formula() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = WeightAverage(net, 0.9)
    expected = net[0].weight.detach().double().clone()
    for step in range(1, 60):
        with torch.no_grad():
            net[0].weight.add_(torch.randn(3, 3))
            net[1].running_var.add_(1)  # type: ignore[operator,union-attr]
            net[1].num_batches_tracked.add_(1)  # type: ignore[operator,union-attr]
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach().double()
    assert torch.allclose(average.tensors["0.weight"].double(), expected, atol=1e-5)
    assert int(average.tensors["1.num_batches_tracked"]) == 59
    assert 40 < float(average.tensors["1.running_var"][0]) < 60
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with average.in_place():
        assert torch.equal(net[0].weight, average.tensors["0.weight"])
    assert all(torch.equal(tensor, own[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert all(torch.equal(tensor, own[name]) for name, tensor in net.state_dict().items())


def test_the_averaged_weights_are_evaluated_and_final(few: ImageDataset, held: ImageDataset) -> None:
    options: dict[str, Any] = QUICK | {"validation": held, "lr": 2e-2, "schedule": "none"}
    plain = train_classifier(fresh(few), few, **options)
    averaged = train_classifier(fresh(few), few, **options, ema=0.8)
    assert averaged.fingerprint != plain.fingerprint
    assert averaged.info["history"][-1]["loss"] == plain.info["history"][-1]["loss"]  # the steps are the same
    assert averaged.info["history"][-1]["validation_accuracy"] == accuracy(averaged, held)
    assert plain.info["history"][-1]["validation_accuracy"] == accuracy(plain, held)


def test_precision_where_it_is_safe(few: ImageDataset, held: ImageDataset) -> None:
    seen: list[torch.dtype] = []

    def noted(model: nn.Module, batch: Batch, attack: BatchAttack | None) -> Outcome:
        outcome = standard(model, batch, attack)
        assert outcome.clean is not None
        seen.append(outcome.clean.dtype)
        return outcome

    for asked, used in (("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32)):
        seen.clear()
        classifier = train_classifier(fresh(few), few, **QUICK, objective=noted, precision=asked, validation=held)
        assert set(seen) == {used}
        assert {weight.dtype for weight in classifier.parameters()} == {torch.float32}
        record = classifier.info["precision"]
        assert getattr(torch, record["used"]) == used
        assert (record["reason"] is None) == (asked == record["used"])
        assert classifier.info["history"][-1]["validation_accuracy"] == accuracy(classifier, held)
    assert "CPU" in str(unsafe("float16", CPU))
    assert Precision("float16", CPU).name == "float32"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_on_a_gpu(held: ImageDataset, precision: str, tmp_path: Path) -> None:
    digits = open_dataset("digits:train")
    classifier = train_classifier(
        fresh(digits),
        digits,
        epochs=6,
        device="cuda",
        progress=False,
        precision=precision,
        channels_last=True,
        objective="adversarial",
        attack=ATTACK,
        validation=held,
        out=tmp_path,
    )
    assert classifier.info["precision"]["used"] == precision
    assert classifier.info["history"][-1]["robust_validation_accuracy"] > 0.7


def test_channels_last_gives_the_same(few: ImageDataset) -> None:
    plain = train_classifier(fresh(few), few, **QUICK)
    other = train_classifier(fresh(few), few, **QUICK, channels_last=True)
    assert all(weight.is_contiguous() for weight in other.parameters())
    assert other.info["history"][-1]["loss"] == pytest.approx(plain.info["history"][-1]["loss"], rel=1e-3)


@pytest.mark.slow
def test_compiled(few: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's own stand-in, which runs the graphs as they are: seconds instead of minutes."""
    compiled, graphs = torch.compile, []

    def eager(model: nn.Module, **options: Any) -> Any:
        def backend(graph: Any, _inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        assert options == {"dynamic": False}
        return compiled(model, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", eager)
    options: dict[str, Any] = QUICK | {"objective": "trades", "attack": InnerAttack(eps=0.1, steps=2, start="gaussian")}
    options |= {"batch_size": 32, "validation": few}
    plain = train_classifier(fresh(few), few, **options)
    assert not graphs
    other = train_classifier(fresh(few), few, **options, compile=True)
    # Training and evaluation mode; batches of 25.
    assert 2 <= len(graphs) <= 4
    assert other.fingerprint == plain.fingerprint
    assert not any("_orig_mod" in name for name in other.state_dict())


# --- what a training is given


def test_parts_that_do_not_fit(few: ImageDataset, held: ImageDataset) -> None:
    for options, words in (
        ({"objective": "adversarial"}, "the objective adversarial attacks its images: give an attack"),
        ({"objective": "rst-at", "attack": ATTACK}, "rst-at learns from unlabelled images too: give a pool"),
        ({"unlabelled": held}, "the objective standard knows labelled images alone"),
        ({"unlabelled_per_batch": 4}, "there are no unlabelled images"),
        ({"keep_best": True}, "give a validation set"),
        ({"patience": 2}, "give a validation set"),
        ({"validation_attack": ATTACK}, "there are no images for the validation attack"),
        ({"objective": "standart"}, "'standart'"),
        ({"tensorboard": True}, "give --out"),
        ({"batch_size": 101}, "the batch size 101 is more than the 100 images"),
    ):
        with pytest.raises(InputError) as error:
            train_classifier(fresh(few), few, **QUICK | options)
        assert words in str(error.value)
    with pytest.raises(InputError, match=r"eps is -0\.1"):
        InnerAttack(eps=-0.1)
    unknown = held.subset(range(10))
    unknown.labels = unknown.labels.copy()
    unknown.labels[3] = -1
    with pytest.raises(InputError, match="have no label"):
        train_classifier(fresh(few), few, **QUICK, objective="self-training", unlabelled=unknown)
    unknown.labels[3] = 10
    with pytest.raises(InputError, match="has the label 10, but only 10 classes"):
        train_classifier(fresh(few), few, **QUICK, objective="self-training", unlabelled=unknown)
    with pytest.raises(InputError, match="returns an Outcome, not Tensor"):
        train_classifier(fresh(few), few, **QUICK, objective=lambda model, batch, _: model(batch.images).sum())


def test_the_pool_teaches(few: ImageDataset, held: ImageDataset) -> None:
    """With its labels as pseudo-labels, a pool of 600 images is worth more than 20 labelled ones alone."""
    small = few.subset(range(20))
    pool = open_dataset("digits:train").subset(range(100, 700))
    options: dict[str, Any] = {"epochs": 4, "batch_size": 10, "device": "cpu", "progress": False, "steps_per_epoch": 15}
    alone = train_classifier(fresh(few), small, **options)
    helped = train_classifier(
        fresh(few), small, **options, objective="self-training", unlabelled=pool, unlabelled_per_batch=20
    )
    assert accuracy(helped, held) > accuracy(alone, held) + 0.05
    assert helped.info["unlabelled"]["n"] == 600


# --- best weights, early stopping, catastrophic overfitting


def spoiling(after: int) -> Any:
    """An objective that teaches for so many steps, and then the contrary."""
    steps = 0

    def objective(model: nn.Module, batch: Batch, attack: BatchAttack | None) -> Outcome:
        nonlocal steps
        steps += 1
        outcome = standard(model, batch, attack)
        return outcome if steps <= after else dataclasses.replace(outcome, loss=-outcome.loss)

    return objective


@pytest.mark.parametrize("robust", [False, True])
def test_the_best_weights_are_kept(few: ImageDataset, held: ImageDataset, robust: bool) -> None:
    options: dict[str, Any] = QUICK | {"epochs": 8, "lr": 5e-3, "schedule": "none", "validation": held}
    if robust:
        options["validation_attack"] = ATTACK
    last = train_classifier(fresh(few), few, **options, objective=spoiling(20))
    best = train_classifier(fresh(few), few, **options, objective=spoiling(20), keep_best=True)
    tired = train_classifier(fresh(few), few, **options, objective=spoiling(20), patience=2)
    name = "robust_validation_accuracy" if robust else "validation_accuracy"
    scores = [row[name] for row in best.info["history"]]
    top = scores.index(max(scores)) + 1
    assert top <= 5
    assert best.info["best"]["epoch"] == top
    assert best.info["best"]["score"] == max(scores)
    assert accuracy(best, held) > accuracy(last, held) + 0.2
    if not robust:
        assert accuracy(best, held) == max(scores)
    assert len(tired.info["history"]) == top + 2
    assert tired.fingerprint == best.fingerprint


def test_robust_accuracy_is_measured_alike_in_every_check(few: ImageDataset, held: ImageDataset) -> None:
    rows: list[dict[str, Any]] = []
    classifier = train_classifier(
        fresh(few),
        few,
        **QUICK,
        objective="adversarial",
        attack=ATTACK,
        validation=held,
        checks_per_epoch=2,
        lr=1e-12,
        on_epoch=rows.append,
    )
    checks = [check for row in rows for check in row["checks"]]
    assert [check["step"] for check in checks] == [2, 5] * 3
    # A net that does not move: what still changes are the statistics of its batch normalisation.
    assert len({row["robust_accuracy"] for row in rows}) > 1
    assert all("single_step_accuracy" not in check for check in checks)
    assert classifier.info["history"] == rows
    assert "catastrophic_overfitting" not in rows[0]


def test_which_attack_checks() -> None:
    fast = InnerAttack.single_step(0.3)
    assert stronger(fast) == InnerAttack(eps=0.3, steps=10)
    long = InnerAttack(eps=0.3, steps=40, step_size=0.01, mode="train")
    assert stronger(long) == InnerAttack(eps=0.3, steps=40, step_size=0.01)

    def other(*_: Any) -> Any:
        return None

    assert stronger(other) is other


@pytest.mark.parametrize(
    ("single", "robust", "top", "expected"),
    [
        (0.95, 0.00, 0.40, True),  # the jump of Wong et al.
        (0.95, 0.18, 0.40, True),
        (0.95, 0.30, 0.40, False),  # less than half is left, but its own best was no better
        (0.95, 0.02, 0.00, True),  # so from the first check on
        (0.56, 0.47, 0.47, False),  # an honest net
        (0.30, 0.15, 0.15, False),  # not robust yet
        (0.18, 0.01, 0.01, False),  # knows nothing yet
    ],
)
def test_what_a_collapse_is(single: float, robust: float, top: float, expected: bool) -> None:
    assert collapsed(single, robust, top) is expected


@pytest.mark.slow
def test_catastrophic_overfitting_is_found_and_told(few: ImageDataset) -> None:
    digits = open_dataset("digits:train")
    fgsm = InnerAttack(eps=0.3, steps=1, step_size=0.3, start="none")
    with pytest.warns(CatastrophicOverfitting, match="train with more steps") as told:
        classifier = train_classifier(
            fresh(few),
            digits,
            epochs=10,
            batch_size=64,
            lr=5e-3,
            device="cpu",
            progress=False,
            objective="adversarial",
            attack=fgsm,
            stop_on_collapse=True,
        )
    assert len(told) == 1
    assert told[0].filename == __file__
    rows = classifier.info["history"]
    assert [row["catastrophic_overfitting"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert 1 < len(rows) < 10
    check = rows[-1]["checks"][0]
    assert check["single_step_accuracy"] > 2 * check["robust_accuracy"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        several = train_classifier(fresh(few), few, **QUICK, objective="adversarial", attack=ATTACK)
    assert "checks" not in several.info["history"][-1]


# --- what is shown


def test_the_bar_shows_how_it_goes(
    few: ImageDataset, held: ImageDataset, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nndefense.training.epochs.LOOK_SECONDS", 0.0)
    # Without a terminal there is a line a minute.
    monkeypatch.setattr("nndefense.bars.MINUTE", 0.0)
    options = QUICK | {"progress": True, "validation": held, "attack": ATTACK}
    train_classifier(fresh(few), few, **options, objective="trades")
    shown = capfd.readouterr().err
    assert re.search(r"epoch 2/3: .*img/s, loss \d\.\d+, clean [01]\.\d+, robust [01]\.\d+, \d\d:\d\d left", shown)
    # One time left, the training's: tqdm's own of an epoch stands after a "<".
    assert not re.search(r"\d\d:\d\d<", shown)
    assert re.search(r"epoch 3/3, loss [\d.]+, accuracy [\d.]+, robust [\d.]+, validation [\d.]+, robust val", shown)
    train_classifier(fresh(few), few, **options, objective="adversarial")
    assert re.search(r"clean [01]\.\d+ at the last check, robust", capfd.readouterr().err)
    train_classifier(fresh(few), few, **options | {"progress": False})
    assert capfd.readouterr().err == ""


def test_curves_for_tensorboard(few: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("nndefense.training.epochs.LOOK_SECONDS", 0.0)

    class Stop(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Stop

    options: dict[str, Any] = QUICK | {"out": tmp_path, "tensorboard": True}
    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **options, on_epoch=stop)
    train_classifier(fresh(few), few, **options, resume=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"epoch/loss", "epoch/accuracy", "step/loss", "step/lr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("epoch/loss")] == [5, 10, 15]
    assert [event.step for event in events.Scalars("step/lr")] == list(range(1, 16))
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("epoch/loss")] == pytest.approx([row["loss"] for row in history])
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install tensorboard"):
        train_classifier(fresh(few), few, **options, overwrite=True)
