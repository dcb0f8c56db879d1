"""Memory that is used again instead of being given back to the system.

A forward pass on a CPU asks for the same large blocks with every batch. glibc gives them back as soon as they are free,
and the system must find, clear and map every page of them anew: for small nets and for MobileNetV2 at 224 pixels that
can take as long as the computing (`make bench-index` measures it).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

# glibc's names for what mallopt sets (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST = -1, (1 << 31) - 1
# The most that glibc itself would raise both to, seeing blocks of such sizes come and go.
_USUAL_MMAP, _USUAL_TRIM = 32 << 20, 64 << 20

# Numbers in a batch from which its maps are likely to be larger than what glibc keeps.
_LARGE = 1 << 16

Call = TypeVar("Call", bound=Callable[..., Any])

_lock = threading.Lock()
_inside = 0


@contextmanager
def reused_memory() -> Iterator[None]:
    """While the context is open, freed memory stays with the process; at its end it goes back to the system.

    The peak is that of the blocks that are in use at one time and the gaps between them: somewhat more than without.
    Contexts may be nested, and opened by several threads; the last to close gives the memory back. Without glibc (on
    macOS, Windows, musl) nothing is changed.
    """
    global _inside
    library = _glibc()
    with _lock:
        _inside += 1
        if library is not None and _inside == 1 and library.mallopt(_MMAP_THRESHOLD, _LARGEST):
            library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if library is not None and _inside == 0:
                # Once set, the thresholds no longer move by themselves, so they stay where they would have gone.
                library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
                library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
                library.malloc_trim(0)


def reusing_memory(attack: Call) -> Call:
    """The attack, keeping freed memory until it returns where its images ``x``, the second argument, are many and on a
    CPU; for few, giving the memory back would take longer than asking for it.
    """

    @functools.wraps(attack)
    def call(*args: Any, **settings: Any) -> Any:
        x = args[1] if len(args) > 1 else settings.get("x")
        if not isinstance(x, Tensor) or x.device.type != "cpu" or x.numel() < _LARGE:
            return attack(*args, **settings)
        with reused_memory():
            return attack(*args, **settings)

    return call  # type: ignore[return-value]


@functools.cache
def _glibc() -> Any:
    """The C library with the functions wanted, or None."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library
