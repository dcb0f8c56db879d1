"""Who may ask, under which name, and how much: keys, the gate before every route, and limits on bodies."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from nndefense.errors import InputError
from nndefense.files import read_whole
from nndefense.serving.http.encodings import is_packed, unpacked
from nndefense.serving.http.problem import ServiceProblem, busy
from nndefense.serving.http.settings import ServingSettings, is_loopback
from nndefense.serving.pictures.limits import Refused, refused

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json", "/favicon.ico"})
"""Paths that need no key: what is there tells nothing of the images or the model."""
OPEN_FOLDERS = ("/page/", "/problems/")
ADMIN_FOLDER = "/v1/admin/"
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""On every answer, unless it brings its own value (as the page does)."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_SHORTEST_KEY = 16
_HOST = re.compile(r"(?:\[([0-9a-f.]*:[0-9a-f:.]*)\]|([\w.~%!$&'()*+,;=-]*))(?::[0-9]{0,5})?", re.ASCII)
# What these say decides who is let in, and what a body is.
_ONCE = (b"host", b"origin", b"authorization", b"x-api-key", b"content-type", b"content-length")
_ABOUT_BODY = (b"content-encoding", b"content-length", b"transfer-encoding")


class Keys:
    """The API keys, held as sha256 digests.

    Args:
        lines: a key each, of at least 16 visible ASCII characters; those after ``admin:`` may also use
            ``/v1/admin``. Empty lines and those that begin with ``#`` are skipped.

    Raises:
        InputError: a key that is too short or has blanks in it.
    """

    def __init__(self, lines: list[str]) -> None:
        self._digests: list[tuple[bytes, bool]] = []
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            admin = text.startswith("admin:")
            key = text.removeprefix("admin:").strip()
            if len(key) < _SHORTEST_KEY or not all("!" <= letter <= "~" for letter in key):
                raise InputError(
                    f"the key in line {number} must have at least {_SHORTEST_KEY} visible ASCII characters: make one "
                    "with 'openssl rand -hex 24'"
                )
            self._digests.append((hashlib.sha256(key.encode()).digest(), admin))

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """Read the file of keys; None gives none.

        Raises:
            InputError: the file cannot be read or holds no key.
        """
        if path is None:
            return cls([])
        try:
            keys = cls(read_whole(path).decode("utf-8").splitlines())
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(f"the keys in {path} cannot be read ({reason})") from error
        if not keys:
            raise InputError(f"{path} holds no key: write one into a line, for example of 'openssl rand -hex 24'")
        return keys

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, given: bytes) -> tuple[bool, bool]:
        """Whether a key is one of ours, and whether it is an administrator's.

        The time does not depend on how much of it is right, nor on which key it is.
        """
        digest = hashlib.sha256(given).digest()
        known = admin = False
        for stored, is_admin in self._digests:
            same = hmac.compare_digest(digest, stored)
            known |= same
            admin |= same & is_admin
        return known, admin


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of a name (in lower case), or None."""
    for found, value in scope["headers"]:
        if found == name:
            return bytes(value)
    return None


