"""Training: accuracy, repeatability, resuming after every kind of stop, and every refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rewrite
from torch import Tensor, nn

from nndefense.datasets import ImageDataset, open_dataset
from nndefense.datasets.arrays import ArrayDataset
from nndefense.errors import InputError, ModelError
from nndefense.models import Classifier, build_classifier, load_classifier
from nndefense.training import (
    Batch,
    BatchAttack,
    Outcome,
    accuracy,
    default_batch_size,
    default_epochs,
    make_objective,
    objective_name,
    standard,
    train_classifier,
)
from nndefense.training.random_state import derived_seed

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return open_dataset("digits:train")


@pytest.fixture(scope="module")
def few(digits: ImageDataset) -> ImageDataset:
    return digits.subset(range(100))


def fresh(dataset: ImageDataset, seed: int = 0) -> Classifier:
    return build_classifier("small-cnn", input_shape=dataset.shape, classes=dataset.classes, seed=seed)


QUICK: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 32,
    "augment": True,
    "flip": True,
    "device": "cpu",
    "progress": False,
}


class Stop(Exception):
    pass


def stop_after(epoch: int) -> Any:
    def check(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Stop

    return check


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# --- results


@pytest.mark.slow
def test_digits_with_the_defaults(digits: ImageDataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    test = open_dataset("digits:test")
    out = tmp_path / "net"
    classifier = train_classifier(fresh(digits), digits, device="cpu", out=out, validation=test)
    assert accuracy(classifier, test) >= 0.98
    assert not classifier.training
    loaded = load_classifier(out)
    assert loaded.fingerprint == classifier.fingerprint
    assert loaded.info["data"] == {"name": digits.name, "n": len(digits), "fingerprint": digits.fingerprint}
    assert loaded.info["validation"]["name"] == test.name
    assert sorted(path.name for path in out.iterdir()) == ["classifier.json", "history.jsonl", "model.safetensors"]
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, default_epochs(1297, 64) + 1))
    assert rows == loaded.info["history"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["accuracy"] > 0.98
    assert rows[-1]["validation_accuracy"] == accuracy(classifier, test)
    assert 0 < rows[-1]["lr"] < rows[0]["lr"] < 2e-3
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "epoch 1/" in printed.err
    assert "images/s" in printed.err


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_optimizers_learn(digits: ImageDataset, optimizer: str) -> None:
    part = digits.subset(range(400))
    lr = 0.05 if optimizer == "sgd" else 2e-3
    classifier = train_classifier(
        fresh(digits),
        part,
        epochs=4,
        batch_size=32,
        lr=lr,
        weight_decay=1e-4,
        optimizer=optimizer,
        schedule="none",
        device="cpu",
        progress=False,
    )
    assert accuracy(classifier, part) > 0.9
    assert classifier.info["history"][-1]["lr"] == lr


def test_labels_follow_the_classifiers_classes(few: ImageDataset) -> None:
    classifier = build_classifier("small-cnn", input_shape=few.shape, classes=few.classes[::-1])
    train_classifier(classifier, few, epochs=25, batch_size=20, device="cpu", progress=False)
    assert accuracy(classifier, few) > 0.95
    straight = Classifier(classifier.net, arch="small-cnn", input_shape=few.shape, classes=[f"c{n}" for n in range(10)])
    assert accuracy(straight.eval(), few) < 0.5


def test_accuracy_of_a_known_classifier(few: ImageDataset) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(10)[3].expand(len(images), 10) + 0 * images.sum()

    classifier = Classifier(Constant(), arch="x", input_shape=few.shape, classes=few.classes).train()
    share = float((few.labels == 3).mean())
    assert accuracy(classifier, few, batch_size=7) == pytest.approx(share)
    assert accuracy(classifier, few, device="cpu") == pytest.approx(share)
    assert classifier.training  # as it was before


# --- repeatability


def test_same_seed_same_weights_and_the_global_state_stays(few: ImageDataset) -> None:
    torch.manual_seed(11)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = train_classifier(fresh(few), few, **QUICK).fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(12)
    assert train_classifier(fresh(few), few, **QUICK).fingerprint == first
    assert train_classifier(fresh(few), few, **QUICK, seed=1).fingerprint != first


def test_reading_batch_by_batch_gives_the_same(few: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train_classifier(fresh(few), few, **QUICK).fingerprint
    monkeypatch.setattr("nndefense.training.batches.RESIDENT_BYTES", 0)
    assert train_classifier(fresh(few), few, **QUICK).fingerprint == expected
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nndefense-read")]


def test_an_objective_may_use_chance(few: ImageDataset, tmp_path: Path) -> None:
    def noisy(model: nn.Module, batch: Batch, _attack: BatchAttack | None) -> Outcome:
        images = (batch.images + 0.1 * torch.randn_like(batch.images)).clamp(0, 1)
        return standard(model, Batch(images, batch.labels))

    once = train_classifier(fresh(few), few, **QUICK, objective=noisy).fingerprint
    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **QUICK, objective=noisy, out=tmp_path, on_epoch=stop_after(1))
    again = train_classifier(fresh(few), few, **QUICK, objective=noisy, out=tmp_path, resume=True)
    assert again.fingerprint == once


def test_an_objective_that_gives_no_logits_has_no_accuracy(few: ImageDataset) -> None:
    def inner(model: nn.Module, batch: Batch, _attack: BatchAttack | None) -> Outcome:
        assert isinstance(model, Classifier)
        return Outcome(nn.functional.cross_entropy(model.net(batch.images), batch.labels))

    rows: list[dict[str, Any]] = []
    train_classifier(fresh(few), few, **QUICK | {"epochs": 1}, objective=inner, on_epoch=rows.append)
    assert rows[0]["accuracy"] is None


# --- resuming


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_resume_after_a_stop(few: ImageDataset, tmp_path: Path, optimizer: str) -> None:
    options = QUICK | {"optimizer": optimizer, "weight_decay": 1e-3, "validation": few}
    straight = train_classifier(fresh(few), few, **options, out=tmp_path / "straight")
    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **options, out=tmp_path / "cut", on_epoch=stop_after(2))
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == ["history.jsonl", "training-0002.safetensors", "training.json"]
    with pytest.raises(ModelError, match="finish it with --resume"):
        load_classifier(tmp_path / "cut")
    epochs: list[int] = []
    resumed = train_classifier(
        fresh(few), few, **options, out=tmp_path / "cut", resume=True, on_epoch=lambda row: epochs.append(row["epoch"])
    )
    assert epochs == [3, 4]
    assert resumed.fingerprint == straight.fingerprint
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if "second" not in key}
            for line in (tmp_path / name / "history.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "cut")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "cut")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "cut").glob("training*"))


@pytest.mark.slow
def test_resume_after_a_kill(few: ImageDataset, tmp_path: Path) -> None:
    code = f"""
