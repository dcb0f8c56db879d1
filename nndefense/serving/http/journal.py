"""The access log: JSON lines in a file of its own, written by a thread, so that a slow or full disk stops no answer."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import Any

from nndefense.files import make_folder

FILE = "access.jsonl"
_WAITING = 10_000
_BYTES = 64 * 2**20
_KEPT = 4
_log = logging.getLogger(__name__)


class Journal:
    """A log that gives up lines rather than time.

    Before it grows beyond 64 MiB the file is renamed to ``access.jsonl.1`` and so on; four old ones are kept. What
    cannot be written, because the disk is full or too slow, is counted and dropped, and said once in the server's own
    log.

    Args:
        folder: where the file is; created where it is missing.
        lost: called with the number of lines that could not be written.

    Raises:
        InputError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, lost: Callable[[int], None], *, max_bytes: int = _BYTES) -> None:
        make_folder(folder)
        self.path = folder / FILE
        lines: queue.Queue[Any] = queue.Queue(_WAITING)
        self._entrance = _Entrance(lines, lost)
        self._listener = _Listener(lines, _File(self.path, max_bytes, lost))
        self._listener.start()

    def put(self, line: Mapping[str, Any]) -> None:
        """Write a line soon; never waits and never fails."""
        self._entrance.emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """Write what waits, for five seconds at most, and end the thread."""
        # The listener itself would wait for as long as the disk does.
        stopping = threading.Thread(target=self._listener.stop, daemon=True)
        stopping.start()
        stopping.join(5)


class _Entrance(QueueHandler):
    """Puts lines into the queue as they are, and counts those that find it full."""

    def __init__(self, lines: queue.Queue[Any], lost: Callable[[int], None]) -> None:
        super().__init__(lines)
        self._lost = lost

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def handleError(self, record: logging.LogRecord) -> None:
        self._lost(1)


class _Listener(QueueListener):
    """Makes text of the lines in its thread, and waits for room to end where the queue is full."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.msg = json.dumps(record.msg, ensure_ascii=True)
        return record

    def enqueue_sentinel(self) -> None:
        self.queue.put(None)  # type: ignore[attr-defined]


class _File(RotatingFileHandler, WatchedFileHandler):
    """The file: after it was renamed or deleted, lines go into one that can be found."""

    dev = ino = -1

    def __init__(self, path: Path, max_bytes: int, lost: Callable[[int], None]) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=_KEPT, encoding="ascii", delay=True)
        self._lost, self._healthy, self._failed = lost, True, False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        try:
            self.reopenIfNeeded()
        except OSError:
            self.handleError(record)
        else:
            super().emit(record)
        if not self._failed and not self._healthy:
            _log.warning("the access log can be written again")
        self._healthy = not self._failed

    def handleError(self, record: logging.LogRecord) -> None:
        self._lost(1)
        if self._healthy and not self._failed:
            _log.error("the access log cannot be written (%s); serving goes on without it", sys.exc_info()[1])
        self._failed = True
        # What could not be written must not be written later: it was counted as lost.
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()
