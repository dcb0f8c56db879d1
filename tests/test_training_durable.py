"""A training that dies goes on as if nothing had happened: kills at random moments, failed writes, broken weights."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nndefense.datasets import ImageDataset, open_dataset
from nndefense.errors import InputError, ModelError
from nndefense.models import Classifier, build_classifier, load_classifier
from nndefense.training import Batch, BatchAttack, InnerAttack, Outcome, make_objective, train_classifier
from nndefense.training.progress import TrainingFolder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")


@functools.lru_cache
def digits() -> ImageDataset:
    return open_dataset("digits:train")


class Narrow(nn.Module):
    """A small net with batch normalisation and dropout: running statistics and chance of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2)
        )
        self.last = nn.Linear(8 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.layers(images))
        return result


def fresh() -> Classifier:
    return build_classifier("small-cnn", input_shape=(1, 8, 8), classes=digits().classes, seed=0)


def everything() -> dict[str, Any]:
    """Robust self-training with all that has a state: momentum, moving average, best weights, checks, a pool."""
    return {
        "dataset": digits().subset(range(48)),
        "objective": make_objective("rst-at"),
        "attack": InnerAttack(eps=0.1, steps=2),
        "unlabelled": digits().subset(range(64, 200)),
        "unlabelled_per_batch": 12,
        "validation": digits().subset(range(1000, 1020)),
        "optimizer": "sgd",
        "lr": 0.02,
        "schedule": "one-cycle",
        "warmup": 0.5,
        "ema": 0.95,
        "clip_norm": 1.0,
        "keep_best": True,
        "checks_per_epoch": 2,
        "augment": True,
        "flip": True,
        "epochs": 3,
        "batch_size": 8,
        "device": "cpu",
        "progress": False,
        "checkpoint_steps": 1,
    }


@functools.lru_cache
def uninterrupted() -> tuple[str, list[dict[str, Any]]]:
    classifier = train_classifier(fresh(), **everything())
    return classifier.fingerprint, plain(classifier.info["history"])


