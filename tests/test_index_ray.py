"""Builds on a Ray cluster: the same files as on one machine, also when workers are killed or fail in the middle.

The cluster, its processes and the kills are real.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import digits, trained
from PIL import Image
from typer.testing import CliRunner

from index_build import add as adding
from index_build import build_database, build_databases, pieces, ray_engine, ray_worker, stages
from index_build.add import PartReport
from index_build.extract import ShardReport
from index_build.job import BuildJob
from index_build.ray_engine import await_piece, engine_of, share_out
from index_build.ray_worker import Attempts, Extractor, Work, check_folders, heard, told
from nndefense.cli.app import build
from nndefense.database import ImageDatabase, Manifest, cluster
from nndefense.datasets import SourceError, open_dataset
from nndefense.errors import DatabaseError, DataError, InputError, ModelError, NNDefenseError
from nndefense.features import FeatureSpec
from nndefense.files import sha256_of
from nndefense.models import save_classifier

HERE = Path(__file__).resolve().parent
FEATURE = FeatureSpec("block2", pca=8)
SMALL: dict[str, Any] = {"shard_rows": 24, "batch_size": 10, "pca_sample": 40, "progress": False, "index": "IVF4,Flat"}

needs_ray = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "pandas", "pyarrow")),
    reason="Ray Data is not installed",
)


def checksums(folder: Path) -> dict[str, str]:
    """What the manifest says of its files, each compared with the file; nothing else is in the folder."""
    manifest = Manifest.read(folder)
    manifest.check_files(folder, checksums=True)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest.files}
    return {name: entry.sha256 for name, entry in manifest.files.items()}


def begun(folder: Path, **options: Any) -> BuildJob:
    """An unfinished build of 60 digits whose rows are complete."""
    stages.extract(digits("train").subset(np.arange(60)), trained(), FEATURE, folder, **(SMALL | options))
    return BuildJob.read(folder)


# -- without a cluster ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machines", "workers", "gpu", "expected"),
    [
        ([(2, 0)], None, False, (1, 2)),
        ([(2, 0)], 2, False, (2, 1)),
        ([(8, 0)], 3, False, (3, 2)),
        ([(0, 0), (16, 0), (16, 0)], None, False, (2, 16)),
        ([(16, 0), (4, 0)], None, False, (2, 8)),
        ([(16, 0), (16, 0)], 3, False, (3, 8)),
        ([(16, 4), (16, 4)], None, True, (8, 4)),
        ([(64, 0), (8, 1)], None, True, (1, 8)),
        ([(64, 0), (16, 4)], 2, True, (2, 8)),
    ],
)
def test_processors_are_shared_out(
    machines: list[tuple[int, int]], workers: int | None, gpu: bool, expected: tuple[int, int]
) -> None:
    held = [{"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) for cpus, gpus in machines]
    assert share_out(held, workers, gpu=gpu) == expected


@pytest.mark.parametrize(
    ("machines", "workers", "gpu", "message"),
    [
        ([{"CPU": 2.0}], 3, False, "has 2 processors, too few for 3 workers"),
        ([{"memory": 5.0}], None, False, "has 0 processors"),
        ([{"CPU": 8.0}], None, True, "8 processors and 0 GPUs, too few for 1 workers of at least 1 of both"),
        ([{"CPU": 8.0, "GPU": 1.0}], 2, True, "8 processors and 1 GPUs"),
    ],
)
def test_a_cluster_that_is_too_small(
    machines: list[dict[str, float]], workers: int | None, gpu: bool, message: str
) -> None:
    with pytest.raises(DatabaseError, match=message):
        share_out(machines, workers, gpu=gpu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "must be one of local, ray"),
        ({"ray_address": "10.0.0.5:6379"}, "add --engine ray"),
        ({"ray_workers": 2}, "add --engine ray"),
        ({"engine": "ray", "ray_workers": 0}, "at least 1 worker"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_database(digits("train"), trained(), FEATURE, tmp_path / "db", **SMALL, **options)
    assert not (tmp_path / "db").exists()
    with pytest.raises(InputError, match=message):
        stages.extract(digits("train"), trained(), FEATURE, tmp_path / "db", **SMALL, **options)


@pytest.mark.parametrize("missing", ["ray", "pandas"])
def test_without_ray_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(ray_engine.importlib.util, "find_spec", lambda name: None if name == missing else found("json"))
    message = f'--engine ray needs {missing}, which is not installed: pip install "ray[data,serve]"'
    with pytest.raises(InputError) as caught, engine_of("ray"):
        pass
    assert str(caught.value) == message
    begun(tmp_path / "db")
    words = ["index", "add", str(tmp_path / "db"), "--engine", "ray"]
    with pytest.raises(InputError, match="needs"):
        CliRunner().invoke(build(), words, catch_exceptions=False, standalone_mode=False)


def test_the_local_engine_loads_nothing_of_ray() -> None:
    code = (
        "import sys; from index_build.ray_engine import engine_of\nwith engine_of('local') as e: assert e is None\n"
        "assert 'ray' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


@pytest.mark.parametrize("kind", [InputError, DataError, ModelError, DatabaseError, SourceError])
def test_errors_travel_as_text_and_keep_their_kind(kind: type[NNDefenseError]) -> None:
    def fail() -> ShardReport:
        raise kind("a disk is full: ü")

    with pytest.raises(kind, match=r"^a worker on \S+: a disk is full: ü$") as caught:
        heard(told(fail), ShardReport)
    assert type(caught.value) is kind


def test_reports_travel_as_text() -> None:
    # A file's name need not be text.
    report = ShardReport(3, 24, 22, ({"id": "b\udcffd.png", "kind": "empty", "reason": "no bytes"},))
    assert heard(told(lambda: report), ShardReport) == report
    assert heard(told(lambda: PartReport(1, 9)), PartReport) == PartReport(1, 9)

    def bug() -> ShardReport:
        raise KeyError("two lines")

    with pytest.raises(DatabaseError, match=r"worker on \S+ failed \(KeyError: 'two lines'\)") as caught:
        heard(told(bug), ShardReport)
    assert "test_index_ray" in str(caught.value.__cause__)


def test_a_worker_looks_whether_the_folder_is_the_builds(tmp_path: Path) -> None:
    job = begun(tmp_path / "db")
    check_folders(job)
    other = begun(tmp_path / "other", seed=1)
    with pytest.raises(DatabaseError, match=r"does not hold the build there.*shared file system"):
        check_folders(BuildJob(**{**vars(job), "options": other.options}))
    (tmp_path / "db" / "job.json").unlink()
    with pytest.raises(DatabaseError, match=r"does not hold the build there.*shared file system"):
        check_folders(job)


def test_a_piece_may_come_late_but_must_come(tmp_path: Path) -> None:
    path = tmp_path / "rows-00000.h5"
    late = threading.Timer(0.3, lambda: pieces.finish(path, lambda part: part.write_bytes(b"rows") and None))
    late.start()
    await_piece(path, 20)
    late.join()
    assert path.exists()
    with pytest.raises(DatabaseError, match=r"rows-00001.*not here.*shared file system"):
        await_piece(tmp_path / "rows-00001.h5", 0.05)


def test_a_worker_makes_what_the_local_engine_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Ray does is done here by hand: get, an actor, a batch.
    source = digits("train").subset(np.arange(60))
    job = begun(tmp_path / "db")
    monkeypatch.chdir(tmp_path)
    work = Work(ray_engine._absolute(job), source, trained(), None, 1, "cpu", str(tmp_path), 2)
    counter = Attempts()
    handle = SimpleNamespace(begin=SimpleNamespace(remote=counter.begin))
    monkeypatch.setattr(ray_worker, "import_ray", lambda: SimpleNamespace(get=lambda value: value))
    worker = Extractor([work, handle])
    path = job.paths(job.targets[0])[1]
    before = sha256_of(path)
    pieces.discard(path)
    for _ in range(2):
        report = heard(str(worker({"id": np.array([1])})["told"][0]), ShardReport)
        assert (report.number, report.images, report.rows, report.rejected) == (1, 24, 24, ())
        assert sha256_of(path) == before
    # Begun for the third time: two workers were lost over it.
    with pytest.raises(DatabaseError, match=r"2 workers were lost over the images 24 to 47"):
        heard(str(worker({"id": np.array([1])})["told"][0]), ShardReport)


# -- with one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of two workers' size, to which this process is connected; and a folder that its processes know."""
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        # The workers inherit both; one thread computes, as in the local builds here.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("NNDEFENSE_TEST_HOME", str(place))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert cluster.join(cpus=2)
        try:
            yield place
        finally:
            cluster.leave()


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


