"""The server process: uvicorn with time limits from the first byte, reload at SIGHUP, an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from nndefense.errors import InputError
from nndefense.guard import Guard
from nndefense.serving.app import create_app
from nndefense.serving.http.problem import MEDIA_TYPE, body_of
from nndefense.serving.http.settings import ServingSettings
from nndefense.serving.http.state import ServingState

KEEP_ALIVE = 30
_BACKLOG = 512
_TURN_AWAY_SECONDS = 1.0
SWITCH_SECONDS = 0.0005
_log = logging.getLogger(__name__)
_Base: Any = AutoHTTPProtocol


class _Quiet:
    """A transport to whose client nothing is written once it has gone: uvloop raises where it has just gone."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, or let it be."""
        if not self._transport.is_closing():
            self._transport.write(data)


def make_protocol(settings: ServingSettings) -> type[asyncio.Protocol]:
    """The connection's protocol: uvicorn's, with limits on the time and size of headers and on the connections.

    uvicorn itself waits for ever for a request that never becomes complete.
    """
    limits = settings.limits

    class Protocol(_Base):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None
        _unfinished = 0
        _one_too_many = False

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(_Quiet(transport))
            self._one_too_many = len(self.connections) > settings.max_connections
            self._arm(_TURN_AWAY_SECONDS if self._one_too_many else limits.header_seconds)

        def data_received(self, data: bytes) -> None:
            if self._one_too_many:
                # Not before it has asked: who is still sending might never see the answer.
                self._refuse(503, "queue_full", "too many connections are open: try later", "retry-after: 1\r\n")
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                # A request has begun; from here on the application's own limits hold.
                self._disarm()
                return
            self._unfinished += len(data)
            if self._unfinished > limits.max_header_bytes:
                self._refuse(431, "malformed_request", "the headers are too large")
            elif self._timer is None:
                self._arm(limits.header_seconds)

        def connection_lost(self, error: Exception | None) -> None:
            self._disarm()
            super().connection_lost(error)

        def send_400_response(self, message: str) -> None:
            self._refuse(400, "malformed_request", "this is not HTTP as it should be")

        def _arm(self, seconds: float) -> None:
            self._timer = self.loop.call_later(seconds, self._late)

        def _disarm(self) -> None:
            self._unfinished = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self._unfinished:
                self._refuse(408, "slow_body", f"the headers did not arrive within {limits.header_seconds:g} seconds")
            else:
                self.transport.close()

        def _refuse(self, status: int, code: str, detail: str, more: str = "") -> None:
            if self.transport.is_closing():
                return
            body = body_of(status, code, detail)
            head = f"HTTP/1.1 {status} \r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}{more}connection: close\r\n\r\n".encode() + body)
            self.transport.close()

    return Protocol


class Managed(Protocol):
    """What a server needs of the state behind its application."""

    stopping: bool
    on_failure: Callable[[], None] | None

    async def reload(self) -> Any:
        """Load everything again; raises where that fails."""

    async def loaded(self) -> None:
        """Wait until requests can be answered; raises why they never will be."""


class Server(uvicorn.Server):
    """uvicorn's server, which answers SIGHUP with a reload, and SIGTERM and SIGINT with an orderly end."""

    def __init__(self, config: uvicorn.Config, state: Managed) -> None:
        super().__init__(config)
        self._state = state
        self._tasks: set[asyncio.Task[Any]] = set()
        self.on_started: Callable[[list[str]], None] | None = None
        state.on_failure = self.stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell who wants to know where, as soon as what is asked there is answered."""
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self._keep(self._tell(self.on_started))

    async def _tell(self, started: Callable[[list[str]], None]) -> None:
        # Why it cannot be loaded is for the state to say.
        with contextlib.suppress(Exception):
            await self._state.loaded()
            started(self.addresses)

    @property
    def addresses(self) -> list[str]:
        """Where the server listens, as URLs; empty before it does."""
        found = []
        for server in getattr(self, "servers", ()):
            for one in server.sockets:
                host, port = one.getsockname()[:2]
                found.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        return found

    def stop(self) -> None:
        """Accept nothing more, finish what was accepted, and end; a second call does not wait."""
        if self.should_exit:
            self.force_exit = True
        self._state.stopping = True
        self.should_exit = True

    def reload(self) -> None:
        """Begin a reload; what it comes to stands in the log."""

        async def quietly() -> None:
            # The state has logged a failure already.
            with contextlib.suppress(Exception):
                await self._state.reload()

        self._keep(quietly())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals in the event loop, and give them back afterwards."""
        loop = asyncio.get_running_loop()
        handled: list[tuple[int, Callable[[], None]]] = [(signal.SIGTERM, self.stop), (signal.SIGINT, self.stop)]
        if hasattr(signal, "SIGHUP"):
            handled.append((signal.SIGHUP, self.reload))
        try:
            for number, action in handled:
                loop.add_signal_handler(number, action)
        except (NotImplementedError, RuntimeError, ValueError):
            # Not the main thread, or a system whose loop knows no signals: as uvicorn does it.
            with super().capture_signals():
                yield
            return
        try:
            yield
        finally:
            for number, _ in handled:
                loop.remove_signal_handler(number)


def make_server(guard: Guard | Callable[[], Guard], settings: ServingSettings) -> Server:
    """A server that is not running yet; arguments as for :func:`~nndefense.serving.app.create_app`."""
    app = create_app(guard, settings)
    return server_of(app, app.state.serving, settings)


def server_of(app: Any, state: Managed, settings: ServingSettings) -> Server:
    """A server, not running yet, for any ASGI application and the state that it manages."""
    config = uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        http=make_protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        h11_max_incomplete_event_size=settings.limits.max_header_bytes,
    )
    return Server(config, state)


def serve(
    guard: Guard | Callable[[], Guard], settings: ServingSettings, *, started: Callable[[list[str]], None] | None = None
) -> None:
    """Serve until a signal ends it.

    Args:
        guard: the guard, or what opens one.
        settings: the settings.
        started: called with the URLs once the database is loaded and requests are answered.

    Raises:
        NNDefenseError: the database could not be opened.
        InputError: the address cannot be bound.
    """
    # The thread that predicts wants the interpreter for a moment after each operation of the net: with Python's own 5
    # milliseconds it would stand still while a batch of answers is written.
    sys.setswitchinterval(SWITCH_SECONDS)
    sockets = bind(settings.host, settings.port)
    server = make_server(guard, settings)
    state: ServingState = server.config.app.state.serving  # type: ignore[union-attr]
    run_server(server, sockets, started)
    if state.error is not None:
        raise state.error


def run_server(server: Server, sockets: list[socket.socket], started: Callable[[list[str]], None] | None) -> None:
    """Run a server on bound sockets until a signal ends it; ``started`` is called with its URLs once they answer."""
    # Of other libraries only what is wrong: FAISS tells, as information, of each build of it that is not installed.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("nndefense").setLevel(logging.INFO)
    server.on_started = started
    server.run(sockets)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets for all addresses of a host, on one port; with port 0 on a free one.

    Raises:
        InputError: the host is unknown, or an address cannot be bound.
    """
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            bound.append(one)
            if os.name == "posix":
                # A port that a process has just left may be taken at once; one that is in use may not.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port or bound[0].getsockname()[1], *address[2:]))
    except OSError as error:
        for one in bound:
            one.close()
        raise InputError(
            f"{host}:{port} cannot be bound ({error.strerror}): another program may use the port, choose another one"
        ) from error
    return bound
