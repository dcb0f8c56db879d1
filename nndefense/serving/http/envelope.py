"""What goes around every answer: an id, security headers, problem details, counters and the access log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from nndefense.serving.http.metrics import Journal, Metrics
from nndefense.serving.http.problem import MEDIA_TYPE, ServiceProblem, body_of
from nndefense.serving.http.security import (
    HEADERS,
    App,
    BodyLimit,
    Gate,
    Message,
    Receive,
    Scope,
    Send,
    has_body,
    header,
)
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.pictures.limits import Refused

_log = logging.getLogger(__name__)
# How long, and how much of, a refused body is still read, so that its sender gets to see the answer.
_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 64 * 2**20


class Envelope:
    """ASGI middleware, the outermost one.

    It asks the gate, adds the security headers and ``X-Request-ID``, turns errors into problem details (a defect of
    the server into a bare 500, with its traceback in the log under the request's id), and counts. HEAD is answered as
    GET without the body (RFC 9110, section 9.3.2).
    """

    def __init__(
        self,
        app: App,
        *,
        settings: ServingSettings,
        gate: Gate,
        metrics: Metrics,
        journal: Journal | None,
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        """``app`` gets bodies within the limits of the settings; ``waiting`` says how many images wait in it."""
        limited = BodyLimit(app, settings, metrics.part["body"].observe)
        metrics.watch(waiting, lambda: limited.buffered)
        self.app, self._gate, self._metrics, self._journal = limited, gate, metrics, journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Only lifespan events may pass; there are no web sockets here.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        # The server itself has to know which it was.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        self._metrics.in_flight.inc()
        try:
            self._gate.check(scope)
            await self.app(asked, answer.receive, answer.send)
        except Exception as error:
            if not isinstance(error, (ServiceProblem, Refused)):
                _log.exception("request %s failed", answer.id)
                error = ServiceProblem(
                    "internal", "this is a defect of the server, which logged it under this answer's id"
                )
            if answer.status:
                # The answer has begun, and can only be cut off.
                raise
            # The name ends with this block: an error remembers the frames that it came through, and the body in them.
            await answer.refuse(error)
        finally:
            self._metrics.in_flight.dec()
            self._count(scope, asked.get("route"), answer)

    def _count(self, scope: Scope, found: Any, answer: _Answer) -> None:
        # Only known routes become labels: a client must not be able to make new ones.
        route = getattr(found, "path", "other")
        seconds = time.perf_counter() - answer.begun
        self._metrics.requests.labels(route, answer.status or 499).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if answer.code and answer.status < 500:
            self._metrics.rejected.labels(answer.code).inc()
        if self._journal is not None:
            line: dict[str, Any] = {
                "time": time.time(),
                "id": answer.id,
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"][:16],
                "path": scope["path"][:200],
                "status": answer.status or 499,
                "ms": round(1000 * seconds, 2),
            }
            if answer.code:
                line["code"] = answer.code
            self._journal.put(line)


class _Answer:
    """One answer on its way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        # A request that another part of the service hands on has its id already.
        self.id: str = scope.setdefault("request_id", str(uuid.uuid4()))
        self.begun = time.perf_counter()
        self.status = 0
        self.code = ""
        self._complete = not has_body(scope)

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._complete = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            names = {name.lower() for name, _ in headers}
            headers += [pair for pair in HEADERS if pair[0] not in names]
            headers.append((b"x-request-id", self.id.encode()))
            message = {**message, "headers": headers}
        elif self._scope["method"] == "HEAD":
            message = {**message, "body": b""}
        await self._send(message)

    async def refuse(self, problem: ServiceProblem | Refused) -> None:
        """Answer with a problem; a body that was not read is read to its end first, as far as that is quick."""
        self.code = problem.code
        body = body_of(problem.status, problem.code, problem.detail, self.id)
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
        if not self._complete:
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": not self._complete})
        if not self._complete:
            # To close while the client is still sending would reset the connection, and the answer might be lost.
            if header(self._scope, b"expect") is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._drain(), _DRAIN_SECONDS)
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self) -> None:
        left = _DRAIN_BYTES
        while left > 0 and not self._complete:
            left -= len((await self.receive()).get("body", b""))
