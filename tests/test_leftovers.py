"""What killed jobs leave behind is swept by the next one, and two jobs never write into one place at a time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import fails, nndefense
from test_experiments import tiny

from nndefense import experiments, files, locks
from nndefense.errors import InputError, NNDefenseError
from nndefense.files import write_bytes
from nndefense.locks import LOCK, locked, locked_file, passing_folder, writes
from nndefense.parts import sweep

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")


# --- the mechanism


@contextmanager
def writer(path: Path) -> Iterator[Path]:
    """Another process that is just writing a file; gives the part that is there so far."""
    program = (
        "import sys; from pathlib import Path; from nndefense.files import write_atomically\n"
        "def write(part): part.write_bytes(b'half'); print(part, flush=True); sys.stdin.read()\n"
        f"write_atomically(Path({str(path)!r}), write)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
        process.communicate()


def test_a_sweep_takes_what_the_dead_have_left_and_nothing_else(tmp_path: Path) -> None:
    mine = ["film.part", "notes.part", "x.12a.part", "x.json", "12.part.txt"]
    for name in (*mine, "x.json.17.part", "x.json.17.3.part", "y.5.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / "z.1.part").mkdir()
    (tmp_path / "link.1.part").symlink_to(tmp_path / "x.json")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.9.part").write_text("half")
    kept = {*mine, "z.1.part", "link.1.part", "in"}
    sweep(tmp_path, "x.json")
    assert {path.name for path in tmp_path.iterdir()} == kept | {"y.5.part"}
    with writer(tmp_path / "x.json") as part:
        sweep(tmp_path)
        assert part.read_bytes() == b"half"
        assert {path.name for path in tmp_path.iterdir()} == kept | {part.name}
        assert (tmp_path / "in" / "x.9.part").exists()
        sweep(tmp_path, deep=True)
        assert part.exists()
        assert not (tmp_path / "in" / "x.9.part").exists()
    assert (tmp_path / "x.json").read_bytes() == b"half"
    assert {path.name for path in tmp_path.iterdir()} == kept
    sweep(tmp_path / "missing", deep=True)


def test_two_writers_of_one_process_do_not_share_a_part(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        write_bytes(tmp_path / "x", b"inner")
        sweep(tmp_path)
        part.write_bytes(b"outer")

    files.write_atomically(tmp_path / "x", write)
    assert (tmp_path / "x").read_bytes() == b"outer"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_lock_keeps_others_out_and_sweeps(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for name in ("x.1.part", "cells/a/y.1.part", "other/z.1.part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    with locked(folder, holds=("cells", "missing")) as killed:
        assert not killed
        assert {path.name for path in folder.rglob("*.part")} == {"z.1.part"}
        with pytest.raises(InputError, match=rf"out is being written by process {os.getpid()} on .*: wait for it"):
            locked(folder).__enter__()
    (folder / LOCK).write_text("process 1 on nowhere\n")
    with locked(folder) as killed:
        assert killed
    assert not (folder / LOCK).exists()


def test_a_lock_on_a_file_leaves_the_rest_of_its_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "a.h5.1.part").write_text("half")
    (tmp_path / "b.h5.1.part").write_text("half")
    with locked_file(tmp_path / "a.h5"), locked_file(tmp_path / "c.h5"):
        with pytest.raises(InputError, match=r"a\.h5 is being written by .*: wait for it to end, or choose another f"):
            locked_file(tmp_path / "a.h5").__enter__()
        assert (tmp_path / "b.h5.1.part").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b.h5.1.part"]
    with pytest.raises(RuntimeError), locked_file(tmp_path / "new" / "a.h5"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_a_job_lends_its_folder_to_the_jobs_that_it_begins(tmp_path: Path) -> None:
    @writes("out")
    def inner(out: Path | str | None = None) -> bool:
        return out is None or (Path(out) / LOCK).exists()

    @writes("settings.out", lend=True)
    def outer(settings: Any) -> bool:
        return inner(settings.out) and inner(str(settings.out / "deeper"))

    @dataclass
    class Settings:
        out: Path

    assert inner()
    assert outer(Settings(tmp_path))
    assert not any(tmp_path.iterdir())
    with locked(tmp_path), pytest.raises(InputError, match="is being written by"):
        outer(Settings(tmp_path))


def test_a_lock_that_is_a_link_writes_nowhere(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(precious)
    with pytest.raises(NNDefenseError, match="cannot be written"):
        locked(tmp_path / "out").__enter__()
    assert precious.read_text() == "mine"


def ended_by(number: int, place: Path) -> Path:
    """What a process leaves in a place that a signal ends while it works in a passing folder there."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Started by nohup, this process ignores one of them.
            for each in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(each, signal.SIG_DFL)
            with passing_folder(place) as folder:
                (folder / "candidate" / "rows").mkdir(parents=True)
                write_bytes(folder / "candidate" / "rows" / "a.h5", b"large")
                os.kill(os.getpid(), number)
                signal.pause()
        except (KeyboardInterrupt, SystemExit):
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == (number if number == signal.SIGKILL else 0)
    return place


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_of_a_passing_folder_where_a_signal_ends_its_process(number: int, tmp_path: Path) -> None:
    assert not any(ended_by(number, tmp_path).iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@needs_fork
@pytest.mark.parametrize("by", ["passing_folder", "locked"])
def test_what_is_left_of_a_killed_one_goes_with_the_next_and_what_lives_or_is_others_stays(
    by: str, tmp_path: Path
) -> None:
    (left,) = ended_by(signal.SIGKILL, tmp_path).iterdir()
    assert (left / "candidate" / "rows" / "a.h5").exists()
    (tmp_path / f"{left.name[:-3]}new").mkdir()
    theirs = tmp_path / "nndefense-passing-of-mine"
    theirs.mkdir()
    (theirs / "precious").write_text("mine")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / LOCK).write_text("mine")
    (tmp_path / "nndefense-passing-link").symlink_to(tmp_path / "precious")
    with passing_folder(tmp_path) as living:
        (living / "x").write_text("alive")
        assert not left.exists()
        (other,) = (path for path in ended_by(signal.SIGKILL, tmp_path).iterdir() if (path / "candidate").exists())
        with passing_folder(tmp_path) if by == "passing_folder" else locked(tmp_path):
            assert (living / "x").exists()
            assert not other.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "nndefense-passing-link", theirs.name}
    assert (tmp_path / "precious" / LOCK).exists()


