"""A build that is killed for good, again and again, and one whose rows would not fit into memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import digits
from PIL import Image

from nndefense.database import ImageDatabase, Manifest

HERE = Path(__file__).resolve().parent
KILLS = 20

# One process imports everything and forks those that are killed: each by its own hand, at a call that was drawn from
# all calls of an undisturbed build, so that neither the machine's speed nor the parent's clock decides where.
KILLED = """
import os, random, signal, sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from helpers import untrained
from index_build import add, build_database
from nndefense.datasets import open_dataset
from nndefense.errors import DatabaseError
from nndefense.features import FeatureSpec
add.PART_ROWS = 40
root, kills = Path(sys.argv[1]), int(sys.argv[2])
classifier, calls = untrained(), 0

def work(name):
    source = open_dataset(f"imagefolder:{root / 'pictures'}", channels=1, size=8)
    build_database(
        source, classifier, FeatureSpec("block2", pca=8), root / name, index="IVF4,Flat", shard_rows=24, batch_size=10,
        pca_sample=50, dedupe=True, progress=False, workers=2,
    )

def child(name, last=None):
    process = os.fork()
    if process == 0:
        def count(*_):
            global calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        done = finished(name)
        try:
            work(name)
        except DatabaseError as error:
            # One that was killed after its last step is refused, as any finished database is, and tidied up.
            os._exit(0 if done and "already holds a database" in str(error) else 1)
        sys.setprofile(None)
        (root / f"{name}.calls").write_text(str(calls))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def finished(name):
    return (root / name / "manifest.json").exists() and not (root / name / "job.json").exists()

# What is imported at first use is imported here, once.
work("warm")
assert child("whole") == 0
total = int((root / "whole.calls").read_text())
moments = random.Random(0)
for number in range(kills):
    name = f"once-{number}"
    print(child(name, moments.randrange(1, total)), child(name))
# And one build that is killed until it is done: every attempt gets a little farther.
attempts = 0
while not finished("often"):
    child("often", moments.randrange(total // 4, total))
    attempts += 1
    assert attempts < 100
# The last one may have been killed with its lock in the folder.
assert child("often") == 0
print(attempts)
"""


def pictures(root: Path) -> None:
    """130 digits as image files, among them five copies and three that cannot be read."""
    source = digits("train")
    for i in range(130):
        image, label = source[i if i < 125 else i - 100]
        path = root / str(label) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(path)
        if i in (5, 60, 61):
            path.write_bytes(path.read_bytes()[:40])


def checked(folder: Path) -> dict[str, str]:
    """The checksums of a database whose every promise was checked."""
    database = ImageDatabase.open(folder)
    assert database.verify()["rows"] == 122
    names = database.ids(np.arange(122))
    rejected = [json.loads(line)["id"] for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert len(set(names) | set(rejected)) == len(names) + len(rejected) == 130
    files = {path.name for path in folder.iterdir()}
    assert files == {"manifest.json", *database.manifest.files}
    return {name: entry.sha256 for name, entry in database.manifest.files.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_killed_at_20_random_moments_and_continued(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures")
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(KILLS)],
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    *pairs, last = [line.split() for line in run.stdout.splitlines()]
    assert pairs == [[str(-signal.SIGKILL), "0"]] * KILLS
    whole = checked(tmp_path / "whole")
    assert sum(name.startswith("rows-") for name in whole) == 6
    manifest = Manifest.read(tmp_path / "whole")
    for number in range(KILLS):
        assert checked(tmp_path / f"once-{number}") == whole, number
        found = Manifest.read(tmp_path / f"once-{number}")
        assert found.fingerprint == manifest.fingerprint
        assert (found.rejected, found.build) == (manifest.rejected, manifest.build)
    assert int(last[0]) >= 2
    assert checked(tmp_path / "often") == whole


MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from helpers import untrained
from index_build import build_database
from nndefense.datasets.base import ImageDataset
from nndefense.datasets.ids import NumberedIds
from nndefense.features import FeatureSpec

class Made(ImageDataset):
    def __init__(self, count):
        labels = np.full(count, -1)
        super().__init__(name="made", classes=(), shape=(1, 8, 8), ids=NumberedIds("made", count), labels=labels)
    def _read(self, rows):
        return torch.stack([torch.rand((1, 8, 8), generator=torch.Generator().manual_seed(int(row))) for row in rows])
    def _digest(self):
        return f"{len(self):064x}"

def build(count):
    build_database(
        Made(count), untrained(), FeatureSpec("block2", pca=8), Path(sys.argv[1]) / str(count), index="IVF16,Flat",
        shard_rows=1000, batch_size=500, pca_sample=500, dedupe=True, progress=False, workers=1,
    )

build(2000)
small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build(int(sys.argv[2]))
print(small, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs resource usage")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), "40000"],
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    small, large = map(int, run.stdout.split())
    assert large <= 1.2 * small
