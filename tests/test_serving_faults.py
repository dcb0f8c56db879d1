"""What must not happen when files break, disks fill up and processes die: that anything wrong is served."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from served import Process, copy_of, guard, home, open_guard, pictures, predicted, process, serving, until

from nndefense.cli.app import build
from nndefense.errors import DatabaseError, InputError
from nndefense.serving.app import answer_json
from nndefense.serving.client import Client, ServiceError
from nndefense.serving.http.metrics import FILE, Journal

PNG = {"content-type": "image/png"}


def expected(number: int) -> bytes:
    by = guard()
    return answer_json(predicted([pictures()[number]]), by.fingerprint, by.database.fingerprint)


def right(client: httpx.Client, count: int = 10) -> None:
    """The first images get the answers that they always got."""
    for number in range(count):
        answer = client.post("/v1/classify", content=pictures()[number], headers=PNG)
        assert answer.status_code == 200, answer.text
        assert answer.content == expected(number)


def rows_file(folder: Path) -> Path:
    return next(folder.glob("rows-*.h5"))


def index_file(folder: Path) -> Path:
    return next(folder.glob("index*.faiss"))


def flip(path: Path) -> None:
    """Change every byte of the later half in place, as a program that writes into the file would."""
    with path.open("r+b") as file:
        half = path.stat().st_size // 2
        file.seek(half)
        found = file.read()
        file.seek(half)
        file.write(bytes(255 - byte for byte in found))


def replace_by_corrupt(path: Path) -> None:
    """Put a corrupt copy in a file's place."""
    part = path.with_suffix(".new")
    shutil.copy(path, part)
    flip(part)
    os.replace(part, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "index replaced by a corrupt one": lambda folder: replace_by_corrupt(index_file(folder)),
    "index changed in place": lambda folder: flip(index_file(folder)),
    "index deleted": lambda folder: index_file(folder).unlink(),
    "index truncated in place": lambda folder: cut(index_file(folder)),
    "rows replaced by corrupt ones": lambda folder: replace_by_corrupt(rows_file(folder)),
    "rows changed in place": lambda folder: flip(rows_file(folder)),
    "rows truncated in place": lambda folder: cut(rows_file(folder)),
    "rows deleted": lambda folder: rows_file(folder).unlink(),
    "manifest deleted": lambda folder: (folder / "manifest.json").unlink(),
    "manifest not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "all of it deleted": shutil.rmtree,
}


# One of each kind; `make test-slow` goes through all.
QUICK = ("index changed in place", "rows replaced by corrupt ones", "manifest not JSON")


