"""Threads that decode images: Pillow lets go of the interpreter lock while it decodes, so they do run side by side."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch.utils.data import get_worker_info

_here = threading.local()


def each(function: Callable[[int], None], count: int) -> None:
    """Call ``function`` with 0 to ``count`` - 1, side by side unless this thread or process is one of many already.

    The first call in that order that raises an error has its error raised here.
    """
    if count < 2 or get_worker_info() is not None or getattr(_here, "one_of_many", False):
        for number in range(count):
            function(number)
    else:
        for _ in decoder_threads(os.getpid()).map(function, range(count)):
            pass


def one_of_many() -> None:
    """Say that the calling thread is one of several that read at the same time: threads in each would only compete."""
    _here.one_of_many = True


@functools.lru_cache(maxsize=1)
def decoder_threads(process: int) -> ThreadPoolExecutor:
    """Return the process's decoding threads. They do not survive a fork, hence one pool for each process id."""
    return ThreadPoolExecutor(max_workers=processors(), thread_name_prefix="decode", initializer=one_of_many)


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
