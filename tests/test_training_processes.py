"""One training in two processes, started by torchrun, over gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rewrite
from torch import nn

from nndefense.datasets import open_dataset
from nndefense.errors import InputError
from nndefense.models import Classifier, load_classifier
from nndefense.training import train_classifier
from nndefense.training.launcher import Team, join, leads, running_statistics

pytest.importorskip("lightning_fabric")
# Each case starts interpreters by torchrun.
pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parent.parent

# Run by every process; what it finds goes to found-RANK.json beside the folders of the trainings.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch import nn
from nndefense.datasets import open_dataset
from nndefense.models import Classifier, build_classifier
from nndefense.training import InnerAttack, train_classifier
from nndefense.training import progress as files

place, rank = Path(sys.argv[1]), int(os.environ["RANK"])
few = open_dataset("digits:train").subset(range(90))
pool, held = open_dataset("digits:train").subset(range(90, 200)), open_dataset("digits:test").subset(range(31))
quick = {"epochs": 3, "batch_size": 15, "device": "cpu", "progress": False}
if rank:
    def write(*_):
        raise AssertionError("a process that does not lead writes")
    files.write_json = files.write_tensors = files.write_bytes = write

def linear(seed=0):
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
                      arch="linear", input_shape=few.shape, classes=few.classes)

def cnn():
    return build_classifier("small-cnn", input_shape=few.shape, classes=few.classes, seed=0)

class Stop(Exception):
    pass

def stop(row):
    if row["epoch"] == 2:
        raise Stop

found = {}
# Weights that differ at first are those of the leading process; no chance in the steps: as in one process.
one = train_classifier(linear(rank), few, **quick, optimizer="sgd", lr=0.05, validation=held, clip_norm=1.0)
found["linear"] = {"weights": one.net[1].weight.detach().tolist(), "history": one.info["history"],
                   "processes": one.info["processes"]}
robust = {**quick, "objective": "rst-at", "attack": InnerAttack(eps=0.1, steps=2), "unlabelled": pool,
          "unlabelled_per_batch": 7, "validation": held, "keep_best": True, "ema": 0.9, "augment": True,
          "checkpoint_steps": 2}
found["robust"] = train_classifier(cnn(), few, **robust).fingerprint
try:
    train_classifier(cnn(), few, **robust, out=place / "net", on_epoch=stop)
except Stop:
    pass
again = train_classifier(cnn(), few, **robust, out=place / "net", resume=True)
found["resumed"], found["history"] = again.fingerprint, again.info["history"]
finished = train_classifier(cnn(), few, **robust, out=place / "net", resume=True)
found["finished"] = finished.fingerprint
from nndefense.cli import main
words = ["--dataset", "digits:train[:60]", "--epochs", "1", "--objective", "adversarial", "--eps", "0.1"]
sys.argv = ["nndefense", "train", *words, "--out", str(place / "command"), "--device", "cpu", "--quiet"]
try:
    main()
except SystemExit as end:
    assert not end.code
(place / f"found-{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the trainings, and what each process found; in the folder, what they printed."""
    place = tmp_path_factory.mktemp("two")
    script = place / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*words, str(script), str(place)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (place / "printed").write_text(done.stdout)
    return place, [json.loads((place / f"found-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_do_what_one_does(found: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = found
    few = open_dataset("digits:train").subset(range(90))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    alone = train_classifier(
        Classifier(net, arch="linear", input_shape=few.shape, classes=few.classes),
        few,
        epochs=3,
        batch_size=15,
        optimizer="sgd",
        lr=0.05,
        clip_norm=1.0,
        validation=open_dataset("digits:test").subset(range(31)),
        device="cpu",
        progress=False,
    )
    weight = net[1].weight.detach()
    # Batches of 15 are shared as 8 and 7, so this also shows that the shares are weighed rightly.
    assert torch.allclose(torch.tensor(first["linear"]["weights"]), weight, atol=1e-6)
    assert first["linear"]["weights"] == second["linear"]["weights"]
    assert first["linear"]["processes"] == 2
    for one, two in zip(alone.info["history"], first["linear"]["history"], strict=True):
        for name in ("accuracy", "validation_accuracy", "lr"):
            assert one[name] == pytest.approx(two[name], abs=1e-9)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_two_processes_stay_alike_and_resume(found: tuple[Path, list[dict[str, Any]]]) -> None:
    place, (first, second) = found
    assert len({one[name] for one in (first, second) for name in ("robust", "resumed", "finished")}) == 1
    assert load_classifier(place / "net").fingerprint == first["robust"]
    rows = [
        [{name: value for name, value in row.items() if "second" not in name} for row in one["history"]]
        for one in (first, second)
    ]
    assert rows[0] == rows[1]


def test_only_the_leading_process_writes(found: tuple[Path, list[dict[str, Any]]]) -> None:
    # Any write of the second process would have been an error.
    place, _ = found
    names = sorted(path.name for path in (place / "net").iterdir())
    assert names == ["classifier.json", "history.jsonl", "model.safetensors"]


def test_the_command_prints_once(found: tuple[Path, list[dict[str, Any]]]) -> None:
    place, _ = found
    assert (place / "printed").read_text().count("training accuracy") == 1
    assert load_classifier(place / "command").info["processes"] == 2


def test_a_training_of_two_processes_is_not_resumed_by_one(tmp_path: Path) -> None:
    few = open_dataset("digits:train").subset(range(30))

    def fresh() -> Classifier:
        return Classifier(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), arch="small-cnn", input_shape=(1, 8, 8), classes=few.classes
        )

    class Stop(Exception):
        pass

    def stop(_row: dict[str, Any]) -> None:
        raise Stop

    options: dict[str, Any] = {"epochs": 2, "batch_size": 10, "device": "cpu", "progress": False, "out": tmp_path}
    with pytest.raises(Stop):
        train_classifier(fresh(), few, **options, on_epoch=stop)
    edited = json.loads((tmp_path / "training.json").read_text().replace('"processes": 1', '"processes": 2'))
    rewrite(tmp_path / "training.json", lambda value: value.update(edited))
    with pytest.raises(InputError, match=r"number of processes \(2, not 1\)"):
        train_classifier(fresh(), few, **options, resume=True)


def test_without_torchrun_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    team = join(torch.device("cpu"))
    assert (team.rank, team.size, team.leads, leads()) == (0, 1, True, True)
    rows = torch.arange(5)
    assert team.share(rows) is rows
    assert [Team(torch.device("cpu"), rank, 2).share(rows).tolist() for rank in (0, 1)] == [[0, 1, 2], [3, 4]]
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert [tuple(tensor.shape) for tensor in running_statistics(net)] == [(2,), (2,)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert join(torch.device("cpu")).size == 1  # some other launcher's variable
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not leads()
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(InputError, match=r"pip install lightning-fabric"):
        join(torch.device("cpu"))
