"""The door of a service on Ray: it takes requests within the same limits as the service of one process, and hands each
to a replica; where that replica dies, to another one.

Ray Serve's own HTTP proxy is not used. It hands a request on once only, so that those in a replica that dies are
answered with 500; it has no limit on the time and size of headers and bodies nor on connections; and it shows its
routes to everybody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from nndefense.database.cluster import import_ray
from nndefense.serving.cluster.replica import Member, Reply
from nndefense.serving.http.envelope import Envelope
from nndefense.serving.http.metrics import Journal, Metrics
from nndefense.serving.http.problem import MEDIA_TYPE, ServiceProblem, busy
from nndefense.serving.http.security import App, Gate, Keys, Receive, Scope, Send, has_body
from nndefense.serving.http.settings import ServingSettings

RELOAD = "/v1/admin/reload"
_PLAIN = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_PATIENCE = 60.0
_RELOAD_SECONDS = 900.0
_log = logging.getLogger(__name__)


class Door:
    """An ASGI application that has every request answered by a replica.

    Args:
        handle: Ray Serve's handle of the deployment.
        board: the handle of the board.
        settings: the settings of the service.
        retire: called with the fingerprints of databases that no replica serves any more.

    Attributes:
        stopping: whether the service is being stopped.
        app: the application with everything around it.
    """

    def __init__(self, handle: Any, board: Any, settings: ServingSettings, retire: Callable[[set[str]], None]) -> None:
        self._handle, self._board, self._settings, self._retire = handle, board, settings, retire
        self._errors = import_ray().exceptions
        self._serve_errors = _serve_errors()
        self._patience = max(_PATIENCE, 3 * settings.timeout)
        self._spreading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.stopping = False
        self.on_failure: Callable[[], None] | None = None
        self.metrics = Metrics()
        self._gate = Gate(settings, Keys.read(settings.api_key_file))
        self._journal = Journal(settings.log_dir, self.metrics.log_lost.inc) if settings.log_dir is not None else None
        self.metrics.ready.set(1)
        self.app: App = Envelope(self, settings=settings, gate=self._gate, metrics=self.metrics, journal=self._journal)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        path = scope["path"]
        if path == "/readyz" and self.stopping:
            raise busy("stopping", "the server is being stopped", 1)
        body = (await receive())["body"] if has_body(scope) else b""
        status, headers, content, route = await self._answer(_plain(scope), body)
        # What the counters take the name of a route from.
        scope["route"] = SimpleNamespace(path=route)
        if status == 200 and path == "/metrics":
            members = await self._members()
            content = merged(self.metrics.text(), {name: member.metrics for name, member in members.items()})
        elif status == 200 and path == RELOAD:
            content = json.dumps({**json.loads(content), **await self._spread()}).encode()
        # The length may have changed, and the id is put on by the envelope, which gave it to the replica.
        headers = [pair for pair in headers if pair[0] not in (b"content-length", b"x-request-id")]
        headers.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def loaded(self) -> None:
        """A door opens when its replicas serve: there is nothing to wait for."""

    async def reload(self) -> None:
        """Load the database and the keys again, in every replica: first in one, then in the others if that went well.

        Raises:
            ServiceProblem: ``reload_failed``; nothing has changed.
        """
        failed = await self._handle.reload.remote()
        if failed is not None:
            _log.error("the reload failed, the old database keeps serving: %s", failed)
            raise ServiceProblem("reload_failed", failed)
        await self._spread()

    async def _spread(self) -> dict[str, Any]:
        """Have all replicas load what one of them has just loaded; says how many did."""
        self._gate.keys = Keys.read(self._settings.api_key_file)
        async with self._spreading:
            before = await self._members()
            generation = await self._board.publish.remote()
            end = time.monotonic() + _RELOAD_SECONDS
            while True:
                now = await self._members()
                late = [name for name, member in now.items() if member.generation < generation]
                if (now and not late) or time.monotonic() > end:
                    break
                await asyncio.sleep(0.2)
            failed = [member.error for member in now.values() if member.error is not None]
            for error in failed:
                _log.error("a replica keeps serving the old database: %s", error)
            if not failed and not late:
                old = {member.database for member in before.values()} - {member.database for member in now.values()}
                self._later(old)
            _log.info("reloaded in %d replicas", len(now) - len(failed) - len(late))
            return {"replicas": len(now) - len(failed) - len(late), "replicas_failed": len(failed) + len(late)}

    def _later(self, old: set[str]) -> None:
        """Retire databases once every request that was accepted for them is answered."""

        async def wait() -> None:
            await asyncio.sleep(self._settings.timeout + 5)
            await asyncio.to_thread(self._retire, old)

        if old:
            task = asyncio.ensure_future(wait())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, scope: dict[str, Any], body: bytes) -> Reply:
        """Ask replicas until one has answered; nothing that the service does is harmed by being done twice."""
        end = time.monotonic() + self._patience
        pause = _PAUSE
        while True:
            try:
                asked = self._handle.http.remote(scope, body)
                reply: Reply = await asyncio.wait_for(asked, max(end - time.monotonic(), 0.1))
                if not _stopping(reply):
                    return reply
            except self._errors.RayActorError as error:
                _log.warning("a replica was lost (%s); asking another one", type(error).__name__)
            except self._serve_errors as error:
                raise busy("queue_full", "more requests wait than can be answered: try again in a moment", 1) from error
            except asyncio.TimeoutError as error:
                raise busy("timed_out", "no replica has answered: try again in a moment", 5) from error
            if time.monotonic() + pause > end:
                raise busy("not_ready", "there is no replica to answer: try again in a moment", 5)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _members(self) -> dict[str, Member]:
        found: dict[str, Member] = await self._board.members.remote()
        return found

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in self._tasks:
            task.cancel()
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)
        await send({"type": "lifespan.shutdown.complete"})


def merged(door: bytes, replicas: Mapping[str, bytes]) -> bytes:
    """The metrics of the door and of all replicas as one text, with a label ``replica`` on every sample.

    Requests are counted at the door, which sees all of them, and not once more in the replicas.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for replica, text in (("door", door), *sorted(replicas.items())):
        name = ""
        for line in text.decode().splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                heads = families.setdefault(name, ([], []))[0]
                if line not in heads:
                    heads.append(line)
            elif replica == "door" or not name.startswith("nndefense_request"):
                families[name][1].append(_labelled(line, replica))
    return "".join(f"{line}\n" for heads, lines in families.values() for line in (*heads, *lines)).encode()


def _labelled(line: str, replica: str) -> str:
    name, space, value = line.rpartition(" ")
    if name.endswith("}"):
        return f'{name[:-1]},replica="{replica}"}}{space}{value}'
    return f'{name}{{replica="{replica}"}}{space}{value}'


def _plain(scope: Scope) -> dict[str, Any]:
    """The part of a scope that can travel; the replica answers under the id that the envelope has given."""
    found = {name: scope[name] for name in _PLAIN if name in scope}
    found["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    found["client"] = tuple(scope["client"]) if scope.get("client") else None
    found["server"] = tuple(scope["server"]) if scope.get("server") else None
    found["asgi"] = {"version": "3.0"}
    found["request_id"] = scope["request_id"]
    return found


def _stopping(reply: Reply) -> bool:
    status, headers, content, _ = reply
    return status == 503 and (b"content-type", MEDIA_TYPE.encode()) in headers and b'"code": "stopping"' in content


def _serve_errors() -> tuple[type[Exception], ...]:
    import ray.serve.exceptions as found

    names = ("BackPressureError", "DeploymentUnavailableError")
    return tuple(getattr(found, name) for name in names if hasattr(found, name))