@pytest.mark.parametrize(
    "damage", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_a_damaged_database_is_not_loaded_and_the_old_one_keeps_serving(damage: str, tmp_path: Path) -> None:
    folder = copy_of("database", tmp_path / "database")
    with serving(lambda: open_guard(folder)) as served, served.client() as client:
        right(client)
        DAMAGES[damage](folder)
        # Nothing is read from the damaged files any more, whether anybody asks for a reload or not.
        right(client)
        answer = client.post("/v1/admin/reload")
        assert (answer.status_code, answer.json()["code"]) == (409, "reload_failed"), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert str(tmp_path) not in answer.text
        right(client)
        assert client.get("/readyz").json() == {"status": "ready", "last_reload": "failed"}
        assert served.counted('nndefense_reloads_total{outcome="failed"}') == 1
        # Mended, it is loaded.
        shutil.rmtree(folder, ignore_errors=True)
        copy_of("database", folder)
        answer = client.post("/v1/admin/reload")
        assert answer.status_code == 200, answer.text
        assert client.get("/readyz").json()["last_reload"] == "succeeded"
        right(client)


def test_a_damaged_classifier_is_not_loaded_either(tmp_path: Path) -> None:
    from nndefense.guard import Guard

    classifier = tmp_path / "classifier"
    shutil.copytree(home() / "classifier", classifier)

    def opened() -> Guard:
        return Guard.open(home() / "database", classifier, k=10, device="cpu")

    with serving(opened) as served, served.client() as client:
        right(client, 3)
        flip(classifier / "model.safetensors")
        assert client.post("/v1/admin/reload").status_code == 409
        right(client, 3)


def test_a_guard_that_fails_in_any_other_way_is_not_taken_either() -> None:
    guards = [open_guard]

    def opened() -> object:
        return guards.pop()() if guards else 1 / 0

    with serving(opened) as served, served.client() as client:
        answer = client.post("/v1/admin/reload")
        assert (answer.status_code, answer.json()["code"]) == (409, "reload_failed")
        assert "division" not in answer.text
        right(client, 3)


# -- processes ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_kill_9_under_load_and_a_restart_give_nothing_wrong() -> None:
    port = free_port()
    wanted = [expected(number) for number in range(20)]
    stop, wrong, counts = threading.Event(), [], [0] * 4

    def ask(worker: int) -> None:
        client = Client(f"http://127.0.0.1:{port}", timeout=10, retries=0)
        number = worker
        while not stop.is_set():
            try:
                answer = client.classify(pictures()[number % 20])
            except ServiceError as error:
                # No answer, or one that says so: never a wrong one.
                if error.status not in (0, 503):
                    wrong.append(str(error))
                time.sleep(0.02)
                continue
            if answer.body != wanted[number % 20]:
                wrong.append(answer.body.decode())
            counts[worker] += 1
            number += 1
        client.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    with process(home() / "database", port=port) as first:
        for thread in threads:
            thread.start()
        until(lambda: min(counts) > 10)
        os.kill(first.process.pid, signal.SIGKILL)
        assert first.process.wait(10) == -signal.SIGKILL
    before = list(counts)
    with process(home() / "database", port=port):
        until(lambda: all(now > then + 10 for now, then in zip(counts, before, strict=True)))
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not wrong


def log_has(served: Process, text: str) -> Callable[[], bool]:
    return lambda: text in "".join(served.errors)


def test_sighup_loads_a_good_database_and_refuses_a_bad_one(tmp_path: Path) -> None:
    folder = copy_of("database", tmp_path / "database")
    with process(folder) as served, served.client() as client:
        right(client, 3)
        index = index_file(folder)
        kept = index.read_bytes()
        flip(index)
        served.process.send_signal(signal.SIGHUP)
        until(log_has(served, "the old database keeps serving"))
        # The log names the file and the fault.
        assert index.name in "".join(served.errors)
        assert "sha256" in "".join(served.errors)
        right(client, 3)
        index.write_bytes(kept)
        served.process.send_signal(signal.SIGHUP)
        until(log_has(served, "reloaded"))
        right(client, 3)
        assert client.get("/readyz").json()["last_reload"] == "succeeded"
        # And SIGTERM ends it in order.
        served.process.terminate()
        assert served.process.wait(20) == 0
        assert "Traceback" not in "".join(served.errors)
        # Nor does it tell what other libraries found missing and do without.
        assert "ModuleNotFoundError" not in "".join(served.errors)


def serve_command(database: Path, port: int = 0) -> None:
    """The command in this process."""
    words = ["--database", database, "--classifier", home() / "classifier", "--k", 10, "--device", "cpu"]
    build()(["serve", *map(str, [*words, "--port", port, "--threads", 1])], standalone_mode=False)


def test_a_damaged_database_does_not_start(tmp_path: Path) -> None:
    folder = copy_of("database", tmp_path / "database")
    flip(index_file(folder))
    with pytest.raises(DatabaseError, match="wrong sha256"):
        serve_command(folder)


def test_a_taken_port_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot be bound"):
            serve_command(home() / "database", taken.getsockname()[1])


# -- the log --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / FILE).symlink_to("/dev/full")
    with serving(log_dir=logs) as served, served.client() as client:
        right(client)
        until(lambda: served.counted("nndefense_log_lines_lost_total") >= 10)
        assert client.get("/healthz").status_code == 200
        assert caplog.text.count("the access log cannot be written") == 1
        # There is room again.
        (logs / FILE).unlink()
        right(client, 3)
        until(lambda: (logs / FILE).exists() and '"status": 200' in (logs / FILE).read_text())


def test_a_log_folder_that_vanishes_stops_nothing(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with serving(log_dir=logs) as served, served.client() as client:
        right(client, 2)
        until(lambda: (logs / FILE).exists())
        shutil.rmtree(logs)
        right(client, 2)
        until(lambda: served.counted("nndefense_log_lines_lost_total") >= 1)


def test_the_log_is_renamed_before_it_grows_too_large(tmp_path: Path) -> None:
    lost: list[int] = []
    journal = Journal(tmp_path, lost.append, max_bytes=2000)
    for number in range(300):
        journal.put({"number": number, "text": "x" * 50})
        time.sleep(0.0005)
    journal.close()
    files = sorted(tmp_path.iterdir())
    assert 2 <= len(files) <= 6
    assert not lost
    numbers = [line.split(",")[0] for file in files for line in file.read_text().splitlines()]
    assert len(numbers) == len(set(numbers))


def test_a_log_folder_that_cannot_be_made_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be a folder"), serving(log_dir=tmp_path / "file"):
        pass