class Gate:
    """Lets a request through, or raises the :class:`ServiceProblem` that it is refused with.

    ``keys`` may be replaced while the service runs.
    """

    def __init__(self, settings: ServingSettings, keys: Keys) -> None:
        self.keys = keys
        self._local = is_loopback(settings.host)
        self._header_bytes = settings.limits.max_header_bytes
        self._hosts = frozenset(host.lower().strip("[]") for host in settings.allowed_hosts)

    def check(self, scope: Scope) -> None:
        """Check the name, the origin and the key of a request.

        Raises:
            ServiceProblem: ``wrong_host``, ``forbidden`` or ``unauthorized``.
            Refused: the headers are too large (the connection's own limit does not see those that arrive whole), or one
                that may stand there once stands there twice.
        """
        size = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > self._header_bytes:
            raise Refused(431, "malformed_request", "the headers are too large")
        names = [name for name, _ in scope["headers"]]
        if twice := next((name.decode() for name in _ONCE if names.count(name) > 1), ""):
            # What stands before this server may have looked at the other one.
            raise Refused(400, "malformed_request", f"the header {twice} stands in the request twice: send it once")
        hosts = self._hosts or (LOCAL_HOSTS if self._local and not self.keys else None)
        host = (header(scope, b"host") or b"").decode("latin-1").lower()
        # Another web site whose name was pointed at this address would come with its own name (DNS rebinding).
        known = _name(host)
        if known is None or (hosts is not None and known not in hosts):
            raise ServiceProblem(
                "wrong_host", "use the address that the server printed, or start it with --allowed-host"
            )
        if self.keys:
            self._check_key(scope)
        elif scope["method"] not in _SAFE:
            self._check_origin(scope, host)

    def _check_origin(self, scope: Scope, host: str) -> None:
        """A page of another site must not make a visitor's browser ask here: without keys, nothing else stops it."""
        origin = header(scope, b"origin")
        if origin is None:
            return
        place = origin.decode("latin-1").lower().partition("://")[2]
        name = _name(place)
        if not name or (place != host and name not in self._hosts):
            raise ServiceProblem("forbidden", "pages of other sites may not ask here")

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return
        given = header(scope, b"x-api-key")
        if given is None:
            kind, _, rest = (header(scope, b"authorization") or b"").partition(b" ")
            given = rest.strip() if kind.lower() == b"bearer" else b""
        known, admin = self.keys.check(given)
        if not known:
            detail = "send a key: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            raise ServiceProblem("unauthorized", detail, headers={"www-authenticate": "Bearer"})
        if path.startswith(ADMIN_FOLDER) and not admin:
            raise ServiceProblem("forbidden", "this needs an administrator's key (a line 'admin:KEY' of the key file)")


def _name(host: str) -> str | None:
    """A host without its port; empty where there is none, None where it is not written as RFC 3986 has it (3.2.2)."""
    found = _HOST.fullmatch(host)
    return found and (found[1] or found[2] or "")


class BodyLimit:
    """ASGI middleware that receives a body whole, within limits, before anything else looks at it.

    What was compressed is unpacked, so that nothing else sees that it was.

    Args:
        app: what gets the body, in one piece.
        settings: the limits: bytes and seconds of one body, bytes of all together.
    """

    def __init__(self, app: App, settings: ServingSettings, on_body: Callable[[float], None]) -> None:
        self.app, self._settings, self._on_body = app, settings, on_body
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self.app(scope, receive, send)
            return
        held, seconds, begun = [0], self._settings.limits.body_seconds, time.monotonic()
        packed = is_packed(",".join(v.decode("latin-1") for n, v in scope["headers"] if n == b"content-encoding"))
        try:
            try:
                body = await asyncio.wait_for(self._body(scope, receive, held), seconds)
            except asyncio.TimeoutError:
                raise refused("slow_body", f"the body did not arrive within {seconds:g} seconds") from None
            self._on_body(time.monotonic() - begun)
            if packed:
                body = await asyncio.to_thread(unpacked, body, self._settings.limits)
                self._hold(len(body), held)
                rest = [pair for pair in scope["headers"] if pair[0] not in _ABOUT_BODY]
                scope["headers"] = [*rest, (b"content-length", str(len(body)).encode())]
            pieces = [{"type": "http.request", "body": body, "more_body": False}]

            async def again() -> Message:
                return pieces.pop() if pieces else await receive()

            await self.app(scope, again, send)
        finally:
            self.buffered -= held[0]

    async def _body(self, scope: Scope, receive: Receive, held: list[int]) -> bytes:
        limits = self._settings.limits
        length = header(scope, b"content-length") or b"0"
        if not length.isdigit() or len(length) > 15 or int(length) > limits.max_body_bytes:
            raise _too_large(limits.max_body_bytes)
        chunks: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise refused("malformed_request", "the connection was closed before the body was complete")
            chunk = message.get("body", b"")
            if held[0] + len(chunk) > limits.max_body_bytes:
                raise _too_large(limits.max_body_bytes)
            self._hold(len(chunk), held)
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _hold(self, size: int, held: list[int]) -> None:
        """Count bytes that are kept until the answer."""
        held[0] += size
        self.buffered += size
        if self.buffered > self._settings.max_buffered_bytes:
            raise busy("queue_full", "too many bodies are being received: try later", 1)


def has_body(scope: Scope) -> bool:
    """Whether a request announces a body."""
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _too_large(limit: int) -> Exception:
    return refused("body_too_large", f"a body may have {limit:,} bytes at most: send fewer or smaller images")
