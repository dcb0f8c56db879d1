"""Ensemble adversarial training: attack and loss in NumPy, the cache of attacked images, kills, what it is for."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import fails, nndefense
from helpers import digits, images, untrained
from numbers_net import SIDE, Numbers, slopes, tanh_net
from torch import Tensor

from nndefense.attacks import fgsm, pgd
from nndefense.errors import DataError, InputError
from nndefense.models import Classifier, load_classifier
from nndefense.training import (
    AttackedImages,
    Batch,
    EnsembleAttack,
    InnerAttack,
    ensemble_attack,
    make_objective,
    train_classifier,
    write_attacked_images,
)
from nndefense.training.batches import EpochBatches
from nndefense.training.launcher import Team
from nndefense.training.random_state import kept
from nndefense.training.settings import make_settings
from nndefense.training.validation import stronger

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
N, EPS = 8, 0.2
Y = np.array([0, 1, 2, 3, 0, 1, 2, 3])
STEP = InnerAttack.fgsm(EPS)


def the_images() -> Tensor:
    return torch.rand(N, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


X = the_images().numpy()


def the_batch() -> Batch:
    return Batch(the_images(), torch.from_numpy(Y))


def seed_for(number: int, of: int) -> int:
    """A seed under which the first draw is that net."""
    for seed in range(1000):
        torch.manual_seed(seed)
        if int(torch.randint(of, ())) == number:
            return seed
    raise AssertionError("one of so many nets is never drawn")


def plain_fgsm(net: Numbers) -> np.ndarray:
    return np.clip(X + EPS * np.sign(net.slope(X, net.logits(X).argmax(1))), 0, 1)


def step_ll(net: Numbers) -> np.ndarray:
    return np.clip(X - EPS * np.sign(net.slope(X, net.logits(X).argmin(1))), 0, 1)


def r_fgsm(net: Numbers) -> np.ndarray:
    """With a = eps / 4; the generator stands where the draw of the net has left it."""
    start = np.clip(X + EPS / 4 * np.sign(torch.randn(X.shape, dtype=torch.float64).numpy()), 0, 1)
    moved = start + EPS * 3 / 4 * np.sign(net.slope(start, net.logits(X).argmax(1)))
    return np.clip(moved, X - EPS, X + EPS).clip(0, 1)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["source 0", "source 1", "itself"])
@pytest.mark.parametrize(
    ("step", "paper", "mix"),
    [
        (STEP, plain_fgsm, 0.5),
        (InnerAttack.fgsm(EPS, target="least-likely"), step_ll, 0.5),
        (InnerAttack.r_fgsm(EPS, EPS / 4), r_fgsm, 0.5),
        (STEP, plain_fgsm, 0.8),
    ],
    ids=["fgsm", "step-ll", "r-fgsm", "mix"],
)
def test_the_papers_loss(number: int, step: InnerAttack, paper: Callable[[Numbers], np.ndarray], mix: float) -> None:
    nets = [tanh_net(11), tanh_net(12), tanh_net(3)]
    attack, seed = EnsembleAttack(nets[:2], step), seed_for(number, 3)
    torch.manual_seed(seed)
    outcome = make_objective("ensemble-adversarial", mix=mix)(nets[2], the_batch(), attack)
    torch.manual_seed(seed)
    assert int(torch.randint(3, ())) == number
    moved, net = paper(Numbers(nets[number])), Numbers(nets[2])
    expected = (1 - mix) * net.ce(X, Y).mean() + mix * net.ce(moved, Y).mean()
    assert float(outcome.loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    assert outcome.clean is not None
    assert outcome.robust is not None
    assert np.allclose(outcome.robust.numpy(), net.logits(moved), atol=1e-12)
    # Every net is as it was, and no gradient has reached a source.
    assert all(module.training for module in nets)
    outcome.loss.backward()
    assert all(weight.grad is None for source in nets[:2] for weight in source.parameters())
    assert all(weight.grad is not None for weight in nets[2].parameters())


def test_the_gradient_by_finite_differences() -> None:
    model, seed = tanh_net(), seed_for(0, 2)
    objective, attack = make_objective("ensemble-adversarial"), EnsembleAttack([tanh_net(11)], STEP)

    def loss() -> Tensor:
        torch.manual_seed(seed)
        return objective(model, the_batch(), attack).loss

    parameters = list(model.parameters())
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
    assert torch.allclose(found, slopes(loss, parameters), rtol=1e-6, atol=1e-8)


def test_every_net_is_drawn_equally_often() -> None:
    """2,000 draws of one of four: chi-squared with 3 degrees of freedom below its 99.9 % point."""
    model, drawn = tanh_net(), []
    attack = EnsembleAttack([tanh_net(seed) for seed in (1, 2, 3)], STEP)
    x, y = the_images()[:1], torch.zeros(1, dtype=torch.int64)

    def note(number: int) -> Tensor:
        drawn.append(number)
        return x

    with kept(torch.device("cpu")):
        torch.manual_seed(4)
        for _ in range(2000):
            attack(model, x, y, others=note)
    counts = np.bincount([*drawn, *[3] * (2000 - len(drawn))], minlength=4)
    assert float(((counts - 500) ** 2 / 500).sum()) < 16.27


def test_labels_cannot_leak() -> None:
    model = tanh_net()
    attack = EnsembleAttack([tanh_net(11)], STEP)
    for number in (0, 1):
        made = []
        for y in (torch.from_numpy(Y), torch.from_numpy((Y + 1) % 4)):
            torch.manual_seed(seed_for(number, 2))
            made.append(attack(model, the_images(), y))
        assert torch.equal(*made)
    for step in (InnerAttack(eps=0.1), InnerAttack.single_step(0.1), InnerAttack.fgsm(0.1, target="label")):
        with pytest.raises(InputError, match="must not see the label"):
            EnsembleAttack([], step)


def test_the_single_steps_are_those_of_the_attacks() -> None:
    model, x, y = tanh_net().eval(), the_images(), torch.from_numpy(Y)
    with torch.no_grad():
        predicted, unlikely = model(x).argmax(1), model(x).argmin(1)
    assert torch.equal(InnerAttack.fgsm(0.1)(model, x, y), fgsm(model, x, predicted, eps=0.1))
    least = InnerAttack.fgsm(0.1, target="least-likely")(model, x, y)
    assert torch.equal(least, fgsm(model, x, unlikely, eps=0.1, targeted=True))
    moved = InnerAttack.r_fgsm(0.3)(model, x, y)
    assert InnerAttack.r_fgsm(0.3).start_scale == pytest.approx(0.05)
    assert float((moved - x).abs().max()) <= 0.3 + 1e-12
    with pytest.raises(InputError, match=r"the noise of R\+FGSM is 0.4"):
        InnerAttack.r_fgsm(0.3, 0.4)
    with pytest.raises(InputError, match="use it with linf, not with l2"):
        InnerAttack(eps=1.0, norm="l2", start="sign")


def test_what_is_refused(tmp_path: Path) -> None:
    model, batch = tanh_net(), the_batch()
    objective = make_objective("ensemble-adversarial")
    for attack in (InnerAttack.fgsm(0.1), lambda model, x, y: x):
        with pytest.raises(InputError, match="takes an EnsembleAttack"):
            objective(model, batch, attack)
    with pytest.raises(InputError, match="no use for unlabelled images"):
        objective(model, Batch(batch.images, batch.labels, torch.arange(N) < 4), EnsembleAttack([], STEP))
    with pytest.raises(InputError, match="raises the cross-entropy, not kl"):
        make_objective("trades")(model, batch, EnsembleAttack([], STEP))
    with pytest.raises(InputError, match="a source is a Classifier, not Linear"):
        EnsembleAttack([torch.nn.Linear(2, 2)], STEP)  # type: ignore[list-item]
    with pytest.raises(InputError, match="must not depend on labels"):
        write_attacked_images(untrained(), digits("train"), InnerAttack(eps=0.1), tmp_path)
    net = untrained(arch="strided-cnn")
    options = {"objective": "ensemble-adversarial", "device": "cpu", "progress": False}
    with pytest.raises(InputError, match="source 2 is the net in training"):
        train_classifier(net, digits("train"), attack=EnsembleAttack([untrained(), net], STEP), **options)
    with pytest.raises(InputError, match="source 1 cannot attack digits:train"):
        train_classifier(net, digits("train"), attack=EnsembleAttack([tanh_net().float()], STEP), **options)


def test_the_checks_attack_the_net_itself() -> None:
    attack = EnsembleAttack([untrained()], InnerAttack.r_fgsm(0.3))
    assert stronger(attack) == InnerAttack(eps=0.3, steps=10, start_scale=attack.step.start_scale)


# The cache


@functools.lru_cache
def few() -> Any:
    return digits("train").subset(range(5, 205))


@functools.lru_cache
def taught(seed: int) -> Classifier:
    """A source that has learned something."""
    net = untrained(seed, arch="strided-cnn")
    with torch.enable_grad():
        return train_classifier(net, digits("train"), epochs=8, batch_size=64, device="cpu", progress=False)


def everything(found: AttackedImages) -> Tensor:
    return found.read(torch.arange(len(found)))


def small_shards(patch: pytest.MonkeyPatch) -> None:
    """Shards of 32 images in batches of 16."""
    patch.setattr(ensemble_attack, "_SHARD_BYTES", 32 * 64 * 4)
    patch.setattr(ensemble_attack, "_BATCH", 16)


@pytest.mark.parametrize("step", [STEP, InnerAttack.fgsm(EPS, target="least-likely")], ids=["fgsm", "step-ll"])
def test_what_is_kept_is_what_the_source_makes(tmp_path: Path, step: InnerAttack) -> None:
    source, dataset = taught(1), few()
    found = write_attacked_images(source, dataset, step, tmp_path, progress=False)
    x, y = dataset.batch(np.arange(len(dataset)))
    assert torch.equal(everything(found), step(source, x, y))
    assert not torch.equal(everything(found), x)
    rows = torch.tensor([7, 3, 199, 3])
    assert torch.equal(found.read(rows), everything(found)[rows])
    (folder,) = tmp_path.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["identity"]["source"] == source.fingerprint
    assert manifest["identity"]["data"] == dataset.fingerprint
    assert manifest["identity"]["attack"] == step.as_dict()
    assert torch.equal(everything(AttackedImages.open(tmp_path, dataset, source, step)), everything(found))


def test_random_starts_differ_by_row_and_repeat(tmp_path: Path) -> None:
    step, source = InnerAttack.r_fgsm(EPS), taught(1)
    before = torch.random.get_rng_state()
    made = [
        everything(write_attacked_images(source, few(), step, tmp_path / name, progress=False)) for name in ("a", "b")
    ]
    assert torch.equal(*made)
    assert torch.equal(before, torch.random.get_rng_state())
    x, _ = few().batch(np.arange(len(few())))
    assert float((made[0] - x).abs().max()) <= EPS + 1e-6


def test_each_set_source_and_attack_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = taught(1), few()
    for other in (
        (source, dataset, STEP),
        (untrained(5, arch="strided-cnn"), dataset, STEP),
        (source, dataset.subset(range(199)), STEP),
        (source, dataset, InnerAttack.fgsm(EPS / 2)),
        (source, dataset, InnerAttack.fgsm(EPS, target="least-likely")),
    ):
        with pytest.raises(DataError, match="write it by write_attacked_images"):
            AttackedImages.open(tmp_path, other[1], other[0], other[2])
        write_attacked_images(*other, tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 5
    # What is there is not made again.
    monkeypatch.setattr(InnerAttack, "__call__", None)
    write_attacked_images(source, dataset, STEP, tmp_path, progress=False)


def test_a_damaged_shard_is_seen_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    source, dataset = taught(1), few()
    whole = everything(write_attacked_images(source, dataset, STEP, tmp_path, progress=False)).clone()
    (folder,) = tmp_path.iterdir()
    shards = sorted(folder.glob("*.h5"))
    assert len(shards) == 7
    for number, damage in enumerate((lambda data: data[:-40], lambda data: data[:-9] + b"x" + data[-8:], None)):
        if damage is None:
            shards[number].unlink()
        else:
            shards[number].write_bytes(damage(shards[number].read_bytes()))
        with pytest.raises(DataError, match="missing or damaged"):
            AttackedImages.open(tmp_path, dataset, source, STEP)
        assert torch.equal(everything(write_attacked_images(source, dataset, STEP, tmp_path, progress=False)), whole)
        AttackedImages.open(tmp_path, dataset, source, STEP)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = taught(1), few()
    with monkeypatch.context() as patch:
        patch.setattr(ensemble_attack.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
        with pytest.raises(DataError, match="choose another folder, or do without the cache"):
            write_attacked_images(source, dataset, STEP, tmp_path, progress=False)

    def full(part: Path, data: memoryview) -> None:
        part.write_text("some of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match=r"No space left on device\): free some space and run the same again"):
            write_attacked_images(source, dataset, STEP, tmp_path, progress=False)
    assert len(write_attacked_images(source, dataset, STEP, tmp_path, progress=False)) == len(dataset)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is in its place"):
        write_attacked_images(source, dataset, STEP, tmp_path / "file", progress=False)


def test_another_job_with_the_same_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done while this one writes, and takes what this one writes for a dead writer's."""
    small_shards(monkeypatch)
    source, dataset = taught(1), few()
    whole = everything(write_attacked_images(source, dataset, STEP, tmp_path / "a", progress=False))
    write = Path.write_bytes

    def overtaken(part: Path, data: memoryview) -> None:
        monkeypatch.setattr(Path, "write_bytes", write)
        part.write_bytes(data)
        write_attacked_images(source, dataset, STEP, tmp_path / "b", progress=False)

    monkeypatch.setattr(Path, "write_bytes", overtaken)
    assert torch.equal(everything(write_attacked_images(source, dataset, STEP, tmp_path / "b", progress=False)), whole)
    (folder,) = (tmp_path / "b").iterdir()
    assert len(list(folder.iterdir())) == 8


