"""Every hostile case against a running server: each answer is the right one, and nothing is left behind."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import hostile
import hostile_files as make
import httpx
import pytest
from served import Process, Served, home, process, serving
from uvicorn.protocols.http.h11_impl import H11Protocol

from nndefense.serving.http.problem import PROBLEMS
from nndefense.serving.pictures.limits import STATUS, Limits

SLOW = 1.0
LONGEST = 5.0
STRETCH, PASSES = 3, 15
GROWTH = 3.0
"""MiB over a stretch of passes; the bodies of one pass are more than a hundred times as much."""
SECRETS = re.compile(r"Traceback|File \"|/home|/tmp|\.py|0x[0-9a-f]{6}|site-packages|PIL\b|torch|root:")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server that is impatient, so that slowness need not be waited for."""
    with serving(limits=Limits(body_seconds=SLOW, header_seconds=SLOW)) as found:
        yield found


@pytest.fixture(scope="module")
def plainer() -> Iterator[Served]:
    """The same with the other parser of HTTP, the one in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nndefense.serving.server._Base", H11Protocol)
        with serving(limits=Limits(body_seconds=SLOW, header_seconds=SLOW)) as found:
            yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as found:
        yield found


def assert_good(answer: httpx.Response, allowed: tuple[int, ...], code: str = "") -> None:
    """The status is allowed, an error is a problem with the right code, and nothing is told of the inside."""
    assert answer.status_code in allowed, answer.text[:300]
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        value = answer.json()
        assert value["status"] == answer.status_code
        assert value["code"] in STATUS or value["code"] in PROBLEMS
        assert not code or value["code"] == code
        assert not SECRETS.search(answer.text), answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def ways(case: hostile.Picture, data: bytes) -> Iterator[dict[str, object]]:
    """A picture as a body of its own, in a form and in JSON (which declares no type)."""
    yield {"content": data, "headers": {"content-type": case.media_type}}
    head = 'form-data; name="files"; filename="x"'
    body = hostile.form(hostile.part(data, head, f"Content-Type: {case.media_type}"))
    yield {"content": body, "headers": {"content-type": hostile.FORM}}
    if case.media_type == "application/octet-stream":
        yield {"json": {"images": [base64.b64encode(data).decode()]}}


@pytest.mark.parametrize("case", hostile.PICTURES, ids=lambda case: case.name)
def test_pictures(client: httpx.Client, case: hostile.Picture) -> None:
    expected = None
    if case.twin is not None:
        expected = client.post(
            "/v1/classify", content=case.twin(), headers={"content-type": "application/octet-stream"}
        )
        assert expected.status_code == 200
    for options in ways(case, case.data):
        begun = time.monotonic()
        answer = client.post("/v1/classify", **options)  # type: ignore[arg-type]
        assert time.monotonic() - begun < LONGEST
        # A body of no bytes has no image; a form or a list with an empty one has a bad image.
        codes = ("no_image", "empty_image") if case.code == "empty_image" else (case.code,)
        assert_good(answer, (case.status,) if len(codes) == 1 else (400, 422))
        if case.status != 200:
            assert answer.json()["code"] in codes
        elif expected is not None:
            assert answer.content == expected.content
        else:
            assert 0 <= answer.json()["predictions"][0]["probability"] <= 1


def raw_request(case: hostile.Request, port: int) -> bytes:
    """Written by hand, since clients set paths and headers right."""
    body = case.data
    headers = {"Host": f"127.0.0.1:{port}", "Connection": "close", **case.headers}
    if body or case.method == "POST":
        headers["Content-Length"] = str(len(body))
    if case.content_type:
        headers["Content-Type"] = case.content_type
    lines = [f"{case.method} {case.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def raw_picture(case: hostile.Picture) -> bytes:
    """A picture as a body of its own."""
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {case.media_type}\r\n"
    return f"{head}Content-Length: {len(case.data)}\r\n\r\n".encode() + case.data


def exchange(port: int, pieces: tuple[bytes | float, ...], *, closes: bool = False, seconds: float = LONGEST) -> bytes:
    """The first answer to what is sent over a bare connection; empty where the server closes it without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        # A server that refuses may close before all is sent.
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    connection.sendall(piece)
            if closes:
                connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionError):
            while not complete(received):
                piece = connection.recv(2**16)
                if not piece:
                    break
                received += piece
        return received


