"""What a process of this package, the node or the command, sets for the libraries that it is about to load."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os

__all__ = ["configure_process"]

_ENVIRONMENT = {
    # A thread that waits for the others spins, and takes the processor from the robot's other processes and from the
    # thread that it waits for. GCC's OpenMP, which PyTorch is built with, spins for 300,000 rounds. For a pair of
    # images on two cores (docs/performance.md) 1,000 rounds are as fast as that where nothing else runs, and several
    # times as fast where something does; no rounds are a quarter slower where nothing else runs.
    "GOMP_SPINCOUNT": "1000",
    "OMP_WAIT_POLICY": "PASSIVE",  # for another OpenMP; GCC's goes by the number of rounds
    # NumPy's products are of small matrices here: more threads only wait for each other.
    "OPENBLAS_NUM_THREADS": "1",
    # oneDNN keeps what it compiles for each shape of its input, some 0.5 MB each, up to a thousand. A camera has one.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
_M_ARENA_MAX = -8  # malloc.h


def configure_process() -> None:
    """Set how threads wait, how memory is kept, and how the process ends; what the environment sets already stays.

    Has to come before NumPy and PyTorch are loaded: they read it once.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # One heap for all threads. glibc gives each thread a heap, and the networks' large buffers leave holes in it, more
    # with every change of parameters: in ten minutes a node grew by 2 to 14 %, with one heap by 0.1 %, no slower.
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    # At its end Python looks for garbage among all that PyTorch has loaded, which takes a third of a second.
    atexit.register(gc.freeze)
