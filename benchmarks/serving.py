"""What the service makes of the defence's speed: throughput, latency, overload and memory, with wrk on loopback.

For each subject a server is started as a process of its own. Rounds of offline predictions (``Guard.predict`` on
batches of decoded images, in this process) and of requests (one PNG each, 64 concurrent clients, different images)
take turns, so that what the machine does meanwhile meets both. Then twice the load that was borne, and the recovery.
The net has the same number of threads in both; the clients and the HTTP side of the server use what is left of the
machine, and wait for it where nothing is left.

Needs wrk, and runs/demo (``make demo``); for ``cifar10`` also runs/cifar10 with its classifier.

Usage: python benchmarks/serving.py --requests 20000 --out benchmarks/serving.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nndefense.datasets import open_dataset
from nndefense.guard import Guard
from nndefense.serving.app import NEIGHBORS, TOP
from nndefense.versions import library_versions

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENTS = 64
IMAGES = 256
QUEUE = 256
# wrk's own script language: every request another image, and the whole histogram of latencies at the end.
SCRIPT = """
local bodies, requests, next = {}, {}, 0
function init(arguments)
  for number = 1, tonumber(arguments[2]) do
    local file = io.open(arguments[1] .. "/" .. number .. ".png", "rb")
    requests[number] = wrk.format("POST", "/v1/classify", {["Content-Type"] = "image/png"}, file:read("*a"))
    file:close()
  end
  next = math.random(#requests)
end
function request()
  next = next % #requests + 1
  return requests[next]
end
function done(summary, latency, requests)
  local parts = {}
  for i = 1, #latency do
    local value, count = latency(i)
    parts[#parts + 1] = "[" .. value .. "," .. count .. "]"
  end
  local e = summary.errors
  io.write(string.format('RESULT {"requests":%d,"microseconds":%d,"connect":%d,"read":%d,"write":%d,"status":%d,' ..
    '"timeout":%d,"latency":[%s]}\\n', summary.requests, summary.duration, e.connect, e.read, e.write, e.status,
    e.timeout, table.concat(parts, ",")))
end
"""


@dataclass
class Subject:
    """A defence to serve."""

    name: str
    database: Path
    classifier: str
    dataset: str
    threads: int = 1


@dataclass
class Load:
    """What wrk saw, over several runs."""

    requests: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    latency: Counter[int] = field(default_factory=Counter)

    def add(self, found: dict[str, Any]) -> None:
        self.requests += found["requests"]
        self.seconds += found["microseconds"] / 1e6
        for name in ("connect", "read", "write", "status", "timeout"):
            self.errors[name] += found[name]
        for value, count in found["latency"]:
            self.latency[value] += count

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds."""
        left = share * sum(self.latency.values())
        for value in sorted(self.latency):
            left -= self.latency[value]
            if left <= 0:
                return value / 1000
        return float("nan")


class Memory:
    """The resident memory of a process, read each second by a thread."""

    def __init__(self, pid: int) -> None:
        self.samples: list[int] = []
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            with suppress(OSError, IndexError):
                text = Path(f"/proc/{self._pid}/status").read_text()
                self.samples.append(int(text.split("VmRSS:")[1].split()[0]) // 1024)

    def end(self) -> dict[str, float]:
        """MiB after the first tenth of the samples, at the end (medians of a twentieth), their ratio, and the most."""
        self._stop.set()
        self._thread.join()
        few = max(1, len(self.samples) // 20)
        warm = len(self.samples) // 10
        first = statistics.median(self.samples[warm : warm + few])
        last = statistics.median(self.samples[-few:])
        return {"warm_mib": first, "end_mib": last, "growth": last / first, "most_mib": max(self.samples)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=["cifar10", "digits"], help="digits, cifar10, cifar10-2")
    parser.add_argument("--requests", type=int, default=20_000, help="requests of each subject under 64 clients")
    parser.add_argument("--rounds", type=int, default=10, help="turns of offline predictions and requests")
    parser.add_argument("--offline-seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--overload-seconds", type=float, default=20.0)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--cifar10-classifier", default="python:../shared/data/models.py:cifar_resnet56")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("serving.py: error: this needs wrk: install it (apt-get install wrk)")
    cifar = (REPOSITORY / "runs/cifar10/database", options.cifar10_classifier, "cifar10:test")
    known = {
        "digits": Subject(
            "digits", REPOSITORY / "runs/demo/database", str(REPOSITORY / "runs/demo/classifier"), "digits:test"
        ),
        "cifar10": Subject("cifar10", *cifar),
        "cifar10-2": Subject("cifar10-2", *cifar, threads=2),
    }
    result: dict[str, Any] = {
        "clients": CLIENTS,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": library_versions(),
        "max_batch": options.max_batch,
        "top": TOP,
        "neighbors": NEIGHBORS,
        "subjects": {},
    }
    for name in options.subjects:
        result["subjects"][name] = measure(known[name], options)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in result["subjects"].items():
        print(
            f"{name}: {one['rate']:.0f}/s over HTTP, {one['offline_rate']:.0f}/s offline, ratio {one['ratio']:.3f}; "
            f"p50 {one['p50_ms']:.1f} ms, p99 {one['p99_ms']:.1f} ms ({one['p99_over_p50']:.2f} times); "
            f"{one['errors']} errors in {one['requests']}; memory {one['memory']['growth']:.3f} times; "
            f"overload: {one['overload']['answered']} answered, {one['overload']['shed']} shed, "
            f"{one['overload']['errors']} errors; afterwards {one['recovery']['ratio']:.2f} of the rate, "
            f"{one['recovery']['errors']} errors"
        )


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """One subject: rounds, overload, recovery."""
    use_threads(subject.threads)
    guard = Guard.open(subject.database, subject.classifier, device="cpu")
    channels, *_ = guard.input_shape
    test = open_dataset(subject.dataset, size=guard.input_shape[1:], channels=channels)
    images, _ = test.batch(np.arange(min(IMAGES, len(test))))
    with tempfile.TemporaryDirectory() as folder, server(subject, options) as (pid, url):
        script = Path(folder) / "load.lua"
        script.write_text(SCRIPT)
        for number, image in enumerate(images, 1):
            write_png(image, Path(folder) / f"{number}.png")

        def run(seconds: float, clients: int = CLIENTS) -> dict[str, Any]:
            return wrk(url, script, Path(folder), len(images), seconds, clients)

        # Warm-up of both sides, which also says how long the rounds must be.
        first = run(6.0)
        offline(guard, images, options.max_batch, 2.0)
        memory = Memory(pid)
        estimate = first["requests"] / (first["microseconds"] / 1e6)
        seconds = max(2.0, options.requests / estimate / options.rounds)
        load, offline_rates, ratios = Load(), [], []
        while load.requests < options.requests:
            before = offline(guard, images, options.max_batch, options.offline_seconds)
            one = Load()
            found = run(seconds)
            one.add(found)
            load.add(found)
            after = offline(guard, images, options.max_batch, options.offline_seconds)
            offline_rates += [before, after]
            ratios.append(one.rate / ((before + after) / 2))
            print(f"{subject.name}: {load.requests} requests, ratio {ratios[-1]:.3f}", file=sys.stderr, flush=True)
        flat = memory.end()
        rate = load.rate
        # What it bears now: the machine may have become quicker since. The queue must have the time to fill.
        now = Load()
        now.add(run(max(5.0, options.offline_seconds)))
        most = max(now.rate, rate)
        overload = (
            asyncio.run(pour(url, Path(folder), len(images), 2 * most, max(options.overload_seconds, 3 * QUEUE / most)))
            if most < 400
            else storm(run, options.overload_seconds)
        )
        recovered = Load()
        recovered.add(run(max(5.0, options.offline_seconds)))
        metrics = parts(url)
    return {
        "threads": subject.threads,
        "rows": len(guard.database),
        "k": guard.k,
        "input_shape": list(guard.input_shape),
        "requests": load.requests,
        "errors": sum(load.errors.values()),
        "rate": rate,
        "offline_rate": statistics.mean(offline_rates),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "p50_ms": load.percentile(0.5),
        "p99_ms": load.percentile(0.99),
        "p99_over_p50": load.percentile(0.99) / load.percentile(0.5),
        "memory": flat,
        "overload": overload,
        "recovery": {"ratio": recovered.rate / now.rate, "errors": sum(recovered.errors.values())},
        "mean_seconds": metrics,
    }


def use_threads(count: int) -> None:
    """Set the threads of torch and FAISS."""
    torch.set_num_threads(count)
    with suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(count)


def offline(guard: Guard, images: Tensor, batch: int, seconds: float) -> float:
    """Predictions per second in full batches."""
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        first = done % (len(images) - batch + 1)
        guard.predict(images[first : first + batch], top=TOP, neighbors=NEIGHBORS, batch_size=batch)
        done += batch
    return done / (time.perf_counter() - begun)


def write_png(image: Tensor, path: Path) -> None:
    """Write C x H x W as PNG."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(path)


@contextmanager
def server(subject: Subject, options: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """A running server: process id and URL."""
    words: list[object] = [
        sys.executable, "-m", "nndefense", "serve", "--database", subject.database, "--classifier", subject.classifier,
        "--port", 0, "--threads", subject.threads, "--max-batch", options.max_batch, "--queue", QUEUE,
        "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(subject.threads)}
    child = subprocess.Popen(
        [str(word) for word in words], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if " on http://" not in line:
            sys.exit("serving.py: error: the server did not start")
        url = line.split(" on ")[1].split(";")[0].strip()
        while True:
            with suppress(OSError), urlopen(f"{url}/readyz") as answer:
                if answer.status == 200:
                    break
            if child.poll() is not None:
                sys.exit("serving.py: error: the server did not start")
            time.sleep(0.2)
        yield child.pid, url
    finally:
        child.terminate()
        child.wait(60)


def wrk(url: str, script: Path, folder: Path, images: int, seconds: float, clients: int) -> dict[str, Any]:
    """Run wrk, and return what its script printed."""
    words = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(script), url]
    done = subprocess.run([*words, "--", str(folder), str(images)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    return found


def storm(run: Any, seconds: float) -> dict[str, Any]:
    """Far more clients than the queue has places, each asking again at once when it was refused."""
    load = Load()
    load.add(run(seconds, clients=600))
    shed = load.errors.pop("status")
    return {
        "kind": "600 clients that ask again at once",
        "offered_per_second": load.rate,
        "answered": load.requests - shed,
        "shed": shed,
        "answered_per_second": (load.requests - shed) / load.seconds,
        "errors": sum(load.errors.values()),
    }


async def pour(url: str, folder: Path, images: int, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at a fixed rate, whatever becomes of the earlier ones."""
    bodies = [(folder / f"{number}.png").read_bytes() for number in range(1, images + 1)]
    host, port = url.removeprefix("http://").split(":")
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    statuses: Counter[str] = Counter()
    times: dict[str, list[float]] = {"200": [], "503": []}

    async def ask(number: int) -> None:
        body = bodies[number % images]
        head = f"POST /v1/classify HTTP/1.1\r\nhost: {host}\r\ncontent-type: image/png\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        begun = time.perf_counter()
        try:
            reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
            writer.write(head.encode() + body)
            answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode()
            length = next(line for line in answer.lower().split("\r\n") if line.startswith("content-length:"))
            await reader.readexactly(int(length.split(":")[1]))
            idle.append((reader, writer))
            status = answer.split()[1]
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            status = type(error).__name__
        statuses[status] += 1
        if status in times:
            times[status].append(time.perf_counter() - begun)

    begun, tasks = time.perf_counter(), []
    while (passed := time.perf_counter() - begun) < seconds:
        tasks += [
            asyncio.create_task(ask(len(tasks) + more)) for more in range(max(0, int(rate * passed) - len(tasks)))
        ]
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    whole = time.perf_counter() - begun
    for _, writer in idle:
        writer.close()
    return {
        "kind": "twice the rate, regardless of the answers",
        "offered_per_second": len(tasks) / seconds,
        "answered": statuses["200"],
        "shed": statuses["503"],
        "answered_per_second": statuses["200"] / whole,
        "errors": sum(count for status, count in statuses.items() if status not in ("200", "503")),
        "p50_ms": 1000 * statistics.median(times["200"] or [0.0]),
        "p99_ms": 1000 * float(np.quantile(times["200"] or [0.0], 0.99)),
        "shed_p50_ms": 1000 * statistics.median(times["503"] or [0.0]),
    }


def parts(url: str) -> dict[str, float]:
    """The mean seconds of each part, and the mean batch, as the server counted them."""
    with urlopen(f"{url}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    found = {}
    for name, value in lines.items():
        if name.startswith("nndefense_part_seconds_sum"):
            count = float(lines[name.replace("_sum", "_count")])
            found[name.split('"')[1]] = float(value) / count if count else 0.0
    found["batch_size"] = float(lines["nndefense_batch_size_sum"]) / float(lines["nndefense_batch_size_count"])
    return found


if __name__ == "__main__":
    main()