def complete(answer: bytes) -> bool:
    """Whether an answer is whole (interim ones, 100 Continue, aside)."""
    head, gap, body = answer.partition(b"\r\n\r\n")
    if not gap or head.startswith(b"HTTP/1.1 100"):
        return bool(gap) and complete(body)
    length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
    return length is None or len(body) >= int(length[1])


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 for none."""
    statuses = [int(status) for status in re.findall(rb"(?m)^HTTP/1\.[01] (\d{3})", answer)]
    return next((status for status in statuses if status != 100), 0)


@pytest.mark.parametrize("case", hostile.REQUESTS, ids=lambda case: case.name)
def test_requests(served: Served, case: hostile.Request) -> None:
    begun = time.monotonic()
    answer = exchange(served.port, (raw_request(case, served.port),))
    assert time.monotonic() - begun < LONGEST
    status = status_of(answer)
    assert status in case.allowed, answer[:500]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert not SECRETS.search(answer.decode("utf-8", "replace"))
    if status >= 400 and case.method != "HEAD":
        assert b"application/problem+json" in head
        value = json.loads(body)
        assert not case.code or value["code"] == case.code


@pytest.mark.parametrize("parser", ["served", "plainer"])
@pytest.mark.parametrize("case", hostile.CONNECTIONS, ids=lambda case: case.name)
def test_connections(parser: str, case: hostile.Connection, request: pytest.FixtureRequest) -> None:
    server: Served = request.getfixturevalue(parser)
    begun = time.monotonic()
    answer = exchange(server.port, case.build(), closes=case.closes)
    assert time.monotonic() - begun < LONGEST
    assert status_of(answer) in case.allowed, answer[:500]
    assert not SECRETS.search(answer.decode("utf-8", "replace"))


def test_slow_clients_do_not_keep_others_waiting(served: Served) -> None:
    """Forty connections that send nothing, or half a request, beside one that is honest."""
    with contextlib.ExitStack() as stack, served.client() as client:
        for number in range(40):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            connection.sendall([b"", b"POST /v1/cl", hostile.image_head()][number % 3])
        begun = time.monotonic()
        answer = client.post("/v1/classify", content=make.plain(), headers={"content-type": "image/png"})
        assert answer.status_code == 200
        assert time.monotonic() - begun < SLOW


def test_the_server_is_well_afterwards(served: Served, client: httpx.Client) -> None:
    """No request is left in the server, and it still answers as it should."""
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    answer = client.post("/v1/classify", content=make.plain(), headers={"content-type": "image/png"})
    assert answer.status_code == 200
    assert not re.search(r'status="5\d\d"', client.get("/metrics").text)
    for name in ("nndefense_buffered_bytes", "nndefense_queue_images"):
        assert served.counted(name) == 0


def test_nothing_waits_for_the_garbage_collector(served: Served) -> None:
    """What a request leaves behind is freed at once: no circles with bodies in them, as the collector comes seldom."""
    nowhere = hostile.Request("a body for nobody", lambda: bytes(4 * hostile.MEBIBYTE), (404,), path="/nowhere")
    headers = next(case for case in hostile.CONNECTIONS if case.name == "10,000 headers")
    wrong = next(case for case in hostile.REQUESTS if case.name == "PUT classify")
    jobs = [
        (raw_request(nowhere, served.port),),
        headers.build(),
        (raw_request(wrong, served.port),),
        (raw_picture(hostile.PICTURES[0]),),
    ]
    for pieces in jobs:
        exchange(served.port, pieces)
    time.sleep(0.1)
    gc.collect()
    gc.disable()
    try:
        for pieces in jobs * 5:
            exchange(served.port, pieces)
        time.sleep(0.1)
        assert gc.collect() < 100
    finally:
        gc.enable()


def resident(child: Process) -> float:
    """The memory of a process, in MiB."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{child.process.pid}/status").read_text())
    assert match
    return int(match[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's memory")
@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    """The whole catalogue, again and again, at a server in a process of its own: the memory comes to a level and stays.

    How many passes fill the caches and the allocator's pools depends on which requests meet; a leak never ends.
    """
    with process(home() / "database", "--body-seconds", SLOW) as child:
        port = int(child.url.rpartition(":")[2])

        def everything() -> None:
            with ThreadPoolExecutor(4) as pool:
                quick = [case for case in hostile.CONNECTIONS if not case.waits]
                ask = partial(exchange, port, seconds=30.0)
                answers = [
                    *pool.map(lambda case: ask((raw_picture(case),)), hostile.PICTURES),
                    *pool.map(lambda case: ask((raw_request(case, port),)), hostile.REQUESTS),
                    *pool.map(lambda case: ask(case.build(), closes=case.closes), quick),
                ]
                assert all(status_of(answer) < 500 for answer in answers)

        sizes: list[float] = []
        while len(sizes) <= STRETCH or sizes[-1] - sizes[-1 - STRETCH] > GROWTH:
            assert len(sizes) < PASSES, sizes
            everything()
            sizes.append(resident(child))
        assert child.process.poll() is None
