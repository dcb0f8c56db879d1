"""The access log: JSON lines in a file of its own, written by a thread, so that a slow or full disk stops no answer."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
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

    At 64 MiB the file is renamed to ``access.jsonl.1`` and so on; four old ones are kept. What cannot be written,
    because the disk is full or too slow, is counted and dropped, and said once in the server's own log.

    Args:
        folder: where the file is; created where it is missing.
        lost: called with the number of lines that could not be written.

    Raises:
        InputError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, lost: Callable[[int], None], *, max_bytes: int = _BYTES) -> None:
        make_folder(folder)
        self.path = folder / FILE
        self._lost, self._max_bytes = lost, max_bytes
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_WAITING)
        self._healthy = True
        self._thread = threading.Thread(target=self._work, name="nndefense-log", daemon=True)
        self._thread.start()

    def put(self, line: Mapping[str, Any]) -> None:
        """Write a line soon; never waits and never fails."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost(1)

    def close(self) -> None:
        """Write what waits, for five seconds at most, and end the thread."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(5)

    def _work(self) -> None:
        ended = False
        while not ended:
            lines = [self._lines.get()]
            # What came meanwhile goes into the same write.
            while len(lines) < 1000 and not self._lines.empty():
                lines.append(self._lines.get())
            ended = lines[-1] is None or None in lines
            found = [json.dumps(line, ensure_ascii=True) + "\n" for line in lines if line is not None]
            if not found:
                continue
            try:
                self._write("".join(found))
            except OSError as error:
                self._lost(len(found))
                if self._healthy:
                    _log.error("the access log cannot be written (%s); serving goes on without it", error.strerror)
                self._healthy = False
            else:
                if not self._healthy:
                    _log.warning("the access log can be written again")
                self._healthy = True

    def _write(self, text: str) -> None:
        # Opened anew each time: after a rename or a deleted file, lines go into a file that can be found.
        with self.path.open("a", encoding="ascii") as file:
            file.write(text)
            size = file.tell()
        if size > self._max_bytes:
            for number in range(_KEPT - 1, 0, -1):
                old = self.path.with_name(f"{FILE}.{number}")
                if old.exists():
                    old.replace(self.path.with_name(f"{FILE}.{number + 1}"))
            self.path.replace(self.path.with_name(f"{FILE}.1"))