import sys, time
import torch
torch.set_num_threads({torch.get_num_threads()})
from nndefense.datasets import open_dataset
from nndefense.models import build_classifier
from nndefense.training import train_classifier
few = open_dataset("digits:train").subset(range(100))
net = build_classifier("small-cnn", input_shape=few.shape, classes=few.classes)
def slow(row):
    if row["epoch"] == 2:
        print("ready", flush=True)
        time.sleep(60)
train_classifier(net, few, **{QUICK!r}, out=sys.argv[1], on_epoch=slow)
"""
    out = tmp_path / "net"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready"
        process.send_signal(signal.SIGKILL)
    # What a kill in the middle of a write leaves: a part of a file, and tensors that nothing names yet.
    (out / "training-0003.safetensors.1.part").write_bytes(b"half")
    (out / "training-0003.safetensors").write_bytes(b"half")
    resumed = train_classifier(fresh(few), few, **QUICK, out=out, resume=True)
    assert resumed.fingerprint == train_classifier(fresh(few), few, **QUICK).fingerprint
    assert sorted(path.name for path in out.iterdir()) == ["classifier.json", "history.jsonl", "model.safetensors"]


def test_a_stop_in_the_first_epoch_can_be_resumed(few: ImageDataset, tmp_path: Path) -> None:
    def fail(_model: nn.Module, _batch: Batch, _attack: BatchAttack | None) -> Outcome:
        raise Stop

    fail.description = objective_name(make_objective("standard"))  # type: ignore[attr-defined]
    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **QUICK, objective=fail, out=tmp_path)
    resumed = train_classifier(fresh(few), few, **QUICK, out=tmp_path, resume=True)
    assert resumed.fingerprint == train_classifier(fresh(few), few, **QUICK).fingerprint


def test_resuming_a_finished_training_returns_it(few: ImageDataset, tmp_path: Path) -> None:
    done = train_classifier(fresh(few), few, **QUICK, out=tmp_path)
    before = (tmp_path / "classifier.json").read_bytes()
    again = train_classifier(fresh(few), few, **QUICK, out=tmp_path, resume=True)
    assert again.fingerprint == done.fingerprint
    assert (tmp_path / "classifier.json").read_bytes() == before
    with pytest.raises(InputError, match=r"epochs \(4, not 5\)"):
        train_classifier(fresh(few), few, **QUICK | {"epochs": 5}, out=tmp_path, resume=True)


def test_resume_names_what_differs(digits: ImageDataset, few: ImageDataset, tmp_path: Path) -> None:
    def other(model: nn.Module, batch: Batch, attack: BatchAttack | None) -> Outcome:
        return standard(model, batch, attack)

    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **QUICK, out=tmp_path, on_epoch=stop_after(1))
    before = (tmp_path / "training.json").read_bytes()
    shifted_net = build_classifier("small-cnn", input_shape=few.shape, classes=few.classes, mean=[0.5])
    for classifier, data, change, words in (
        (fresh(few), few, {"lr": 0.1, "epochs": 6}, ("epochs (4, not 6)", "lr (0.002, not 0.1)")),
        (fresh(few), digits.subset(range(1, 101)), {}, ("data (",)),
        (fresh(few), few, {"objective": other}, ("objective (standard, not",)),
        (shifted_net, few, {}, ("other mean",)),
        (
            build_classifier("cifar-resnet18", input_shape=few.shape, classes=few.classes),
            few,
            {},
            ("architecture (small-cnn, not cifar-resnet18)",),
        ),
    ):
        with pytest.raises(InputError) as error:
            train_classifier(classifier, data, **QUICK | change, out=tmp_path, resume=True)
        text = one_line(error)
        assert all(word in text for word in words)
        assert "--overwrite" in text
    assert (tmp_path / "training.json").read_bytes() == before


def test_resume_refuses_damaged_checkpoints(few: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **QUICK, out=tmp_path, on_epoch=stop_after(1))
    tensors = tmp_path / "training-0001.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="damaged or cut short"):
        train_classifier(fresh(few), few, **QUICK, out=tmp_path, resume=True)
    tensors.unlink()
    with pytest.raises(ModelError, match="is missing"):
        train_classifier(fresh(few), few, **QUICK, out=tmp_path, resume=True)
    tensors.write_bytes(whole)
    rewrite(tmp_path / "training.json", lambda state: state.pop("tensors"))
    with pytest.raises(ModelError, match="--overwrite"):
        train_classifier(fresh(few), few, **QUICK, out=tmp_path, resume=True)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ModelError, match=r"training\.json cannot be read"):
        train_classifier(fresh(few), few, **QUICK, out=tmp_path, resume=True)


# --- the folder


def test_the_folder_is_not_overwritten_unasked(few: ImageDataset, tmp_path: Path) -> None:
    options = QUICK | {"epochs": 1}
    with pytest.raises(InputError, match="holds no training to resume"):
        train_classifier(fresh(few), few, **options, out=tmp_path / "net", resume=True)
    assert not (tmp_path / "net").exists()
    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **options | {"epochs": 2}, out=tmp_path / "net", on_epoch=stop_after(1))
    with pytest.raises(InputError) as error:
        train_classifier(fresh(few), few, **options, out=tmp_path / "net")
    assert "go on with --resume" in one_line(error)
    done = train_classifier(fresh(few), few, **options, out=tmp_path / "net", overwrite=True)
    assert load_classifier(tmp_path / "net").fingerprint == done.fingerprint
    with pytest.raises(InputError) as error:
        train_classifier(fresh(few), few, **options, out=tmp_path / "net")
    assert "already holds a classifier" in one_line(error)
    with pytest.raises(Stop):
        train_classifier(fresh(few), few, **options, out=tmp_path / "net", overwrite=True, on_epoch=stop_after(1))
    assert not (tmp_path / "net" / "classifier.json").exists()
    with pytest.raises(InputError, match="not both"):
        train_classifier(fresh(few), few, **options, out=tmp_path / "net", overwrite=True, resume=True)
    with pytest.raises(InputError, match="give --out"):
        train_classifier(fresh(few), few, **options, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is in its place"):
        train_classifier(fresh(few), few, **options, out=tmp_path / "file")


def test_other_files_in_the_folder_stay(few: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    train_classifier(fresh(few), few, **QUICK | {"epochs": 1}, out=tmp_path)
    train_classifier(fresh(few), few, **QUICK | {"epochs": 1}, out=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- refusals


def arrays(n: int = 20, labels: list[int] | None = None, **options: Any) -> ArrayDataset:
    images = np.random.default_rng(0).random((n, 1, 8, 8), dtype=np.float32)
    labels = [index % 2 for index in range(n)] if labels is None else labels
    return ArrayDataset(images, labels, name="made", classes=options.get("classes", ["a", "b"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "number of epochs must be a whole number from 1 up, not 0"),
        ({"epochs": 1.5}, "number of epochs"),
        ({"batch_size": 0}, "batch size must be a whole number from 1 up"),
        ({"batch_size": 21}, "the batch size 21 is more than the 20 images"),
        ({"lr": 0.0}, "learning rate must be above 0"),
        ({"lr": float("nan")}, "learning rate must be above 0"),
        ({"weight_decay": -1.0}, "weight decay"),
        ({"optimizer": "lion"}, "choose one of adam, adamw, sgd"),
        ({"schedule": "linear"}, "choose one of cosine, step, one-cycle, none"),
        ({"seed": -1}, "seed"),
        ({"device": "gpu"}, "no device 'gpu'"),
    ],
)
def test_impossible_settings(change: dict[str, Any], words: str) -> None:
    data = arrays()
    with pytest.raises(InputError) as error:
        train_classifier(fresh(data), data, **QUICK | {"batch_size": 10} | change)
    assert words in one_line(error)


def test_impossible_data(tmp_path: Path) -> None:
    data = arrays()
    unlabelled = arrays(labels=[-1] + [0] * 19)
    for training, validation in ((unlabelled, None), (data, unlabelled)):
        with pytest.raises(InputError) as error:
            train_classifier(
                fresh(data), training, **QUICK | {"batch_size": 10}, validation=validation, out=tmp_path / "x"
            )
        assert "have no label" in one_line(error)
    wrong = arrays()
    wrong.labels = np.full(20, 2)
    with pytest.raises(InputError, match="has the label 2, but only 2 classes"):
        train_classifier(fresh(data), wrong, **QUICK | {"batch_size": 10})
    with pytest.raises(InputError, match="has no images"):
        accuracy(fresh(data), data.subset([]))
    with pytest.raises(ModelError, match="'c' is not one"):
        train_classifier(fresh(data), arrays(classes=["b", "c"]), **QUICK | {"batch_size": 10})
    colour = build_classifier("small-cnn", input_shape=(3, 8, 8), classes=data.classes)
    with pytest.raises(InputError, match="are grey"):
        train_classifier(colour, data, **QUICK | {"batch_size": 10})
    fixed = build_classifier("madry-mnist", input_shape=(1, 28, 28), classes=data.classes)
    with pytest.raises(InputError, match="takes only 28 x 28"):
        train_classifier(fixed, data, **QUICK | {"batch_size": 10})
    assert not (tmp_path / "x").exists()


def test_frozen_and_foreign_nets(tmp_path: Path) -> None:
    data = arrays()
    frozen = fresh(data).requires_grad_(False)
    with pytest.raises(InputError, match="no weights to train"):
        train_classifier(frozen, data, **QUICK | {"batch_size": 10})
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    foreign = Classifier(net, arch="Sequential", input_shape=(1, 8, 8), classes=data.classes)
    with pytest.raises(InputError, match="python:FILE:FACTORY"):
        train_classifier(foreign, data, **QUICK | {"batch_size": 10}, out=tmp_path / "x")
    train_classifier(foreign, data, **QUICK | {"batch_size": 10})  # in memory it may be


def test_a_loss_that_is_not_finite(few: ImageDataset, tmp_path: Path) -> None:
    calls = []

    def breaks(model: nn.Module, batch: Batch, attack: BatchAttack | None) -> Outcome:
        calls.append(1)
        outcome = standard(model, batch, attack)
        return replace(outcome, loss=outcome.loss * (float("nan") if len(calls) > 4 else 1))

    with pytest.raises(ModelError) as error:
        train_classifier(fresh(few), few, **QUICK, objective=breaks, out=tmp_path)
    assert "in epoch 2 of 4" in one_line(error)
    assert json.loads((tmp_path / "training.json").read_text())["epoch"] == 1
    text = (tmp_path / "history.jsonl").read_text()
    assert len(text.splitlines()) == 1


# --- defaults and seeds


def test_defaults_follow_the_size_of_the_data() -> None:
    assert [default_batch_size(n) for n in (1, 10, 100, 1297, 60000)] == [1, 10, 16, 64, 128]
    assert [default_epochs(n, default_batch_size(n)) for n in (10, 1297, 10000, 60000)] == [20, 20, 6, 3]


def test_derived_seeds_differ() -> None:
    seeds = {derived_seed(seed, epoch, use) for seed in (0, 1) for epoch in (1, 2, 11) for use in ("order", "augment")}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu(digits: ImageDataset, tmp_path: Path) -> None:
    torch.cuda.manual_seed_all(3)
    state = torch.cuda.get_rng_state()
    started = time.perf_counter()
    options = {"epochs": 6, "device": "cuda", "progress": False, "out": tmp_path, "augment": True}
    with pytest.raises(Stop):
        train_classifier(fresh(digits), digits, **options, on_epoch=stop_after(3))
    classifier = train_classifier(fresh(digits), digits, **options, resume=True)
    assert time.perf_counter() - started < 60
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert classifier.device.type == "cuda"
    assert accuracy(classifier, open_dataset("digits:test")) > 0.95
    assert load_classifier(tmp_path).fingerprint == classifier.fingerprint
