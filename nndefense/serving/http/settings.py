"""The settings of a server, checked once when they are made."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path

from nndefense.errors import InputError
from nndefense.serving.pictures.limits import Limits


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reachable from this machine alone; a name other than ``localhost`` is not."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class ServingSettings:
    """How the service listens, whom it answers, and how much it takes on. Times are in seconds but for ``max_wait_ms``.

    Raises:
        InputError: a value out of range, or an address that others can reach without keys and without ``allow_open``.
    """

    host: str = "127.0.0.1"
    """The address to bind."""
    port: int = 8000
    """The port; 0 for any free one."""
    api_key_file: Path | None = None
    """The keys, a line each; see :class:`~nndefense.serving.http.security.Keys`."""
    allow_open: bool = False
    """Serve without keys although others can reach the address."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the service is reached, checked against the Host header; none: only those of loopback where
    nothing else protects the service (no keys, bound to loopback), and any name elsewhere."""
    demo_attacks: bool = False
    """Whether the page may attack images on the server."""
    max_batch: int | None = None
    """Images in one forward pass and one search; :data:`~nndefense.serving.http.state.MAX_BATCH` if None."""
    max_wait_ms: float = 5.0
    """How long the first image of a batch that is not full waits for others."""
    queue: int = 256
    """Images that may wait; further ones are answered with 503."""
    timeout: float = 10.0
    """From the end of a request's body to its prediction; what would take longer is answered with 503."""
    max_buffered_bytes: int = 256 * 2**20
    """All bodies together that are being received or worked on."""
    max_connections: int = 800
    """Connections that may be open, most of them idle; each needs a file descriptor."""
    grace: float = 30.0
    """How long accepted requests may take to finish when the server is stopped."""
    threads: int | None = None
    """Threads of torch and of the search; None: as they choose."""
    log_dir: Path | None = None
    """The folder of the access log; None: no such log."""
    limits: Limits = field(default_factory=Limits)
    """What one request may ask."""

    def __post_init__(self) -> None:
        for name, least in (("max_wait_ms", 0), ("timeout", 0), ("grace", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least) or (name == "timeout" and value == 0):
                raise InputError(f"{name} is {value}, but must be a positive number")
        for name in ("max_batch", "queue", "threads", "max_buffered_bytes", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, but must be at least 1")
        if not 0 <= self.port <= 65535:
            raise InputError(f"the port is {self.port}, but must be from 0 to 65535")
        if self.queue < self.limits.max_images:
            raise InputError(
                f"the queue holds {self.queue} images, fewer than the {self.limits.max_images} of one request: "
                "raise --queue or lower --max-images"
            )
        if self.max_buffered_bytes < self.limits.max_body_bytes:
            raise InputError("max_buffered_bytes is less than one body may have: raise it")
        if self.api_key_file is None and not self.allow_open and not is_loopback(self.host):
            raise InputError(
                f"others can reach {self.host}: give --api-key-file, or --allow-open to serve everyone, or bind "
                "127.0.0.1"
            )
