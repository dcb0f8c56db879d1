"""A service to test: a real guard of the digits on disk, servers in threads and in processes of their own."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from helpers import digits, images, trained
from PIL import Image

from index_build import build_database
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.guard.prediction import Defended
from nndefense.models import save_classifier
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.http.state import ServingState
from nndefense.serving.server import Server, make_server

REPOSITORY = Path(__file__).resolve().parent.parent
_KEPT: list[Any] = []
K = 10


@functools.lru_cache(maxsize=1)
def home() -> Path:
    """A folder with ``classifier``, ``database`` (800 digits) and ``other`` (500 of them); do not write there."""
    kept = tempfile.TemporaryDirectory(prefix="nndefense-served-")
    _KEPT.append(kept)
    folder = Path(kept.name)
    save_classifier(trained(), folder / "classifier")
    for name, count in (("database", 800), ("other", 500)):
        rows = digits("train").subset(np.arange(count))
        spec = f"digits:train[:{count}]"
        build_database(rows, trained(), FeatureSpec("block2", pca=32), folder / name, specs=[spec], progress=False)
    return folder


def copy_of(name: str, place: Path) -> Path:
    """A database that a test may damage."""
    shutil.copytree(home() / name, place)
    return place


def open_guard(folder: Path | None = None, **options: Any) -> Guard:
    """Open a guard over a database of ``home()`` or a copy of one."""
    options = {"k": K, "device": "cpu", **options}
    return Guard.open(folder or home() / "database", home() / "classifier", **options)


@functools.lru_cache(maxsize=1)
def guard() -> Guard:
    """The guard of most tests."""
    return open_guard()


@functools.lru_cache(maxsize=1)
def pictures() -> tuple[bytes, ...]:
    """Some digits that the database does not hold, as PNG files."""
    return tuple(png(image[0].numpy()) for image in images("test", 60)[0])


def png(pixels: np.ndarray) -> bytes:
    """Grey pixels in [0, 1] as a PNG file."""
    out = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def predicted(files: list[bytes], by: Guard | None = None, **options: Any) -> list[Defended]:
    """What the Python call says of image files, read from a disk as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, data in enumerate(files):
            paths.append(Path(folder) / f"{number}.png")
            paths[-1].write_bytes(data)
        return (by or guard()).predict(paths, **options)


class Slow:
    """A guard whose predictions wait for ``go``, or take a while; all else is the real one's."""

    def __init__(self, inner: Guard, seconds: float = 0.0) -> None:
        self._inner, self.seconds = inner, seconds
        self.go = threading.Event()
        self.go.set()
        self.begun, self.taken = threading.Event(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def predict(self, images: Any, *arguments: Any, **options: Any) -> list[Defended]:
        self.taken += len(images)
        self.begun.set()
        assert self.go.wait(20)
        time.sleep(self.seconds)
        return self._inner.predict(images, *arguments, **options)


@dataclass
class Served:
    """A server that runs in a thread."""

    url: str
    server: Server
    state: ServingState
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)

    def counted(self, name: str) -> float:
        """A sample of /metrics by its whole name."""
        for line in self.state.metrics.text().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"there is no {name}")


@contextlib.contextmanager
def serving(
    source: Any | Callable[[], Any] | None = None,
    *,
    wait: bool = True,
    told: Callable[[list[str]], None] | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """Serve in a thread, on a free port of loopback; ``told`` is called with the address when requests are answered."""
    settings = {"port": 0, "max_wait_ms": 2, **settings}
    server = make_server(source if source is not None else guard(), ServingSettings(**settings))
    server.on_started = told
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started and bool(server.addresses))
        port = server.addresses[0].rpartition(":")[2]
        served = Served(f"http://127.0.0.1:{port}", server, server.config.app.state.serving, thread)
        if wait:
            until(lambda: served.state.ready)
        yield served
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


@dataclass
class Process:
    """A server in a process of its own, started by the command."""

    url: str
    process: subprocess.Popen[str]
    errors: list[str]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError), self.client() as client:
            return client.get("/readyz").status_code == 200
        return False


def command(*words: object) -> list[str]:
    """The command line of ``nndefense serve``, in this interpreter."""
    return [sys.executable, "-m", "nndefense", "serve", *map(str, words)]


def environment() -> dict[str, str]:
    """Of a process on a busy machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@contextlib.contextmanager
def process(database: Path, *words: object, port: int = 0) -> Iterator[Process]:
    """Run ``nndefense serve`` and wait until it is ready; it is killed at the end, if it still runs."""
    options = ("--database", database, "--classifier", home() / "classifier", "--k", K, "--port", port, "--threads", 1)
    child = subprocess.Popen(
        command(*options, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    errors: list[str] = []
    assert child.stdout is not None
    assert child.stderr is not None
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    try:
        line = child.stdout.readline()
        assert " on http://" in line, "".join(errors)
        served = Process(line.split(" on ")[1].split(";")[0].strip(), child, errors)
        until(lambda: served.ready() or child.poll() is not None, 60)
        assert child.poll() is None, "".join(errors)
        yield served
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(20)
        reader.join(5)
        child.stdout.close()
        child.stderr.close()