def child(work: Callable[[], object]) -> int:
    number = os.fork()
    if number == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return number


@needs_fork
def test_a_killed_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each of the files is in its place; the bits are those of a job that was not killed."""
    small_shards(monkeypatch)
    source, dataset, step = taught(1), few(), InnerAttack.r_fgsm(EPS)
    whole = everything(write_attacked_images(source, dataset, step, tmp_path / "whole", progress=False))
    count, replace = 0, os.replace

    def deadly(first: Any, second: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(first, second)

    kills = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", deadly)
            number = child(lambda: write_attacked_images(source, dataset, step, tmp_path / "out", progress=False))
        code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    # Seven shards and a manifest, two files a run.
    assert kills == 3
    found = AttackedImages.open(tmp_path / "out", dataset, source, step)
    assert torch.equal(everything(found), whole)
    assert not list(found.folder.glob("*.part"))


class AsIs:
    """In the place of attacked images: the images themselves."""

    def read(self, rows: Tensor) -> Tensor:
        return few().batch(rows)[0]


@pytest.mark.parametrize("options", [{}, {"augment": True}, {"flip": True}, {"augment": True, "flip": True}])
@pytest.mark.parametrize("processes", [1, 2])
def test_attacked_images_move_with_the_clean_ones(options: dict[str, Any], processes: int) -> None:
    settings = make_settings(200, {"epochs": 1, "batch_size": 64, "channels_last": True, **options})
    team = Team(torch.device("cpu"), rank=processes - 1, size=processes)
    batches = EpochBatches(few(), torch.from_numpy(few().labels), settings, team)
    batches.others = (AsIs(), AsIs())  # type: ignore[assignment]
    moved = 0
    with kept(torch.device("cpu")):
        for share in batches.epoch(1):
            assert share.batch.others is not None
            assert torch.equal(share.batch.others(1), share.batch.images)
            assert share.batch.rows is not None
            moved += int(not torch.equal(few().batch(share.batch.rows)[0], share.batch.images))
    assert (moved > 0) is bool(options)


# Trainings


def ensemble(cache: Path | None, step: InnerAttack = STEP) -> EnsembleAttack:
    return EnsembleAttack([taught(1), taught(2)], step, cache=cache)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "objective": "ensemble-adversarial", "epochs": 3, "batch_size": 25, "augment": True, "flip": True, "ema": 0.9,
        "device": "cpu", "progress": False, "checkpoint_steps": 1, **changes,
    }  # fmt: skip


def fresh() -> Classifier:
    return untrained(arch="strided-cnn")


@needs_fork
@pytest.mark.slow
def test_a_training_with_a_cache_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the job, then in the training, at any file; in the end the weights are those of an uninterrupted one."""
    small_shards(monkeypatch)
    straight = train_classifier(fresh(), few(), attack=ensemble(tmp_path / "one"), **settings())
    out, replace, kills = tmp_path / "net", os.replace, []
    for stage in (5, 12, 20, 30, 400):
        count = 0

        def deadly(first: Any, second: Any, stage: int = stage) -> None:
            nonlocal count
            count += 1
            if count == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(first, second)

        resume = (out / "training.json").exists()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", deadly)
            number = child(
                lambda resume=resume: train_classifier(  # type: ignore[misc]
                    fresh(), few(), attack=ensemble(tmp_path / "two"), out=out, resume=resume, **settings()
                )
            )
        code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        kills.append((code, resume))
    # In the job and in the training, whose first checkpoint comes before the job.
    assert kills == [(-9, False), (-9, True), (-9, True), (-9, True), (0, True)]
    assert load_classifier(out).fingerprint == straight.fingerprint