# --- all jobs

_QUICK = ("--device", "cpu", "--quiet")


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
        words: of the command; ``{net}``, ``{db}`` and ``{out}`` are filled in.
        file: whether it writes one file.
        again: what the next command says more than the killed one.
        finished: what a command says that is refused because the killed one was just finished.
    """

    words: str
    file: bool = False
    again: tuple[str, ...] = ()
    finished: str = ""

    def command(self, root: Path, out: Path) -> list[str]:
        """The words, for folders of this test."""
        filled = self.words.format(net=root / "net", db=root / "db", out=out).split()
        return [*filled, *(() if {"theory", "--quiet", "--device"} & set(filled) else _QUICK)]


_GRAY = "--objective gray --build-anyway"
_CALIBRATE = f"{_GRAY} --holdout 20 --layers block2 --poolings avg --ks 1,2 --eps 0.1 --steps 1"
JOBS = {
    "train": Job("train --dataset digits:train[:60] --epochs 2 --out {out}", again=("--resume",)),
    "calibrate": Job(f"calibrate --dataset digits:train[:80] --classifier {{net}} {_CALIBRATE} --out {{out}}",
                     finished="already holds"),
    "evaluate": Job("evaluate --dataset digits:test --classifier {net} --database {db} --eps 0.1 --adaptive-steps 1 "
                    "--no-audit --gallery 1 --limit 20 --steps 1 --out {out}"),
    "attack": Job("attack --dataset digits:test --classifier {net} --limit 20 --steps 1 --out {out}", file=True,
                  finished="exists"),
    "pseudo-label": Job("pseudo-label write --dataset digits:train[:60] --classifier {net} --batch-size 10 "
                        "--part-images 20 --out {out}", file=True),
    "racnn train": Job("racnn train --dataset digits:train[:60] --classifier {net} --database {db} --epochs 1 --k 2 "
                       "--out {out}", again=("--resume",)),
    "guard calibrate": Job("guard calibrate --dataset digits:test --limit 20 --database {db} --out {out} --device cpu",
                           file=True, finished="exists"),
    "reproduce": Job("reproduce madry-cifar10 --scale small --out {out}"),
    "index build": Job("index build --dataset digits:train[:60] --classifier {net} --layer block2 --out {out}",
                       finished="already holds"),
    "index patches": Job("index patches --dataset digits:train[:60] --patches 50 --side 3 --out {out} --quiet",
                         finished="already holds"),
    "theory": Job("theory directions --out {out}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a net and a database of digits."""
    folder = tmp_path_factory.mktemp("jobs")
    made = nndefense("train", "--dataset", "digits:train[:200]", "--epochs", 1, "--out", folder / "net", *_QUICK)
    assert made.code == 0, made.err
    built = nndefense(
        "index", "build", "--dataset", "digits:train[:100]", "--classifier", folder / "net", "--layer", "block2",
        "--out", folder / "db", *_QUICK,
    )  # fmt: skip
    assert built.code == 0, built.err
    return folder


