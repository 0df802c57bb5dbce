"""Configures a process of this package (the node or the command) before it loads NumPy and PyTorch."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os

__all__ = ["configure_process"]

_ENVIRONMENT = {
    # An OpenMP thread that waits for other threads spins. It takes the CPU from the robot's other processes and from
    # the thread it waits for. GCC's OpenMP, with which PyTorch is built, spins for 300,000 rounds by default. With
    # 1,000 rounds, a pair of images on two cores (docs/performance.md) takes the same time on an idle machine, and is
    # several times as fast if other processes are running. Without spinning it is a quarter slower on an idle machine.
    "GOMP_SPINCOUNT": "1000",
    "OMP_WAIT_POLICY": "PASSIVE",  # for other OpenMP libraries; GCC's uses GOMP_SPINCOUNT
    # NumPy multiplies only small matrices here: more threads would only wait for each other.
    "OPENBLAS_NUM_THREADS": "1",
    # oneDNN caches compiled code per input shape, about 0.5 MB each and up to 1,000 by default. A camera has one shape.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
_M_ARENA_MAX = -8  # malloc.h


def configure_process() -> None:
    """Set how threads wait, how memory is managed, and how the process ends.

    Environment variables that are already set keep their values. Call this before NumPy and PyTorch are loaded, because
    they read the environment only once.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Use one heap for all threads. By default glibc gives each thread its own heap. The networks' large buffers
    # fragment the heaps, more with every change of parameters: in ten minutes a node grew by 2 to 14 %. With one heap
    # it grew by 0.1 %, and was no slower.
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    # Skips the garbage collection at exit, which takes a third of a second for all objects that PyTorch has loaded.
    atexit.register(gc.freeze)