def test_what_the_weights_depend_on(tmp_path: Path) -> None:
    cached = train_classifier(fresh(), few(), attack=ensemble(tmp_path / "a"), out=tmp_path / "net", **settings())
    other = train_classifier(fresh(), few(), attack=ensemble(None), **settings())
    # The augmented image is attacked, not the image as it stands in the set.
    assert cached.fingerprint != other.fingerprint
    record = cached.info["attack"]
    assert record == {
        "name": "ensemble",
        "step": STEP.as_dict(),
        "sources": [taught(1).fingerprint, taught(2).fingerprint],
        "cached": True,
    }
    for attack in (ensemble(None), EnsembleAttack([taught(1)], STEP, cache=tmp_path / "a")):
        with pytest.raises(InputError, match="was started with other attack"):
            train_classifier(fresh(), few(), attack=attack, out=tmp_path / "net", resume=True, **settings())
    # Where the cache lies is no matter.
    again = train_classifier(fresh(), few(), attack=ensemble(tmp_path / "b"), **settings())
    assert again.fingerprint == cached.fingerprint


def test_without_augmentation_the_cache_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"augment": False, "flip": False, "batch_size": 50, "epochs": 2}
    cached = train_classifier(fresh(), few(), attack=ensemble(tmp_path), **settings(**plain))
    anew = train_classifier(fresh(), few(), attack=ensemble(None), **settings(**plain))
    # But for rounding: the sources saw the images in other batches.
    for first, second in zip(cached.parameters(), anew.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-3)
    calls = []
    for source in (taught(1), taught(2)):
        monkeypatch.setattr(source, "forward", lambda x: calls.append(len(x)))
    train_classifier(fresh(), few(), attack=ensemble(tmp_path), **settings(**plain))
    assert not calls


