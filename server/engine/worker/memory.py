"""Memory that was freed goes back to the operating system, so that the process is as large as what it holds."""

import ctypes
from collections.abc import Callable
from functools import cache


def release_memory() -> None:
    """Return the free pages of the C heap. Does nothing where the allocator is not glibc's."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    found: Callable[[int], int] = trim
    return found