@pytest.fixture
def small_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = experiments.shipped_recipe
    monkeypatch.setattr("nndefense.experiments.shipped_recipe", lambda name, scale: tiny(shipped(name, scale)))


@pytest.mark.parametrize("name", JOBS)
def test_the_second_of_two_jobs_in_one_place_is_told(
    name: str, root: Path, tmp_path: Path, small_recipes: None
) -> None:
    job, out = JOBS[name], tmp_path / "out"
    with locked_file(out) if job.file else locked(out):
        fails(5 if name == "index build" else 2, f"out is being written by process {os.getpid()}",
              *job.command(root, out))  # fmt: skip
    assert not out.exists()


def killed_at(number: int, words: list[str]) -> int:
    """Run a command that is killed when it puts its file of that number in place (0: as soon as it has its lock).

    Returns:
        How it ended: its exit code, or minus the signal.
    """
    child = os.fork()
    if child == 0:
        code, count, replace = 1, 0, os.replace

        def deadly(*given: Any) -> None:
            nonlocal count
            count += 1
            if number in (0, count):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*given)

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(*((locks, "sweep") if number == 0 else (os, "replace")), deadly)
                code = nndefense(*words).code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_after_a_kill_the_next_command_leaves_what_an_undisturbed_one_does(
    name: str, root: Path, tmp_path: Path, small_recipes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, writes_in_all, replace = JOBS[name], 0, os.replace

    def counted(*given: Any) -> None:
        nonlocal writes_in_all
        writes_in_all += 1
        replace(*given)

    def made(number: int) -> Path:
        place = tmp_path / str(number)
        place.mkdir()
        return place / "out"

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        whole = nndefense(*job.command(root, made(-1)))
    assert whole.code == 0, whole.err
    drawn = random.Random(name).sample(range(1, writes_in_all + 1), min(3, writes_in_all))
    for number in sorted({0, 1, writes_in_all, *drawn}):
        out = made(number)
        assert killed_at(number, job.command(root, out)) == -signal.SIGKILL
        assert any(left.endswith((".part", LOCK, ".lock")) for left in names_in(out.parent))
        done = nndefense(*job.command(root, out), *job.again)
        refused = job.finished and job.finished in done.err
        assert done.code == 0 or refused, (number, done.err)
        assert names_in(out.parent) == names_in(tmp_path / "-1"), number