@pytest.mark.slow
def test_what_it_is_for_and_what_breaks_it() -> None:
    """Attacks carried over from a net it never saw do less harm; PGD on the net itself takes most of it away."""
    x, y = images("test", 300)
    options = {"epochs": 12, "batch_size": 64, "lr": 5e-3, "device": "cpu", "progress": False}
    standard = train_classifier(fresh(), digits("train"), **options)
    trained = train_classifier(
        fresh(), digits("train"), objective="ensemble-adversarial", attack=ensemble(None), **options
    )
    held_out = taught(3)
    carried = fgsm(held_out, x, y, eps=EPS)

    def right(net: Classifier, batch: Tensor) -> float:
        return float((net(batch).argmax(1) == y).float().mean())

    own = pgd(trained, x, y, eps=EPS, steps=30, restarts=2, generator=torch.Generator().manual_seed(0))
    assert right(trained, x) > 0.9
    assert right(trained, carried) > right(standard, carried) + 0.1
    assert right(trained, own) < right(trained, carried) - 0.2


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from nndefense.datasets import open_dataset
from nndefense.models import build_classifier
from nndefense.training import EnsembleAttack, InnerAttack, train_classifier

place, rank = Path(sys.argv[1]), int(os.environ["RANK"])
few = open_dataset("digits:train").subset(range(90))
net, source = (build_classifier("strided-cnn", input_shape=(1, 8, 8), classes=few.classes, seed=s) for s in (0, 1))
attack = EnsembleAttack([source], InnerAttack.r_fgsm(0.2), cache=place / "cache")
net = train_classifier(net, few, objective="ensemble-adversarial", attack=attack, epochs=3, batch_size=15, augment=True,
                       device="cpu", progress=False)