def killing(place: Path) -> threading.Thread:
    """Arms the trap, and kills the process that walks into it."""
    for name in ("taken", "pid"):
        (place / name).unlink(missing_ok=True)
    (place / "armed").write_text("wait")

    def kill() -> None:
        until((place / "pid").exists)
        os.kill(int((place / "pid").read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@needs_ray
@pytest.mark.slow
def test_ray_makes_the_files_of_a_local_build(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Damaged images, copies, images to keep out, relative paths, two databases of one pass, several parts.
    source = digits("train")
    for i in range(140):
        image, label = source[i if i < 130 else i - 100]
        path = tmp_path / "photos" / str(label) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(path)
        if i in (5, 60, 61):
            path.write_bytes(path.read_bytes()[:40])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adding, "PART_ROWS", 40)
    places = {"pca": FEATURE, "raw": FeatureSpec("block1", "rmac", pca=0)}
    options = {**SMALL, "dedupe": True, "storage": "float16", "posteriors": "top-4", "exclude_eps": 0.5}
    found = {}
    for engine, more in (("local", {}), ("ray", {"engine": "ray", "ray_workers": 2})):
        images = open_dataset("imagefolder:photos", channels=1, size=8)
        kept_out = source.subset(np.arange(70, 75))
        folders = {Path(engine) / name: feature for name, feature in places.items()}
        made = build_databases(images, trained(), folders, exclude=kept_out, **options, **more)
        found[engine] = [checksums(database.path) for database in made]
        assert made[0].manifest.rejected == {"duplicate": 10, "excluded": 5, "not an image": 3}
        assert made[0].verify()["rows"] == 122
    assert found["ray"] == found["local"]
    one, other = (Manifest.read(Path(engine) / "pca") for engine in ("local", "ray"))
    assert one.build == other.build
    assert {n: one.index["search"][n] for n in ("recall", "setting")} == {
        n: other.index["search"][n] for n in ("recall", "setting")
    }


@needs_ray
@pytest.mark.slow
def test_killed_workers_lose_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray_sets

    monkeypatch.setattr(adding, "PART_ROWS", 40)
    (home / "armed").unlink(missing_ok=True)
    source = ray_sets.Treacherous(200, 101, home)
    build_database(source, trained(), FEATURE, tmp_path / "local", **SMALL)
    out = tmp_path / "ray"
    # In the middle of a shard, which is then not there.
    thread = killing(home)
    found = stages.extract(source, trained(), FEATURE, out, **SMALL, engine="ray", ray_workers=2)
    thread.join(5)
    assert (home / "taken").exists()
    assert not thread.is_alive()
    assert found.rows == 200
    stages.fit(out)
    monkeypatch.setattr(ray_engine, "tell_part", ray_sets.tell_part_late)
    # A part over which every worker is lost: Ray gives up, and says so in one line.
    (home / "armed").write_text("die")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_engine, "ATTEMPTS", 1)
        with pytest.raises(DatabaseError, match=r"could not make a part of the index \(.*same command") as caught:
            stages.add(out, engine="ray", ray_workers=2, progress=False)
    assert "\n" not in str(caught.value)
    # In the middle of a part.
    thread = killing(home)
    assert stages.add(out, engine="ray", ray_workers=2, progress=False) == 5
    thread.join(5)
    assert (home / "taken").exists()
    assert not thread.is_alive()
    stages.merge(out)
    assert stages.verify(out)["rows"] == 200
    assert checksums(out) == checksums(tmp_path / "local")


@needs_ray
@pytest.mark.slow
def test_failing_workers_are_one_line_and_the_build_goes_on_later(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray_sets

    monkeypatch.setattr(ray_engine, "ATTEMPTS", 1)
    (home / "armed").unlink(missing_ok=True)
    source = ray_sets.Treacherous(100, 60, home)
    build_database(source, trained(), FEATURE, tmp_path / "local", **SMALL)
    out = tmp_path / "ray"
    for deed, kind, message in (
        ("gone", SourceError, r"a worker on \S+: the disk of treacherous is gone: put it back"),
        ("bug", DatabaseError, r"a worker on \S+ failed \(RuntimeError: two tensors of different mind\).*same command"),
        ("die", DatabaseError, r"1 workers were lost over the images 48 to 71, one after another.*"),
    ):
        (home / "armed").write_text(deed)
        with pytest.raises(kind, match=message) as caught:
            build_database(source, trained(), FEATURE, out, **SMALL, engine="ray", ray_workers=2)
        assert "\n" not in str(caught.value)
        assert not (out / "manifest.json").exists()
        assert not (out / "rows-00002.h5").exists()
        assert not (out / "nndefense.lock").exists()
        # While the error is looked at, nobody works on.
        until(lambda: not ray_sets.workers(home))
    (home / "armed").unlink()
    # Too many rejected images are noticed by the process that builds.
    raw, dirty = FeatureSpec("block2", pca=0), ray_sets.Spoilt(100)
    with pytest.raises(DataError, match="cannot be used, more than the 1 that") as rejected:
        build_database(dirty, trained(), raw, tmp_path / "no", **SMALL, max_rejected=1, engine="ray")
    assert rejected.value.__traceback__ is not None
    until(lambda: not ray_sets.workers(home))
    build_database(source, trained(), FEATURE, out, **SMALL, engine="ray")
    assert checksums(out) == checksums(tmp_path / "local")


@needs_ray
@pytest.mark.slow
def test_the_command_joins_a_cluster_and_leaves_it_as_it_was(home: Path, tmp_path: Path) -> None:
    save_classifier(trained(), tmp_path / "classifier")
    words = ["--dataset", "digits:train[:100]", "--classifier", str(tmp_path / "classifier"), "--layer", "block2"]
    words += ["--pca", "8", "--pca-sample", "40", "--shard-rows", "24", "--batch-size", "10", "--quiet"]
    ray = ["--engine", "ray", "--ray-address"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nndefense", "index", "build", *words, *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)

    done = run("--out", str(tmp_path / "ray"), *ray, cluster.address(), "--ray-workers", "2")
    assert done.returncode == 0, done.stderr
    assert "100 rows" in done.stdout
    assert run("--out", str(tmp_path / "local")).returncode == 0
    assert checksums(tmp_path / "ray") == checksums(tmp_path / "local")
    assert ImageDatabase.open(tmp_path / "ray").verify()["rows"] == 100
    # The cluster still works, and a number of workers that it does not have is refused in one line.
    done = run("--out", str(tmp_path / "many"), *ray, cluster.address(), "--ray-workers", "9")
    assert done.returncode == DatabaseError.exit_code
    assert "has 2 processors, too few for 9 workers" in done.stderr.splitlines()[-1]