def plain(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without what depends on the clock."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in history]


# Processes that were started, so that nobody but end_of waits for them.
STARTED: list[subprocess.Popen[bytes]] = []
LOADED = "import sys; from ray import cloudpickle; cloudpickle.load(sys.stdin.buffer)()"


def child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; return its number. It ends with 0, or 1 after an error."""
    if end_of(forked(lambda: torch.ones(1, requires_grad=True).backward())):
        # Autograd has threads of its own here, since another test of this process traced a net: no fork can train.
        cloudpickle = pytest.importorskip("ray.cloudpickle")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        STARTED.append(subprocess.Popen([sys.executable, "-c", LOADED], stdin=subprocess.PIPE, env=environment))
        assert STARTED[-1].stdin is not None
        STARTED[-1].stdin.write(cloudpickle.dumps(work))
        STARTED[-1].stdin.close()
        return STARTED[-1].pid
    return forked(work)


def forked(work: Callable[[], object]) -> int:
    """:func:`child` by a fork."""
    number = os.fork()
    if number == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            if "fork-based" not in str(error):
                traceback.print_exc()
        finally:
            os._exit(code)
    return number


def end_of(number: int) -> int:
    """How a process ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def position(out: Path) -> tuple[int, int] | None:
    """The epoch and step of the checkpoint in a folder."""
    try:
        state = json.loads((out / "training.json").read_text())
    except FileNotFoundError:
        return None
    return state["epoch"], state["step"]


def moved_on(out: Path, before: tuple[int, int] | None) -> tuple[int, int] | None:
    """Wait for another checkpoint than that one, or the end of the training."""
    deadline = time.monotonic() + 60
    while (found := position(out)) == before and not (out / "classifier.json").exists():
        assert time.monotonic() < deadline, "the training makes no checkpoints"
        time.sleep(0.001)
    return found


def resumed(out: Path) -> Classifier:
    return train_classifier(fresh(), **everything(), out=out, resume=True)


def survives_kills(out: Path, train: Callable[..., Classifier]) -> None:
    """SIGKILL, again and again, until a run gets through; then the weights are those of an uninterrupted one.

    Args:
        out: folder of the training.
        train: takes ``out``, ``resume`` and ``overwrite``, and trains for at least 18 steps, with a checkpoint at each.
    """
    straight = train()
    chance, kills, places = random.Random(), 0, set()
    for _ in range(200):
        before = position(out)
        options = {"resume": True} if before else {"overwrite": True}
        number = child(lambda options=options: train(out=out, **options))  # type: ignore[misc]
        if kills < 6:
            # A few of the steps further, however fast the machine is, and then at any moment of a step.
            for _ in range(chance.randrange(4)):
                before = moved_on(out, before)
            time.sleep(chance.uniform(0, 0.02))
            os.kill(number, signal.SIGKILL)
        code = end_of(number)
        if code == 0:
            break
        assert code == -signal.SIGKILL, "the training failed by itself"
        kills += 1
        if found := position(out):
            places.add(found)
    assert kills >= 3
    assert any(step for _, step in places), "no kill within an epoch"
    loaded = load_classifier(out)
    assert loaded.fingerprint == straight.fingerprint, f"after kills with checkpoints at {sorted(places)}"
    assert plain(loaded.info["history"]) == plain(straight.info["history"])
    assert sorted(path.name for path in out.iterdir()) == ["classifier.json", "history.jsonl", "model.safetensors"]


@pytest.mark.slow
@needs_fork
def test_killed_at_random_moments(tmp_path: Path) -> None:
    survives_kills(tmp_path / "net", lambda **options: train_classifier(fresh(), **everything(), **options))


@needs_fork
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_stage_of_a_checkpoint(tmp_path: Path, after: bool) -> None:
    """SIGKILL just before and just after each file is put in its place."""
    expected, _ = uninterrupted()
    out = tmp_path / "net"

    def train(stage: int, options: dict[str, Any]) -> None:
        count, replace = 0, os.replace

        def deadly(source: Any, target: Any) -> None:
            nonlocal count
            if after:
                replace(source, target)
            count += 1
            if count == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            if not after:
                replace(source, target)

        os.replace = deadly
        train_classifier(fresh(), **everything(), out=out, **options)

    for stage in (1, 2, 3, 4, 5, 16):
        unfinished = (out / "training.json").exists()
        options = {"resume": True} if unfinished else {"overwrite": True}
        number = child(lambda stage=stage, options=options: train(stage, options))  # type: ignore[misc]
        assert end_of(number) == -signal.SIGKILL
    assert resumed(out).fingerprint == expected


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, stopping_after(3, patch):
        train_classifier(fresh(), **everything(), out=tmp_path)
    own = ["history.jsonl", "training.json", "training-0001.safetensors", "model.safetensors", "classifier.json"]
    for name in own:
        (tmp_path / f"{name}.4711.part").write_bytes(b"half")
    (tmp_path / "notes.part").write_text("mine")
    resumed(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["classifier.json", "history.jsonl", "model.safetensors", "notes.part"]


class Stop(Exception):
    pass


@contextmanager
def stopping_after(saves: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a training end after that many checkpoints."""
    save, count = TrainingFolder.save, 0

    def counted(self: TrainingFolder, *arguments: Any) -> None:
        nonlocal count
        save(self, *arguments)
        count += 1
        if count == saves:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(TrainingFolder, "save", counted)
        with pytest.raises(Stop):
            yield


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    few = digits().subset(range(100))
    options: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 20,
        "augment": True,
        "optimizer": optimizer,
        "device": "cpu",
        "progress": False,
        "checkpoint_steps": 2,
        "patience": 2,
        "validation": few,
    }
    net = {"net": Narrow(), "arch": "small-cnn", "input_shape": few.shape, "classes": few.classes}
    start = {name: tensor.clone() for name, tensor in net["net"].state_dict().items()}  # type: ignore[union-attr]

    def begun() -> Classifier:
        other = Narrow()
        other.load_state_dict(start)
        return Classifier(**{**net, "net": other})  # type: ignore[arg-type]

    straight = train_classifier(begun(), few, **options)
    # Before the first step, then after steps 2 and 4, after the epoch, after step 2 of the second.
    with stopping_after(5, monkeypatch):
        train_classifier(begun(), few, **options, out=tmp_path)
    state = json.loads((tmp_path / "training.json").read_text())
    assert (state["epoch"], state["step"]) == (1, 2)
    assert (tmp_path / "training-0001-000002.safetensors").exists()
    again = train_classifier(begun(), few, **options, out=tmp_path, resume=True)
    assert again.fingerprint == straight.fingerprint
    assert plain(again.info["history"]) == plain(straight.info["history"])


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = everything() | {"checkpoint_steps": None, "checkpoint_seconds": 1e-9}
    with stopping_after(4, monkeypatch):
        train_classifier(fresh(), **options, out=tmp_path)
    state = json.loads((tmp_path / "training.json").read_text())
    assert (state["epoch"], state["step"]) == (0, 3)
    for change, words in (
        ({"checkpoint_steps": 0}, "steps between checkpoints"),
        ({"checkpoint_seconds": 0.0}, "seconds between checkpoints"),
    ):
        with pytest.raises(InputError, match=words):
            train_classifier(fresh(), **everything() | change)


@pytest.mark.parametrize("failing", ["training-", "training.json", "history"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """The write of some file fails halfway, in the middle of the second epoch."""
    expected, _ = uninterrupted()
    with stopping_after(12, monkeypatch):
        train_classifier(fresh(), **everything(), out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("training")}
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name.startswith(failing):
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError) as error:
            train_classifier(fresh(), **everything(), out=tmp_path, resume=True)
    assert "No space left on device" in str(error.value)
    assert "free space" in str(error.value)
    assert not list(tmp_path.glob("*.part"))
    if failing != "history":
        assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert resumed(tmp_path).fingerprint == expected


@needs_fork
def test_a_limit_of_the_system_on_files(tmp_path: Path) -> None:
    """The same with a limit that the kernel keeps: no file may grow beyond 64 KiB."""
    import resource

    def train() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        with pytest.raises(InputError, match="cannot be written"):
            train_classifier(fresh(), **everything(), out=tmp_path, resume=True)

    with pytest.MonkeyPatch.context() as patch, stopping_after(3, patch):
        train_classifier(fresh(), **everything(), out=tmp_path)
    assert end_of(child(train)) == 0
    assert resumed(tmp_path).fingerprint == uninterrupted()[0]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """The loss is finite, but the step destroys the weights: the last checkpoint is older than that."""
    steps = 0

    def breaks(model: nn.Module, batch: Batch, attack: BatchAttack | None) -> Outcome:
        nonlocal steps
        steps += 1
        outcome = make_objective("rst-at")(model, batch, attack)
        if steps == 5:
            outcome.loss.register_hook(lambda gradient: gradient * float("inf"))
        return outcome

    breaks.description = "rst"  # type: ignore[attr-defined]
    options = everything() | {"objective": breaks, "clip_norm": None}
    with pytest.raises(ModelError, match="the weights are no longer finite numbers"):
        train_classifier(fresh(), **options, out=tmp_path)
    state = json.loads((tmp_path / "training.json").read_text())
    assert (state["epoch"], state["step"]) == (0, 4)
    steps = 100
    again = train_classifier(fresh(), **options, out=tmp_path, resume=True)
    assert again.fingerprint == train_classifier(fresh(), **options).fingerprint


def test_a_damaged_file_of_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stopping_after(9, monkeypatch):
        train_classifier(fresh(), **everything(), out=tmp_path)
    (best,) = tmp_path.glob("training-best-*.safetensors")
    best.write_bytes(best.read_bytes()[:-1])
    with pytest.raises(ModelError, match="damaged or cut short"):
        resumed(tmp_path)


def test_what_a_resume_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stopping_after(2, monkeypatch):
        train_classifier(fresh(), **everything(), out=tmp_path)
    for change, words in (
        ({"attack": InnerAttack(eps=0.2, steps=2)}, "attack (eps 0.1, not 0.2)"),
        ({"unlabelled": digits().subset(range(64, 201))}, "unlabelled data ("),
        ({"ema": None}, "ema (0.95, not None)"),
        ({"validation": digits().subset(range(1000, 1021))}, "choice of the final weights ("),
        ({"objective": make_objective("rst-at", mix=0.25)}, "objective ("),
    ):
        with pytest.raises(InputError) as error:
            train_classifier(fresh(), **everything() | change, out=tmp_path, resume=True)
        assert words in str(error.value)