(place / f"found-{rank}.json").write_text(json.dumps(net.fingerprint))
"""


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path) -> None:
    """One of them fills the cache, both read it, and both end with the same weights."""
    pytest.importorskip("lightning_fabric")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
         str(tmp_path / "script.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["images-000000.h5", "manifest.json"]


def test_the_command(tmp_path: Path) -> None:
    quick = (
        "train",
        "--dataset",
        "digits:train[:200]",
        "--device",
        "cpu",
        "--quiet",
        "--epochs",
        1,
        "--batch-size",
        50,
    )
    for seed in (1, 2):
        nndefense(*quick, "--arch", "strided-cnn", "--seed", seed, "--out", tmp_path / f"source{seed}")
    sources = ("--source", tmp_path / "source1", "--source", tmp_path / "source2")
    words = (*quick, "--objective", "ensemble-adversarial", "--eps", "0.2", "--arch", "strided-cnn")
    out = tmp_path / "net"
    said = nndefense(
        *(*words, *sources, "--source-cache", tmp_path / "cache", "--out", out, "--json", "--holdout", 50),
        *("--check-steps", 12),
    ).json
    assert said["objective"] == "ensemble-adversarial(mix=0.5)"
    info = load_classifier(out).info
    step = InnerAttack.fgsm(0.2).as_dict()
    assert info["attack"]["step"] == step
    assert info["attack"]["cached"]
    assert len(info["attack"]["sources"]) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for name, more, expected in (
        ("r", ("--attack", "r-fgsm", "--start-scale", 0.05), InnerAttack.r_fgsm(0.2, 0.05)),
        ("ll", ("--target", "least-likely"), InnerAttack.fgsm(0.2, target="least-likely")),
        ("pgd", ("--attack", "pgd", "--steps", 2), InnerAttack(eps=0.2, steps=2, target="predicted")),
    ):
        nndefense(*words, *sources, *more, "--out", tmp_path / name)
        found = load_classifier(tmp_path / name).info["attack"]
        assert found["step"] == expected.as_dict()
        assert not found["cached"]
    no = ("--out", tmp_path / "no")
    fails(2, "name trained classifiers by --source", *words, *no)
    fails(2, "must not see the label", *words, *sources, *no, "--target", "label")
    fails(2, "attacks by gradient steps", *words, *sources, *no, "--attack", "spatial")
    fails(2, "R+FGSM is an attack in linf, not in l2", *words, *sources, *no, "--attack", "r-fgsm", "--norm", "l2")
    fails(2, "leave --source out", *quick, *sources, *no, "--objective", "adversarial", "--eps", "0.2")
    fails(4, "there is no classifier at", *words, "--source", tmp_path / "nowhere", *no)
