"""The threads that torch computes with on a CPU: each thread that calls torch has a team of its own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from typing import Any

SOFT = 1  # of omp_pause_resource_t: what was set stays


def release_threads() -> bool:
    """End the calling thread's team of OpenMP threads; the next computation makes another. Whether there was a way.

    A team waits for its next work by spinning, which lets thousands of short parallel sections a second follow each
    other. Where all teams of a process have more threads than the machine has cores, GNU's OpenMP lets them all sleep
    instead, and a section begins with waking them: an image of the demo takes 1.3 to 1.8 times as long once another
    thread has computed before, even if that thread does nothing any more. So a thread that is done for a while, or for
    good, releases its team.
    """
    library = _openmp()
    if library is None:
        return False
    return library.omp_pause_resource_all(SOFT) == 0


@functools.cache
def _openmp() -> Any:
    """The OpenMP library that this process has loaded, None where there is none that can (or it cannot be found)."""
    with contextlib.suppress(OSError, AttributeError):
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
        for path in sorted(paths):
            if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$", path):
                library = ctypes.CDLL(path)
                library.omp_pause_resource_all.restype = ctypes.c_int
                return library
    return None
