"""What runs in the Ray cluster: replicas of the application, and the board by which they keep together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nndefense.database import ImageDatabase
from nndefense.database.cluster import NAMESPACE, import_ray
from nndefense.database.sharded import LateError
from nndefense.errors import DatabaseError
from nndefense.guard import HELD_BYTES, Guard
from nndefense.serving.app import create_app
from nndefense.serving.http.problem import ServiceProblem
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.http.state import ServingState
from nndefense.serving.server import SWITCH_SECONDS

Headers = list[tuple[bytes, bytes]]
Reply = tuple[int, Headers, bytes, str]
"""Status, headers, body, and the path of the route that answered."""

_BEAT = 1.0
_SILENT = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica needs to know.

    Attributes:
        guard: arguments of :meth:`~nndefense.guard.Guard.open`.
        settings: the settings of the service.
        name: of the application; its board and its shards have it too.
        shards: parts of the index.
        replicas: how many replicas may share a machine's memory.
    """

    guard: dict[str, Any]
    settings: ServingSettings
    name: str
    shards: int
    replicas: int

    @property
    def board(self) -> str:
        """The name of the board's actor."""
        return f"{self.name}-board"


@dataclass(frozen=True)
class Member:
    """What a replica last said of itself: which reload it has followed, what it serves, and its metrics."""

    generation: int
    database: str
    error: str | None
    metrics: bytes


class ReplicaBoard:
    """An actor where replicas report every second, and learn that there is a new database to load."""

    def __init__(self) -> None:
        self.generation = 0
        self._members: dict[str, tuple[float, Member]] = {}
        self._failure: tuple[str, str] | None = None

    def report(self, replica: str, member: Member) -> int:
        """Keep a report; returns the generation that is wanted of everyone."""
        # After a restart the board knows nothing; the replicas do.
        self.generation = max(self.generation, member.generation)
        self._members[replica] = (time.monotonic(), member)
        return self.generation

    def join(self, replica: str, database: str) -> int:
        """Take in a new replica, which has opened this database; returns its generation.

        Where the others serve another one, the folder was replaced while they ran and nobody has asked for a reload.
        They follow, so that a client does not get answers of both for longer than that takes.
        """
        others = self.members().values()
        if any(member.database != database and member.generation == self.generation for member in others):
            self.generation += 1
        self.report(replica, Member(self.generation, database, None, b""))
        return self.generation

    def publish(self) -> int:
        """Ask everyone to load the database again; returns the new generation."""
        self.generation += 1
        return self.generation

    def members(self) -> dict[str, Member]:
        """The replicas that reported within ten seconds."""
        now = time.monotonic()
        self._members = {name: one for name, one in self._members.items() if now - one[0] < _SILENT}
        return {name: member for name, (_, member) in self._members.items()}

    def leave(self, replica: str) -> None:
        """Forget a replica that ends."""
        self._members.pop(replica, None)

    def fail(self, kind: str, text: str) -> None:
        """Keep why a replica could not start."""
        self._failure = (kind, text)

    def failure(self) -> tuple[str, str] | None:
        """Name and text of the error with which a replica last failed to start, or None."""
        return self._failure


class Replica:
    """One copy of the application, as a deployment of Ray Serve; it gets requests from the door."""

    async def __init__(self, spec: ReplicaSpec) -> None:  # type: ignore[misc]
        """Open the database; Ray Serve sends no request before that is done."""
        self._id = uuid.uuid4().hex[:8]
        sys.setswitchinterval(SWITCH_SECONDS)
        self._board = import_ray().get_actor(spec.board, namespace=NAMESPACE)
        self._app = create_app(partial(open_guard, spec), replace(spec.settings, log_dir=None))
        self._state: ServingState = self._app.state.serving
        self._error: str | None = None
        try:
            await self._state.start()
            await self._state.loaded()
        except Exception as error:
            await self._board.fail.remote(type(error).__name__, str(error))
            raise
        fingerprint = self._state.guard.database.fingerprint
        self._generation: int = await self._board.join.remote(self._id, fingerprint)
        self._reloading: asyncio.Task[None] | None = None
        self._following = asyncio.create_task(self._follow())

    async def http(self, scope: dict[str, Any], body: bytes) -> Reply:
        """Answer a request, whose body has been received already."""
        pieces = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            return pieces.pop() if pieces else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        headers = [(bytes(name), bytes(value)) for name, value in sent[0]["headers"]]
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], headers, content, getattr(scope.get("route"), "path", "other")

    async def reload(self) -> str | None:
        """Load the database and the keys again, in this replica; returns why it failed, or None."""
        try:
            await self._state.reload()
        except ServiceProblem as problem:
            return problem.detail
        return None

    async def check_health(self) -> None:
        """Raise where Ray Serve should start this replica anew."""
        if not self._state.alive:
            raise DatabaseError("the thread that predicts has ended")
        parts = self._state.guard.database.sharded
        if parts is not None:
            # A part that is being started again is no reason; one that cannot be is.
            with contextlib.suppress(LateError):
                await asyncio.to_thread(parts.check, 5.0)

    async def __del__(self) -> None:
        """Called by Ray Serve, after the last request was answered."""
        self._following.cancel()
        with contextlib.suppress(import_ray().exceptions.RayError):
            await self._board.leave.remote(self._id)
        await self._state.stop()

    async def _follow(self) -> None:
        while True:
            try:
                wanted = await self._board.report.remote(self._id, self._member())
            except import_ray().exceptions.RayError as error:
                _log.warning("the board does not answer: %s", error)
                wanted = self._generation
            if wanted > self._generation and (self._reloading is None or self._reloading.done()):
                self._reloading = asyncio.create_task(self._catch_up(wanted))
            await asyncio.sleep(_BEAT)

    async def _catch_up(self, wanted: int) -> None:
        self._error = await self.reload()
        self._generation = wanted

    def _member(self) -> Member:
        database = self._state.guard.database.fingerprint
        return Member(self._generation, database, self._error, self._state.metrics.text())


def open_guard(spec: ReplicaSpec) -> Guard:
    """Open the guard of a replica, whose index is in parts that all replicas share."""
    options = dict(spec.guard)
    database = ImageDatabase.open(Path(options.pop("database")), engine="ray", shards=spec.shards, ray_name=spec.name)
    if not database.hold_rows(HELD_BYTES // spec.replicas):
        _log.warning("%s is too large to be held in memory: replace its files, never write into them", database.path)
    return Guard.open(database, **options)
