"""``nndefense train``: every option reaches the training, and wrong ones are told in one line."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command import fails, nndefense

from nndefense.cli.train import InnerAttackOptions
from nndefense.datasets import open_dataset
from nndefense.errors import InputError
from nndefense.models import load_classifier
from nndefense.training import InnerAttack
from nndefense.training.labellers import Teacher
from nndefense.training.pools import complement
from nndefense.training.pseudo_job import write_pseudo_labels

QUICK = ("train", "--dataset", "digits:train[:200]", "--device", "cpu", "--quiet", "--epochs", 2, "--batch-size", 25)


def choice(**changes: object) -> InnerAttackOptions:
    return InnerAttackOptions(**{"attack": "pgd", "eps": "0.1", **changes})  # type: ignore[arg-type]


def test_an_adversarial_training(tmp_path: Path) -> None:
    out = tmp_path / "net"
    words = (
        *(*QUICK, "--out", out, "--json", "--objective", "trades", "--weight", "beta=3", "--eps", "16/255"),
        *("--steps", 3, "--norm", "linf", "--step-size", "0.02", "--optimizer", "sgd", "--lr", 0.05, "--momentum", 0.8),
        *("--no-nesterov", "--weight-decay", 5e-4, "--schedule", "step", "--milestones", "1,1.5", "--gamma", 0.2),
        *("--warmup", 0.25, "--ema", 0.9, "--clip-norm", 5, "--augment", "--flip", "--precision", "bfloat16"),
        *("--channels-last", "--holdout", 40, "--check-steps", 4, "--checks-per-epoch", 2, "--check-images", 30),
        *("--keep-best", "--checkpoint-steps", 3, "--checkpoint-seconds", 0, "--steps-per-epoch", 6, "--seed", 3),
    )
    said = nndefense(*words).json
    loaded = load_classifier(out)
    assert said["fingerprint"] == loaded.fingerprint
    assert said["objective"] == "trades(beta=3.0)" == loaded.info["objective"]
    assert 0 < said["validation_accuracy"] <= 1
    assert said["robust_validation_accuracy"] == said["best"]["score"]
    settings = loaded.info["settings"]
    expected = {
        "epochs": 2, "batch_size": 25, "steps_per_epoch": 6, "lr": 0.05, "weight_decay": 5e-4, "optimizer": "sgd",
        "momentum": 0.8, "nesterov": False, "schedule": "step", "milestones": [1.0, 1.5], "gamma": 0.2, "warmup": 0.25,
        "ema": 0.9, "clip_norm": 5.0, "augment": True, "flip": True, "precision": "bfloat16", "channels_last": True,
        "compile": False, "keep_best": True, "patience": None, "checks_per_epoch": 2, "check_images": 30, "seed": 3,
        "peak": 0.4, "unlabelled_per_batch": None, "refresh_steps": None, "stop_on_collapse": False,
    }  # fmt: skip
    assert settings == expected
    attack = InnerAttack(eps=16 / 255, steps=3, step_size=0.02, start="gaussian").as_dict()
    assert loaded.info["attack"] == attack
    assert loaded.info["selection"]["attack"] == InnerAttack(eps=16 / 255, steps=4).as_dict()
    assert loaded.info["data"]["n"] == 160
    assert loaded.info["validation"]["n"] == 40
    assert nndefense(*words, "--resume").json["fingerprint"] == loaded.fingerprint
    fails(2, "clip norm (5.0, not 6.0)", *words, "--resume", "--clip-norm", 6)


def test_a_single_step_and_what_is_printed(tmp_path: Path) -> None:
    done = nndefense(
        *(*QUICK, "--out", tmp_path, "--objective", "adversarial", "--attack", "single-step", "--eps", 0.1),
        *("--schedule", "one-cycle", "--peak", 0.3, "--validation", "digits:test[:50]", "--stop-on-collapse"),
    )
    assert done.code == 0, done.err
    assert f"{tmp_path}: small-cnn, training accuracy 0." in done.out
    assert "under attack (on 50 of them)" in done.out
    assert load_classifier(tmp_path).info["attack"] == InnerAttack.single_step(0.1).as_dict()


def test_self_training_with_a_file_of_pseudo_labels(tmp_path: Path) -> None:
    teacher, labels = tmp_path / "teacher", tmp_path / "labels.h5"
    assert nndefense(*QUICK, "--out", teacher, "--labels", 100).code == 0
    assert load_classifier(teacher).info["data"]["n"] == 100
    _, pool = complement(open_dataset("digits:train[:200]"), 100, 0)
    write_pseudo_labels(Teacher(load_classifier(teacher)), pool, labels, progress=False)
    student = (*QUICK, "--labels", 100, "--objective", "rst-at", "--eps", 0.1, "--steps", 2, "--pseudo-labels", labels)
    said = nndefense(*student, "--out", tmp_path / "student", "--unlabelled-per-batch", 10, "--json").json
    info = load_classifier(tmp_path / "student").info
    assert said["objective"].startswith("rst-at(")
    assert info["unlabelled"]["n"] == 100
    assert info["settings"]["unlabelled_per_batch"] == 10
    fails(2, "--pseudo-labels are those of a pool", *QUICK, "--out", tmp_path / "x", "--pseudo-labels", labels)
    other = ("--unlabelled", "digits:train[200:300]")
    fails(2, "nndefense pseudo-label", *QUICK, "--out", tmp_path / "x", *other)
    fails(3, "", *QUICK, "--out", tmp_path / "x", *other, "--pseudo-labels", labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "adversarial"], "give --eps"),
        (["--objective", "madry"], "there is no objective 'madry'"),
        (["--objective", "trades", "--weight", "gamma=1", "--eps", "0.1"], "no weight 'gamma'"),
        (["--objective", "trades", "--weight", "6", "--eps", "0.1"], "--weight is '6'"),
        (["--objective", "adversarial", "--eps", "-0.1"], "eps is -0.1"),
        (["--objective", "adversarial", "--eps", "much"], "'much'"),
        (["--objective", "adversarial", "--eps", "0.1", "--steps", "0"], "steps"),
        (["--schedule", "step"], "needs milestones"),
        (["--precision", "half"], "choose one of float32"),
        (["--keep-best"], "validation"),
        (["--holdout", "20", "--validation", "digits:test"], "not both"),
        (["--check-steps", "5", "--holdout", "20"], "--check-steps"),
        (["--batch-size", "201"], "the batch size 201 is more than the 200 images"),
        (["--unlabelled-per-batch", "5"], "no unlabelled images"),
        (["--objective", "self-training"], "give a pool"),
        (["--labels", "200"], "cannot take 200 labelled images"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    fails(2, message, *QUICK, "--out", tmp_path / "x", *words)
    assert not (tmp_path / "x").exists()


def test_the_attack_that_is_made() -> None:
    assert choice().made("adversarial") == InnerAttack(eps=0.1)
    assert choice().made("rst-trades") == InnerAttack(eps=0.1, start="gaussian")
    assert choice(start="none", attack_mode="train").made("trades") == InnerAttack(eps=0.1, start="none", mode="train")
    assert choice(attack="single-step", step_size="0.2").made("adversarial") == InnerAttack(
        eps=0.1, steps=1, step_size=0.2
    )
    assert choice(eps=None).made("standard") is None
    assert choice(eps=None).made("worst-of-10") is None
    spatial = choice(attack="spatial", eps=None, steps=7).made("adversarial")
    assert getattr(spatial, "draws", None) == 7
    assert choice().checking(spatial) is None
    assert choice(check_steps=50).checking(InnerAttack(eps=0.2, steps=1)) == InnerAttack(eps=0.2, steps=50)
    with pytest.raises(InputError, match="--check-steps"):
        choice(check_steps=50).checking(spatial)


@pytest.mark.slow
def test_a_net_to_retrieve_by_says_how_it_becomes_a_defence_and_its_database_takes_the_kernel(tmp_path: Path) -> None:
    net = tmp_path / "net with a blank"
    words = ("--arch", "nn-small-cnn", "--objective", "retrieval", "--eps", 0.1, "--steps", 1, "--out", net)
    told = [line for line in nndefense(*QUICK, *words).out.splitlines() if line.startswith("  nndefense ")]
    build, evaluate = ([*shlex.split(line)[1:], "--device", "cpu"] for line in told)
    learned = load_classifier(net).info["retrieval"]
    shown = nndefense(*build, "--json", "--quiet").json["rule"]
    expected = {"k": 200, "weighting": "uniform", "votes": "labels", "temperature": learned["temperature"], "alpha": 0}
    assert {name: shown[name] for name in expected} == expected
    small = ("--limit", 4, "--steps", 2, "--adaptive-steps", 2, "--quiet", "--out", tmp_path / "found")
    nndefense(*[word if word != "TEST" else "digits:test" for word in evaluate], *small)
    # Other distances are none that a kernel was learned for; what is asked for goes first.
    other = nndefense(*build[:-3], tmp_path / "scaled", "--device", "cpu", "--normalize", "--json", "--quiet").json
    assert other["rule"]["temperature"] is None
    asked = nndefense(*build[:-3], tmp_path / "few", "--device", "cpu", "--k", 9, "--json", "--quiet").json["rule"]
    assert (asked["k"], asked["temperature"]) == (9, learned["temperature"])
